"""Representation alignment: what a block makes of a noised image is drawn to a vision encoder's view of the clean one.

REPA (arXiv:2410.06940), PixelREPA's adapter (arXiv:2603.14366) and iREPA (arXiv:2512.10794).

Shapes: B images, N tokens of the backbone's grid, K ≤ N of them that the block saw, D hidden size, C width of the features.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from composer.core import Algorithm
from torch import Tensor, nn

from prx_composer.algorithms.base import LossTrick, unsuited
from prx_composer.common.errors import UserError, at_path
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.encoders import TeacherSpec, VisionEncoder, teacher_features
from prx_composer.models.flow import FlowOutput, TextConditioning
from prx_composer.models.layers import MLPEmbedder, Modulation, PRXBlock, cached_rotation, sinusoid
from prx_composer.models.routing import merge_tokens, select_tokens
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.evidence import PRX_PART_2, Evidence

FeatureSource = Callable[[Mapping[str, Any], int, int], Tensor]  # batch, rows, columns → (B, rows · columns, C)
GeneratorOf = Callable[[torch.device], torch.Generator]
EPSILON = 1e-6


class TappedTokens(NamedTuple):
    """A block's output and where in the grid its tokens lie: what a head projects to the teacher's width."""

    tokens: Tensor  # (B, K, D)
    rows: int
    columns: int
    kept_indices: Tensor | None  # (B, K), row-major; None = the whole grid
    timestep: Tensor  # (B,)
    text: TextConditioning


@dataclass(frozen=True)
class StoredFeatures:
    """A teacher's features that were made beforehand and come with the data, as `train_loader.features: [column]`.

    Args:
        column: of the data set; (h, w, width) per image, for the image as the loader crops it.
        width: channels of the features.

    Raises:
        ValueError: no positive width.
    """

    column: str
    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be the number of channels of the features, not {self.width}.")


def alignment_loss(projected_BKC: Tensor, features_BKC: Tensor) -> Tensor:
    """Return −cos of the angle between the two, averaged over tokens and images, in fp32: REPA's sign, −1 at its best."""
    return -F.cosine_similarity(projected_BKC.float(), features_BKC.float(), dim=-1).mean()


