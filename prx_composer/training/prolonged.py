"""A run that goes on with a longer duration: what of its schedules moves by that, said before its first step."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from composer.core import State

from prx_composer import registry
from prx_composer.algorithms.base import Trick
from prx_composer.callbacks.resumed import NewValues
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe
from prx_composer.runs.checkpoints import Checkpoint
from prx_composer.schedule.moments import ScheduleWindow
from prx_composer.schedule.time_budget import time_budget_of

log = logging.getLogger(__name__)

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
