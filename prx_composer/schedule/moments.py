"""Points and spans of training time: in Composer's units, in hours of training, or as a part of the time budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prx_composer.common.errors import UserError

if TYPE_CHECKING:  # a recipe's times are checked before Composer is imported
    from composer.core import State

BUDGET, SECONDS = "budget", "sec"
BATCH, EPOCH, DURATION, TOKEN = "ba", "ep", "dur", "tok"  # Composer's TimeUnits
_NUMBER = r"(\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)"
_UNITS = {86400: "d|days?", 3600: "h|hrs?|hours?", 60: "m|mins?|minutes?", 1: "s|secs?|seconds?"}
_DURATION = re.compile(r" ?".join(rf"(?:{_NUMBER} ?(?:{names}))?" for names in _UNITS.values()), re.IGNORECASE)
_COUNT = re.compile(rf"{_NUMBER} ?(iter|ep|ba|sp|tok|dur|budget)", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Return the seconds of "3d", "24h", "90m", "1h30m", "1.5h", "86400s", "86400sec", "2 hours" or "1d 12h".

    Raises:
        ValueError: anything else, and nothing at all.
    """
    text = str(text).strip()
    match = _DURATION.fullmatch(text)
    if match is None or not match[0]:
        raise ValueError(f"{text!r} is no duration such as 24h, 90m, 1h30m, 3d or 86400s.")
    return sum(length * float(number or 0) for length, number in zip(_UNITS, match.groups(), strict=True))


def duration_string(seconds: float) -> str:
    """Return seconds as people say them: "23h05m", "4m10s", "12s"."""
    whole = round(max(seconds, 0))
    if whole >= 3600:
        minutes = round(whole / 60)
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class TrainingTime:
    """What measures training, over all restarts; `clock.TrainingClock` is one.

    Attributes:
        elapsed: seconds of training up to the end of the newest step.
        fraction: largest part of the budget that has been reached; raising the budget does not lower it.
        budget: seconds of training that the recipe's `time_budget` allows, if it does.
    """

    elapsed = 0.0
    fraction = 0.0
    budget: float | None = None


def _time_of(state: State, point: Point) -> TrainingTime:
    found = next((callback for callback in state.callbacks if isinstance(callback, TrainingTime)), None)
    if found is None:
        raise UserError(f"{point.text}: time is measured by train.py only; here, give batches, samples, epochs or dur.")
    if point.unit == BUDGET and found.budget is None:
        raise UserError(f"{point.text} is a part of the time budget, and the run has none; set time_budget=24h, say.")
    return found


@dataclass(frozen=True)
class Point:
    """A point of training time in one unit.

    Args:
        value: of `unit`.
        unit: Composer's "ba", "sp", "ep", "tok" and "dur"; "sec", seconds of training by `TrainingClock`; or "budget", a part of
            the time budget.
        text: as it was given.
    """

    value: float
    unit: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Point:
        """Read a point of time. Raise ValueError for what is none."""
        text = str(text).strip()
        match = _COUNT.fullmatch(text)
        if match is None:
            try:
                return cls(parse_duration(text), SECONDS, text)
            except ValueError:
                allowed = "1000ba, 3ep, 64000sp, 0.5dur, 2h, 1h30m or 0.83budget"
                raise ValueError(f"{text!r} is no time such as {allowed}.") from None
        value, unit = float(match[1]), match[2].lower()
        if unit == BUDGET and value > 1:
            raise ValueError(f"{text!r}: a part of the budget lies between 0 and 1, such as 0.83budget.")
        if unit not in (BUDGET, DURATION) and not value.is_integer():
            raise ValueError(f"{text!r}: these are counted in whole numbers.")
        return cls(value, unit, text)

    @classmethod
    def parse_interval(cls, text: str) -> Point:
        """Read an interval. Raise ValueError for what nothing can be repeated at."""
        point = cls.parse(text)
        if point.value <= 0 or point.unit in (BUDGET, TOKEN):
            raise ValueError(f"an interval must be a positive time such as 2000ba, 0.1dur or 30m, not {text}.")
        return point

    def for_composer(self) -> str:
        """Return it as Composer's `Time` takes it, which knows no days, and of the day no more than 23 hours."""
        return f"{math.ceil(self.value)}sec" if self.unit == SECONDS else self.text

    def reached(self, state: State) -> float:
        """Return how much of `value` has passed, in its unit."""
        if self.unit == BUDGET:
            return _time_of(state, self).fraction
        if self.unit == SECONDS:
            return _time_of(state, self).elapsed if self.value else 0.0
        if self.unit == DURATION:
            elapsed = state.get_elapsed_duration()
            return -math.inf if elapsed is None else elapsed.value
        return state.timestamp.get(self.unit).value

    def progress(self, state: State) -> float:
        """Return how much of the way there is done after the step in hand, from 0 to 1.

        A scheduler, which is asked during a step, needs that.
        """
        if self.value == 0:
            return 1.0
        if self.unit in (BUDGET, SECONDS):
            done = self.reached(state)
        elif self.unit == DURATION:
            assert state.max_duration is not None
            done = count_after_step(state, state.max_duration.unit.value) / state.max_duration.value
        else:
            done = count_after_step(state, self.unit)
        return min(done / self.value, 1.0)

    def seconds_left(self, state: State, seconds_per_batch: float) -> float:
        """Estimate the training time until then, at the present pace; inf if it can't be known."""
        if self.unit in (SECONDS, BUDGET):
            time = _time_of(state, self)
            seconds = self.value if self.unit == SECONDS or time.budget is None else self.value * time.budget
            return seconds - time.elapsed
        reached = self.reached(state)
        batches_per_unit = int(state.timestamp.batch) / reached if reached > 0 else math.inf
        return (self.value - reached) * batches_per_unit * seconds_per_batch


