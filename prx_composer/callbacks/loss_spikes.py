"""Names the batches whose loss stands out, so that what was in them can be looked at."""

import json
import logging
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from prx_composer.runs.folder import read_metrics

log = logging.getLogger(__name__)

_TO_SIGMA = 1.4826  # median absolute deviation → standard deviation, for a normal distribution
_LEAST_SPREAD = 1e-3  # of the median: steadier losses are no reason for a finer measure
_RECENT, _NEW_LEVEL = 20, 10  # steps; when so many of the recent ones are spikes, the loss has another level


def robust_score(value: float, normal: list[float]) -> float:
    """How many standard deviations `value` lies above the median of `normal`, by their median absolute deviation."""
    middle = median(normal)
    spread = _TO_SIGMA * median(abs(other - middle) for other in normal)
    return (value - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)


class LossSpikes(Callback):
    """Compares each step's total loss with the last ones, and says which samples were in a batch that stands out above them.

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
        """What a run that was killed wrote after the checkpoint comes again."""
        if dist.get_global_rank() == 0 and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["batch"] <= int(state.timestamp.batch)]
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.rename(self.path)

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
        own = {"sample_id": _listed(state.batch, "sample_id"), "timestep": None}
        if self._timesteps:
            own["timestep"] = [round(t, 4) for t in torch.cat(self._timesteps).tolist()]
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


def _listed(batch: Any, key: str) -> list[Any] | None:
    value = batch.get(key) if isinstance(batch, dict) else None
    return value.tolist() if isinstance(value, Tensor) else None
