"""Monitors: how far a run is, speed and FLOPs, losses that stand out, samples and captions that were lost."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import composer.callbacks
import torch
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from prx_composer.algorithms.base import Trick
from prx_composer.common.distributed import unwrapped
from prx_composer.common.files import write_whole
from prx_composer.data.loader import ImageCaptionLoader
from prx_composer.models.counting import StepCounter, shape_of
from prx_composer.runs.folder import read_metrics
from prx_composer.schedule.clock import time_budget_of
from prx_composer.schedule.moments import duration_string

log = logging.getLogger(__name__)


class _Last(Algorithm):
    """Call `look` when every trick is attached to the model, and before it is sharded: Composer asks no callback then."""

    def __init__(self, look: Callable[[State], None]):
        self._look = look

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.algorithms.remove(self)
        self._look(state)


class _Reached(NamedTuple):
    """Where a run is at a moment of this process."""

    seconds: float
    batch: int
    part: float  # of max_duration, or of the time budget if that ends first


class ProgressLines(Callback):
    """Say in the log how far training is: after the first batch, then once a minute, and what an evaluation measured.

    It stands in for Composer's progress bar where the output is no terminal, and a bar would be thousands of lines.

    Args:
        interval: seconds between two lines.
    """

    def __init__(self, interval: float = 60.0):
        self._interval = interval
        self._begun: _Reached | None = None
        self._told: _Reached | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        self._begun, self._told = self._reached(state), None

    def batch_end(self, state: State, logger: Logger) -> None:
        now, told, begun = self._reached(state), self._told, self._begun
        if dist.get_global_rank() != 0 or begun is None or (told and now.seconds - told.seconds < self._interval):
            return
        text = f"Batch {now.batch:,}, {now.part:.1%} of the run"
        if (loss := state.total_loss_dict.get("loss/train/total")) is not None:
            text += f": loss {float(loss):.4g}"
        if told is not None and now.part > begun.part:
            speed = (now.batch - told.batch) / (now.seconds - told.seconds)
            left = (1 - now.part) * (now.seconds - begun.seconds) / (now.part - begun.part)
            text += f", {speed:.3g} batches per second, about {duration_string(left)} to go"
        log.info("%s.", text)
        self._told = now

    def eval_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            values = state.eval_metric_values
            whole = [name for name in values if not any(name.startswith(f"{other}_") for other in values)]  # no loss by timestep
            measured = ", ".join(f"{name} {float(values[name]):.4g}" for name in whole)
            log.info("Batch %s: %s.", f"{int(state.timestamp.batch):,}", measured)

    def _reached(self, state: State) -> _Reached:
        budget, elapsed = time_budget_of(state), state.get_elapsed_duration()
        parts = (0.0 if elapsed is None else float(elapsed.value), 0.0 if budget is None else budget.progress)
        return _Reached(time.monotonic(), int(state.timestamp.batch), max(parts))


class SpeedMonitor(composer.callbacks.SpeedMonitor):
    """Log `throughput/…` and, where the GPU's peak is known, `throughput/device/mfu`, under Composer's names.

    FLOPs are counted as `models.counting` does, with the teachers and the text encoder: once for each shape of batch and set of
    active tricks, which takes a second or a few. A frozen text encoder that runs is counted with all `max_tokens` of a caption,
    though it leaves most padding out. A model that isn't ours may say them itself (`flops_per_batch`).

    Composer adds up the FLOPs of all ranks on the device and reads the sum in every batch. Here a rank's count stands for all:
    batches have one shape on all ranks (see `BucketBatchSampler`).

    Args:
        window_size: batches that are averaged over.
        gpu_flops_available: peak FLOP/s of a GPU; by default Composer's table.
        time_unit: of `time/…`: seconds, minutes, hours or days.

    Raises:
        ValueError: another unit, no batch to average over.
    """

    def __init__(self, window_size: int = 100, gpu_flops_available: float | None = None, time_unit: str = "hours"):
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, not {window_size}.")
        super().__init__(window_size, gpu_flops_available, time_unit)
        self._tricks: list[Trick] = []
        self._counter: StepCounter | None = None

    def init(self, state: State, logger: Logger) -> None:
        state.algorithms.append(_Last(self._copy))

    def _copy(self, state: State) -> None:
        model = unwrapped(state.model)
        self._tricks = [algorithm for algorithm in state.algorithms if isinstance(algorithm, Trick)]
        if hasattr(model, "auxiliary_losses"):
            with self._without_stopping():
                self._counter = StepCounter(model, self._tricks)

    def batch_end(self, state: State, logger: Logger) -> None:
        timestamp, ranks = state.timestamp, dist.get_world_size()
        seconds = timestamp.total_wct.total_seconds()
        self.history_samples.append(int(timestamp.sample))
        self.history_wct.append(seconds)
        if (flops := self._flops(state)) is not None:
            self.history_flops.append(ranks * flops)
        if len(self.history_wct) == self.history_wct.maxlen:
            elapsed = self.history_wct[-1] - self.history_wct[0]
            rates = {
                "batches_per_sec": (len(self.history_wct) - 1) / elapsed,
                "samples_per_sec": (self.history_samples[-1] - self.history_samples[0]) / elapsed,
            }
            if len(self.history_flops) == self.history_flops.maxlen:
                rates["flops_per_sec"] = (sum(self.history_flops) - self.history_flops[0]) / elapsed
            logger.log_metrics({f"throughput/{name}": rate for name, rate in rates.items()})
            logger.log_metrics({f"throughput/device/{name}": rate / ranks for name, rate in rates.items()})
            if self.gpu_flops_available and "flops_per_sec" in rates:
                logger.log_metrics({"throughput/device/mfu": rates["flops_per_sec"] / ranks / self.gpu_flops_available})
        logger.log_metrics(
            {
                "time/train": seconds / self.divider,
                "time/val": self.total_eval_wct / self.divider,
                "time/total": (seconds + self.total_eval_wct) / self.divider,
            }
        )

    def _flops(self, state: State) -> int | None:
        """Return what it took to train on this rank's batch; None if it cannot be counted."""
        if self._counter is not None:
            active = [trick.name for trick in self._tricks if trick.active]
            with self._without_stopping():
                return len(state.batch["input_ids"]) * self._counter.count(shape_of(state.batch), active).total_flops
        flops_per_batch = getattr(unwrapped(state.model), "flops_per_batch", None)
        return None if flops_per_batch is None else flops_per_batch(state.batch)

    @contextmanager
    def _without_stopping(self) -> Iterator[None]:
        """Let what cannot be done with tensors that have no content cost the MFU, and not the run."""
        try:
            yield
        except Exception as error:
            self._counter = None
            if dist.get_global_rank() == 0:
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                log.warning("The FLOPs of a step cannot be counted, so that no MFU is logged (%s).", reason)


