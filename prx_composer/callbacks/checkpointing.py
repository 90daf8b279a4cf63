"""Checkpoints are written, and a run that goes on from one draws the same random numbers and takes the recipe's new values."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State, Timestamp
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch.optim import Optimizer

from prx_composer.algorithms.base import Trick
from prx_composer.common.distributed import unwrapped
from prx_composer.common.errors import TrainingInterrupted, UserError
from prx_composer.loggers.trackers import log_checkpoint
from prx_composer.models.randomness import RandomStreams, derive_seed
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.resume import Change
from prx_composer.runs.checkpoints import Checkpoint, CheckpointWriter, clean_up, newest_checkpoint
from prx_composer.runs.copies import Copier
from prx_composer.schedule.clock import clock_of, if_written_in_time, rehearsing, time_budget_of, with_rehearsal
from prx_composer.schedule.moments import SECONDS, Moment, Point, ScheduleWindow

log = logging.getLogger(__name__)


def due_every(interval: Point) -> Any:
    """Return `(state, event) → bool` for 2000ba, 0.1dur …, or for training time (30m, 1h), counted over restarts."""
    if interval.unit != SECONDS:
        return create_interval_scheduler(interval.text)
    at_end = create_interval_scheduler("1dur")
    last: float | None = None

    def due(state: State, event: Event) -> bool:
        nonlocal last
        elapsed = clock_of(state).elapsed
        last = elapsed if last is None else last
        if elapsed - last >= interval.value:
            last = elapsed
            return True
        return at_end(state, event)

    return due


class Checkpointing(CheckpointSaver):
    """Composer's CheckpointSaver, with whole checkpoints that are written while training goes on (`CheckpointWriter`).

    Training waits for a copy of the state in host memory, and for the write only where nothing else is left to do: at the end,
    before it stops for a signal or an error, in a rehearsal of the end, and when the next checkpoint is due already, which is
    said. When any rank was asked to stop, the step in hand is completed, a checkpoint is written, and `TrainingInterrupted` ends
    the run on all ranks.

    A checkpoint that cannot be written is an error in the log, and training goes on: the one before it is still there, and the
    next may succeed. Only where it is the last one does the run end with a message. Any other error in the background is raised
    after the step in hand.

    Args:
        run_folder: of the run; checkpoints go to `<run folder>/checkpoints`.
        interval: from one to the next.
        keep: how many; −1 = all.
        recipe: kept in each of them.
        check: raises UserError, on all ranks, if the state is none that should be kept.
        timeout: seconds that ranks wait for each other.
        copier: of rank 0 has each of them copied to a store, if there is one to copy to.
    """

    def __init__(
        self,
        run_folder: Path,
        interval: Point,
        keep: int,
        recipe: dict[str, Any],
        check: Callable[[State], None],
        timeout: float = 600.0,
        copier: Copier | None = None,
    ):
        folder, due = str(run_folder / "checkpoints"), with_rehearsal(if_written_in_time(due_every(interval)))
        super().__init__(folder, save_interval=due, overwrite=True, num_checkpoints_to_keep=keep)
        self._run_folder, self._recipe, self._check, self._timeout = run_folder, recipe, check, timeout
        self._writer: CheckpointWriter | None = None
        self._copier = copier if dist.get_global_rank() == 0 else None
        self._at_end = False
        self._stalled = 0.0  # seconds in which training waited for the checkpoint in hand
        self.failures = 0  # in a row

    @property
    def writer(self) -> CheckpointWriter:
        assert self._writer is not None
        return self._writer

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        if dist.get_global_rank() == 0:
            clean_up(Path(self.folder))
        self._writer = CheckpointWriter(Path(self.folder), self.num_checkpoints_to_keep, self._timeout)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.writer.is_done:
            self._finish(state, logger)
        if self._copier is not None:
            self._copier.poll()
        super().batch_checkpoint(state, logger)
        if clock_of(state).stop_requested and self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)

    def before_dataloader(self, state: State, logger: Logger) -> None:  # what watches the run has written its last line by now
        clock = clock_of(state)
        if clock.stop_requested:
            self._at_end = True
            newest = newest_checkpoint(self._run_folder)
            where = f"its checkpoint is {newest.path}" if newest is not None else "it has no checkpoint yet"
            raise TrainingInterrupted(
                f"Stopped after batch {int(state.timestamp.batch)} ({clock.stop_reason}); {where}. "
                "The same command goes on from there."
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        self._at_end = True

    def close(self, state: State, logger: Logger) -> None:
        if self._writer is not None:
            if self._writer.is_writing and not self._writer.is_done:
                log.info("The checkpoint of batch %d is being written to its end.", self._writer.batch)
            self._writer.close()
        if self._copier is not None:
            self._copier.finish() if self._at_end else self._copier.stop()

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        assert state.max_duration is not None
        last = state.timestamp >= state.max_duration or clock_of(state).stop_requested
        self._check(state)
        if self.writer.is_writing:
            before, start = self.writer.batch, time.monotonic()
            self._finish(state, logger)
            if not last and dist.get_global_rank() == 0:
                log.warning(
                    "The checkpoint of batch %d was still being written when that of batch %d was due: training waited for it, "
                    "%.1f s. A longer save_interval, or a faster disk, avoids that.",
                    before, int(state.timestamp.batch), time.monotonic() - start,
                )  # fmt: skip
        start = time.monotonic()
        self.writer.begin(state, self._recipe, finite=True)
        self._stalled = time.monotonic() - start
        if last or rehearsing(state):  # a rehearsal shall tell what the end of the run costs
            self._finish(state, logger, last)

    def _finish(self, state: State, logger: Logger, last: bool = False) -> None:
        """Wait for the checkpoint in hand, and say what became of it."""
        start = time.monotonic()
        try:
            checkpoint = self.writer.finish()
        except OSError as error:
            self._note_failure(error, last)
        else:
            self.failures, clock = 0, clock_of(state)
            clock.own_write = max(clock.own_write, self.writer.seconds)
            if dist.get_global_rank() == 0:
                log_checkpoint(logger, checkpoint)
                if self._copier is not None:
                    self._copier.copy(checkpoint)
            self.saved_checkpoints = [str(checkpoint.path)]
            stalled = self._stalled + time.monotonic() - start
            logger.log_metrics({"checkpoint/seconds": self.writer.seconds, "checkpoint/stalled_seconds": stalled})
        logger.log_metrics({"checkpoint/failures": self.failures})

    def _note_failure(self, error: OSError, last: bool) -> None:
        self.failures += 1
        newest = newest_checkpoint(self._run_folder)
        before = f"The newest is {newest.path}." if newest is not None else "There is none before it."
        message = f"The checkpoint of batch {self.writer.batch} could not be written: {error}. {before}"
        if last:
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


class RandomStep(Callback):
    """Tell the model's `RandomStreams` which step it is, and reseeds the global generators.

    Our own code draws from the streams; the global generators are for dropout layers and other people's algorithms.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        streams = getattr(unwrapped(state.model), "random", None)
        if isinstance(streams, RandomStreams):
            streams.begin_step(step)
        seed = derive_seed(state.rank_zero_seed, dist.get_global_rank(), step)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)


