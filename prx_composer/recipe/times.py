"""Times of a recipe: lengths and intervals, the scheduler's against the length of the run, and when a mixture changes."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prx_composer.common.errors import Problems, UserError, at_path, listed
from prx_composer.recipe.consistency import STAGES, stages_of, strings
from prx_composer.schedule.moments import BUDGET, SECONDS, Moment, Point, in_order, names_budget, parse_duration

Values = Mapping[str, Any]


def time_problems(values: Values) -> list[str]:
    """Return what is wrong with durations and intervals, and with the budget."""
    problems, num_stages = list[str](), len(stages_of(values)) - 1
    texts = [text for key in ("scheduler", "algorithms", "callbacks") for text in strings(values.get(key), key)]
    times = {key: values[key] for key in ("save_interval", "max_duration", "eval_interval", "time_budget") if key in values}
    times |= {f"scheduler.{key}": text for key, text in values.get("scheduler", {}).items() if key.startswith("t_")}
    for path, text in times.items():
        try:
            _check_time(path, text, num_stages)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if times.get("time_budget", "1h") is None and (parts := [(path, text) for path, text in texts if names_budget(text)]):
        path, text = parts[0]
        problems.append(f"{path}: {text} is a part of the time budget, and the recipe has none; set time_budget=24h, say.")
    return problems


def _check_time(path: str, text: Any, num_stages: int) -> None:
    """Raise ValueError for what is no time, or none that can stand at that path."""
    if path == "save_interval":
        Point.parse_interval(text)
        return
    if path == "time_budget":
        if text is not None and parse_duration(text) <= 0:
            raise ValueError("a budget must be more than nothing.")
        return
    if path.startswith("scheduler."):
        Moment(text)
        return
    given = str(text).strip()
    point = Point.parse(given.removeprefix("-"))
    unit, is_length = point.unit, path == "max_duration"
    if is_length and unit not in ("ba", "ep", "sp"):
        hours = (
            " For a length in hours, give it as time_budget, and a max_duration that is long enough." if unit == SECONDS else ""
        )
        raise ValueError(f"{text} must be a number of batches, epochs or samples, such as 1000ba.{hours}")
    if unit == "tok":
        raise ValueError(f"{text}: images have no tokens to count; use ba, ep, sp or dur.")
    if point.value <= 0 or given.startswith("-"):
        raise ValueError(f"{text} must be positive, such as {'1000ba or 3ep' if is_length else '0.25dur'}.")
    if unit == BUDGET:
        raise ValueError(f"{text}: evaluation comes at batches, epochs, samples, times or parts of the run; use 0.1dur, say.")
    if is_length and unit == "ep" and num_stages > 1:
        raise ValueError(f"{text} cannot be in epochs with {STAGES}; use ba, or set progressive_resolution: false.")


# Composer's schedulers, which compare two times in one unit. `warmup_stable_decay` takes `Moment`s, each of which knows its own.
_AS_OURS = {"constant_with_warmup": None, "cosine_with_warmup": "cosine", "linear_decay_with_warmup": "linear"}  # its shape
_OVERLAP = 1.1  # of warm-up and decay together, in runs: the rate reaches 0.9 of its height then
_COUNTED = {"ba": "batches", "sp": "samples", "ep": "epochs", "dur": "parts of max_duration"}


def schedule_problems(values: Values, batches_per_epoch: float | None = None) -> list[str]:
    """Return what is wrong with the times of the scheduler: what Composer cannot compare, or the run never reaches.

    Args:
        values: keys of a recipe whose times are times.
        batches_per_epoch: if it is known; without it epochs are compared with epochs alone.
    """
    scheduler, path = values["scheduler"], "scheduler.t_warmup"
    given = values["max_duration"], scheduler.get("t_warmup"), scheduler.get("t_max", "1dur")
    total, warmup, t_max = map(_point, given)
    if total is None or total.value <= 0 or warmup is None:
        return []  # said elsewhere
    # Samples are a number of batches if all are of one size.
    batch_size = None if stages_of(values)[1:] else values["global_train_batch_size"]
    if scheduler.get("name") in _AS_OURS and (problem := _not_comparable(values, warmup, t_max, total, batch_size)):
        return [problem]
    key, share = _share_of_run(values, warmup, total, batch_size, batches_per_epoch)
    if share is None or share <= 1:
        return []
    return [
        f"{path}: {warmup.text} is longer than the run ({key}: {values[key]}), whose full learning rate would "
        f"never be reached; give a shorter one, such as 0.1dur, or a longer {key}."
    ]


def schedule_notes(values: Values) -> list[str]:
    """Return with which rate a run may end or what rate it may never have, where the scheduler is one that we know."""
    scheduler, budget = values["scheduler"], values["time_budget"]
    name, decay = scheduler.get("name"), scheduler.get("decay")
    total, warmup = map(_point, (values["max_duration"], scheduler.get("t_warmup", "0ba")))
    if total is None or warmup is None:
        return []  # said elsewhere
    if budget is not None and _AS_OURS.get(name) is not None:
        end = "t_max" if "t_max" in scheduler else "max_duration"
        return [
            f"scheduler: {name} falls until {end}, and does not know time_budget: {budget}. If the budget ends the run first, "
            f"the learning rate is still high. One that has fallen by whichever comes first: {_as_ours(values, warmup, total)}."
        ]
    batch_size = None if stages_of(values)[1:] else values["global_train_batch_size"]
    share = _share_of_run(values, warmup, total, batch_size)[1]
    if name != "warmup_stable_decay" or not isinstance(decay, int | float) or share is None or not _OVERLAP - decay < share <= 1:
        return []
    return [
        f"scheduler: its decay (decay: {decay:g}) begins before its warm-up ends (t_warmup: {warmup.text}), so that the full "
        f"learning rate is never reached. Give a shorter t_warmup, or decay: {1 - share:.3g}."
    ]


def budget_notes(values: Values) -> list[str]:
    """Return which times are parts of `max_duration` alone, in a run that `time_budget` may end before."""
    budget = values.get("time_budget")
    if budget is None:
        return []
    texts = [pair for key in ("algorithms", "callbacks") for pair in strings(values.get(key), key)]
    texts += [(key, str(values.get(key))) for key in ("eval_interval", "save_interval")]
    found = [f"{path}: {text}" for path, text in texts if re.fullmatch(r"[\d.]+dur", text.strip())]
    if not found:
        return []
    return [
        f"{listed(found)} {'are parts' if len(found) > 1 else 'is a part'} of max_duration: {values['max_duration']} alone. If "
        f"time_budget: {budget} ends the run first, they come late or never. In a window or stage, write 0.5dur or 0.5budget; as "
        "an interval, a number of batches such as 1000ba."
    ]


def _as_ours(values: Values, warmup: Point, total: Point) -> str:
    """Return what to write for a scheduler of Composer's: ours, which takes any time, and falls as that from the warm-up on."""
    scheduler = values["scheduler"]
    shape, batch_size = _AS_OURS[scheduler["name"]], None if stages_of(values)[1:] else values["global_train_batch_size"]
    share = _share_of_run(values, warmup, total, batch_size)[1] or 0.0
    decay = f"{1 - share:.3g}, shape: {shape}" if shape and share < 1 else "0"
    alpha_f = "".join(f", {key}: {value}" for key, value in scheduler.items() if key == "alpha_f" and shape)
    return f"'scheduler={{name: warmup_stable_decay, t_warmup: {warmup.text}, decay: {decay}{alpha_f}}}'"


