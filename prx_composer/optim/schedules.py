"""Learning rates that follow a run whose number of steps is not known beforehand."""

import math
from typing import Literal

from composer.core import State
from composer.optim import ComposerScheduler

from prx_composer.schedule.clock import time_budget_of
from prx_composer.schedule.moments import Moment, count_after_step

DECAYS = {
    "linear": lambda part: 1 - part,
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "1-sqrt": lambda part: 1 - math.sqrt(part),
}


def run_progress(state: State) -> float:
    """Part of the run that is done after the step in hand: of `max_duration` or of the time budget, whichever is further."""
    assert state.max_duration is not None
    done = count_after_step(state, state.max_duration.unit.value) / state.max_duration.value
    budget = time_budget_of(state)
    return min(max(done, budget.progress if budget is not None else 0.0), 1.0)


class WarmupStableDecay(ComposerScheduler):
    """Warm-up, then the full rate, then decay over the last part of the run (arXiv:2405.18392).

    The last part is of `max_duration` or of the time that the budget leaves for steps, whichever ends the run: the rate reaches
    `alpha_f` either way, and never rises on the way. As it is constant before, a run can be extended: raise `max_duration` or
    `time_budget`, and go on from a checkpoint before the decay. From a later one the rate goes back up at once.

    Args:
        t_warmup: when the full rate is reached, a `Moment` ("1000ba", "0.01dur", "5m"); it grows linearly until then.
        decay: part of the run, from 0 (none) to 1.
        shape: of the decay; "1-sqrt" falls fast at first, and did best in the paper.
        alpha_f: multiplier of the learning rate at the end.

    Raises:
        ValueError: a value out of range, or no time.
    """

    def __init__(
        self,
        t_warmup: str = "0ba",
        decay: float = 0.1,
        shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt",
        alpha_f: float = 0.0,
    ):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, a part of the run, not {decay}.")
        if shape not in DECAYS:
            raise ValueError(f"shape must be one of {', '.join(DECAYS)}, not {shape!r}.")
        self.warmup = Moment(t_warmup)
        self.decay, self.shape, self.alpha_f = decay, shape, alpha_f

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        left = 1 - run_progress(state)
        decayed = 1 - left / self.decay if left < self.decay else 0.0
        rest = DECAYS[self.shape](decayed)
        return min(self.warmup.progress(state), self.alpha_f + (1 - self.alpha_f) * rest)
