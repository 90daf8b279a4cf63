"""Summaries of columns in bounded memory, however many values go by."""

import math
from collections import Counter
from typing import Any

SHARES = (0.05, 0.5, 0.95)


class Spread:
    """Smallest, largest and mean of numbers, exactly, and their quantiles to three digits: exact for integers below 1,000."""

    def __init__(self) -> None:
        self.count, self.missing = 0, 0
        self._sum, self._low, self._high = 0.0, math.inf, -math.inf
        self._rounded: Counter[float] = Counter()

    def add(self, value: float) -> None:
        """NaN counts as missing."""
        if math.isnan(value):
            self.missing += 1
            return
        self.count += 1
        self._sum += value
        self._low, self._high = min(self._low, value), max(self._high, value)
        self._rounded[float(f"{value:.3g}")] += 1

    def quantile(self, share: float) -> float:
        """The value that this share of the values, or more, doesn't exceed."""
        rank, below = math.ceil(share * self.count), 0
        for value in sorted(self._rounded):
            below += self._rounded[value]
            if below >= rank:
                return min(max(value, self._low), self._high)
        return math.nan

    def to_json(self) -> dict[str, Any]:
        if not self.count:
            return {"count": 0, "missing": self.missing}
        low, median, high = (_plain(self.quantile(share)) for share in SHARES)
        return {
            "count": self.count,
            "missing": self.missing,
            "min": _plain(self._low),
            "5%": low,
            "median": median,
            "mean": round(self._sum / self.count, 6),
            "95%": high,
            "max": _plain(self._high),
        }


class Distinct:
    """How many different texts there are, up to a limit, and which are the most frequent of those."""

    LIMIT, LETTERS, NAMED = 1000, 80, 5

    def __init__(self) -> None:
        self.missing = 0
        self._counts: Counter[str] = Counter()
        self._more = False

    def add(self, text: str) -> None:
        """The empty text counts as missing."""
        if not text:
            self.missing += 1
            return
        text = text[: self.LETTERS]
        if text in self._counts or len(self._counts) < self.LIMIT:
            self._counts[text] += 1
        else:
            self._more = True

    def to_json(self) -> dict[str, Any]:
        most = sorted(self._counts.items(), key=lambda entry: (-entry[1], entry[0]))[: self.NAMED]
        return {"distinct": len(self._counts), "or_more": self._more, "missing": self.missing, "most": dict(most)}


def _plain(value: float) -> float | int:
    """3 rather than 3.0."""
    return int(value) if math.isfinite(value) and value == int(value) else value