def _share_of_run(
    values: Values, point: Point, total: Point, batch_size: int | None, batches_per_epoch: float | None = None
) -> tuple[str, float | None]:
    """Return which key says how long the run is that a time is of, and its share of that; None if it isn't known, or is of 0."""
    key, length, whole = "max_duration", point.value, total.value
    if point.unit == SECONDS:
        budget = _point(values["time_budget"])
        key, whole = "time_budget", None if budget is None else budget.value
    elif point.unit == "dur":
        whole = 1.0
    elif point.unit != total.unit:
        length, whole = (_batches(one, batch_size, batches_per_epoch) for one in (point, total))
    return key, length / whole if length is not None and whole else None


def _not_comparable(values: Values, warmup: Point, t_max: Point | None, total: Point, batch_size: int | None) -> str | None:
    """Return why a scheduler of Composer's cannot compare its warm-up with its end, at its path, if it cannot."""
    scheduler = values["scheduler"]
    name = scheduler["name"]
    ours = f"or {_as_ours(values, warmup, total)}, which takes any time"
    for path, point, instead in (("scheduler.t_warmup", warmup, "0.05dur"), ("scheduler.t_max", t_max, "1dur")):
        if point is not None and point.unit not in _COUNTED:
            return f"{path}: {name} counts batches, samples, epochs or dur, not {point.text}; give such as {instead}, {ours}."
    unit, against = (_composers_unit(point or warmup, total) for point in (warmup, t_max))
    if unit == against:
        return None
    instead = "a part of the run such as 0.05dur"
    if batch_size is not None and (warmup.unit, against) == ("sp", "ba"):
        instead = f"{max(math.ceil(warmup.value / batch_size), 1)}ba"
    elif batch_size is not None and (warmup.unit, against) == ("ba", "sp"):
        instead = f"{int(warmup.value) * batch_size}sp"
    key = "scheduler.t_max" if "t_max" in scheduler else "max_duration"
    end = scheduler.get("t_max", values["max_duration"])
    return (
        f"scheduler.t_warmup: {warmup.text} is counted in {_COUNTED[warmup.unit]}, and {key}: {end} in {_COUNTED[against]}, "
        f"which {name} cannot compare; give {instead}, {ours}."
    )