def count_after_step(state: State, unit: str) -> float:
    """Return the batches, samples or (parts of) epochs at the end of the step in hand.

    The state's `timestamp` is still that of the step's beginning.
    """
    now, before = state.timestamp, state.previous_timestamp
    count = now.get(unit).value
    if unit == BATCH:
        return count + 1
    if unit == EPOCH:
        return count + (int(now.batch_in_epoch) + 1) / int(state.dataloader_len) if state.dataloader_len else count
    return count + max(count - before.get(unit).value, 0) if before is not None else count  # as many as in the step before


class Moment:
    """The first of one or several points of time: "100000ba", "2h", "100000ba or 0.83budget".

    Seconds and parts of the budget are of training over all restarts (`TrainingClock`), and the same on all ranks. A moment that
    has come stays come: batches and training time only grow, and the clock remembers the largest part of the budget that was
    reached, also when the budget is raised. (Only a longer `max_duration` moves "dur"s that have passed.)

    Args:
        text: alternatives, separated by " or ".

    Raises:
        ValueError: one of them is no time.
    """

    def __init__(self, text: str):
        self.text = " ".join(str(text).split())
        self.points = tuple(Point.parse(part) for part in self.text.split(" or "))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Moment({self.text!r})"

    def has_come(self, state: State) -> bool:
        return any(point.reached(state) >= point.value for point in self.points)

    def progress(self, state: State) -> float:
        """Return how much of the way there is done after the step in hand, from 0 to 1."""
        return max(point.progress(state) for point in self.points)

    def seconds_left(self, state: State, seconds_per_batch: float) -> float:
        """Estimate the training time until then, at the present pace; inf if it can't be known."""
        return max(min(point.seconds_left(state, seconds_per_batch) for point in self.points), 0.0)

    @property
    def is_beginning(self) -> bool:
        """Say whether it has come before the first step."""
        return any(point.value == 0 for point in self.points)

    def surely_by(self, other: Moment) -> bool:
        """Return whether it is certain not to come later than `other`; points in different units can't be compared."""
        return self.is_beginning or all(any(_not_later(mine, theirs) for mine in self.points) for theirs in other.points)

    def may_precede(self, other: Moment) -> bool:
        """Return whether it comes no later than `other` whenever the same unit decides about both."""
        return any(_not_later(mine, theirs) for mine in self.points for theirs in other.points)


def in_order(moments: Iterable[Moment]) -> list[Moment]:
    """Return moments in order, each once. Raise ValueError for two of which it isn't known which comes first."""
    ordered = list[Moment]()
    for moment in sorted(moments, key=lambda moment: [point.value for point in moment.points]):
        for other in ordered[-1:]:
            pairs = list(zip(moment.points, other.points, strict=False))
            if len(moment.points) != len(other.points) or not all(_not_later(theirs, mine) for mine, theirs in pairs):
                raise ValueError(f"whether {other} or {moment} comes first isn't known; give all times in one unit, such as dur.")
        if not ordered or [p.value for p in moment.points] != [p.value for p in ordered[-1].points]:
            ordered.append(moment)
    return ordered


def names_budget(text: str) -> bool:
    """Return whether a string is a moment one of whose alternatives is a part of the time budget."""
    try:
        return any(point.unit == BUDGET for point in Moment(text).points)
    except ValueError:
        return False


def _not_later(first: Point, second: Point) -> bool:
    return first.unit == second.unit and first.value <= second.value


class ScheduleWindow:
    """The span of training for which start ≤ now < end.

    Args:
        start: a `Moment`, such as "1000ba", "0.1dur" or "2h or 0.1budget".
        end: likewise, or None for the end of training.

    Raises:
        ValueError: not a time string.
    """

    def __init__(self, start: str = "0ba", end: str | None = None):
        self.start = Moment(start)
        self.end = None if end is None else Moment(end)

    def contains(self, state: State) -> bool:
        return self.start.has_come(state) and not self.is_over(state)

    def is_over(self, state: State) -> bool:
        """Return whether the window has closed for good."""
        return self.end is not None and self.end.has_come(state)

    def is_disjoint_from(self, other: ScheduleWindow) -> bool:
        """Return whether the two are certain never to be open at once; times in different units can't be compared."""
        return self._ends_before(other) or other._ends_before(self)

    def _ends_before(self, other: ScheduleWindow) -> bool:
        return self.end is not None and self.end.surely_by(other.start)
