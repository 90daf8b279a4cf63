"""Seconds of training, over all restarts and the same on every rank."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from prx_composer.common.distributed import HostGroup

log = logging.getLogger(__name__)

_WRITE_EVERY = 10.0  # seconds


class TrainingClock(Callback):
    """Measures training with rank 0's monotonic clock from FIT_START on, with evaluation, drawing, checkpoints and waiting.

    The ranks agree once per step, at AFTER_TRAIN_BATCH: one all-reduce of three numbers on the CPU, while the GPU computes. What
    algorithms, scheduler and callbacks read in `elapsed` therefore changes only between a step's BATCH_START and its BATCH_END,
    as the count of batches does: a point of time comes for everybody at the same batch boundary. (Were it BATCH_END, algorithms,
    which Composer runs before callbacks, would learn of it a step after those that look at BATCH_START.)

    Checkpoints carry `elapsed`. Rank 0 also writes it to `<folder>/clock.json`, since work that was lost between a checkpoint and
    a kill has been paid for too: a resumed run goes on from the larger of the two.

    Args:
        folder: the run folder.
        budget: seconds of training that the recipe's `time_budget` allows, if it does.
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, folder: str | Path, budget: float | None = None, timeout: float = 600.0):
        self.path = Path(folder) / "clock.json"
        self.budget = budget
        self.elapsed = 0.0
        """Seconds of training up to the end of the newest step."""
        self.fraction = 0.0
        """Largest part of the budget that has been reached; raising the budget does not lower it."""
        self.paused = 0.0
        """Seconds between the end of the step before and the next batch being asked for, on the slowest rank."""
        self.spent = 0.0
        """Seconds of training before this process, known from AFTER_LOAD on: at least `elapsed`, which changes in steps only."""
        self.asked: str | None = None
        """Why this rank was asked to stop."""
        self.stop_requested = False
        """Whether any rank was asked to stop; changes at AFTER_TRAIN_BATCH, on all ranks."""
        self._timeout = timeout
        self._hosts: HostGroup | None = None
        self._start: float | None = None  # while training: now − spent
        self._step_end: float | None = None
        self._batch_asked_for = 0.0
        self._written_at = -math.inf
        self._writable = True

    def request_stop(self, reason: str) -> None:
        """Asks all ranks to stop after the step in hand. May be called by a signal handler, on any rank."""
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
        (self.spent,) = self._agree(spent)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._start = time.monotonic() - self.spent
        self._step_end = None

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._batch_asked_for = time.monotonic()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        now = time.monotonic()
        assert self._start is not None
        paused = 0.0 if self._step_end is None else self._batch_asked_for - self._step_end
        own = now - self._start if dist.get_global_rank() == 0 else -math.inf
        self.elapsed, self.paused, asked = self._agree(own, paused, float(self.asked is not None))
        self._step_end = now
        self.stop_requested = asked > 0
        if self.budget is not None:
            self.fraction = max(self.fraction, self.elapsed / self.budget)
        self._write(now)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self._write(time.monotonic())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write(time.monotonic())

    def stop(self) -> None:
        """Stops the clock; FIT_START starts it again."""
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

    def _agree(self, *values: float) -> list[float]:
        """The largest of every rank's values, on all of them."""
        return list(values) if self._hosts is None else self._hosts.largest(values)

    def _read(self) -> float:
        if not self.path.exists():
            if self.elapsed:
                log.warning("%s is missing: training time is taken from the checkpoint, %.0f s.", self.path, self.elapsed)
            return 0.0
        try:
            elapsed = float(json.loads(self.path.read_text())["elapsed"])
            if not 0 <= elapsed < math.inf:
                raise ValueError(f"elapsed is {elapsed}")
        except (OSError, ValueError, TypeError, LookupError) as error:
            log.warning(
                "%s cannot be read (%s): training time is taken from the checkpoint, %.0f s.", self.path, error, self.elapsed
            )
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
    """Stops the clock when the last callback is done with FIT_END; train.py puts it at the end of the list."""

    def __init__(self, clock: TrainingClock):
        self._clock = clock

    def fit_end(self, state: State, logger: Logger) -> None:
        self._clock.stop()


def clock_of(state: State) -> TrainingClock:
    """The run's clock.

    Raises:
        RuntimeError: the trainer has none; train.py installs it.
    """
    for callback in state.callbacks:
        if isinstance(callback, TrainingClock):
            return callback
    raise RuntimeError("Give the Trainer a prx_composer.schedule.clock.TrainingClock as its first callback, as train.py does.")
