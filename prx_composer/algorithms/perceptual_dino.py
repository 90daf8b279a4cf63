"""P-DINO: the predicted image is to look like the true one to a frozen vision encoder, patch by patch."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prx_composer.algorithms.auxiliary_loss import AuxiliaryLossAlgorithm
from prx_composer.algorithms.pixel_prediction import PixelLoss, refuse_latents
from prx_composer.common.errors import UserError
from prx_composer.models.flow import FlowMatching
from prx_composer.models.vision_encoder import TeacherSpec, VisionEncoder, resize_antialiased


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


class PerceptualDINOLoss(PixelLoss):
    """`patch_dissimilarity` of the images at `fit_size`.

    Args:
        weight, flow, max_timestep: as in `PixelLoss`.
        teacher: frozen encoder.
        image_size: side of the square whose area the teacher sees, in pixels.

    Raises:
        ValueError: an image size smaller than the teacher's patches.
    """

    def __init__(
        self, weight: float, flow: FlowMatching, teacher: VisionEncoder, image_size: int = 224, max_timestep: float = 1.0
    ):
        super().__init__(weight, flow, max_timestep)
        if image_size < teacher.patch_size:
            raise ValueError(f"image_size must be at least {teacher.patch_size}, the teacher's patch size, not {image_size}.")
        self.teacher: VisionEncoder | None = teacher
        self.image_size = image_size

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        assert self.teacher is not None
        sides = fit_size(target.shape[-2], target.shape[-1], self.image_size, self.teacher.patch_size)
        return patch_dissimilarity(self.teacher, resize_antialiased(prediction, *sides), resize_antialiased(target, *sides))

    def release(self) -> None:
        self.teacher = None


class PerceptualDINO(AuxiliaryLossAlgorithm):
    """Adds a `PerceptualDINOLoss` to a model that predicts pixels.

    Args:
        teacher: vision encoder, by hub id or folder or as a `TeacherSpec`.
        weight: of the term in the total loss.
        image_size: side of the square whose area the teacher sees, in pixels; the aspect ratio is kept.
        max_timestep: images noisier than that don't count; 1 = all do.
        start, end: window; after it the teacher is let go.

    Raises:
        UserError: at INIT, for a model of latents and for a teacher that cannot be had.
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
        super().__init__(start, end)
        self.teacher, self.weight, self.image_size, self.max_timestep = teacher, weight, image_size, max_timestep

    def build_loss(self, model: Any) -> PerceptualDINOLoss:
        refuse_latents(model, self.name)
        try:
            teacher = VisionEncoder(self.teacher)
        except (OSError, ValueError) as error:
            raise UserError(f"algorithms.{self.name}.teacher: {error}") from error
        return PerceptualDINOLoss(self.weight, model.flow, teacher, self.image_size, self.max_timestep)