_OF_SOME = "adam_"  # muon's name for what its AdamW groups call lr, betas and eps


class NewValues(Callback):
    """Put new values where loading a checkpoint has put the old ones: into the optimizer's groups, the schedule and the seed.

    Everything else that a recipe says is held by the objects that are built from it, of which a checkpoint has counts, moments
    and weights but no settings. Which these are is tested key by key.

    Args:
        changes: that are allowed, against the recipe in the checkpoint.
    """

    def __init__(self, changes: Sequence[Change]):
        parts = [change.key.split(".") for change in changes]
        self._arguments = {part[1].partition("[")[0] for part in parts if part[0] == "optimizer" and len(part) > 1}
        self._schedule = any(part[0] == "scheduler" for part in parts)
        self._seed = any(part[0] == "seed" for part in parts)
        self._groups: list[list[dict[str, Any]]] = []  # as they were built, by optimizer
        self._built_seed = 0
        self.loaded_rate: float | None = None  # the learning rate in the checkpoint, of the first group

    def before_load(self, state: State, logger: Logger) -> None:
        self._groups = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in state.optimizers
        ]
        self._built_seed = state.rank_zero_seed

    def after_load(self, state: State, logger: Logger) -> None:
        self.loaded_rate = float(state.optimizers[0].param_groups[0]["lr"])
        if self._seed:
            state.rank_zero_seed = self._built_seed
        if not (self._arguments or self._schedule):
            return
        names = {name.removeprefix(_OF_SOME) for name in self._arguments}
        for optimizer, built in zip(state.optimizers, self._groups, strict=True):
            for group, new in zip(optimizer.param_groups, built, strict=True):
                group |= {name: new[name] for name in names if name in new and name != "lr"}
            if "lr" in names or self._schedule:
                self._renew_rates(state, optimizer, [new.get("initial_lr", new["lr"]) for new in built])

    @staticmethod
    def _renew_rates(state: State, optimizer: Optimizer, rates: list[float]) -> None:
        """Make the rates what they would be if the run had had these and this schedule from its beginning on."""
        now = state.timestamp
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            before = group.get("initial_lr", group["lr"])
            group["initial_lr"] = rate
            group["lr"] = group["lr"] * rate / before if before else rate
        for scheduler in (scheduler for scheduler in state.schedulers if scheduler.optimizer is optimizer):
            scheduler.base_lrs = list(rates)
            multipliers = getattr(scheduler, "lr_lambdas", None)
            if multipliers is None:  # PyTorch's own, which has state of its own
                continue
            # Composer asks a schedule at the end of a step, before it counts it, for the rate of the next one.
            with _holding(state, timestamp=_back(now, 1), previous_timestamp=_back(now, 2)):
                for group, rate, multiplier in zip(optimizer.param_groups, rates, multipliers, strict=True):
                    group["lr"] = rate * multiplier(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        log.info("Learning rates of the next step: %s", ", ".join(f"{group['lr']:.4g}" for group in optimizer.param_groups))


@contextmanager
def _holding(holder: Any, **values: Any) -> Iterator[None]:
    """Give attributes of an object other values inside of this context."""
    before = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)


