"""Training time, over all restarts and the same on every rank, and a run that ends inside a given time.

A run with a time budget ends with its final evaluation, images and checkpoint inside it. What evaluates, draws and saves at
intervals asks `with_rehearsal`: a budgeted run also does it once at its beginning, to learn what it costs.
"""

import json
import logging
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger, ProgressBarLogger
from composer.utils import dist

from prx_composer.common.distributed import HostGroup
from prx_composer.schedule.moments import Moment, TrainingTime, duration_string

log = logging.getLogger(__name__)

_WRITE_EVERY = 10.0  # seconds


class TrainingClock(TrainingTime, Callback):
    """Measure training with rank 0's monotonic clock from FIT_START on, with evaluation, drawing, checkpoints and waiting.

    The ranks agree once per step: `take` reads the sums over the ranks of what each `report`s. This package's Trainer sends the
    report with the losses; any other one has the hosts send it at AFTER_TRAIN_BATCH, over gloo, while the GPU computes. What
    scheduler and callbacks read in `elapsed` therefore changes only between a step's BATCH_START and its BATCH_END, as the count
    of batches does: a point of time comes for everybody at the same batch boundary. (Were it BATCH_END, algorithms, which
    Composer runs before callbacks, would learn of it a step after those that look at BATCH_START.)

    Checkpoints carry `elapsed`. Rank 0 also writes it to `<folder>/clock.json`, since work that was lost between a checkpoint and
    a kill has been paid for too: a resumed run goes on from the larger of the two.

    Args:
        folder: the run folder.
        budget: see `TrainingTime`.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, folder: str | Path, budget: float | None = None, timeout: float = 600.0):
        self.path = Path(folder) / "clock.json"
        self.budget = budget
        self.paused = 0.0
        """Seconds between the end of the step before and the next batch being asked for, on the slowest rank."""
        self.step_seconds = 0.0
        """Rank 0's seconds from the step before to this one, without evaluation in between."""
        self.spent = 0.0
        """Seconds of training before this process, known from AFTER_LOAD on: at least `elapsed`, which changes in steps only."""
        self.asked: str | None = None
        """Why this rank was asked to stop."""
        self.stop_requested = False
        """Whether any rank was asked to stop; changes with `elapsed`, on all ranks."""
        self.own_write = self.write_seconds = 0.0
        """Of the longest checkpoint of this process, to the end of its file: this rank's, and rank 0's as of the step before."""
        self._timeout = timeout
        self._hosts: HostGroup | None = None
        self._start: float | None = None  # while training: now − spent
        self._step_end: float | None = None
        self._batch_asked_for = 0.0
        self._evaluated = self._evaluation_began = 0.0
        self._reported = False
        self._written_at = -math.inf
        self._writable = True

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop after the step in hand. A signal handler may call this, on any rank."""
        self.asked = reason

    @property
    def stop_reason(self) -> str | None:
        """Why the run is to stop, as far as this rank knows."""
        return self.asked or ("asked for on another rank" if self.stop_requested else None)

    def init(self, state: State, logger: Logger) -> None:
        self._hosts = HostGroup(self._timeout)

    def after_load(self, state: State, logger: Logger) -> None:
        spent = self.elapsed
        if dist.get_global_rank() == 0:
            spent = max(spent, self._read())
        (self.spent,) = [spent] if self._hosts is None else self._hosts.largest([spent])

    def fit_start(self, state: State, logger: Logger) -> None:
        self._start = time.monotonic() - self.spent
        self._step_end, self._evaluated = None, 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._batch_asked_for = time.monotonic()

    def eval_before_all(self, state: State, logger: Logger) -> None:
        self._evaluation_began = time.monotonic()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._evaluated += time.monotonic() - self._evaluation_began

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if not self._reported:
            own = self.report()
            self.take(state, own if self._hosts is None else self._hosts.sums(own))

    def report(self) -> list[float]:
        """Return what this rank has to say of the step in hand; in fp32 nothing of it that matters is lost."""
        assert self._start is not None
        now, rank = time.monotonic(), dist.get_global_rank()
        pauses = [0.0] * dist.get_world_size()
        pauses[rank] = 0.0 if self._step_end is None else self._batch_asked_for - self._step_end
        whole, evaluated = math.floor(now - self._start), self._evaluated
        fraction = now - self._start - whole
        self._step_end, self._evaluated, self._reported = now, 0.0, True
        of_rank_zero = [whole, fraction, evaluated, self.own_write] if rank == 0 else [0.0] * 4
        return [*of_rank_zero, float(self.asked is not None), *pauses]

    def take(self, state: State, sums: Sequence[float]) -> None:
        """Read the sums over the ranks of their reports, between AFTER_TRAIN_BATCH and the step of the learning rate."""
        whole, fraction, evaluated, self.write_seconds, asked, *pauses = sums
        before = max(self.elapsed, self.spent)
        self.elapsed, self.paused, self._reported = whole + fraction, max(pauses), False
        self.step_seconds = max(self.elapsed - before - evaluated, 0.0)
        self.stop_requested = asked > 0
        if self.budget is not None:
            self.fraction = max(self.fraction, self.elapsed / self.budget)
        if self._step_end is not None:
            self._write(self._step_end)
        if (budget := time_budget_of(state)) is not None:
            budget.follow(self)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self._write(time.monotonic())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write(time.monotonic())

    def stop(self) -> None:
        """Stop the clock; FIT_START starts it again."""
        if self._start is not None:
            now = time.monotonic()
            self._write(now, always=True)
            self.spent, self._start = now - self._start, None

    def close(self, state: State, logger: Logger) -> None:
        self.stop()
        if self._hosts is not None:
            self._hosts.close()

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed, "fraction": self.fraction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.elapsed, self.fraction = float(state["elapsed"]), float(state["fraction"])

    def _read(self) -> float:
        if not self.path.exists() and not self.elapsed:
            return 0.0
        try:
            elapsed = float(json.loads(self.path.read_text())["elapsed"])
            if not 0 <= elapsed < math.inf:
                raise ValueError(f"elapsed is {elapsed}")
        except (OSError, ValueError, TypeError, LookupError) as error:
            wrong = f"cannot be read ({error})" if self.path.exists() else "is missing"
            log.warning("%s %s: training time is taken from the checkpoint, %.0f s.", self.path, wrong, self.elapsed)
            return 0.0
        return elapsed

    def _write(self, now: float, always: bool = False) -> None:
        if dist.get_global_rank() != 0 or self._start is None or (now - self._written_at < _WRITE_EVERY and not always):
            return
        self._written_at = now
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"elapsed": round(now - self._start, 3)}) + "\n")
            os.replace(partial, self.path)
        except OSError as error:  # a full disk: the next one may succeed, and checkpoints carry the time too
            if self._writable:
                log.warning("%s cannot be written: %s", self.path, error)
            self._writable = False


class ClockStop(Callback):
    """Stop the clock when the last callback is done with FIT_END; train.py puts it at the end of the list."""

    def __init__(self, clock: TrainingClock):
        self._clock = clock

    def fit_end(self, state: State, logger: Logger) -> None:
        self._clock.stop()


def clock_of(state: State) -> TrainingClock:
    """Return the run's clock. Raise RuntimeError for a trainer that train.py didn't make, which has none."""
    for callback in state.callbacks:
        if isinstance(callback, TrainingClock):
            return callback
    raise RuntimeError("Give the Trainer a prx_composer.schedule.clock.TrainingClock as its first callback, as train.py does.")


_STEPS = 50  # the newest, by which a slow one is judged
_QUANTILE = 0.9
_MARGIN = 1.1  # on the closing, which is measured a few times at most
_WORTH_A_SECOND_REHEARSAL = 0.005  # of the budget
_TELL_EVERY = 60.0  # seconds, at least


class TimeBudget(Callback):
    """Stop training when another step and the closing would no longer fit into the budget.

    The *closing* is what happens between the last step and the end: evaluation, images, scores, checkpoint. So that its cost is
    known before it is needed, and what is broken in it shows in the first minute and not in the last, the run rehearses it after
    its first batch. If that took more than 0.5% of the budget it does so once more after the second batch, since the first time
    includes what is paid once (compilation, starting workers); a resumed run, which pays it again, reckons with the first time.
    Later pauses between two steps that took longer raise the reserve. No checkpoint is begun for which the closing would wait.

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

    def has_time_to_write(self, seconds: float) -> bool:
        """Return whether a checkpoint begun now is whole when the closing begins; 0: not known, at most as long as a closing."""
        return self._elapsed + (_MARGIN * seconds or self.reserve) <= self.budget - self.reserve

    def after_load(self, state: State, logger: Logger) -> None:
        self._measure_progress(clock_of(state).spent)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._elapsed = self._told_at = clock_of(state).spent

    def follow(self, clock: TrainingClock) -> None:
        """Reckon anew at every step, before the scheduler's, which follows `progress`."""
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
        """Say what is left in the progress bar, and in the log at every 1% of the budget."""
        if not self._steps or dist.get_local_rank() != 0:
            return
        step = statistics.median(self._steps)
        batches = min((self.budget - self.reserve - self._elapsed) / step, Moment("1dur").seconds_left(state, 1.0))
        seconds = min(self.budget - self._elapsed, batches * step + self.reserve)
        for destination in logger.destinations:
            if isinstance(destination, ProgressBarLogger) and destination.train_pbar is not None:
                # Shown with the next loss.
                destination.train_pbar.metrics["left"] = f"{batches:.0f}ba, {duration_string(seconds)}"
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


