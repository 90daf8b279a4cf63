"""REPA: one block's tokens are to tell what a vision encoder sees in the clean image (arXiv:2410.06940).

Shapes: B images, K tokens that the block saw, T text tokens, D hidden size, C width of the teacher's features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer.algorithms.alignment import AlignmentAlgorithm, StoredFeatures, TappedTokens, initialise_linears
from prx_composer.models.backbone import PRXBackbone, cached_rotation
from prx_composer.models.layers import MLPEmbedder, Modulation, PRXBlock, sinusoid
from prx_composer.models.vision_encoder import TeacherSpec


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

    Regressing a few compressed features straight from the tokens of a pixel model is a shortcut that costs diversity late in
    training; here the alignment holds in the space that the adapter induces, and needs context. As in the paper, its blocks
    are of the backbone's kind, with time and condition embeddings of their own and the backbone's rotary positions.
    Gradients reach the tapped tokens, but not the text encoder.

    Args:
        backbone: whose tokens; gives the sizes.
        depth, mask_rate: see `Adapter`.
        width: of the teacher's features.
        generator: of the mask's draws, for a device.
    """

    def __init__(
        self,
        backbone: PRXBackbone,
        depth: int,
        mask_rate: float,
        width: int,
        generator: Callable[[torch.device], torch.Generator],
    ):
        super().__init__()
        c = backbone.config
        hidden_size: int = c["hidden_size"]
        self.mask_rate, self._generator = mask_rate, generator
        self._axes_dim, self._theta = (c["axes_dim"][0], c["axes_dim"][1]), c["theta"]
        self._time_max_period, self._time_factor = c["time_max_period"], c["time_factor"]
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

        rotation = cached_rotation(tapped.rows, tapped.columns, self._axes_dim, self._theta, device)
        if kept is not None:
            rotation = rotation[kept][:, None]
        key_mask = F.pad(tapped.text.mask, (0, shape[1]), value=True)[:, None, None, :]
        context_BTD = self.txt_in(tapped.text.embedding.detach())
        activated_BD = F.silu(self.time_in(sinusoid(tapped.timestep, 256, self._time_max_period, self._time_factor)))
        for block in self.blocks:
            x_BKD = block(x_BKD, context_BTD, activated_BD, rotation, key_mask)
        return self.out(x_BKD)


class REPA(AlignmentAlgorithm):
    """Aligns a block's output with a teacher's patch features, through an MLP or a masked transformer adapter.

    Args:
        teacher, features, block, weight, start, end: as in `AlignmentAlgorithm`.
        projector_hidden: width of the MLP; without effect when there is an adapter.
        adapter: PixelREPA's head instead of the MLP.

    Raises:
        ValueError, UserError: as `AlignmentAlgorithm`; a width of the projector that is not positive.
    """

    name = "repa"

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

    def build_head(self, model: Any, width: int) -> nn.Module:
        if self.adapter is None:
            return MLPProjector(model.backbone.hidden_size, self.projector_hidden, width)
        generator = partial(model.random.generator, f"{self.name}_mask")
        return MaskedTransformerAdapter(model.backbone, self.adapter.depth, self.adapter.mask_rate, width, generator)