def _back(now: Timestamp, steps: int) -> Timestamp:
    """Return the time so many steps ago, of the average size; within the epoch."""
    batch = int(now.batch)
    steps = min(steps, batch)
    samples = steps * int(now.sample) // max(batch, 1)
    return now.copy(
        batch=batch - steps,
        sample=int(now.sample) - samples,
        batch_in_epoch=max(int(now.batch_in_epoch) - steps, 0),
        sample_in_epoch=max(int(now.sample_in_epoch) - samples, 0),
    )


_KEYS = ("max_duration", "time_budget")
_ALSO = ("optimizer", "scheduler")  # what else the rate depends on, where it was allowed to change
_SAME = 0.01  # of a learning rate


def say_what_moves(state: State, recipe: Recipe, checkpoint: Checkpoint | None) -> None:
    """Warn of `what_moves` in the log; called on one rank, once the checkpoint is loaded."""
    before = {} if checkpoint is None else checkpoint.index().get("recipe", {})
    for message in what_moves(state, recipe, before):
        log.warning("%s", message)


def what_moves(state: State, recipe: Recipe, before: dict[str, Any]) -> list[str]:
    """Return what another `max_duration` or `time_budget` changes at this point of the run, in words.

    Args:
        state: after loading.
        before: the recipe that the checkpoint was written with.
    """
    changed = [key for key in _KEYS if key in before and before[key] != getattr(recipe, key)]
    if not changed or int(state.timestamp.batch) == 0:
        return []
    rate, windows = _rate(state), _windows(state)
    budget = time_budget_of(state)
    with ExitStack() as stack:
        stack.enter_context(_holding(state, max_duration=before.get("max_duration", state.max_duration)))
        if budget is not None and budget.progress_before is not None:
            stack.enter_context(_holding(budget, progress=budget.progress_before))
        rate_before, windows_before = _rate(state), _windows(state)
    by = " and ".join(
        [f"{key} {before[key]} → {getattr(recipe, key)}" for key in changed]
        + [f"another {key}" for key in _ALSO if key in before and before[key] != getattr(recipe, key)]
    )
    batch = int(state.timestamp.batch)
    messages = []
    if abs(rate - rate_before) > _SAME * max(rate, rate_before):
        messages.append(_about_rate(state, rate, by, recipe.run_folder))
    for name, (window, phase) in windows.items():
        was = windows_before[name][1]
        if phase != was:
            span = f"{window.start} to {window.end or 'the end'}"
            messages.append(f"algorithms.{name}: at batch {batch} its window ({span}) was {was}, and is {phase} now ({by}).")
    messages.extend(f"train_loader.mix: at batch {batch} {text} ({by})." for text in _shares(state))
    return messages


def _about_rate(state: State, rate: float, by: str, folder: str) -> str:
    batch = int(state.timestamp.batch)
    loaded = next((callback.loaded_rate for callback in state.callbacks if isinstance(callback, NewValues)), None)
    last = float(state.optimizers[0].param_groups[0]["lr"]) if loaded is None else loaded
    return (
        f"The learning rate was {last:.3g} up to batch {batch} and goes to {rate:.3g} now ({by}): its schedule is a part of the "
        f"run's length. To go on without that jump, train these weights in another run: run_name=<another name> "
        f"model.init_from={folder} optimizer.lr={last:.3g} 'scheduler={{name: constant}}'. A run that is to be "
        "prolonged trains with scheduler: {name: warmup_stable_decay}, whose rate is constant until its last part: keep the "
        "checkpoints before that (save_num_checkpoints_to_keep=-1), delete the later ones, and go on with a longer max_duration."
    )


def _rate(state: State) -> float:
    """Return the learning rate of the first group of weights, in the step after the coming one at the latest."""
    scheduler: Any = state.schedulers[0]
    return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](0))


def _shares(state: State) -> Iterator[str]:
    """Yield which phases of a mixture began at another time than they would now."""
    mixture: Any = getattr(state.train_dataloader, "dataset", None)
    for index, phase in enumerate(getattr(mixture, "phases", [])[:-1]):
        if index < mixture.phase and not Moment(phase.until).has_come(state):
            yield f"the shares {phase} had ended, and stay so"
        elif index >= mixture.phase and Moment(phase.until).has_come(state):
            yield f"the shares {phase} end, after one batch more"


def _windows(state: State) -> dict[str, tuple[ScheduleWindow, str]]:
    """Return the windows of every trick by their names, and whether it is not begun, open or over."""
    found = {}
    for trick in state.algorithms:
        if isinstance(trick, Trick):
            for name, window in trick.windows.items():
                begun = trick.has_begun or window.start.has_come(state)
                found[name] = window, "over" if window.is_over(state) else "open" if begun else "not begun"
    return found
