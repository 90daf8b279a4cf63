"""metrics.jsonl: one JSON object per step, complete after a crash and consistent after a resume."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

__all__ = ["MetricsFile", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsFile(LoggerDestination):
    """Writes what was logged during a step as one line, on rank 0.

    Every line has `batch` (steps completed) and `seconds` (of training, over all restarts); the last line of a finished
    run also has the final scores and `train_seconds`, the training time with its sampling. A resumed run drops the lines
    after its checkpoint before it goes on.

    Args:
        folder: where `metrics.jsonl` goes.
        interval: write every so many steps.
    """

    def __init__(self, folder: str, interval: int = 1):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, not {interval}.")
        self.path = Path(folder) / "metrics.jsonl"
        self._interval = interval
        self._row: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._last_start = 0
        self._seconds_before = 0.0
        self._fit_start = 0.0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            number = value.item() if hasattr(value, "item") else value
            if isinstance(number, int | float):
                self._row[name] = number if math.isfinite(number) else None  # JSON has no NaN

    def fit_start(self, state: State, logger: Logger) -> None:
        self._seconds_before = state.timestamp.total_wct.total_seconds()
        self._fit_start = time.monotonic()
        if dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            batch = int(state.timestamp.batch)
            kept = [row for row in read_metrics(self.path) if row["batch"] <= batch] if self.path.exists() else []
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.rename(self.path)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # after evaluation, with or before the checkpoint
        if int(state.timestamp.batch) % self._interval == 0:
            self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """The last line again, with what was logged since."""
        self._row["train_seconds"] = round(self._seconds_before + time.monotonic() - self._fit_start, 3)
        if self._last.get("batch") == int(state.timestamp.batch):
            self._row = self._last | self._row
            if dist.get_global_rank() == 0:
                os.truncate(self.path, self._last_start)
        self._write(state)

    def _write(self, state: State) -> None:
        seconds = round(state.timestamp.total_wct.total_seconds(), 3)
        self._last, self._row = {"batch": int(state.timestamp.batch), "seconds": seconds} | self._row, {}
        if dist.get_global_rank() == 0:
            with self.path.open("a") as file:
                self._last_start = file.tell()
                file.write(json.dumps(self._last, allow_nan=False) + "\n")
