"""iREPA: representation alignment for the sake of spatial structure (arXiv:2512.10794).

Shapes: B images, N tokens of the backbone's grid, K of them that the block saw, D hidden size, C width of the features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from prx_composer.algorithms.alignment import AlignmentAlgorithm, StoredFeatures, TappedTokens
from prx_composer.models.routing import merge_tokens, select_tokens
from prx_composer.models.vision_encoder import TeacherSpec

EPSILON = 1e-6


def normalise_over_space(features_BNC: Tensor, gamma: float) -> Tensor:
    """(y − γ·mean) / std, channel by channel, with both taken over an image's tokens.

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


class IREPA(AlignmentAlgorithm):
    """REPA with a convolution in the MLP's place, and the teacher's features normalised over space.

    Args:
        teacher, features, block, weight, start, end: as in `AlignmentAlgorithm`.
        gamma: share of the features' mean over the image that is taken away.
        kernel_size: side of the convolution's kernel, in tokens; odd.

    Raises:
        ValueError, UserError: as `AlignmentAlgorithm`; a gamma outside of [0, 1], an even kernel.
    """

    name = "irepa"

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

    def transform(self) -> Callable[[Tensor], Tensor]:
        return partial(normalise_over_space, gamma=self.gamma)
