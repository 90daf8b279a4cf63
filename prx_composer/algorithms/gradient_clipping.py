"""Composer's gradient clipping, with arguments that are checked before training."""

from typing import Literal

import composer.algorithms
from composer.core import Event, State

from prx_composer.schedule.moments import ScheduleWindow


class GradientClipping(composer.algorithms.GradientClipping):
    """Clips gradients before every optimizer step.

    Args:
        clipping_type: "norm" of all gradients together, "value" of every element, or "adaptive" per unit (arXiv:2102.06171).
        clipping_threshold: largest norm, value, or ratio to the weight's norm.
        start, end: window.

    Raises:
        ValueError: a threshold that is not positive.
    """

    def __init__(
        self,
        clipping_type: Literal["norm", "value", "adaptive"],
        clipping_threshold: float,
        start: str = "0ba",
        end: str | None = None,
    ):
        if clipping_threshold <= 0:
            raise ValueError(f"clipping_threshold must be positive, not {clipping_threshold}.")
        super().__init__(clipping_type, clipping_threshold)
        self.window = ScheduleWindow(start, end)

    def match(self, event: Event, state: State) -> bool:
        return super().match(event, state) and self.window.contains(state)
