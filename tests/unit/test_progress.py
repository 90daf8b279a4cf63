"""How far a run is, in a log: a line a minute, with a time to go that comes true."""

import itertools
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Time, Timestamp

from prx_composer.callbacks.monitors import ProgressLines
from prx_composer.schedule.clock import TimeBudget


class Run:
    """A run of equally long steps on a clock that only passes in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, length: str, callbacks: list[Any] | None = None):
        self.now = 5000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.lines, self.timestamp, self.length = ProgressLines(), Timestamp(), Time.from_timestring(length)
        self.callbacks, self.eval_metric_values = callbacks or [], dict[str, float]()
        self.begun = False

    def state(self) -> Any:
        part = self.timestamp.get(self.length.unit) / self.length
        return SimpleNamespace(
            timestamp=self.timestamp, callbacks=self.callbacks, get_elapsed_duration=lambda: part,
            total_loss_dict={"loss/train/total": 0.25}, eval_metric_values=self.eval_metric_values,
        )  # fmt: skip

    def train(self, steps: int, seconds: float) -> None:
        log: Any = None
        if not self.begun:
            self.lines.fit_start(self.state(), log)
            self.begun = True
        for _ in range(steps):
            self.now += seconds
            self.timestamp = self.timestamp.to_next_batch(4)
            self.lines.batch_end(self.state(), log)


def test_thousands_of_steps_are_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(monkeypatch, "4000ba")
    run.train(4000, 0.1)  # 400 s
    told = [int(line.split()[1].rstrip(",").replace(",", "")) for line in caplog.messages]
    assert told[0] == 1 and len(told) == 7
    assert all(abs(after - before - 600) <= 1 for before, after in itertools.pairwise(told))
    assert caplog.messages[0] == "Batch 1, 0.0% of the run: loss 0.25."
    said = r"Batch 60[12], 15\.\d% of the run: loss 0\.25, 10 batches per second, about 5m(39|40)s to go\."
    assert re.fullmatch(said, caplog.messages[1])


def test_a_run_that_goes_on_reckons_with_its_own_pace(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(monkeypatch, "4000sp")  # a thousand steps
    run.timestamp = run.timestamp.to_next_batch(4 * 500)
    run.train(121, 1.0)
    assert len(caplog.messages) == 3 and "about 6m19s to go" in caplog.messages[-1]  # 379 of its 500 steps are left


def test_a_time_budget_that_ends_first_is_what_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    budget = TimeBudget(1000.0)
    run = Run(monkeypatch, "1000000ba", [budget])
    for _ in range(500):
        budget.progress += 0.001
        run.train(1, 1.0)
    assert "of the run" in caplog.messages[-1] and re.search(r"about (8|9)m\d+s to go", caplog.messages[-1])


def test_an_evaluation_is_a_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(monkeypatch, "10ba")
    run.train(3, 1.0)
    run.eval_metric_values = {"validation_loss": 0.5, "validation_loss_t0.0625": 2.0, "other": 1.0}
    run.lines.eval_end(run.state(), None)  # pyright: ignore[reportArgumentType]
    assert caplog.messages[-1] == "Batch 3: validation_loss 0.5, other 1."
