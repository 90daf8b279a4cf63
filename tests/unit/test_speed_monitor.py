"""Our SpeedMonitor against Composer's, over the same batches."""

import datetime
from types import SimpleNamespace
from typing import Any

import composer.callbacks
import torch
from composer.core import Event, Timestamp
from composer.devices import DeviceCPU
from composer.models import ComposerModel
from torch.optim import SGD

from prx_composer.algorithms.perceptual import LPIPS
from prx_composer.callbacks.monitors import SpeedMonitor
from prx_composer.models.counting import StepCounter, shape_of


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


def begun(monitor: SpeedMonitor, model: Any, trick: Any, batch: Any) -> Any:
    """Return a state whose callback and algorithms have seen Event.INIT, in the order of Composer's engine."""
    optimizers = [SGD(model.parameters(), 0.1)]
    state: Any = SimpleNamespace(
        timestamp=Timestamp(), batch=batch, model=model, algorithms=[trick], optimizers=optimizers, fsdp_config=None
    )
    log: Any = Log()
    monitor.init(state, log)
    for algorithm in list(state.algorithms):
        algorithm.apply(Event.INIT, state, log)
    return state


def test_it_counts_the_work_of_the_tricks_that_are_active(tiny_model: Any, tiny_batch: Any) -> None:
    model, trick = tiny_model(trainable_text=False), LPIPS(random_weights=True, scale=2.0)
    monitor = SpeedMonitor()
    state = begun(monitor, model, trick, tiny_batch)
    assert state.algorithms == [trick]
    for trick.active in (True, False):
        monitor.batch_end(state, Log())  # pyright: ignore[reportArgumentType]
    counter, shapes = StepCounter(model, [trick]), shape_of(tiny_batch)
    expected = [4 * counter.count(shapes, active).total_flops for active in ({"lpips"}, set())]
    assert list(monitor.history_flops) == expected and expected[0] > 2 * expected[1]


class Reading(LPIPS):
    """A stranger's loss, which reads a number of its tensors: there is none while a step is counted."""

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) * float(outputs.timestep.max().item())


def test_what_cannot_be_counted_costs_the_mfu_and_not_the_run(tiny_model: Any, tiny_batch: Any, caplog: Any) -> None:
    model, trick, monitor = tiny_model(trainable_text=False), Reading(random_weights=True, scale=2.0), SpeedMonitor()
    state = begun(monitor, model, trick, tiny_batch)
    trick.active = True
    for _ in range(2):
        monitor.batch_end(state, Log())  # pyright: ignore[reportArgumentType]
    assert not monitor.history_flops and caplog.text.count("no MFU is logged") == 1
