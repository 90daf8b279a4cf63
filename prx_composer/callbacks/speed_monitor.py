"""Composer's SpeedMonitor, but nobody waits for the device to learn how fast it is."""

import composer.callbacks
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist


class SpeedMonitor(composer.callbacks.SpeedMonitor):
    """Logs `throughput/…` and, where the GPU's peak is known, `throughput/device/mfu`, under Composer's names.

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

    def batch_end(self, state: State, logger: Logger) -> None:
        timestamp, ranks = state.timestamp, dist.get_world_size()
        seconds = timestamp.total_wct.total_seconds()
        model = getattr(state.model, "module", state.model)  # DDP's wrapper has one
        self.history_samples.append(int(timestamp.sample))
        self.history_wct.append(seconds)
        if hasattr(model, "flops_per_batch"):
            self.history_flops.append(ranks * model.flops_per_batch(state.batch))  # pyright: ignore[reportCallIssue]
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
