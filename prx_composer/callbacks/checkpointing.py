"""Write checkpoints at an interval, at the end, and when the run is asked to stop; stop early on purpose."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from prx_composer.common.errors import TrainingInterrupted, UserError
from prx_composer.loggers.trackers import log_checkpoint
from prx_composer.runs.checkpoints import clean_up, keep_newest, newest_checkpoint, write_checkpoint
from prx_composer.schedule.clock import clock_of
from prx_composer.schedule.moments import SECONDS, Moment, Point

log = logging.getLogger(__name__)


def due_every(interval: str) -> Any:
    """Return `(state, event) → bool` for "2000ba", "0.1dur" …, or for training time ("30m", "1h"), counted over restarts.

    Raises:
        ValueError: not a time, or not a positive one.
    """
    point = Point.parse_interval(interval)
    if point.unit != SECONDS:
        return create_interval_scheduler(interval)
    at_end = create_interval_scheduler("1dur")
    last: float | None = None

    def due(state: State, event: Event) -> bool:
        nonlocal last
        elapsed = clock_of(state).elapsed
        last = elapsed if last is None else last
        if elapsed - last >= point.value:
            last = elapsed
            return True
        return at_end(state, event)

    return due


class Checkpointing(CheckpointSaver):
    """Composer's CheckpointSaver, with whole checkpoints (`checkpoints.write_checkpoint`) and a disk that may be full.

    A checkpoint that cannot be written is an error in the log, and training goes on: the one before it is still there, and the
    next may succeed. Only where it is the last one does the run end with a message. When any rank was asked to stop, the step in
    hand is completed, a checkpoint is written, and `TrainingInterrupted` ends the run on all ranks.

    Args:
        run_folder: of the run; checkpoints go to `<run folder>/checkpoints`.
        save_interval: when, as a Composer callable.
        keep: how many; −1 = all.
        recipe: kept in each of them.
        check: raises UserError, on all ranks, if the state is none that should be kept.
    """

    def __init__(self, run_folder: Path, save_interval: Any, keep: int, recipe: dict[str, Any], check: Callable[[State], None]):
        folder = str(run_folder / "checkpoints")
        super().__init__(folder, save_interval=save_interval, overwrite=True, num_checkpoints_to_keep=keep)
        self._run_folder, self._recipe, self._check = run_folder, recipe, check
        self.failures = 0  # in a row

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        if dist.get_global_rank() == 0:
            clean_up(Path(self.folder))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        super().batch_checkpoint(state, logger)
        if clock_of(state).stop_requested and self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)

    def before_dataloader(self, state: State, logger: Logger) -> None:  # what watches the run has written its last line by now
        clock = clock_of(state)
        if clock.stop_requested:
            newest = newest_checkpoint(self._run_folder)
            where = f"its checkpoint is {newest.path}" if newest is not None else "it has no checkpoint yet"
            raise TrainingInterrupted(
                f"Stopped after batch {int(state.timestamp.batch)} ({clock.stop_reason}); {where}. "
                "The same command goes on from there."
            )

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        start = time.monotonic()
        self._check(state)
        try:
            checkpoint = write_checkpoint(state, Path(self.folder), self._recipe, finite=True)
        except OSError as error:
            self._note_failure(state, error)
        else:
            self.failures = 0
            if dist.get_global_rank() == 0:
                log_checkpoint(logger, checkpoint)
                keep_newest(Path(self.folder), self.num_checkpoints_to_keep)
            self.saved_checkpoints = [str(checkpoint.path)]
            logger.log_metrics({"checkpoint/seconds": time.monotonic() - start})
        dist.barrier()
        logger.log_metrics({"checkpoint/failures": self.failures})

    def _note_failure(self, state: State, error: OSError) -> None:
        self.failures += 1
        newest = newest_checkpoint(self._run_folder)
        before = f"The newest is {newest.path}." if newest is not None else "There is none before it."
        message = f"The checkpoint of batch {int(state.timestamp.batch)} could not be written: {error}. {before}"
        assert state.max_duration is not None
        if state.timestamp >= state.max_duration or clock_of(state).stop_requested:
            remedy = "Make room (save_num_checkpoints_to_keep, other runs); then the same command goes on from there."
            raise UserError(f"{message} {remedy}")
        log.error("%s Training goes on; the next one is tried at save_interval.", message)


class StopAfter(Callback):
    """Stop training at a time, with a checkpoint and the final evaluation, as a time slot of a cluster would.

    `max_duration`, and with it the learning rate and everything given as a part of the run, stays what it is: the same command
    without this callback and with `autoresume: true` goes on bit for bit. A shorter `max_duration` would be another schedule.

    Args:
        time: a `Moment`, such as "500ba", "2h" (of training, over all restarts) or "500ba or 0.5budget".
    """

    def __init__(self, time: str):
        self._time = Moment(time)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._time.has_come(state):
            state.stop_training()
