"""An algorithm of one's own: an auxiliary loss that keeps the predicted image as bright as the true one."""

from collections.abc import Mapping
from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor

from prx_composer import registry
from prx_composer.models import AuxiliaryLoss, FlowMatching, FlowOutput
from prx_composer.schedule import ScheduleWindow


class BrightnessLoss(AuxiliaryLoss):
    """Squared difference of mean brightness between x̂0 and x0, averaged over the batch."""

    def __init__(self, weight: float, flow: FlowMatching):
        super().__init__(weight)
        self.flow = flow

    def forward(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        predicted = self.flow.to_x0(outputs.prediction, outputs.noised, outputs.timestep)
        return (predicted.mean((1, 2, 3)) - outputs.clean.mean((1, 2, 3))).square().mean()


@registry.algorithms.register("brightness")
class Brightness(Algorithm):
    """Adds a `BrightnessLoss`.

    Args:
        weight: of the term in the total loss.
        start, end: window.
    """

    def __init__(self, weight: float = 0.1, start: str = "0ba", end: str | None = None):
        self.weight, self.window = weight, ScheduleWindow(start, end)
        self.term: BrightnessLoss | None = None

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model: Any = state.model
        if event == Event.INIT:
            self.term = model.auxiliary_losses["brightness"] = BrightnessLoss(self.weight, model.flow)
        elif self.term is not None:
            self.term.active = self.window.contains(state)
