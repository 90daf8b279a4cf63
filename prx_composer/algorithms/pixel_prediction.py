"""What the perceptual losses have in common: they compare the predicted clean image x̂0 with the true one, in pixels."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prx_composer.common.errors import UserError
from prx_composer.models.flow import FlowMatching
from prx_composer.models.losses import AuxiliaryLoss, FlowOutput


def refuse_latents(model: Any, name: str) -> None:
    """Raises UserError, naming the algorithm, unless the model predicts pixels."""
    autoencoder = model.autoencoder
    if (autoencoder.channels, autoencoder.downsampling) != (3, 1):
        raise UserError(
            f"algorithms.{name} compares images, but the model predicts latents of {autoencoder.channels} channels; "
            f"{name} needs model.autoencoder: {{name: pixels}}."
        )


class PixelLoss(AuxiliaryLoss):
    """(1/B) · Σ distance(x̂0, x0) over the images with t ≤ `max_timestep`; B counts all, so that microbatches add up.

    Args:
        weight: of the term in the total loss.
        flow: turns the network's output into x̂0.
        max_timestep: noisier images than that don't count; 1 = all do.

    Raises:
        ValueError: a timestep outside of (0, 1].
    """

    needs_whole_image = True

    def __init__(self, weight: float, flow: FlowMatching, max_timestep: float = 1.0):
        super().__init__(weight)
        if not 0 < max_timestep <= 1:
            raise ValueError(f"max_timestep must lie in (0, 1], not {max_timestep}.")
        self.flow, self.max_timestep = flow, max_timestep

    @abstractmethod
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Of images (B, 3, H, W) around [−1, 1], not clamped: (B,). Gradients flow to `prediction` alone."""

    def forward(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        predicted = self.flow.to_x0(outputs.prediction, outputs.noised, outputs.timestep).float()
        counts = outputs.timestep <= self.max_timestep
        return (self.distance(predicted, outputs.clean.float()) * counts).mean()
