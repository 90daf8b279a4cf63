"""An algorithm of one's own: an auxiliary loss that keeps the predicted image as bright as the true one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prx_composer import registry
from prx_composer.algorithms.auxiliary_loss import AuxiliaryLossAlgorithm
from prx_composer.models import AuxiliaryLoss, FlowMatching, FlowOutput


class BrightnessLoss(AuxiliaryLoss):
    """Squared difference of mean brightness between x̂0 and x0, averaged over the batch."""

    needs_whole_image = True

    def __init__(self, weight: float, flow: FlowMatching):
        super().__init__(weight)
        self.flow = flow

    def forward(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        predicted = self.flow.to_x0(outputs.prediction, outputs.noised, outputs.timestep)
        return (predicted.mean((1, 2, 3)) - outputs.clean.mean((1, 2, 3))).square().mean()


@registry.algorithms.register("brightness")
class Brightness(AuxiliaryLossAlgorithm):
    """Adds a `BrightnessLoss` of this weight between `start` and `end`."""

    name = "brightness"

    def __init__(self, weight: float = 0.1, start: str = "0ba", end: str | None = None):
        super().__init__(start, end)
        self.weight = weight

    def build_loss(self, model: Any) -> AuxiliaryLoss:
        return BrightnessLoss(self.weight, model.flow)