def stored_features(stored: StoredFeatures, path: str, batch: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Return features of the batch, resized (bilinear, antialiased) to the backbone's grid: (B, rows · columns, C), fp32.

    Args:
        path: YAML path of `stored`, for messages.

    Raises:
        UserError: a column that the batch doesn't have, or of another width.
    """
    if stored.column not in batch:
        raise UserError(
            f"{path}.column: the batches have no column {stored.column!r}; set train_loader.features: [{stored.column}]."
        )
    features_BHWC: Tensor = batch[stored.column]
    if features_BHWC.shape[-1] != stored.width:
        raise UserError(f"{path}.width is {stored.width}, but {stored.column!r} of the data is {features_BHWC.shape[-1]} wide.")
    features_BCHW = features_BHWC.permute(0, 3, 1, 2).float()
    if features_BCHW.shape[-2:] != (rows, columns):
        features_BCHW = F.interpolate(features_BCHW, (rows, columns), mode="bilinear", antialias=True)
    return features_BCHW.flatten(2).transpose(1, 2)


def initialise_linears(module: nn.Module) -> None:
    """Give linear layers Xavier weights and zero biases, as the backbone has them."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Alignment(LossTrick):
    """`alignment_loss` of a block's projected output with the features of the clean images, on the tokens that the block saw.

    Args:
        teacher: vision encoder, by hub id or folder or as a `TeacherSpec` …
        features: … or what it made beforehand. One of the two.
        block: whose output is aligned, counted from 0.
        weight: of the term in the total loss.
        start, end: window; after it the teacher is let go.

    Attributes:
        head: `TappedTokens` → (B, K, C); the trained part.
        source: where the features come from.

    Raises:
        ValueError: neither or both of teacher and features, a negative block or weight.
        UserError: when it is attached, for a teacher that cannot be had.
    """

    instead_of_images = ", or name features that `prx encode features` stored"

    def __init__(
        self,
        teacher: str | TeacherSpec | None,
        features: StoredFeatures | None,
        block: int,
        weight: float,
        start: str,
        end: str | None,
    ):
        if (teacher is None) == (features is None):
            raise ValueError(
                "give either `teacher` (hub id or folder of a vision encoder) or `features` (column and width of features made "
                "beforehand), and null for the other."
            )
        if block < 0:
            raise ValueError(f"block must not be negative, but is {block}.")
        super().__init__(weight, start, end)
        self.teacher, self.features, self.block = teacher, features, block
        self.taps = (block,)
        self.needs_image = teacher is not None
        self.columns = {} if features is None else {features.column: features.width}
        self.head: Any = None
        self.source: FeatureSource | None = None

    @abstractmethod
    def build_head(self, model: Any, width: int) -> nn.Module:
        """Return the trained part: `TappedTokens` → (B, K, width)."""

    def transform(self, features_BNC: Tensor) -> Tensor:
        """Return the features of the whole grid as they are compared; before any are left out."""
        return features_BNC

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        self.patch_size: int = model.backbone.patch_size
        if self.features is not None:
            width = self.features.width
            self.source = partial(stored_features, self.features, f"algorithms.{self.name}.features")
        else:
            assert self.teacher is not None
            # What loading draws must not change the head's first weights.
            with at_path(f"algorithms.{self.name}.teacher"), torch.random.fork_rng(devices=[]):
                encoder = VisionEncoder(self.teacher)
            width, self.source = encoder.hidden_size, partial(teacher_features, encoder)
        self.head = self.build_head(model, width)
        return {"head": self.head}

    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        assert self.source is not None
        route = outputs.route
        rows, columns = (side // self.patch_size for side in outputs.clean.shape[-2:])
        kept = route.kept_indices if route is not None and route.start <= self.block < route.end else None
        features = self.transform(self.source(batch, rows, columns))
        if kept is not None:
            features = select_tokens(features, kept)
        tapped = TappedTokens(outputs.taps[self.block], rows, columns, kept, outputs.timestep, outputs.text)
        return alignment_loss(self.head(tapped), features)

    def release(self) -> None:
        self.source = None


# -------------------------------------------------------------------------------------------------------- REPA


class MLPProjector(nn.Module):
    """REPA's head: three linear layers with SiLU between them, token by token, (B, K, D) → (B, K, C)."""

    def __init__(self, hidden_size: int, projector_hidden: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, projector_hidden),
            nn.SiLU(),
            nn.Linear(projector_hidden, projector_hidden),
            nn.SiLU(),
            nn.Linear(projector_hidden, width),
        )
        initialise_linears(self)

    def forward(self, tapped: TappedTokens) -> Tensor:
        return self.layers(tapped.tokens)


@dataclass(frozen=True)
class Adapter:
    """PixelREPA's head (arXiv:2603.14366) instead of the MLP: see `MaskedTransformerAdapter`.

    Args:
        depth: number of its blocks.
        mask_rate: share of tokens that are hidden from it.

    Raises:
        ValueError: no block, or a share outside of [0, 1).
    """

    depth: int = 2
    mask_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, not {self.depth}.")
        if not 0 <= self.mask_rate < 1:
            raise ValueError(f"mask_rate must lie in [0, 1), the share of tokens that are hidden; it is {self.mask_rate}.")


class MaskedTransformerAdapter(nn.Module):
    """A learned token replaces a random part of the block's; a shallow transformer tells the teacher's features of all of them.

    As in the paper, its blocks are of the backbone's kind, with time and condition embeddings of their own and the backbone's
    rotary positions. Gradients reach the tapped tokens, but not the text encoder.

    Args:
        backbone: whose tokens; gives the sizes.
        depth, mask_rate: see `Adapter`.
        width: of the teacher's features.
        generator: of the mask's draws, for a device.
    """

    def __init__(self, backbone: PRXBackbone, depth: int, mask_rate: float, width: int, generator: GeneratorOf):
        super().__init__()
        c = backbone.config
        hidden_size: int = c["hidden_size"]
        self.mask_rate, self._generator = mask_rate, generator
        self._turns = tuple(c["axes_dim"]), c["theta"]
        self._time_features = partial(sinusoid, dim=256, max_period=c["time_max_period"], scale=c["time_factor"])
        self.mask_token = nn.Parameter(0.02 * torch.randn(hidden_size))
        self.time_in = MLPEmbedder(256, hidden_size)
        self.txt_in = nn.Linear(c["context_in_dim"], hidden_size)
        self.blocks = nn.ModuleList(PRXBlock(hidden_size, c["num_heads"], c["mlp_ratio"]) for _ in range(depth))
        self.out = nn.Linear(hidden_size, width)
        initialise_linears(self)
        for module in self.modules():
            if isinstance(module, Modulation):  # blocks start as the identity
                nn.init.zeros_(module.lin.weight)

    def forward(self, tapped: TappedTokens) -> Tensor:
        x_BKD, kept = tapped.tokens, tapped.kept_indices
        device, shape = x_BKD.device, x_BKD.shape[:2]
        hidden_BK = torch.rand(shape, generator=self._generator(device), device=device) < self.mask_rate
        x_BKD = torch.where(hidden_BK[..., None], self.mask_token.to(x_BKD.dtype), x_BKD)

        rotation = cached_rotation(tapped.rows, tapped.columns, *self._turns, device)
        if kept is not None:
            rotation = rotation[kept][:, None]
        key_mask = F.pad(tapped.text.mask, (0, shape[1]), value=True)[:, None, None, :]
        context_BTD = self.txt_in(tapped.text.embedding.detach())
        activated_BD = F.silu(self.time_in(self._time_features(tapped.timestep)))
        for block in self.blocks:
            x_BKD = block(x_BKD, context_BTD, activated_BD, rotation, key_mask)
        return self.out(x_BKD)


class REPA(Alignment):
    """Align a block's output with a teacher's patch features, through an MLP or a masked transformer adapter.

    Args:
        teacher, features, block, weight, start, end: as in `Alignment`.
        projector_hidden: width of the MLP; without effect when there is an adapter.
        adapter: PixelREPA's head instead of the MLP.

    Raises:
        ValueError, UserError: as `Alignment`; a width of the projector that is not positive.
    """

    name = "repa"
    evidence = (
        Evidence(image_size=256, measure="FID in latents, DINOv3", without=18.2, having=14.64, speed=0.88, source=PRX_PART_2),
        Evidence(image_size=256, measure="FID in latents, DINOv2", without=18.2, having=16.6, speed=0.93, source=PRX_PART_2),
    )

    def __init__(
        self,
        teacher: str | TeacherSpec | None = None,
        block: int = 7,
        weight: float = 0.5,
        projector_hidden: int = 2048,
        adapter: Adapter | None = None,
        features: StoredFeatures | None = None,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(teacher, features, block, weight, start, end)
        if projector_hidden < 1:
            raise ValueError(f"projector_hidden must be at least 1, not {projector_hidden}.")
        self.projector_hidden, self.adapter = projector_hidden, adapter
        self.experimental = adapter is not None

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        super().check(recipe, others, backbone)
        if self.adapter is not None and backbone is not None:
            self._check_adapter(backbone)

    def _check_adapter(self, backbone: Any) -> None:
        if not isinstance(backbone, PRXBackbone):
            raise unsuited("repa.adapter", backbone, "its blocks are those of the backbone prx")

    def build_head(self, model: Any, width: int) -> nn.Module:
        if self.adapter is None:
            return MLPProjector(model.backbone.hidden_size, self.projector_hidden, width)
        self._check_adapter(model.backbone)
        generator = partial(model.random.generator, f"{self.name}_mask")
        return MaskedTransformerAdapter(model.backbone, self.adapter.depth, self.adapter.mask_rate, width, generator)


# ------------------------------------------------------------------------------------------------------- iREPA


def normalise_over_space(features_BNC: Tensor, gamma: float) -> Tensor:
    """Return (y − γ·mean) / std, channel by channel, with both taken over an image's tokens.

    What all patches of an image share says what it shows, not where; γ is the share of that which is taken away.
    """
    mean, std = features_BNC.mean(1, keepdim=True), features_BNC.std(1, correction=0, keepdim=True)
    return (features_BNC - gamma * mean) / (std + EPSILON)


class ConvProjector(nn.Module):
    """One convolution over the token grid, (B, K, D) → (B, K, C). Places whose token the block didn't see are zero."""

    def __init__(self, hidden_size: int, width: int, kernel_size: int):
        super().__init__()
        self.convolution = nn.Conv2d(hidden_size, width, kernel_size, padding=kernel_size // 2)

    def forward(self, tapped: TappedTokens) -> Tensor:
        tokens, rows, columns, kept = tapped[:4]
        if kept is not None:
            tokens = merge_tokens(tokens.new_zeros(len(tokens), rows * columns, tokens.shape[-1]), tokens, kept)
        grid_BDHW = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        projected_BNC = self.convolution(grid_BDHW).flatten(2).transpose(1, 2)
        return projected_BNC if kept is None else select_tokens(projected_BNC, kept)


class IREPA(Alignment):
    """REPA with a convolution in the MLP's place, and the teacher's features normalised over space.

    Args:
        teacher, features, block, weight, start, end: as in `Alignment`.
        gamma: share of the features' mean over the image that is taken away.
        kernel_size: side of the convolution's kernel, in tokens; odd.

    Raises:
        ValueError, UserError: as `Alignment`; a gamma outside of [0, 1], an even kernel.
    """

    name = "irepa"
    experimental = True

    def __init__(
        self,
        teacher: str | TeacherSpec | None = None,
        block: int = 7,
        weight: float = 0.5,
        gamma: float = 0.6,
        kernel_size: int = 3,
        features: StoredFeatures | None = None,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(teacher, features, block, weight, start, end)
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], the share of the mean that is taken away; it is {gamma}.")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that every token has its own place; it is {kernel_size}.")
        self.gamma, self.kernel_size = gamma, kernel_size

    def build_head(self, model: Any, width: int) -> nn.Module:
        return ConvProjector(model.backbone.hidden_size, width, self.kernel_size)

    def transform(self, features_BNC: Tensor) -> Tensor:
        return normalise_over_space(features_BNC, self.gamma)
