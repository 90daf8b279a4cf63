"""Counts of what became of the records: made per work unit, added up over all."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from prx_composer.commands.convert.records import Passed, Record, has
from prx_composer.commands.convert.sample import Dropped, Kept, Measured, clean_key

EXAMPLES = 5  # keys that are kept of every reason …
FILES = 100  # … and of the one that stands for a whole file
DETAIL = 600  # characters: messages of other libraries can be long
HISTOGRAMS = {"size": 64, "log2_aspect": 0.25, "caption_length": 50}  # widths of their bins


class Tally:
    """Counts as JSON stores them.

    Args:
        content: counts to go on from.
    """

    def __init__(self, content: dict[str, Any] | None = None):
        content = content or {}
        self.counts = Counter[str](content.get("counts", {}))
        self.dropped = Counter[str](content.get("dropped", {}))
        self.buckets = Counter[str](content.get("buckets", {}))
        self.images = Counter[str](content.get("images", {}))  # records by the column that their image came from
        self.columns = Counter[str](content.get("columns", {}))  # records that have a column, be it empty
        self.passed = Passed(content.get("passed", {}))
        self.histograms = {name: Counter[str](content.get("histograms", {}).get(name, {})) for name in HISTOGRAMS}
        self.examples: dict[str, list[str]] = {reason: list(keys) for reason, keys in content.get("examples", {}).items()}

    def see(self, record: Record, asked: Iterable[str]) -> None:
        """Counts the columns of a record, those that the settings name; a record of none is not counted."""
        if record.columns:
            self.counts["with_columns"] += 1
            self.columns.update(name for name in asked if has(record.columns, name))
        if record.image is not None and record.image_column:
            self.images[record.image_column] += 1

    def add(self, outcome: Kept | Dropped) -> None:
        self.counts["read"] += 1
        self._measure(outcome.measured)
        if isinstance(outcome, Dropped):
            self.dropped[outcome.reason] += 1
            self._example(outcome.reason, outcome.key, outcome.detail)
            return
        height, width, _ = outcome.measured
        self.counts["kept"] += 1
        self.counts["original_bytes"] += outcome.original
        self.counts["enlarged"] += height < outcome.bucket.height or width < outcome.bucket.width
        self.counts["captions_filled"] += outcome.filled
        self.buckets[str(outcome.bucket)] += 1

    def _measure(self, measured: Measured) -> None:
        height, width, length = measured
        values = {"caption_length": length} if length else {}
        if height and width:
            values |= {"size": math.sqrt(height * width), "log2_aspect": math.log2(width / height)}
        for name, value in values.items():
            self.histograms[name][str(math.floor(value / HISTOGRAMS[name]))] += 1

    def _example(self, reason: str, key: str, detail: str = "") -> None:
        keys = self.examples.setdefault(reason, [])
        if len(keys) < (FILES if reason == "damaged_input" else EXAMPLES):
            keys.append(f"{key}: {clean_key(detail)[:DETAIL]}" if detail else key)

    def include(self, other: "Tally") -> None:
        """Adds what another unit counted."""
        self.counts += other.counts
        self.dropped += other.dropped
        self.buckets += other.buckets
        self.images += other.images
        self.columns += other.columns
        for kind, (count, example) in other.passed.items():
            self.passed.add(kind, example, count)
        for name, histogram in other.histograms.items():
            self.histograms[name] += histogram
        for reason, keys in other.examples.items():
            for key in keys:
                self._example(reason, key)

    def check(self) -> None:
        """Raise RuntimeError unless every record that was read is either kept, in one bucket, or left out for a reason."""
        read, kept, dropped = self.counts["read"], self.counts["kept"], self.dropped.total()
        if read != kept + dropped or kept != self.buckets.total():
            raise RuntimeError(
                f"{read} records were read, {kept} kept, {dropped} left out, and {self.buckets.total()} lie in buckets. "
                "These don't add up, which is a fault of prx data convert; nothing was put in place."
            )

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"counts": dict(self.counts), "dropped": dict(self.dropped), "buckets": dict(self.buckets)}
        content |= {"images": dict(self.images), "columns": dict(self.columns)}
        content["passed"] = dict(self.passed)
        return content | {"histograms": {n: dict(h) for n, h in self.histograms.items()}, "examples": self.examples}
