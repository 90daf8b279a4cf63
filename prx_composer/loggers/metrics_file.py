"""metrics.jsonl: one JSON object per step, complete after a crash and consistent after a resume."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

log = logging.getLogger(__name__)


def _up_to(path: Path, batch: int) -> tuple[int, int]:
    """Return the last batch ≤ `batch` that has a whole line, and where its line ends."""
    last = end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["batch"] > batch or not line.endswith(b"\n"):
                break
            last, end = row["batch"], end + len(line)
    return last, end


class MetricsFile(LoggerDestination):
    """Write what was logged during a step as one line, on rank 0.

    Every line has `batch` (steps completed) and `seconds` (of training, over all restarts); the last line of a finished
    run also has the final scores and `train_seconds`, the training time with its sampling. A resumed run drops the lines
    after its checkpoint before it goes on; the checkpoint carries the line of its own batch, which is written after it.
    Lines that a full disk refuses wait in memory, and training goes on.

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
        self._last_start = 0  # of the last line that was written whole
        self._end = 0  # of the file's whole lines
        self._waiting: list[dict[str, Any]] = []
        self._loaded: dict[str, Any] | None = None
        self._timestamp: Any = None
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
        self._timestamp = state.timestamp
        if dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            last, self._end = _up_to(self.path, int(state.timestamp.batch)) if self.path.exists() else (0, 0)
            if self._loaded and last < self._loaded["batch"]:  # killed between the checkpoint and its line
                self._waiting.append(self._loaded)
            self._write()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._timestamp = state.timestamp

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # loggers come after callbacks: evaluation is in it
        if int(state.timestamp.batch) % self._interval == 0:
            self._finish_row(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the last line again, with what was logged since."""
        self._row["train_seconds"] = round(self._seconds_before + time.monotonic() - self._fit_start, 3)
        if self._last.get("batch") == int(state.timestamp.batch) and not self._waiting:
            self._row = self._last | self._row
            if dist.get_global_rank() == 0:
                self._end = self._last_start
        self._finish_row(state)

    def state_dict(self) -> dict[str, Any]:  # as text: a sharded checkpoint is read key by key, and rows have different ones
        unwritten = self._timestamp is not None and int(self._timestamp.batch) % self._interval == 0
        return {"row": json.dumps(self._labelled(self._timestamp)) if unwritten else ""}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = json.loads(state["row"]) if state.get("row") else None

    def _labelled(self, timestamp: Any) -> dict[str, Any]:
        return {"batch": int(timestamp.batch), "seconds": round(timestamp.total_wct.total_seconds(), 3)} | self._row

    def _finish_row(self, state: State) -> None:
        self._last, self._row = self._labelled(state.timestamp), {}
        if dist.get_global_rank() == 0:
            self._waiting.append(self._last)
            self._write()

    def _write(self) -> None:
        """Append the lines that wait, after the last whole one: a resume or a failed write may have left others."""
        lines = [(json.dumps(row, allow_nan=False) + "\n").encode() for row in self._waiting]
        try:
            with self.path.open("ab") as file:
                file.truncate(self._end)
                file.write(b"".join(lines))
        except OSError as error:
            if len(self._waiting) <= 1:
                log.error("%s cannot be written (%s); its lines wait in memory.", self.path, error)
            return
        self._waiting.clear()
        self._end += sum(map(len, lines))
        self._last_start = self._end - len(lines[-1]) if lines else self._end
