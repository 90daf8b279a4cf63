"""An algorithm of one's own: an auxiliary loss that keeps the predicted image as bright as the true one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prx_composer import registry
from prx_composer.algorithms.base import LossTrick
from prx_composer.models import FlowOutput


@registry.algorithms.register("brightness")
class Brightness(LossTrick):
    """Squared difference of mean brightness between x̂0 and x0, averaged over the batch."""

    name = "brightness"
    needs_whole_image = True

    def __init__(self, weight: float = 0.1, start: str = "0ba", end: str | None = None):
        super().__init__(weight, start, end)

    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        predicted = self.flow.to_x0(outputs.prediction, outputs.noised, outputs.timestep)
        return (predicted.mean((1, 2, 3)) - outputs.clean.mean((1, 2, 3))).square().mean()
