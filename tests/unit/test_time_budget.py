"""The training clock, the budget and the schedule that follows it: closed forms and simulated machines."""

import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.optim.scheduler import CosineAnnealingWithWarmupScheduler, LinearWithWarmupScheduler, compile_composer_scheduler
from torch import nn

from prx_composer.common.errors import UserError
from prx_composer.optim import WarmupStableDecay
from prx_composer.recipe import config
from prx_composer.schedule.clock import ClockStop, TimeBudget, TrainingClock, clock_of, if_written_in_time, once_per_batch
from prx_composer.schedule.moments import Moment, ScheduleWindow


class Machine:
    """Drives the callbacks in Composer's order of events, on a clock that only passes where work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, max_duration: str, budget: float | None = None):
        self.now = 5000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.clock, self.time_budget = TrainingClock(folder, budget), None if budget is None else TimeBudget(budget)
        self.callbacks = [self.clock, *([self.time_budget] if self.time_budget else []), ClockStop(self.clock)]
        model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        self.state = State(
            model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration=max_duration,
            callbacks=self.callbacks, optimizers=self.optimizer,
        )  # fmt: skip
        self.logger = Logger(self.state)
        self.scheduler: Any = None
        self.lrs: list[float] = []
        self.boundaries: list[float] = []

    def event(self, name: str) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self.state, self.logger)

    def start(self, saved: dict[str, Any] | None = None) -> "Machine":
        for callback in self.callbacks if saved is not None else []:
            callback.load_state_dict(cast(dict[str, Any], saved).get(type(callback).__name__, {}))
        for name in ("init", "after_load", "fit_start"):
            self.event(name)
        return self

    def step(self, seconds: float, pause: float = 0.0) -> None:
        """One batch, and what happens after it."""
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        self.event("before_dataloader")
        self.now += seconds
        self.event("after_train_batch")
        if self.scheduler is not None:
            self.scheduler.step()
        self.state.previous_timestamp = self.state.timestamp
        self.state.timestamp = self.state.timestamp.to_next_batch(4)
        self.event("batch_end")
        self.boundaries.append(self.now)
        self.now += pause
        self.event("batch_checkpoint")

    @property
    def is_over(self) -> bool:
        assert self.state.max_duration is not None
        return self.state.timestamp.get(self.state.max_duration.unit) >= self.state.max_duration

    def saved(self) -> dict[str, Any]:
        return {type(callback).__name__: callback.state_dict() for callback in self.callbacks}


# --------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("7ba", 7),
        ("40sp", 10),
        ("0.5dur", 10),
        ("30s", 6),  # 5 seconds a step
        ("0.7budget", 14),  # of 100 seconds
        ("7ba or 0.7budget", 7),
        ("17ba or 0.7budget or 2h", 14),
        ("0ba or 1h", 0),
    ],
)
def test_a_moment_comes_with_its_first_alternative_and_stays(
    text: str, first: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, tmp_path, "20ba", budget=100)
    machine.callbacks = [machine.clock]
    machine.start()
    come = []
    for _ in range(20):
        come.append(Moment(text).has_come(machine.state))
        machine.step(5)
    assert come == [batch >= first for batch in range(20)]


@pytest.mark.parametrize(("moment", "other"), [("5ba", "7ba"), ("5ba or 0.5budget", "9ba or 0.6budget"), ("4sp or 5ba", "6ba")])
def test_certainty_holds_at_every_pace(moment: str, other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Moment(moment).surely_by(Moment(other))
    for pace in (1, 5, 20):
        machine = Machine(monkeypatch, tmp_path / str(pace), "20ba", budget=100)
        machine.callbacks = [machine.clock]
        machine.start()
        for _ in range(20):
            machine.step(pace)
            assert Moment(moment).has_come(machine.state) or not Moment(other).has_come(machine.state)


def test_a_raised_budget_reopens_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, "100ba", budget=100).start()
    for _ in range(9):
        machine.step(10)
    window = ScheduleWindow(end="0.8budget")
    assert window.is_over(machine.state) and not Moment("0.95budget").has_come(machine.state)
    resumed = Machine(monkeypatch, tmp_path, "100ba", budget=1000).start(machine.saved())
    resumed.step(10)
    assert clock_of(resumed.state).elapsed == pytest.approx(100)
    assert window.is_over(resumed.state), "10% of the new budget, but 90% of the one before"
    assert not Moment("0.95budget").has_come(resumed.state)


# ----------------------------------------------------------------------------------------------------------- clock


def test_the_clock_counts_steps_pauses_and_waiting_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, "100ba").start()
    machine.step(3, pause=7)
    machine.now += 0.5
    machine.step(3)
    assert machine.clock.elapsed == pytest.approx(13.5)
    assert machine.clock.paused == pytest.approx(7.5)


def test_a_wall_clock_that_jumps_back_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = TrainingClock(tmp_path)
    state = State(model=nn.Linear(1, 1), rank_zero_seed=0, run_name="test", device=DeviceCPU(), callbacks=[clock])
    wall = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(wall)))
    readings, start = [], time.perf_counter()
    clock.after_load(state, cast(Any, None))
    clock.fit_start(state, cast(Any, None))
    for _ in range(5):
        time.sleep(0.01)
        clock.after_train_batch(state, cast(Any, None))
        readings.append(clock.elapsed)
    assert all(np.diff(readings) >= 0.01) and readings[-1] <= time.perf_counter() - start


def test_a_resumed_run_has_also_paid_for_what_a_kill_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, "100ba").start()
    machine.step(30)
    checkpoint = machine.saved()
    machine.step(30)
    machine.step(5)  # 10 seconds are not over since the last writing; killed here
    resumed = Machine(monkeypatch, tmp_path, "100ba").start(checkpoint)
    assert resumed.clock.spent == pytest.approx(60)
    assert resumed.clock.elapsed == pytest.approx(30), "time passes in steps: here as where it was saved"
    resumed.step(1)
    assert resumed.clock.elapsed == pytest.approx(61)
    resumed.now += 5
    resumed.event("fit_end")
    resumed.now += 1000  # looking at the images before closing is no training
    for callback in resumed.callbacks:
        callback.close(resumed.state, resumed.logger)
    assert json.loads((tmp_path / "clock.json").read_text()) == {"elapsed": pytest.approx(66)}


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"elapsed": null}', '{"elapsed": -1}', '{"elapsed": NaN}', '{"elaps'])
def test_a_missing_or_broken_clock_file_leaves_the_checkpoints_time(
    content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.getLogger("prx_composer"), "propagate", True)
    machine = Machine(monkeypatch, tmp_path, "100ba")
    if content is not None:
        (tmp_path / "clock.json").write_text(content)
    machine.start({"TrainingClock": {"elapsed": 40.0, "fraction": 0.0}})
    assert machine.clock.spent == 40
    assert "training time is taken from the checkpoint, 40 s" in caplog.text


def test_a_request_to_stop_is_heard_at_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, "100ba").start()
    machine.clock.request_stop("SIGTERM")
    assert machine.clock.asked and not machine.clock.stop_requested
    machine.step(1)
    assert machine.clock.stop_requested and machine.clock.stop_reason == "SIGTERM"


def test_ranks_agree_by_the_sum_of_their_reports_in_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On rank 0's time to a tenth of a millisecond after days, the longest pause, and a request that one rank alone got."""
    machines, reports = [], []
    for rank in range(3):
        machine = Machine(monkeypatch, tmp_path / str(rank), "100ba")
        machine.start({"TrainingClock": {"elapsed": 0.0, "fraction": 0.0}})
        machine.clock._start = machine.now - 200_000.1234 - rank
        machine.clock._step_end, machine.clock._batch_asked_for = 10.0, 12.5 + rank
        machines.append(machine.clock)
    machines[1].request_stop("SIGTERM")
    monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: 3)
    for rank, clock in enumerate(machines):
        monkeypatch.setattr("composer.utils.dist.get_global_rank", lambda rank=rank: rank)
        clock._evaluated = 50.0 + rank
        reports.append(torch.tensor(clock.report(), dtype=torch.float32))
    for clock in machines:
        clock.take(machine.state, torch.stack(reports).sum(0).tolist())
        assert clock.elapsed == pytest.approx(200_000.1234, abs=1e-4)
        assert clock.paused == 4.5 and clock.stop_requested and clock.step_seconds == pytest.approx(clock.elapsed - 50)
    assert len({clock.elapsed for clock in machines}) == 1


