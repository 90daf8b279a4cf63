"""Timing in turns: A B, B A, A B … in one process, so that what slows the machine down slows all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["milliseconds", "ratio", "summary", "time_in_turns"]


def milliseconds(function: Callable[[], Any]) -> float:
    """How long a call takes; it must wait for its device by itself."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def time_in_turns(steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds of every step, once per round, the order of calls reversed every other round; the first rounds don't count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds + warmup):
            gc.collect()
            for name in list(steps) if number % 2 else reversed(list(steps)):
                elapsed = milliseconds(steps[name])
                if number >= warmup:
                    times[name].append(elapsed)
    finally:
        if was_collecting:
            gc.enable()
    return times


def summary(values: list[float], digits: int = 3) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, Any]:
    """`slow` / `fast` within each round: median and quartiles."""
    return summary([a / b for a, b in zip(times[slow], times[fast], strict=True)])