def time_budget_of(state: State) -> TimeBudget | None:
    """Return the run's time budget, if it has one."""
    return next((callback for callback in state.callbacks if isinstance(callback, TimeBudget)), None)


Due = Callable[[State, Event], bool]


def rehearsing(state: State) -> bool:
    """Return whether what the end of the run does is to be done now, at full size; see `TimeBudget`."""
    budget = time_budget_of(state)
    return budget is not None and budget.rehearsing


def with_rehearsal(due: Due, event: Event = Event.BATCH_CHECKPOINT) -> Due:
    """Return what says yes where `due` does, and also at the rehearsals' `event`; once per batch."""
    return once_per_batch(lambda state, at: due(state, at) or (at == event and rehearsing(state)))


def if_written_in_time(due: Due) -> Due:
    """Return what says yes where `due` does, unless a checkpoint begun there would not be whole before the closing."""

    def check(state: State, event: Event) -> bool:
        is_due, budget, end = due(state, event), time_budget_of(state), state.max_duration
        if budget is None or end is None or state.timestamp >= end:
            return is_due
        return is_due and budget.has_time_to_write(clock_of(state).write_seconds)

    return check


def once_per_batch(due: Due) -> Due:
    """Return what asks `due` every time, but says yes once in a batch: where an epoch ends with it, say."""
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
