"""Representation alignment: what a block of the backbone makes of a noised image is drawn to a vision encoder's view of it.

Shapes: B images, N tokens of the backbone's grid, K ≤ N of them that the block saw, D hidden size, C width of the features.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer.algorithms.auxiliary_loss import AuxiliaryLossAlgorithm
from prx_composer.common.errors import UserError
from prx_composer.models.losses import AuxiliaryLoss, FlowOutput
from prx_composer.models.routing import select_tokens
from prx_composer.models.sampling import TextConditioning
from prx_composer.models.vision_encoder import TeacherSpec, VisionEncoder, teacher_features

FeatureSource = Callable[[Mapping[str, Any], int, int], Tensor]  # batch, rows, columns → (B, rows · columns, C)


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
    """−cos of the angle between the two, averaged over tokens and images, in fp32: REPA's sign, −1 at its best."""
    return -F.cosine_similarity(projected_BKC.float(), features_BKC.float(), dim=-1).mean()


def stored_features(stored: StoredFeatures, path: str, batch: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Features from the batch, resized (bilinear, antialiased) to the backbone's grid: (B, rows · columns, C), fp32.

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
    """Xavier weights and zero biases, as the backbone has them."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class AlignmentLoss(AuxiliaryLoss):
    """`alignment_loss` of a block's projected output with the features of the clean images, on the tokens that the block saw.

    Args:
        block: whose output; its index is to be among `backbone.taps`.
        weight: of the term in the total loss.
        patch_size: of the backbone.
        head: `TappedTokens` → (B, K, C); the trained part.
        source: where the features come from.
        transform: of the features of the whole grid (B, N, C), before any are left out.
    """

    def __init__(
        self,
        block: int,
        weight: float,
        patch_size: int,
        head: nn.Module,
        source: FeatureSource,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(weight)
        self.taps = (block,)
        self.patch_size, self.head, self.transform = patch_size, head, transform
        self.source: FeatureSource | None = source

    def forward(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        assert self.source is not None
        (block,), route = self.taps, outputs.route
        rows, columns = (side // self.patch_size for side in outputs.clean.shape[-2:])
        kept = route.kept_indices if route is not None and route.start <= block < route.end else None
        features = self.source(batch, rows, columns)
        if self.transform is not None:
            features = self.transform(features)
        if kept is not None:
            features = select_tokens(features, kept)
        tapped = TappedTokens(outputs.taps[block], rows, columns, kept, outputs.timestep, outputs.text)
        return alignment_loss(self.head(tapped), features)

    def release(self) -> None:
        self.source = None


class AlignmentAlgorithm(AuxiliaryLossAlgorithm):
    """Adds an `AlignmentLoss` with the head that `build_head` returns.

    Args:
        teacher: vision encoder, by hub id or folder or as a `TeacherSpec` …
        features: … or what it made beforehand. One of the two.
        block: whose output is aligned, counted from 0.
        weight: of the term in the total loss.
        start, end: window; after it the teacher is let go.

    Raises:
        ValueError: neither or both of teacher and features, a negative block or weight.
        UserError: at INIT, for a teacher that cannot be had.
    """

    def __init__(
        self,
        teacher: str | TeacherSpec | None,
        features: StoredFeatures | None,
        block: int,
        weight: float,
        start: str,
        end: str | None,
    ):
        super().__init__(start, end)
        if (teacher is None) == (features is None):
            raise ValueError(
                "give either `teacher` (hub id or folder of a vision encoder) or `features` (column and width of features made "
                "beforehand), and null for the other."
            )
        for name, value in (("block", block), ("weight", weight)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}.")
        self.teacher, self.features, self.block, self.weight = teacher, features, block, weight

    @property
    def needs_image(self) -> bool:
        """A teacher looks at images; stored features have."""
        return self.teacher is not None

    @abstractmethod
    def build_head(self, model: Any, width: int) -> nn.Module:
        """The trained part: `TappedTokens` → (B, K, width)."""

    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """What the features go through before they are compared."""
        return None

    def build_loss(self, model: Any) -> AlignmentLoss:
        if self.features is not None:
            width, path = self.features.width, f"algorithms.{self.name}.features"
            source: FeatureSource = partial(stored_features, self.features, path)
        else:
            teacher = self._load_teacher()
            width, source = teacher.hidden_size, partial(teacher_features, teacher)
        head = self.build_head(model, width)
        return AlignmentLoss(self.block, self.weight, model.backbone.patch_size, head, source, self.transform())

    def _load_teacher(self) -> VisionEncoder:
        assert self.teacher is not None
        try:
            with torch.random.fork_rng(devices=[]):  # what loading draws must not change the head's first weights
                return VisionEncoder(self.teacher)
        except (OSError, ValueError) as error:
            raise UserError(f"algorithms.{self.name}.teacher: {error}") from error