def _point(text: Any) -> Point | None:
    try:
        return Point.parse(str(text))
    except ValueError:
        return None


def _composers_unit(point: Point, total: Point) -> str:
    """Return the unit in which Composer compares a point: parts of the run are of its unit, and epochs become batches."""
    unit = total.unit if point.unit == "dur" else point.unit
    return "ba" if unit == "ep" else unit


def _batches(point: Point, batch_size: int | None, batches_per_epoch: float | None) -> float | None:
    """Return how many batches it lasts; None if that isn't known."""
    if point.unit == "sp":
        return None if batch_size is None else point.value / batch_size
    if point.unit == "ep":
        return None if batches_per_epoch is None else point.value * batches_per_epoch
    return point.value if point.unit == "ba" else None


# ------------------------------------------------------------------------------------------------ shares of a mixture

_WEIGHT, _UNTIL = "weight", "until"


@dataclass(frozen=True)
class Phase:
    """A span of the run in which the data sets of a mixture have the same shares.

    Args:
        weights: by name; 0: not drawn from. Empty if the mixture has none.
        until: its end, a `Moment`; None for the rest of the run.
    """

    weights: Mapping[str, float]
    until: str | None = None

    def shares(self, samples: Mapping[str, int]) -> dict[str, float]:
        """Return the share of every data set; without weights, of one of so many samples."""
        weights = self.weights or samples
        return {name: weights[name] / sum(weights.values()) for name in samples}

    def drawn_from(self, samples: Mapping[str, int]) -> int:
        """Return how many of the samples of all data sets are of one that has a share."""
        return sum(count for name, count in samples.items() if not self.weights or self.weights[name])

    def __str__(self) -> str:
        return f"until {self.until}" if self.until else "then"


