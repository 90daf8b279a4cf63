"""Where metrics go on this disk, metrics.jsonl and TensorBoard, and what all trackers share.

Their steps are batches, all restarts are one run, and their failures don't stop training.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from composer.core import State
from composer.loggers import Logger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from torch import Tensor

from prx_composer.common.files import write_whole
from prx_composer.common.pages import image_grid
from prx_composer.runs.checkpoints import Checkpoint
from prx_composer.schedule.clock import clock_of

log = logging.getLogger(__name__)


def log_drawings(logger: Logger, images: Tensor, prompts: list[str], step: int) -> None:
    """Give images with their prompts to every logger; one that knows no prompts gets the images alone.

    Args:
        images: uint8 (len(prompts), 3, height, width), on the CPU.
    """
    for destination in logger.destinations:
        if isinstance(destination, Tracker):
            destination.log_drawings(images, prompts, step)
        else:
            destination.log_images(images.float().div(255), name="images", step=step, use_table=False)


def log_checkpoint(logger: Logger, checkpoint: Checkpoint) -> None:
    """Tell every tracker that a checkpoint is complete. On rank 0."""
    for destination in logger.destinations:
        if isinstance(destination, Tracker):
            destination.log_checkpoint(checkpoint)


def run_folder_of(state: State) -> Path:
    return clock_of(state).path.parent


class Tracker(LoggerDestination):
    """Base of a tracker, to be mixed into one of Composer's loggers.

    Step n is the n-th batch and all that comes after it, its evaluation say, as in metrics.jsonl. (Composer counts the batches
    that are complete, by which a batch's own loss is at n − 1 and what is said about it at n.) A run that goes on from the
    checkpoint of batch n therefore has nothing more to say about step n.
    """

    name: str  # in the registry
    _batch = 0  # the one in hand
    _failed: frozenset[str] = frozenset()

    @property
    def tracked_run(self) -> str | None:
        """Return the tracker's id of this run, if it has ids and knows it."""
        return None

    def fit_start(self, state: State, logger: Logger) -> None:
        self._batch = int(state.timestamp.batch) + 1
        if self.tracked_run and dist.get_global_rank() == 0:
            remember_run(run_folder_of(state), self.name, self.tracked_run)

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._batch = int(state.timestamp.batch) + 1

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._batch = int(state.timestamp.batch) + 1

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._sends(step):
            with self._without_stopping("metrics"):
                super().log_metrics(metrics, self._step(step))

    def log_images(self, *args: Any, **options: Any) -> None:
        if self._sends(options.get("step")):
            with self._without_stopping("images"):
                super().log_images(*args, **options | {"step": self._step(options.get("step"))})

    def log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None:
        """See the function of this name; a subclass says `_log_drawings`."""
        if self._sends(step):
            with self._without_stopping("images"):
                self._log_drawings(images, prompts, self._step(step))

    def _log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None: ...

    def log_checkpoint(self, checkpoint: Checkpoint) -> None:
        """See the function of this name."""

    def post_close(self) -> None:
        with self._without_stopping("the run's end"):
            super().post_close()

    def _sends(self, step: int | None) -> bool:
        """Return whether this rank tells the tracker anything about a step."""
        return True

    def _step(self, step: int | None) -> int:
        return max(step or 0, self._batch)

    @contextmanager
    def _without_stopping(self, what: str) -> Iterator[None]:
        """Turn whatever fails inside of this context into a warning, once for each `what`, and let training go on."""
        try:
            yield
        except Exception as error:  # of the tracker's own classes, its server's and the system's
            if what not in self._failed:
                self._failed |= {what}
                log.warning(
                    "loggers.%s: %s could not be logged (%s: %s). Training goes on; this is said once.",
                    self.name, what, type(error).__name__, str(error).strip().partition("\n")[0],
                )  # fmt: skip


TRACKING = "tracking.json"


def remembered_run(folder: Path, tracker: str) -> str | None:
    """Return the id of this run at a tracker, if it has been there before."""
    run_id = _read(folder).get(tracker)
    return run_id if isinstance(run_id, str) and run_id else None


def remember_run(folder: Path, tracker: str, run_id: str) -> None:
    """Keep the id of this run at a tracker, on rank 0. A disk that is full is no reason not to train."""
    known = _read(folder)
    if known.get(tracker) == run_id:
        return
    try:
        write_whole(folder / TRACKING, (json.dumps(known | {tracker: run_id}, indent=1) + "\n").encode())
    except OSError as error:
        log.warning("%s cannot be written (%s): a resumed run will be another one at %s.", folder / TRACKING, error, tracker)


def _read(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / TRACKING).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): trackers begin another run.", folder / TRACKING, error)
        return {}
    return content if isinstance(content, dict) else {}


class TensorBoard(Tracker, TensorboardLogger):
    """Composer's TensorboardLogger; scalars, drawings with their prompts, and the recipe as text.

    A resumed run goes on in the same folder, `<log_dir>/<run_name>`. Its event file says from which step on what the files before
    it contain is void, so that no step is there twice. Each start writes one event file; Composer's own logger begins another
    at every flush, for uploads. What is written before a checkpoint is on the disk by then.

    Args:
        log_dir: `tensorboard_logs` by default.
        flush_interval: write to the disk every so many batches.
        rank_zero_only: or every rank its own.
    """

    name = "tensorboard"

    @property
    def _enabled(self) -> bool:
        return not self.rank_zero_only or dist.get_global_rank() == 0

    def init(self, state: State, logger: Logger) -> None:
        if self._enabled:  # Composer's own opens a file on every rank
            super().init(state, logger)

    def after_load(self, state: State, logger: Logger) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is not None and int(state.timestamp.batch) > 0:
            folder = self.writer.get_logdir()
            self.writer.close()
            self.writer = SummaryWriter(folder, purge_step=int(state.timestamp.batch) + 1, flush_secs=365 * 24 * 3600)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._enabled:
            self.hyperparameters.update(hyperparameters)

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        if self.writer is not None:
            with self._without_stopping("the recipe"):
                text = yaml.safe_dump(self.hyperparameters, sort_keys=False, allow_unicode=True)
                self.writer.add_text("recipe", f"```yaml\n{text}```", global_step=int(state.timestamp.batch))

    def _sends(self, step: int | None) -> bool:
        return self.writer is not None

    def _log_drawings(self, images: Tensor, prompts: list[str], step: int) -> None:
        assert self.writer is not None
        self.writer.add_image("images", np.asarray(image_grid(images, prompts)), global_step=step, dataformats="HWC")

    def log_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._write()

    def eval_end(self, state: State, logger: Logger) -> None:  # Composer's own writes hyperparameters here, each time anew
        self._write()

    def close(self, state: State, logger: Logger) -> None:
        if self.writer is not None:
            with self._without_stopping("the last metrics"):
                self.writer.close()
            self.writer = None

    def _flush(self, logger: Logger) -> None:
        self._write()

    def _write(self) -> None:
        if self.writer is not None:
            with self._without_stopping("metrics"):
                self.writer.flush()


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