# ---------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_met_on_a_machine_that_is_slowed_at_random(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The end lies inside the budget or the last step beyond it, and no more than 2% and two steps before; every other run is
    killed once on the way, which loses what clock.json didn't have yet. A process's first closing takes twice as long."""
    draw = random.Random(seed)
    budget, pace = draw.uniform(600, 7200), draw.uniform(0.5, 5.0)
    warm_closing = 0.01 * budget
    kill_at, unseen, longest, rehearsals, is_cold = (draw.uniform(0.2, 0.9) if seed % 2 else math.inf), 0.0, 0.0, 0, True
    machine = Machine(monkeypatch, tmp_path, "1000000ba", budget).start()
    while not machine.is_over:
        pace = min(max(pace * draw.uniform(0.93, 1.07), 0.3), 8.0)
        seconds = pace * draw.uniform(0.9, 1.1) * (3 if draw.random() < 0.01 else 1)
        longest = max(longest, seconds)
        rehearses = rehearsals < 2
        pause = warm_closing * (2 if is_cold else 1) * draw.uniform(0.95, 1.05) if rehearses else 0.0
        rehearsals, is_cold = rehearsals + rehearses, is_cold and not rehearses
        machine.step(seconds + (20 if machine.state.timestamp.batch == 0 else 0), pause)
        if machine.clock.fraction > kill_at:
            kill_at, unseen, is_cold = math.inf, 10 + longest, True
            saved, timestamp, now = machine.saved(), machine.state.timestamp, machine.now
            machine = Machine(monkeypatch, tmp_path, "1000000ba", budget)
            machine.state.timestamp, machine.now = timestamp, now
            machine.start(saved)
    total = machine.now - 5000 + warm_closing * (2 if is_cold else 1) * draw.uniform(0.95, 1.05)
    assert total <= budget + longest + unseen
    assert total >= 0.98 * budget - 2 * longest


def test_the_closing_is_rehearsed_twice_if_it_is_dear_and_the_longest_pause_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, tmp_path, "1000000ba", budget=1000).start()
    budget = cast(TimeBudget, machine.time_budget)
    assert not budget.rehearsing
    machine.step(1, pause=20)
    assert budget.rehearsing and budget.reserve == 0, "what it takes is known when it is over"
    machine.step(1, pause=10)
    assert budget.rehearsing and budget.reserve == pytest.approx(1.1 * 20)
    machine.step(1, pause=0.1)
    assert not budget.rehearsing and budget.reserve == pytest.approx(1.1 * 10), "what is paid once has been paid"
    machine.step(1, pause=40)
    machine.step(1)
    assert budget.reserve == pytest.approx(1.1 * 40)
    resumed = Machine(monkeypatch, tmp_path, "1000000ba", budget=1000).start(machine.saved())
    resumed.step(1)
    again = cast(TimeBudget, resumed.time_budget)
    assert again.reserve == pytest.approx(1.1 * 40) and not again.rehearsing


@pytest.mark.parametrize("interval", range(31, 61))
@pytest.mark.parametrize("write", [5.0, 30.0])
def test_no_checkpoint_is_still_being_written_when_the_last_one_is_due(
    write: float, interval: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Steps of 1 s, and writes beside them: 300 s leave 300 − 1.1·w − 1 s for steps, whenever checkpoints come in between; the
    last one is begun no more than the interval and 1.1·w before that."""
    machine = Machine(monkeypatch, tmp_path, "1000000ba", budget=300).start()
    due = if_written_in_time(lambda state, event: int(clock_of(state).elapsed) % interval == 0)
    written_at = 0.0
    while not machine.is_over:
        machine.step(1, pause=write if machine.state.timestamp.batch < 2 else 0)  # the rehearsals
        machine.clock.own_write = write
        if due(machine.state, Event.BATCH_CHECKPOINT) and machine.state.timestamp.batch > 2 and not machine.is_over:
            assert machine.now >= written_at, "the interval is longer than a write"
            written_at = machine.now + write
    steps_end = 5000 + 300 - 1.1 * write - 1
    assert machine.now == pytest.approx(steps_end, abs=1)
    assert max(machine.now, written_at) + write <= 5000 + 300, "the closing waits for what is in hand and writes its own"
    assert written_at >= steps_end - interval - 1.1 * write, "no more is left out than must be"