def weight_steps(mix: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield data set, path and keys of every mapping in a mixture that has a `weight`, perhaps `until` a time."""
    for name, part in mix.items():
        listed = part.get(_WEIGHT)
        if not isinstance(listed, list):
            yield name, f"mix.{name}", part
            continue
        for index, step in enumerate(listed):
            yield name, f"mix.{name}.{_WEIGHT}[{index}]", step if isinstance(step, dict) else {_WEIGHT: step}


def phases_of(mix: Mapping[str, Any]) -> list[Phase]:
    """Return the phases of a mixture, in order: one, if no weight changes.

    A data set's `weight` is a number, with `until` one that it has up to then, and none after. Or it is a list of such, each for
    the time up to its `until`, the last to the end of the run.

    Raises:
        UserError: with all that is wrong; each begins with its path.
    """
    problems, steps = Problems(), dict[str, list[tuple[str, float, Moment | None]]]()
    for name, path, step in weight_steps(mix):
        with problems.noted():
            in_list = isinstance(mix[name][_WEIGHT], list) if _WEIGHT in mix[name] else False
            if in_list or step.keys() & {_WEIGHT, _UNTIL}:
                steps.setdefault(name, []).append(_weight_step(path, step, in_list))
    for name, part in mix.items():
        if isinstance(part.get(_WEIGHT), list):
            if not part[_WEIGHT] or _UNTIL in part:
                problems.found.append(f"mix.{name}: a list of weights needs at least one, and each its own until.")
            problems.found.extend(_disorder(name, steps.get(name, [])))
    if steps and (without := next((name for name in mix if name not in steps), None)) and not problems.found:
        problems.found.append(
            f"mix.{without}.weight is missing: give one to all data sets, or to none: samples are seen equally then."
        )
    problems.raise_any()
    with at_path("mix"):
        ends = in_order(end for listed in steps.values() for _, _, end in listed if end is not None)
    phases = [_phase(steps, end) for end in (*ends, None)]
    for before, phase in zip([None, *phases], phases, strict=False):
        if steps and not any(phase.weights.values()):
            since = f"from {before.until} on" if before else "at the beginning"
            problems.found.append(f"mix: no data set has a weight {since} ({phase}); nothing would be trained on.")
    problems.raise_any()
    return phases


def _weight_step(path: str, step: Mapping[str, Any], in_list: bool) -> tuple[str, float, Moment | None]:
    weight, until = step.get(_WEIGHT), step.get(_UNTIL)
    if unknown := (step.keys() - {_WEIGHT, _UNTIL} if in_list else ()):
        raise UserError(f"{path}.{min(unknown)}: unknown; a weight in a list has {_WEIGHT} and {_UNTIL}.")
    expected = "0 or a positive number" if in_list else "a positive number"
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not (0 < weight < math.inf or (in_list and weight == 0))
    ):
        told = f"must be {expected}, not {weight!r}" if _WEIGHT in step else f"is missing: {expected}, beside {_UNTIL}"
        raise UserError(f"{path}.{_WEIGHT} {told}.")
    if until is None:
        return path, float(weight), None
    with at_path(f"{path}.{_UNTIL}"):
        end = Moment(until)
        if any(point.unit in ("ep", "tok") for point in end.points):
            raise ValueError(f"{until} cannot be in epochs, since a change of shares begins one, or tokens; use ba, sp or dur.")
        if end.is_beginning:
            raise ValueError(f"{until} must be later than the beginning.")
    return path, float(weight), end


def _disorder(name: str, steps: Sequence[tuple[str, float, Moment | None]]) -> Iterator[str]:
    """Yield what is wrong with the order of a data set's weights."""
    for (path, _, end), (following, _, later) in pairwise(steps):
        if end is None:
            yield f"{path}.until is missing; only the last weight may go on to the end."
        elif later is not None and later.may_precede(end):
            yield f"{following}.until: {later} must be later than the weight before it ends."


def _phase(steps: Mapping[str, Sequence[tuple[str, float, Moment | None]]], until: Moment | None) -> Phase:
    """Return the phase that ends at a moment: of every data set the first weight that lasts up to it."""

    def weight(listed: Sequence[tuple[str, float, Moment | None]]) -> float:
        lasting = (w for _, w, end in listed if end is None or (until is not None and until.surely_by(end)))
        return next(lasting, 0.0)

    return Phase({name: weight(listed) for name, listed in steps.items()}, None if until is None else until.text)
