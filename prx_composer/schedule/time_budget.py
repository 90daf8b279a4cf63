"""A run that ends inside a given time, with its final evaluation, images and checkpoint.

What evaluates, draws and saves at intervals asks `with_rehearsal`: a budgeted run also does it once at its beginning, to learn
what it costs.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger, ProgressBarLogger
from composer.utils import dist

from prx_composer.schedule.clock import clock_of
from prx_composer.schedule.moments import Moment, duration_string

log = logging.getLogger(__name__)

_STEPS = 50  # of which a slow one is taken
_QUANTILE = 0.9
_MARGIN = 1.1  # on the closing, which is measured a few times at most
_WORTH_A_SECOND_REHEARSAL = 0.005  # of the budget
_TELL_EVERY = 10.0  # seconds, at least


class TimeBudget(Callback):
    """Stops training when another step and the closing would no longer fit into the budget.

    The *closing* is what happens between the last step and the end: evaluation, images, scores, checkpoint. So that its cost is
    known before it is needed, and what is broken in it shows in the first minute and not in the last, the run rehearses it after
    its first batch. If that took more than 0.5% of the budget it does so once more after the second batch, since the first time
    includes what is paid once (compilation, starting workers); a resumed run, which pays it again, reckons with the first time.
    Later pauses between two steps that took longer raise the reserve.

    All is computed from what `TrainingClock` made the same on all ranks, so they stop at the same batch. The budget of a run may
    be raised on a resume: parts of it that lie ahead move with it, stages and windows that were passed stay passed.

    Args:
        budget: seconds of training, over all restarts.
    """

    def __init__(self, budget: float):
        self.budget = budget
        self.rehearsing = False
        """Whether this batch ends with a rehearsal; everything that evaluates, draws or saves at an interval asks for it."""
        self.progress = 0.0
        """Part of the time for steps that has passed, 1 = all. It never falls, so that a learning rate may follow it."""
        self.progress_before: float | None = None
        """What `progress` was in the checkpoint that the run goes on from, perhaps with another budget."""
        self._first_closing = self._second_closing = self._longest_pause = 0.0  # seconds
        self._warm = False  # the second closing was this process's
        self._slow_step = 0.0  # seconds, of the process before this one
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._first_step = True
        self._elapsed = 0.0
        self._told_at = 0.0

    @property
    def reserve(self) -> float:
        """Seconds kept for the closing."""
        closing = self._second_closing if self._warm else max(self._first_closing, self._second_closing)
        return _MARGIN * max(closing, self._longest_pause)

    @property
    def slow_step(self) -> float:
        """Seconds of a slow step, judged by those of late."""
        if not self._steps:
            return self._slow_step
        return max(sorted(self._steps)[int(_QUANTILE * (len(self._steps) - 1))], self._steps[-1])

    @property
    def is_used_up(self) -> bool:
        """Whether not one more step fits."""
        return self.progress >= 1

    def after_load(self, state: State, logger: Logger) -> None:
        self._measure_progress(clock_of(state).spent)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._elapsed = self._told_at = clock_of(state).spent

    def after_train_batch(self, state: State, logger: Logger) -> None:  # before the scheduler steps, which follows `progress`
        clock = clock_of(state)
        self._note_pause(clock.paused)
        if not self._first_step:  # of a process: it compiles and starts workers
            self._steps.append(clock.elapsed - self._elapsed - clock.paused)
        self._first_step = False
        self._elapsed = clock.elapsed
        self._measure_progress(clock.elapsed)
        second_is_due = not self._second_closing and self._first_closing > _WORTH_A_SECOND_REHEARSAL * self.budget
        self.rehearsing = not self._first_closing or second_is_due

    def batch_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"budget/elapsed": self._elapsed, "budget/remaining": max(self.budget - self._elapsed, 0.0)})
        if self.is_used_up:
            state.stop_training()
            if dist.get_global_rank() == 0:
                used, closing = duration_string(self._elapsed), duration_string(self.reserve)
                log.info("%s of the time budget of %s used; closing takes about %s.", used, self, closing)
        else:
            self._tell(state, logger)

    def _note_pause(self, seconds: float) -> None:
        if not self.rehearsing:
            self._longest_pause = max(self._longest_pause, seconds)
        elif self._first_closing:
            self._second_closing, self._warm = seconds, True
        else:
            self._first_closing = seconds
            if _MARGIN * seconds > self.budget / 4:
                log.warning(
                    "Evaluation, images, scores and checkpoint took %s of a budget of %s.", duration_string(seconds), self
                )

    def _measure_progress(self, elapsed: float) -> None:
        time_for_steps = self.budget - self.reserve - self.slow_step
        self.progress = max(self.progress, elapsed / time_for_steps if elapsed < time_for_steps else 1.0)

    # ------------------------------------------------------------------------------------------------- what is left

    def _tell(self, state: State, logger: Logger) -> None:
        """In the progress bar, and in the log at every 1% of the budget."""
        if not self._steps or dist.get_local_rank() != 0:
            return
        step = statistics.median(self._steps)
        batches = min((self.budget - self.reserve - self._elapsed) / step, _batches_to_max_duration(state))
        seconds = min(self.budget - self._elapsed, batches * step + self.reserve)
        for destination in logger.destinations:
            if isinstance(destination, ProgressBarLogger) and destination.train_pbar is not None:
                destination.train_pbar.metrics["left"] = (
                    f"{batches:.0f}ba, {duration_string(seconds)}"  # shown with the next loss
                )
        if self._elapsed - self._told_at < max(self.budget / 100, _TELL_EVERY):
            return
        self._told_at = self._elapsed
        used, left = duration_string(self._elapsed), duration_string(seconds)
        text = f"{used} of {self} used; to go: about {batches:,.0f} batches in {left}"
        for algorithm in state.algorithms:
            if isinstance(switch := getattr(algorithm, "next_switch", None), Moment):
                until_switch = switch.seconds_left(state, step)
                if until_switch < seconds:
                    text += f", next stage in {duration_string(until_switch)}"
        log.info("%s.", text)

    def __str__(self) -> str:
        return duration_string(self.budget)

    def state_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "progress": self.progress,
            "first_closing": self._first_closing,
            "second_closing": self._second_closing,
            "longest_pause": self._longest_pause,
            "slow_step": self.slow_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first_closing, self._second_closing = float(state["first_closing"]), float(state["second_closing"])
        self._longest_pause, self._slow_step = float(state["longest_pause"]), float(state["slow_step"])
        self.progress_before = float(state["progress"])
        if state["budget"] == self.budget:
            self.progress = self.progress_before


def _batches_to_max_duration(state: State) -> float:
    elapsed = state.get_elapsed_duration()
    batch = int(state.timestamp.batch)
    return batch / elapsed.value - batch if elapsed is not None and elapsed.value > 0 else math.inf


def time_budget_of(state: State) -> TimeBudget | None:
    """The run's time budget, if it has one."""
    return next((callback for callback in state.callbacks if isinstance(callback, TimeBudget)), None)


Due = Callable[[State, Event], bool]


def rehearsing(state: State) -> bool:
    """Whether what the end of the run does is to be done now, at full size; see `TimeBudget`."""
    return any(getattr(callback, "rehearsing", False) for callback in state.callbacks)


def with_rehearsal(due: Due, event: Event = Event.BATCH_CHECKPOINT) -> Due:
    """`due`, and also at the rehearsals' `event`; once per batch."""
    return once_per_batch(lambda state, at: due(state, at) or (at == event and rehearsing(state)))


def once_per_batch(due: Due) -> Due:
    """`due`, which is asked every time, but not twice in a batch: where an epoch ends with it, say."""
    last = -1

    def check(state: State, event: Event) -> bool:
        nonlocal last
        is_due = bool(due(state, event))
        batch = int(state.timestamp.batch)
        if not is_due or batch == last:
            return False
        last = batch
        return True

    return check