def test_a_resumed_run_that_has_written_nothing_yet_expects_a_write_to_take_as_long_as_a_closing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, tmp_path, "1000000ba", budget=100).start()
    for pause in (10, 10, 0):
        machine.step(1, pause)
    again = Machine(monkeypatch, tmp_path, "1000000ba", budget=100).start(machine.saved())
    due = if_written_in_time(lambda state, event: True)
    begun = []
    while not again.is_over:
        again.step(1)
        begun += [again.clock.elapsed] if due(again.state, Event.BATCH_CHECKPOINT) else []
    assert begun[-2] == pytest.approx(100 - 2 * 1.1 * 10, abs=1), "and the closing's own is begun in any case"
    assert begun[-1] == again.clock.elapsed


def test_a_cheap_closing_is_rehearsed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(monkeypatch, tmp_path, "1000000ba", budget=1000).start()
    rehearsed = []
    for _ in range(5):
        machine.step(1, pause=4)
        rehearsed.append(cast(TimeBudget, machine.time_budget).rehearsing)
    assert rehearsed == [True, False, False, False, False]


def test_a_run_that_used_its_budget_stays_finished_until_the_budget_is_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, tmp_path, "1000000ba", budget=100).start()
    while not machine.is_over:
        machine.step(1)
    for budget, used_up in ((100, True), (99, True), (150, False)):
        again = Machine(monkeypatch, tmp_path, "1000000ba", budget=budget).start(machine.saved())
        assert cast(TimeBudget, again.time_budget).is_used_up is used_up


