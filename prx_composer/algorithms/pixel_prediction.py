"""What the perceptual losses have in common: they compare the predicted clean image x̂0 with the true one, in pixels."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prx_composer.algorithms.base import LossTrick
from prx_composer.common.errors import UserError
from prx_composer.models.flow import FlowOutput


class PixelLoss(LossTrick):
    """(1/B) · Σ distance(x̂0, x0) over the images with t ≤ `max_timestep`; B counts all, so that microbatches add up.

    Args:
        weight: of the term in the total loss.
        max_timestep: noisier images than that don't count; 1 = all do.
        start, end: window.

    Raises:
        ValueError: a negative weight, a timestep outside of (0, 1].
    """

    needs_whole_image = True

    def __init__(self, weight: float, max_timestep: float, start: str, end: str | None):
        super().__init__(weight, start, end)
        if not 0 < max_timestep <= 1:
            raise ValueError(f"max_timestep must lie in (0, 1], not {max_timestep}.")
        self.max_timestep = max_timestep

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        """Raise UserError unless the model predicts pixels."""
        channels = model.autoencoder.channels
        if (channels, model.autoencoder.downsampling) != (3, 1):
            raise UserError(
                f"algorithms.{self.name} compares images, but the model predicts latents of {channels} channels; "
                f"{self.name} needs model.autoencoder: {{name: pixels}}."
            )
        return {}

    @abstractmethod
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Of images (B, 3, H, W) around [−1, 1], not clamped: (B,). Gradients flow to `prediction` alone."""

    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        predicted = self.flow.to_x0(outputs.prediction, outputs.noised, outputs.timestep).float()
        counts = outputs.timestep <= self.max_timestep
        return (self.distance(predicted, outputs.clean.float()) * counts).mean()
