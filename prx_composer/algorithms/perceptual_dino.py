"""P-DINO: the predicted image is to look like the true one to a frozen vision encoder, patch by patch."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer.algorithms.pixel_prediction import PixelLoss
from prx_composer.common.errors import at_path
from prx_composer.models.encoders import TeacherSpec, VisionEncoder, resize_antialiased


def fit_size(height: int, width: int, image_size: int, multiple: int) -> tuple[int, int]:
    """Height and width of about image_size² pixels and the same aspect ratio, both multiples of `multiple`.

    Smaller images grow: an encoder has seen nothing but images of about the size that it was trained at.
    """
    scale = image_size / math.sqrt(height * width)
    rows, columns = (max(1, round(side * scale / multiple)) for side in (height, width))
    return rows * multiple, columns * multiple


def patch_dissimilarity(teacher: VisionEncoder, prediction: Tensor, target: Tensor) -> Tensor:
    """1 − cos between the features of two images (B, 3, H, W), averaged over patches: (B,). No graph for the target."""
    with torch.no_grad():
        expected = teacher(target)  # (B, rows, columns, D)
    return 1 - F.cosine_similarity(teacher(prediction), expected, dim=-1).mean((1, 2))


class PerceptualDINO(PixelLoss):
    """`patch_dissimilarity` of the images at `fit_size`, for a model that predicts pixels.

    Args:
        teacher: vision encoder, by hub id or folder or as a `TeacherSpec`.
        weight: of the term in the total loss.
        image_size: side of the square whose area the teacher sees, in pixels; the aspect ratio is kept.
        max_timestep: images noisier than that don't count; 1 = all do.
        start, end: window; after it the teacher is let go.

    Raises:
        ValueError: an argument out of range.
        UserError: when it is attached, for a model of latents, for a teacher that cannot be had, and for an image size smaller
            than the teacher's patches.
    """

    name = "perceptual_dino"

    def __init__(
        self,
        teacher: str | TeacherSpec = "facebook/dinov2-with-registers-base",
        weight: float = 0.01,
        image_size: int = 224,
        max_timestep: float = 1.0,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(weight, max_timestep, start, end)
        self.teacher, self.image_size = teacher, image_size
        self.encoder: VisionEncoder | None = None

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        nothing = super().build(model)
        with at_path(f"algorithms.{self.name}.teacher"):
            self.encoder = VisionEncoder(self.teacher)
        if self.image_size < self.encoder.patch_size:
            raise ValueError(
                f"image_size must be at least {self.encoder.patch_size}, the teacher's patch size, not {self.image_size}."
            )
        return nothing

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        assert self.encoder is not None
        sides = fit_size(target.shape[-2], target.shape[-1], self.image_size, self.encoder.patch_size)
        return patch_dissimilarity(self.encoder, resize_antialiased(prediction, *sides), resize_antialiased(target, *sides))

    def release(self) -> None:
        self.encoder = None