def test_an_interval_fires_once_per_batch() -> None:
    state = State(model=nn.Linear(1, 1), rank_zero_seed=0, run_name="test", device=DeviceCPU())
    due = once_per_batch(lambda state, event: True)
    assert [due(state, Event.BATCH_CHECKPOINT), due(state, Event.EPOCH_CHECKPOINT)] == [True, False]
    state.timestamp = state.timestamp.to_next_batch(1)
    assert due(state, Event.BATCH_CHECKPOINT)


# -------------------------------------------------------------------------------------------------------- schedule

SHAPES = {"linear": lambda t: 1 - t, "cosine": lambda t: np.cos(np.pi * t / 2) ** 2, "1-sqrt": lambda t: 1 - t**0.5}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha_f", [0.0, 0.1])
def test_the_learning_rate_is_the_closed_form_in_batches(
    shape: Any, alpha_f: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, tmp_path, "50ba")
    schedule = WarmupStableDecay("10ba", decay=0.4, shape=shape, alpha_f=alpha_f)
    machine.scheduler = compile_composer_scheduler(schedule, machine.state)
    machine.start()
    for _ in range(50):
        machine.step(1)
    batches = np.arange(51)
    falling = alpha_f + (1 - alpha_f) * SHAPES[shape](np.clip((batches - 30) / 20, 0, 1))
    expected = np.minimum(batches / 10, falling)
    found = np.array([*machine.lrs, machine.optimizer.param_groups[0]["lr"]])
    np.testing.assert_allclose(found[1:], expected[1:], atol=1e-12)
    assert found[0] == pytest.approx(0.1), "the first step is not lost"
    assert found[-1] == pytest.approx(alpha_f, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "composers"), [("linear", LinearWithWarmupScheduler), ("cosine", CosineAnnealingWithWarmupScheduler)]
)
def test_with_a_decay_from_the_warmup_on_it_is_composers_scheduler(
    shape: Any, composers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`prx check` proposes it so, where the time of a run is not `max_duration` alone."""
    machine = Machine(monkeypatch, tmp_path, "50ba")
    both = WarmupStableDecay("10ba", decay=0.8, shape=shape, alpha_f=0.1), composers("10ba", alpha_f=0.1)
    machine.scheduler = compile_composer_scheduler(both[0], machine.state)
    machine.start()
    rates = list[list[float]]()
    for _ in range(50):
        machine.step(1)
        rates.append([schedule(machine.state) for schedule in both])
    ours, theirs = zip(*rates, strict=True)
    assert ours[:-1] == pytest.approx(theirs[1:], abs=1e-9)  # ours is a step ahead, so that no step has a rate of 0


def test_the_learning_rate_is_the_closed_form_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps of 1 s and closings of 10 s: 500 s leave 500 − 11 − 1 s for steps, of which the last tenth decays."""
    machine = Machine(monkeypatch, tmp_path, "1000000ba", budget=500)
    machine.scheduler = compile_composer_scheduler(WarmupStableDecay("50s", decay=0.1, shape="linear"), machine.state)
    machine.start()
    rehearsals = 0
    while not machine.is_over:
        rehearses = rehearsals < 2
        machine.step(1, pause=10 if rehearses else 0)
        rehearsals += rehearses
    rates = np.array([*machine.lrs[1:], machine.optimizer.param_groups[0]["lr"]])
    elapsed = np.array(machine.boundaries) - 5000
    expected = np.minimum(np.minimum(elapsed / 50, 1), np.clip(10 * (1 - elapsed / 488), 0, 1))
    np.testing.assert_allclose(rates, expected, atol=1e-9)
    assert rates[-1] == 0 and elapsed[-1] <= 489


def test_the_learning_rate_never_rises_while_it_decays_and_ends_at_alpha_f(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for seed in range(5):
        draw = random.Random(seed)
        machine = Machine(monkeypatch, tmp_path / str(seed), f"{draw.choice([200, 10**6])}ba", budget=300)
        machine.scheduler = compile_composer_scheduler(WarmupStableDecay("5ba", decay=0.3, alpha_f=0.05), machine.state)
        machine.start()
        while not machine.is_over:
            machine.step(draw.uniform(0.1, 3), pause=draw.choice([0, 0, 0, 2]))
        rates = np.array([*machine.lrs, machine.optimizer.param_groups[0]["lr"]])
        assert (np.diff(rates[10:]) <= 1e-12).all() and rates[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"shape": "steep"}, {"t_warmup": "4 moons"}])