FIRST_LOOK = 1000  # captions after which it is said how many of them were cut


class DataMonitor(Callback):
    """Have a mixture's shares change on time, log `data/undecodable` when it has grown, say once what captions lose, if they do.

    Undecodable are those of this rank, so far. The captions are looked at after a thousand of them, then whenever there are twice
    as many, and at the end.
    """

    def __init__(self) -> None:
        self._last = 0
        self._look_at: float = FIRST_LOOK

    def after_load(self, state: State, logger: Logger) -> None:
        if isinstance(loader := state.train_dataloader, ImageCaptionLoader):
            loader.go_on(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        loader = state.train_dataloader
        if isinstance(loader, ImageCaptionLoader) and (shares := loader.keep_time(state)) and dist.get_global_rank() == 0:
            log.info("train_loader.mix from batch %d on: %s.", int(state.timestamp.batch), shares)
        count = getattr(getattr(loader, "dataset", None), "undecodable", 0)
        if count != self._last:
            self._last = count
            logger.log_metrics({"data/undecodable": count})
        self._say_what_captions_lose(state, self._look_at)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._say_what_captions_lose(state, 1)

    def _say_what_captions_lose(self, state: State, at: float) -> None:
        collator = getattr(state.train_dataloader, "collate_fn", None)
        counts = getattr(collator, "counts", None)  # in the host's memory: nothing waits for the device
        if counts is None or self._look_at == float("inf") or counts.captions < at:
            return
        self._look_at *= 2
        lost = counts.told(collator.max_tokens)  # pyright: ignore[reportOptionalMemberAccess]
        if lost is None:
            return
        self._look_at = float("inf")
        if dist.get_global_rank() == 0:
            log.warning("train_loader: so far, %s.", lost)


_TO_SIGMA = 1.4826  # median absolute deviation → standard deviation, for a normal distribution
_LEAST_SPREAD = 1e-3  # of the median: steadier losses are no reason for a finer measure
_RECENT, _NEW_LEVEL = 20, 10  # steps; when so many of the recent ones are spikes, the loss has another level


def robust_score(value: float, normal: list[float]) -> float:
    """Return how many standard deviations `value` lies above the median of `normal`, by their median absolute deviation."""
    middle = median(normal)
    spread = _TO_SIGMA * median(abs(other - middle) for other in normal)
    return (value - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)


class LossSpikes(Callback):
    """Compare each step's total loss with the last ones, and say which samples were in a batch that stands out above them.

    A spike, or a loss that isn't finite, is a warning in the log and a line in `<run folder>/spikes.jsonl`: `batch`, `loss`,
    `median`, `score`, and for every rank its `sample_id`s and the `timestep` that each was trained at. A spike isn't taken into
    the window of normal losses. But when half of the last 20 steps were spikes, the loss has come to another level: the window is
    begun anew, and compares again after `warmup` steps; so does another stage of progressive resolution, whose losses are others.

    The total is the one that Composer has reduced over ranks and brought to the host anyway, so that all ranks agree without a
    word. Nothing waits for the device and nothing is gathered in a step without a spike.

    Args:
        folder: of the run.
        window: how many normal losses to compare with.
        threshold: in standard deviations (`robust_score`).
        warmup: compare once there are so many losses.

    Raises:
        ValueError: warmup < 2 or above the window, or a threshold that isn't positive.
    """

    def __init__(self, folder: str, window: int = 200, threshold: float = 8.0, warmup: int = 50):
        if not 2 <= warmup <= window:
            raise ValueError(f"warmup must lie between 2 and window ({window}), not {warmup}.")
        if threshold <= 0:
            raise ValueError(f"threshold must be positive, not {threshold}.")
        self.path = Path(folder) / "spikes.jsonl"
        self.threshold, self.warmup = threshold, warmup
        self.spikes = 0  # so far
        self._normal: deque[float] = deque(maxlen=window)
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._timesteps: list[Tensor] = []  # of the step in hand, on the device
        self._image_size: int | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop what a run that was killed wrote after the checkpoint: it comes again."""
        if dist.get_global_rank() == 0 and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["batch"] <= int(state.timestamp.batch)]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def batch_start(self, state: State, logger: Logger) -> None:
        image_size = getattr(state.train_dataloader, "image_size", None)
        if self._image_size not in (None, image_size):
            self._begin_anew()
        self._image_size = image_size

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._timesteps.clear()

    def after_forward(self, state: State, logger: Logger) -> None:
        timestep = getattr(state.outputs, "timestep", None)
        if isinstance(timestep, Tensor):
            self._timesteps.append(timestep.detach())

    def batch_end(self, state: State, logger: Logger) -> None:
        loss = state.total_loss_dict["loss/train/total"]
        score = None
        if math.isfinite(loss) and len(self._normal) >= self.warmup:
            score = robust_score(loss, list(self._normal))
        spike = not math.isfinite(loss) or (score is not None and score > self.threshold)
        if spike:
            self.spikes += 1
            self._report(state, loss, score)
        else:
            self._normal.append(loss)
        self._recent.append(spike)
        if sum(self._recent) >= _NEW_LEVEL:
            log.warning("%d of the last %d losses were spikes: the normal loss is learned anew.", _NEW_LEVEL, len(self._recent))
            self._begin_anew()
        logger.log_metrics({"guard/loss_spikes": self.spikes})

    def _begin_anew(self) -> None:
        self._normal.clear()
        self._recent.clear()

    def _report(self, state: State, loss: float, score: float | None) -> None:
        ids = state.batch.get("sample_id") if isinstance(state.batch, dict) else None
        timesteps = [round(t, 4) for t in torch.cat(self._timesteps).tolist()] if self._timesteps else None
        own = {"sample_id": ids.tolist() if isinstance(ids, Tensor) else None, "timestep": timesteps}
        ranks = dist.all_gather_object(own)
        if dist.get_global_rank() != 0:
            return
        row: dict[str, Any] = {"batch": int(state.timestamp.batch), "loss": loss if math.isfinite(loss) else None}
        if score is not None:
            row |= {"median": median(self._normal), "score": round(score, 2)}
        row["ranks"] = ranks
        what = "is not finite" if score is None else f"is {score:.1f} standard deviations above the median {row['median']:.4g}"
        log.warning("Batch %d: the loss, %.4g, %s; its samples are in %s.", row["batch"], loss, what, self.path)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            log.error("%s cannot be written: %s", self.path, error)

    def state_dict(self) -> dict[str, Any]:
        lists = {"normal": list(self._normal), "recent": list(self._recent)}
        return {"spikes": self.spikes, "image_size": self._image_size, **lists}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spikes, self._image_size = int(state["spikes"]), state["image_size"]
        self._begin_anew()
        self._normal.extend(state["normal"])
        self._recent.extend(state["recent"])
