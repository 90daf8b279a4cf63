"""Composer's SpeedMonitor, but nobody waits for the device to learn how fast it is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import composer.callbacks
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from prx_composer.algorithms.base import Trick
from prx_composer.common.distributed import unwrapped
from prx_composer.models.counting import StepCounter, shape_of

log = logging.getLogger(__name__)


class _Last(Algorithm):
    """Looks at the model when every trick has been attached to it and before it is sharded; no callback is asked then."""

    def __init__(self, look: Callable[[State], None]):
        self._look = look

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.algorithms.remove(self)
        self._look(state)


class SpeedMonitor(composer.callbacks.SpeedMonitor):
    """Logs `throughput/…` and, where the GPU's peak is known, `throughput/device/mfu`, under Composer's names.

    FLOPs are counted as `models.counting` does, with the teachers and the text encoder: once for each shape of batch and set of
    active tricks, which takes a second or a few. A model that isn't ours may say them itself (`flops_per_batch`).

    Composer adds up the FLOPs of all ranks on the device and reads the sum in every batch. Here a rank's count stands for all:
    batches have one shape on all ranks (see `BucketBatchSampler`).

    Args:
        window_size: batches that are averaged over.
        gpu_flops_available: peak FLOP/s of a GPU; by default Composer's table.
        time_unit: of `time/…`: seconds, minutes, hours or days.

    Raises:
        ValueError: another unit.
    """

    def __init__(self, window_size: int = 100, gpu_flops_available: float | None = None, time_unit: str = "hours"):
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
        """Of this rank's batch."""
        if self._counter is not None:
            active = [trick.name for trick in self._tricks if trick.active]
            with self._without_stopping():
                return len(state.batch["input_ids"]) * self._counter.count(shape_of(state.batch), active).total_flops
        flops_per_batch = getattr(unwrapped(state.model), "flops_per_batch", None)
        return None if flops_per_batch is None else flops_per_batch(state.batch)

    @contextmanager
    def _without_stopping(self) -> Iterator[None]:
        """Whatever a network or an algorithm cannot do with tensors that have no content costs the MFU, and not the run."""
        try:
            yield
        except Exception as error:
            self._counter = None
            if dist.get_global_rank() == 0:
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                log.warning("The FLOPs of a step cannot be counted, so that no MFU is logged (%s).", reason)
