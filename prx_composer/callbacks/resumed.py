"""What changes when a run goes on with other values: said before its first step, and held after its checkpoint is loaded."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from composer.core import Callback, State, Timestamp
from composer.loggers import Logger
from torch.optim import Optimizer

from prx_composer import registry
from prx_composer.algorithms.base import Trick
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.resume import Change
from prx_composer.runs.checkpoints import Checkpoint
from prx_composer.schedule.clock import time_budget_of
from prx_composer.schedule.moments import ScheduleWindow

log = logging.getLogger(__name__)

_OF_SOME = "adam_"  # muon's name for what its AdamW groups call lr, betas and eps


class NewValues(Callback):
    """Puts new values where loading a checkpoint has put the old ones: into the optimizer's groups, the schedule and the seed.

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
        self._groups = [[_settings(group) for group in optimizer.param_groups] for optimizer in state.optimizers]
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
        """As if the run had had these rates and this schedule from its beginning on."""
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            before = group.get("initial_lr", group["lr"])
            group["initial_lr"] = rate
            group["lr"] = group["lr"] * rate / before if before else rate
        for scheduler in (scheduler for scheduler in state.schedulers if scheduler.optimizer is optimizer):
            scheduler.base_lrs = list(rates)
            multipliers = getattr(scheduler, "lr_lambdas", None)
            if multipliers is None:  # PyTorch's own, which has state of its own
                continue
            with _at_the_step_before(state):
                for group, rate, multiplier in zip(optimizer.param_groups, rates, multipliers, strict=True):
                    group["lr"] = rate * multiplier(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        log.info("Learning rates of the next step: %s", ", ".join(f"{group['lr']:.4g}" for group in optimizer.param_groups))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@contextmanager
def _at_the_step_before(state: State) -> Iterator[None]:
    """Composer asks a schedule at the end of a step, before it counts it, for the rate of the next one."""
    now, before = state.timestamp, state.previous_timestamp
    if int(now.batch) > 0:
        state.timestamp, state.previous_timestamp = _back(now, 1), _back(now, 2)
    try:
        yield
    finally:
        state.timestamp, state.previous_timestamp = now, before


def _back(now: Timestamp, steps: int) -> Timestamp:
    """So many steps ago, of the average size; within the epoch."""
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
    """Warns of it in the log; called on one rank, once the checkpoint is loaded."""
    before = {} if checkpoint is None else checkpoint.index().get("recipe", {})
    for message in what_moves(state, recipe, before) if before else []:
        log.warning("%s", message)


def what_moves(state: State, recipe: Recipe, before: dict[str, Any]) -> list[str]:
    """What another `max_duration` or `time_budget` changes at this point of the run, in words.

    Args:
        state: after loading.
        before: the recipe that the checkpoint was written with.
    """
    changed = [key for key in _KEYS if key in before and before[key] != getattr(recipe, key)]
    if not changed or int(state.timestamp.batch) == 0:
        return []
    now = {"windows": _windows(state, recipe), "rate": _rate(state)}
    with _as_before(state, before):
        then = {"windows": _windows(state, recipe), "rate": _rate(state)}
    by = " and ".join(
        [f"{key} {before[key]} → {getattr(recipe, key)}" for key in changed]
        + [f"another {key}" for key in _ALSO if key in before and before[key] != getattr(recipe, key)]
    )
    batch = int(state.timestamp.batch)
    messages = []
    if abs(now["rate"] - then["rate"]) > _SAME * max(now["rate"], then["rate"]):
        messages.append(_about_rate(state, now["rate"], by, recipe.run_folder))
    for name, (window, phase) in now["windows"].items():
        was = then["windows"][name][1]
        if phase != was:
            span = f"{window.start} to {window.end or 'the end'}"
            messages.append(f"algorithms.{name}: at batch {batch} its window ({span}) was {was}, and is {phase} now ({by}).")
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
    """Of the first group of weights, in the step after the coming one at the latest."""
    scheduler: Any = state.schedulers[0]
    return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](0))


def _windows(state: State, recipe: Recipe) -> dict[str, tuple[ScheduleWindow, str]]:
    """By name, the window of every algorithm that has one, and whether it is not begun, open or over."""
    names = {registry.algorithms.get(name, ""): name for name, _ in entries(recipe.algorithms, "algorithms")}
    found = {}
    for algorithm in state.algorithms:
        if isinstance(algorithm, Trick) and type(algorithm) in names:
            window = algorithm.window
            begun = algorithm.has_begun or window.start.has_come(state)
            phase = "over" if window.is_over(state) else "open" if begun else "not begun"
            found[names[type(algorithm)]] = window, phase
    return found


@contextmanager
def _as_before(state: State, before: dict[str, Any]) -> Iterator[None]:
    """The state with the duration, and the part of the time budget, that the checkpoint was written with."""
    duration, budget = state.max_duration, time_budget_of(state)
    progress = 0.0 if budget is None else budget.progress
    state.max_duration = before.get("max_duration", duration)
    if budget is not None and budget.progress_before is not None:
        budget.progress = budget.progress_before
    try:
        yield
    finally:
        state.max_duration = duration
        if budget is not None:
            budget.progress = progress
