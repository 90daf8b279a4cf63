"""Whether a recipe's times are times, and its scheduler's fit the duration: what Composer cannot compare, or never reaches."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from prx_composer.common.errors import Problems, UserError, at_path
from prx_composer.recipe.sizes import STAGES, stages_of
from prx_composer.schedule.moments import BUDGET, SECONDS, Moment, Point, names_budget, parse_duration

Values = Mapping[str, Any]

# Composer's, which compare both in one unit. `warmup_stable_decay` takes `Moment`s, each of which knows its own.
_AS_OURS = {
    "constant_with_warmup": "decay: 0",
    "cosine_with_warmup": "decay: 1, shape: cosine",
    "linear_decay_with_warmup": "decay: 1, shape: linear",
}
_COUNTED = {"ba": "batches", "sp": "samples", "ep": "epochs", "dur": "parts of max_duration"}
_SAME_AS = {"ep": "ba"}  # Composer turns epochs into batches


def time_problems(values: Values) -> list[str]:
    """Return what is wrong with durations and intervals, and with the budget."""
    problems = Problems()
    for path, time in _times(values):
        with problems.noted(), at_path(path):
            _check_time(time, path)
            stages = len(stages_of(values)) - 1
            if path == "max_duration" and stages > 1 and Point.parse(time).unit == "ep":
                raise ValueError(f"{time} cannot be in epochs with {STAGES}, whose switch begins one; use ba.")
    with problems.noted():
        _check_time_budget(values)
    return problems.found


def _times(values: Values) -> Iterator[tuple[str, Any]]:
    yield from ((key, values[key]) for key in ("save_interval", "max_duration", "eval_interval") if key in values)
    for key, value in values.get("scheduler", {}).items():
        if key.startswith("t_"):
            yield f"scheduler.{key}", value


def _check_time(text: Any, path: str) -> None:
    """Raises ValueError for what is no time, or none that can stand at that path."""
    if path.startswith("scheduler."):
        Moment(text)
        return
    if path == "save_interval":
        Point.parse_interval(text)
        return
    given = str(text).strip()
    point = Point.parse(given.removeprefix("-"))
    unit = point.unit
    if path == "max_duration" and unit not in ("ba", "ep", "sp"):
        hours = " For a length in hours, give it as time_budget, and a max_duration that is long enough." if unit == "sec" else ""
        raise ValueError(f"{text} must be a number of batches, epochs or samples, such as 1000ba.{hours}")
    if unit == "tok":
        raise ValueError(f"{text}: images have no tokens to count; use ba, ep, sp or dur.")
    if point.value <= 0 or given.startswith("-"):
        raise ValueError(f"{text} must be positive, such as {'1000ba or 3ep' if path == 'max_duration' else '0.25dur'}.")
    if unit == BUDGET:
        raise ValueError(f"{text}: evaluation comes at batches, epochs, samples, times or parts of the run; use 0.1dur, say.")


def _check_time_budget(values: Values) -> None:
    """The budget is a time, and without one nothing is a part of it."""
    if "time_budget" not in values:
        return
    budget = values["time_budget"]
    if budget is not None:
        with at_path("time_budget"):
            if parse_duration(budget) <= 0:
                raise ValueError("a budget must be more than nothing.")
        return
    for key in ("scheduler", "algorithms", "callbacks"):
        for path, text in strings(values.get(key), key):
            if names_budget(text):
                raise UserError(
                    f"{path}: {text} is a part of the time budget, and the recipe has none; set time_budget=24h, say."
                )


def strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every string in a value of a recipe, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, f"{path}[{index}]")


# ------------------------------------------------------------------------------------------- the scheduler's times


def schedule_problems(values: Values, batches_per_epoch: float | None = None) -> Iterator[str]:
    """What is wrong, by YAML path.

    Args:
        batches_per_epoch: if it is known; without it epochs are compared with epochs alone.
    """
    name = values["scheduler"].get("name")
    total = _point(values["max_duration"])
    warmup = _point(values["scheduler"].get("t_warmup"))
    if total is None or total.value <= 0 or warmup is None:
        return  # said elsewhere
    path = "scheduler.t_warmup"
    if name in _AS_OURS:
        other = _point(values["scheduler"].get("t_max", "1dur"))
        wrong = list(_not_comparable(values, path, warmup, other, total))
        yield from wrong
        if wrong:
            return
    for key, length, whole in _lengths(values, warmup, total, batches_per_epoch):
        if length > whole:
            yield (
                f"{path}: {warmup.text} is longer than the run ({key}: {values[key]}), whose full learning rate would "
                f"never be reached; give a shorter one, such as 0.1dur, or a longer {key}."
            )


def _lengths(values: Values, warmup: Point, total: Point, batches_per_epoch: float | None) -> Iterator[tuple[str, float, float]]:
    """What ends the run, and both times in one unit, as far as they can be compared."""
    if warmup.unit == SECONDS:
        if values["time_budget"] is not None:
            yield "time_budget", warmup.value, parse_duration(values["time_budget"])
    elif warmup.unit == total.unit:
        yield "max_duration", warmup.value, total.value
    elif warmup.unit == "dur":
        yield "max_duration", warmup.value, 1.0
    else:
        length, whole = (_batches(point, values, batches_per_epoch) for point in (warmup, total))
        if length is not None and whole is not None:
            yield "max_duration", length, whole


def _not_comparable(values: Values, path: str, warmup: Point, t_max: Point | None, total: Point) -> Iterator[str]:
    name = values["scheduler"].get("name")
    ours = f"or 'scheduler={{name: warmup_stable_decay, t_warmup: {warmup.text}, {_AS_OURS[str(name)]}}}', which takes any time"
    if warmup.unit in (SECONDS, BUDGET, "tok", "iter"):
        yield f"{path}: {name} counts batches, samples, epochs or dur, not {warmup.text}; give such as 0.05dur, {ours}."
        return
    unit = _effective(warmup, total)
    against = _effective(t_max, total) if t_max is not None else unit
    if unit == against:
        return
    key = "scheduler.t_max" if "t_max" in values["scheduler"] else "max_duration"
    said = values["scheduler"].get("t_max", values["max_duration"])
    same = _converted(warmup, against, values)
    yield (
        f"{path}: {warmup.text} is counted in {_COUNTED[warmup.unit]}, and {key}: {said} in {_COUNTED[against]}, which {name} "
        f"cannot compare; give {same or 'a part of the run such as 0.05dur'}, {ours}."
    )


def _point(text: object) -> Point | None:
    try:
        return Point.parse(str(text))
    except ValueError:
        return None


def _effective(point: Point, total: Point) -> str:
    """The unit in which Composer compares it."""
    unit = total.unit if point.unit == "dur" else point.unit
    return _SAME_AS.get(unit, unit)


def _converted(point: Point, unit: str, values: Values) -> str | None:
    """The same time in batches or samples, if all batches are of one size."""
    if values["algorithms"].get("progressive_resolution"):
        return None
    size = values["global_train_batch_size"]
    if (point.unit, unit) == ("sp", "ba"):
        return f"{max(math.ceil(point.value / size), 1)}ba"
    return f"{int(point.value) * size}sp" if (point.unit, unit) == ("ba", "sp") else None


def _batches(point: Point, values: Values, batches_per_epoch: float | None) -> float | None:
    """How many batches it lasts; None if that isn't known."""
    if point.unit == "ba":
        return point.value
    if point.unit == "sp":
        staged = values["algorithms"].get("progressive_resolution")
        return None if staged else point.value / values["global_train_batch_size"]
    if point.unit == "ep" and batches_per_epoch is not None:
        return point.value * batches_per_epoch
    return None
