"""Composer's gradient clipping, with arguments that are checked before training."""

from typing import Literal

import composer.algorithms
from composer.core import Event, State
from composer.loggers import Logger

from prx_composer.algorithms.base import Trick


class GradientClipping(Trick, composer.algorithms.GradientClipping):
    """Clips gradients before every optimizer step.

    Args:
        clipping_type: "norm" of all gradients together, "value" of every element, or "adaptive" per unit (arXiv:2102.06171).
        clipping_threshold: largest norm, value, or ratio to the weight's norm.
        start, end: window.

    Raises:
        ValueError: a threshold that is not positive.
    """

    name = "gradient_clipping"

    def __init__(
        self,
        clipping_type: Literal["norm", "value", "adaptive"],
        clipping_threshold: float,
        start: str = "0ba",
        end: str | None = None,
    ):
        if clipping_threshold <= 0:
            raise ValueError(f"clipping_threshold must be positive, not {clipping_threshold}.")
        Trick.__init__(self, start, end)
        composer.algorithms.GradientClipping.__init__(self, clipping_type, clipping_threshold)

    def match(self, event: Event, state: State) -> bool:
        return composer.algorithms.GradientClipping.match(self, event, state) and self.window.contains(state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        composer.algorithms.GradientClipping.apply(self, event, state, logger)
