"""Points and spans of training time, in any of Composer's units."""

import datetime

from composer.core import State, Time, TimeUnit

__all__ = ["ScheduleWindow", "has_reached"]


def has_reached(state: State, time: Time) -> bool:
    """Whether training has come to `time`: batches, samples, epochs, tokens, seconds, or a part of the run (`0.5dur`)."""
    if time.unit == TimeUnit.DURATION:
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed.value >= time.value
    if time.unit == TimeUnit.SECOND:
        return state.timestamp.total_wct >= datetime.timedelta(seconds=float(time.value))
    return state.timestamp.get(time.unit) >= time


class ScheduleWindow:
    """start ≤ now < end.

    Args:
        start: time string, such as "1000ba" or "0.1dur".
        end: likewise, or None for the end of training.

    Raises:
        ValueError: not a time string.
    """

    def __init__(self, start: str = "0ba", end: str | None = None):
        self.start = Time.from_timestring(start)
        self.end = None if end is None else Time.from_timestring(end)

    def contains(self, state: State) -> bool:
        return has_reached(state, self.start) and not (self.end is not None and has_reached(state, self.end))

    def is_over(self, state: State) -> bool:
        """Whether the window has closed for good."""
        return self.end is not None and has_reached(state, self.end)

    def is_open_throughout(self) -> bool:
        """Whether it has neither a start nor an end."""
        return self.start.value == 0 and self.end is None

    def is_disjoint_from(self, other: "ScheduleWindow") -> bool:
        """Whether the two are certain never to be open at once; times in different units can't be compared."""
        return self._ends_before(other) or other._ends_before(self)

    def _ends_before(self, other: "ScheduleWindow") -> bool:
        return self.end is not None and self.end.unit == other.start.unit and self.end <= other.start