def test_a_wrong_schedule_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="decay must lie|shape must be|no time such as"):
        WarmupStableDecay(**wrong)


# ---------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["time_budget=soon"], "time_budget: 'soon' is no duration such as 24h"),
        (["time_budget=0h"], "time_budget: a budget must be more than nothing"),
        (["algorithms.ema.end=0.5budget"], "algorithms.ema.end: 0.5budget is a part of the time budget, and the recipe has none"),
        (
            ["algorithms.progressive_resolution.stages[0].until='4ba or 0.5budget'"],
            "algorithms.progressive_resolution.stages[0].until: 4ba or 0.5budget",
        ),
        (["callbacks.stop_after.time=0.5budget"], "callbacks.stop_after.time"),
        (["scheduler={name: warmup_stable_decay, t_warmup: 0.1budget}"], "scheduler.t_warmup: 0.1budget"),
        (["scheduler={name: warmup_stable_decay, t_warmup: 4 moons}"], "scheduler.t_warmup: '4 moons' is no time"),
        (["eval_interval=1.5ba"], "eval_interval: '1.5ba': these are counted in whole numbers"),
    ],
)
def test_a_part_of_no_budget_is_refused_with_its_path(
    changes: list[str], message: str, tiny_recipe: dict[str, Any], write_recipe: Any
) -> None:
    with pytest.raises(UserError) as error:
        config.check(config.load([write_recipe(tiny_recipe), *changes]))
    assert message in str(error.value)
    if "budget is a part" in message:
        config.check(config.load([write_recipe(tiny_recipe), *changes, "time_budget=24h"]))
