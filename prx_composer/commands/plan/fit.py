"""A schedule that fits a given time: stages keep their proportions, and what is tied to steps moves with them."""

import copy
import dataclasses
import math
from typing import Any

from prx_composer.commands.plan.conditions import Conditions
from prx_composer.commands.plan.plan import Plan, make_plan
from prx_composer.commands.plan.timeline import STAGES, Span, stages, timeline
from prx_composer.common.errors import UserError
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe
from prx_composer.schedule.moments import Moment, Point, duration_string, parse_duration

_DIGITS = 3  # of a number of steps; rounded down
_ATTEMPTS = 200


@dataclasses.dataclass(frozen=True)
class Fit:
    """A changed schedule.

    Args:
        changes: key of the recipe → new value, to be given to train.py as `key=value`.
        unmoved: keys in steps that are left as they are, in words.
        plan: of the recipe with the changes.
    """

    changes: dict[str, str]
    unmoved: list[str]
    plan: Plan

    @property
    def arguments(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.changes.items()]


def fit(recipe: Recipe, conditions: Conditions, seconds: float) -> Fit:
    """Scales the stages' numbers of steps so that training and checkpoints take at most `seconds`, and nearly that.

    Windows of algorithms and the schedulers' `t_max` move along: those at a stage's end stay there. Times in parts of the run
    ("0.5dur") move by themselves. A time budget of the recipe becomes the new time.

    Raises:
        UserError: a recipe that cannot be planned, or a time that is too short for one step of each stage.
    """
    before = make_plan(recipe, conditions)
    line = timeline(recipe, conditions.num_gpus, before.samples)
    factor = seconds / 3600 / before.hours
    for _ in range(_ATTEMPTS):
        lengths = [_round_down(span.steps * factor) for span in line.spans]
        if min(lengths) < 1:
            break
        changes, moved = _scaled(recipe, line.spans, lengths)
        if recipe.time_budget is not None and parse_duration(recipe.time_budget) != seconds:
            changes["time_budget"] = duration_string(seconds)
            moved = dataclasses.replace(moved, time_budget=changes["time_budget"])
        plan = make_plan(moved, conditions)
        if plan.hours * 3600 <= seconds:
            return Fit(changes, _unmoved(recipe), plan)
        factor *= min(0.995, seconds / 3600 / plan.hours)
    now = f"the recipe as it is takes {before.hours:.2f} h"
    raise UserError(f"--fit: {duration_string(seconds)} is too short for a step of every stage; {now}.")


def _round_down(steps: float) -> int:
    grain = 10 ** max(0, math.floor(math.log10(max(steps, 1))) - _DIGITS + 1)
    return math.floor(steps / grain + 1e-9) * grain


def _scaled(recipe: Recipe, spans: list[Span], lengths: list[int]) -> tuple[dict[str, str], Recipe]:
    """The keys that change, and the recipe with them."""
    new: list[Span] = []
    for span, steps in zip(spans, lengths, strict=True):
        start, first = (new[-1].end, new[-1].first_sample + new[-1].samples) if new else (0, 0)
        new.append(dataclasses.replace(span, start=start, end=start + steps, first_sample=first))

    def move(text: str) -> str | None:
        """A time string with its steps or samples moved; None if it stays."""
        points = Moment(text).points
        moved = " or ".join(_moved(point, spans, new) for point in points)
        return None if moved == " or ".join(point.text for point in points) else moved

    changes: dict[str, str] = {}
    algorithms = copy.deepcopy(recipe.algorithms)
    last = Moment(recipe.max_duration).points[0]
    if last.unit == "ep":  # stages and epochs don't go together, so that there is one stage
        last = Point(spans[-1].end, "ba", "")
    changes["max_duration"] = _moved(last, spans, new)
    if len(stages(recipe)) > 1:
        for index, spec in enumerate(algorithms["progressive_resolution"]["stages"]):
            if spec.get("until") and (value := move(spec["until"])):
                spec["until"] = changes[f"{STAGES}[{index}].until"] = value
    for name, arguments in entries(recipe.algorithms, "algorithms"):
        for key in ("start", "end"):
            if arguments.get(key) and (value := move(str(arguments[key]))):
                algorithms[name][key] = changes[f"algorithms.{name}.{key}"] = value
    scheduler = dict(recipe.scheduler)
    if "t_max" in scheduler and (value := move(str(scheduler["t_max"]))):
        scheduler["t_max"] = changes["scheduler.t_max"] = value
    moved = dataclasses.replace(recipe, algorithms=algorithms, scheduler=scheduler, max_duration=changes["max_duration"])
    return changes, moved


def _moved(point: Point, old: list[Span], new: list[Span]) -> str:
    """A point in steps or samples at the same place of the same stage, rounded to a whole step; any other as it is."""
    if point.unit not in ("ba", "sp") or point.value <= 0:
        return point.text
    for before, after in zip(old, new, strict=True):
        first, length = (before.start, before.steps) if point.unit == "ba" else (before.first_sample, before.samples)
        if point.value <= first + length:
            step = after.start + round((point.value - first) / length * after.steps)
            return f"{step}ba" if point.unit == "ba" else f"{after.first_sample + (step - after.start) * after.batch_size}sp"
    return point.text  # after the end, which it stays


def _unmoved(recipe: Recipe) -> list[str]:
    """What is counted in steps and is not the schedule's."""
    candidates: dict[str, Any] = {"scheduler.t_warmup": recipe.scheduler.get("t_warmup"), "save_interval": recipe.save_interval}
    candidates["eval_interval"] = recipe.eval_interval if recipe.eval_loader else None
    for name, arguments in entries(recipe.callbacks, "callbacks"):
        candidates[f"callbacks.{name}.interval"] = arguments.get("interval")
    return [f"{key}={value}" for key, value in candidates.items() if str(value).endswith(("ba", "sp"))]
