"""metrics.jsonl as columns, whatever a crash, a resume or another program left in it."""

import json
import math
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class Column:
    """One metric: `batches`, strictly increasing, and `values`, NaN where they were not finite."""

    def __init__(self) -> None:
        self._batches, self._values = array("q"), array("d")

    def append(self, batch: int, value: float) -> None:
        self._batches.append(batch)
        self._values.append(value)

    def rewind(self, batch: int) -> None:
        """Forgets `batch` and all after it."""
        while self._batches and self._batches[-1] >= batch:
            self._batches.pop()
            self._values.pop()

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def batches(self) -> Numbers:
        return np.array(self._batches, dtype=np.float64)

    @property
    def values(self) -> Numbers:
        return np.array(self._values, dtype=np.float64)

    @property
    def last(self) -> float:
        return self._values[-1]


class History:
    """What was logged.

    A step that comes again, after a resume from an older checkpoint, replaces what was there from it on. Lines that cannot be
    read, as a crash cuts them, are counted in `unreadable` and left out.
    """

    def __init__(self, path: Path):
        self.columns: dict[str, Column] = {}
        self.unreadable = 0
        self.repeated = 0
        """Lines that later ones replaced."""
        steps = Column()
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    self._read(line, steps)
        self.columns = {name: column for name, column in self.columns.items() if len(column)}
        self.batches = steps.batches
        self.seconds = steps.values
        """Seconds of training at each of `batches`."""

    def _read(self, line: bytes, steps: Column) -> None:
        try:
            row = json.loads(line)
            batch = int(row["batch"])
        except (ValueError, TypeError, KeyError):
            self.unreadable += bool(line.strip())
            return
        if len(steps) and batch <= steps._batches[-1]:
            before = len(steps)
            for column in (steps, *self.columns.values()):
                column.rewind(batch)
            self.repeated += before - len(steps)
        seconds = row.get("seconds")
        steps.append(batch, float(seconds) if isinstance(seconds, int | float) else math.nan)
        for name, value in row.items():
            if name not in ("batch", "seconds") and (value is None or isinstance(value, int | float)):
                self.columns.setdefault(name, Column()).append(batch, math.nan if value is None else float(value))

    @property
    def steps(self) -> int:
        return int(self.batches[-1]) if len(self.batches) else 0

    @property
    def finished(self) -> bool:
        """Whether the last line is a finished run's."""
        column = self.columns.get("train_seconds")
        return column is not None and bool(column.batches[-1] == self.steps)

    def last(self, name: str) -> float | None:
        column = self.columns.get(name)
        return column.last if column is not None else None

    def seconds_at(self, batch: float) -> float | None:
        """Of training, at the end of a step."""
        known = np.isfinite(self.seconds)
        return float(np.interp(batch, self.batches[known], self.seconds[known])) if known.any() else None
