"""Our SpeedMonitor against Composer's, over the same batches."""

import datetime
from types import SimpleNamespace
from typing import Any

import composer.callbacks
import torch
from composer.core import Timestamp
from composer.devices import DeviceCPU
from composer.models import ComposerModel

from prx_composer.callbacks.speed_monitor import SpeedMonitor


class Counted(ComposerModel):
    def forward(self, batch: Any) -> Any: ...

    def loss(self, outputs: Any, batch: Any) -> Any: ...

    def flops_per_batch(self, batch: Any) -> int:
        return 1000 * batch


class Log:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = [{}]

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.rows[-1] |= metrics


def logged(monitor: composer.callbacks.SpeedMonitor) -> list[dict[str, float]]:
    log: Any = Log()
    timestamp = Timestamp()
    for batch in range(1, 8):
        duration = datetime.timedelta(seconds=0.25 * batch)
        timestamp = timestamp.to_next_batch(samples=8 * batch, tokens=0, duration=duration)
        state: Any = SimpleNamespace(timestamp=timestamp, batch=batch, model=Counted(), device=DeviceCPU())
        monitor.batch_end(state, log)
        log.rows.append({})
    return log.rows


def test_it_logs_what_composers_does() -> None:
    options: dict[str, Any] = dict(window_size=3, gpu_flops_available=1e6, time_unit="minutes")
    ours, theirs = logged(SpeedMonitor(**options)), logged(composer.callbacks.SpeedMonitor(**options))
    assert "throughput/device/mfu" in ours[-2] and [row.keys() for row in ours] == [row.keys() for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.isclose(torch.tensor(a[name]), torch.tensor(b[name])) for name in a)
