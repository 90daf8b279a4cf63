"""What guards a long run: skipped steps, loss spikes, the watchdog, garbage collection."""

import copy
import gc
import json
import logging
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from composer.core import Event, Timestamp
from scipy.stats import median_abs_deviation

from prx_composer.algorithms.gradients import SkipNonfinite
from prx_composer.callbacks.monitors import LossSpikes, robust_score
from prx_composer.callbacks.watchdog import GarbageCollection, Watchdog
from prx_composer.common.errors import UserError
from prx_composer.optim import not_finite
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics, save_recipe
from prx_composer.training import main
from prx_composer.training.run import build_trainer, run

Write = Callable[..., str]
Recipe = dict[str, Any]
POISON = str(Path(__file__).parents[1] / "poison.py")


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


@pytest.fixture
def guarded(tiny_recipe: Recipe) -> Recipe:
    """One stage, two microbatches a step, six steps, and an auxiliary loss that can be made to fail."""
    del tiny_recipe["algorithms"]["progressive_resolution"]
    tiny_recipe["algorithms"] |= {"poison": {"kinds": {}}, "skip_nonfinite": {"limit": 3}}
    return tiny_recipe | {"code_paths": [POISON], "max_duration": "6ba", "save_interval": "6ba", "image_size": 8}


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def column(recipe: Recipe, name: str) -> list[float | None]:
    return [row.get(name) for row in read_metrics(folder_of(recipe) / "metrics.jsonl")]


def trained(
    recipe: Recipe, write: Write, name: str, algorithms: Recipe, **changes: Any
) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """Trains; returns the recipe and every tensor of weights, average and optimizer at the end."""
    recipe = copy.deepcopy(recipe) | changes | {"run_name": name, "algorithms": algorithms}
    trainer = build_trainer(config.load([write(recipe, f"{name}.yaml")]))
    folder_of(recipe).mkdir(parents=True, exist_ok=True)
    trainer.fit()
    optimizer = trainer.state.optimizers[0]
    found = {f"model.{key}": value for key, value in trainer.state.model.state_dict().items()}
    average = next(callback for callback in trainer.state.callbacks if type(callback).__name__ == "AverageState")
    found |= {f"average.{key}": value for key, value in average.state_dict()["average"].items()}
    for index, slots in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{key}": value for key, value in slots.items() if isinstance(value, torch.Tensor)}
    trainer.close()
    return recipe, found


# --------------------------------------------------------------------------------------------------- skip_nonfinite


@pytest.mark.parametrize(
    ("kind", "optimizer", "clipping", "first"),
    [
        ("nan", "adamw", "norm", "skip_nonfinite"),
        ("gradient", "adamw", "value", "skip_nonfinite"),
        ("loss", "muon", "norm", "gradient_clipping"),
        ("gradient", "muon", "value", "gradient_clipping"),
    ],
)
def test_a_run_with_skipped_steps_ends_where_one_does_that_takes_them_back(
    kind: str, optimizer: str, clipping: str, first: str, guarded: Recipe, write_recipe: Write
) -> None:
    """To the bit, in weights, average, moments, momentum and step counts; on the first step too, when there is no state yet."""
    bad = [1, 3]
    base = {"ema": {"half_life": "4ba"}, "gradient_clipping": {"clipping_type": clipping, "clipping_threshold": 0.1}}
    skip = {"skip_nonfinite": {"limit": 3}}
    poison = {"poison": {"kinds": dict.fromkeys(bad, kind)}}
    algorithms = skip | base | poison if first == "skip_nonfinite" else base | poison | skip
    options = {"optimizer": {"name": optimizer, "lr": 1e-2, "weight_decay": 0.1}}
    recipe, found = trained(guarded, write_recipe, "skipped", algorithms, **options)
    _, expected = trained(
        guarded, write_recipe, "taken_back", {"take_back": {"batches": bad}, **base, "poison": {"kinds": {}}}, **options
    )
    assert column(recipe, "guard/skipped_steps") == [1, 1, 2, 2, 2, 2]
    assert found.keys() == expected.keys() and all(value.isfinite().all() for value in found.values())
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_a_loss_that_failed_inside_of_its_window_leaves_nothing_behind_when_it_closes(
    guarded: Recipe, write_recipe: Write
) -> None:
    """A closed window's loss still adds 0 · its parameters: they must not have become NaN."""
    algorithms = guarded["algorithms"] | {"poison": {"kinds": {2: "nan", 3: "gradient"}, "end": "3ba"}}
    recipe, _ = trained(guarded, write_recipe, "window", algorithms)
    assert column(recipe, "guard/skipped_steps") == [0, 1, 2, 2, 2, 2]
    assert [loss is None for loss in column(recipe, "loss/train/total")] == [False, True, False, False, False, False]
    assert column(recipe, "loss/train/poison")[3:] == [0.0] * 3


def test_the_guard_changes_no_bit_of_a_healthy_run(guarded: Recipe, write_recipe: Write) -> None:
    algorithms = copy.deepcopy(guarded["algorithms"])
    recipe, found = trained(guarded, write_recipe, "with", algorithms)
    del algorithms["skip_nonfinite"]
    other, expected = trained(guarded, write_recipe, "without", algorithms)
    assert column(recipe, "loss/train/total") == column(other, "loss/train/total")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_so_many_skipped_steps_in_a_row_end_training_with_a_message_that_helps(
    guarded: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded["algorithms"]["poison"]["kinds"] = {1: "nan", 3: "loss", 4: "gradient", 5: "nan"}
    assert main([write_recipe(guarded), "save_interval=2ba"]) == 1
    error, folder = capsys.readouterr().err, folder_of(guarded)
    assert "Training ended at batch 5: the loss is not finite" in error and "the last 3 in a row" in error
    assert "those of batch 2" in error and "optimizer.lr" in error and "Traceback" not in error
    assert str(folder / "metrics.jsonl") in error and str(folder / "checkpoints" / "ba4") in error
    assert column(guarded, "guard/skipped_steps") == [1, 1, 2, 3]


def test_a_resumed_run_goes_on_counting(guarded: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    guarded["algorithms"]["poison"]["kinds"] = {"3": "nan", "4": "nan", "5": "nan"}
    path = write_recipe(guarded | {"autoresume": True})
    recipe = config.load([path, "callbacks.stop_after.time=4ba"])
    trainer = build_trainer(recipe)
    save_recipe(recipe, folder_of(guarded))
    trainer.fit()
    trainer.close()
    assert column(guarded, "guard/skipped_steps") == [0, 0, 1, 2]
    assert main([path]) == 1
    assert "Training ended at batch 5" in capsys.readouterr().err, "two before the checkpoint and one after it"


def test_the_check_sees_every_value_that_is_not_finite_and_no_other() -> None:
    good = [torch.tensor([3e38, -3e38][:1]), torch.zeros(0), torch.full((2, 2), 1e30), torch.ones(3, dtype=torch.bfloat16)]
    assert not_finite(good).item() == 0 and not_finite([]).item() == 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not_finite([*good, torch.tensor([0.0, bad])]).isnan()


def test_what_the_guard_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        SkipNonfinite(limit=0)
    state: Any = SimpleNamespace(precision="amp_fp16", algorithms=[])
    with pytest.raises(UserError, match="amp_fp16"):
        SkipNonfinite().apply(Event.INIT, state, None)  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------ loss_spikes


class Record:
    """A logger that keeps the last value of every metric."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        self.values |= metrics


def feed(callback: LossSpikes, losses: Any, first: int = 1) -> list[int]:
    """The batches that the callback takes for spikes."""
    found, record = [], Record()
    for batch, loss in enumerate(losses, first):
        before = callback.spikes
        state: Any = SimpleNamespace(
            total_loss_dict={"loss/train/total": float(loss)},
            timestamp=Timestamp(batch=batch),
            batch={"sample_id": torch.arange(3)},
        )
        callback.batch_end(state, record)  # pyright: ignore[reportArgumentType]
        if callback.spikes > before:
            found.append(batch)
    assert record.values["guard/loss_spikes"] == callback.spikes
    return found


def test_the_score_is_the_distance_from_the_median_in_robust_standard_deviations() -> None:
    normal = np.random.default_rng(0).gamma(3.0, size=101).tolist()
    spread = median_abs_deviation(normal, scale="normal")
    assert robust_score(7.5, normal) == pytest.approx((7.5 - np.median(normal)) / spread, rel=1e-4)
    assert robust_score(1.01, [1.0] * 9) == pytest.approx(10), "of losses that are all the same: thousandths of them"


def test_only_losses_far_above_the_last_ones_are_spikes(tmp_path: Path) -> None:
    losses = 0.5 + 0.3 * np.exp(-np.arange(400) / 50) + 0.02 * np.random.default_rng(1).standard_normal(400)
    assert feed(LossSpikes(str(tmp_path)), losses) == []
    losses[[20, 150, 300]] = 3.0  # the first before there are enough to compare with
    losses[200] = 0.01
    losses[350] = float("nan")
    spikes = LossSpikes(str(tmp_path))
    assert feed(spikes, losses) == [151, 301, 351]
    rows = read_metrics(tmp_path / "spikes.jsonl")
    assert [row["batch"] for row in rows] == [151, 301, 351]
    assert [row["loss"] for row in rows] == [3.0, 3.0, None] and rows[0]["score"] > 8
    assert rows[0]["median"] == pytest.approx(0.57, abs=0.02) and rows[0]["ranks"] == [{"sample_id": [0, 1, 2], "timestep": None}]


def test_a_new_level_is_learned_again(tmp_path: Path) -> None:
    noise = 0.02 * np.random.default_rng(2).standard_normal(400)
    spikes = LossSpikes(str(tmp_path))
    assert feed(spikes, 0.5 + noise[:100]) == []
    assert feed(spikes, 2.0 + noise[100:300], first=101) == list(range(101, 111)), "ten, and then that is what it is"
    assert feed(spikes, [8.0, *(2.0 + noise[300:])], first=301) == [301], "and compared with"


def test_a_resumed_run_compares_with_the_losses_before_and_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    losses = 0.5 + 0.02 * np.random.default_rng(3).standard_normal(120)
    losses[[80, 100, 110]] = 2.0
    whole = LossSpikes(str(tmp_path / "whole"), window=60)
    (tmp_path / "whole").mkdir()
    expected = feed(whole, losses)
    (tmp_path / "parts").mkdir()
    before, killed = (LossSpikes(str(tmp_path / "parts"), window=60) for _ in range(2))
    found = feed(before, losses[:90])
    saved = json.loads(json.dumps(before.state_dict()))
    feed(before, losses[90:105], first=91)  # trained, and lost
    killed.load_state_dict(saved)
    state: Any = SimpleNamespace(timestamp=Timestamp(batch=90))
    killed.fit_start(state, None)  # pyright: ignore[reportArgumentType]
    assert found + feed(killed, losses[90:], first=91) == expected == [81, 101, 111]
    assert killed.state_dict() == whole.state_dict()
    assert (tmp_path / "parts" / "spikes.jsonl").read_text() == (tmp_path / "whole" / "spikes.jsonl").read_text()


def test_a_spike_in_training_is_written_with_its_samples_and_their_timesteps(guarded: Recipe, write_recipe: Write) -> None:
    guarded["algorithms"]["poison"]["kinds"] = {5: "spike"}
    guarded["callbacks"] = {"loss_spikes": {"window": 4, "warmup": 3, "threshold": 100.0}}
    trainer = build_trainer(config.load([write_recipe(guarded)]))
    seen: dict[int, Any] = {}

    class Spy(LossSpikes):
        def batch_end(self, state: Any, logger: Any) -> None:
            seen[int(state.timestamp.batch)] = state.batch["sample_id"].tolist(), state.outputs.timestep.tolist()

    trainer.state.callbacks.append(Spy(str(folder_of(guarded))))
    folder_of(guarded).mkdir(parents=True, exist_ok=True)
    trainer.fit()
    trainer.close()
    (row,) = read_metrics(folder_of(guarded) / "spikes.jsonl")
    assert row["batch"] == 5 and row["loss"] > 400 and column(guarded, "guard/loss_spikes") == [0, 0, 0, 0, 1, 1]
    ids, last_timesteps = seen[5]
    assert row["ranks"][0]["sample_id"] == ids and len(set(ids)) == 48
    assert row["ranks"][0]["timestep"][24:] == pytest.approx(last_timesteps, abs=1e-4), "of the second microbatch"


# --------------------------------------------------------------------------------------------------------- watchdog


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prx-watchdog"]


def begun(folder: Path, timeout: float | str) -> tuple[Watchdog, Any]:
    watchdog = Watchdog(str(folder), timeout)
    state: Any = SimpleNamespace(timestamp=Timestamp(batch=41))
    watchdog.run_event(Event.FIT_START, state, None)  # pyright: ignore[reportArgumentType]
    return watchdog, state


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_stall_is_reported_with_the_stacks_of_all_threads_and_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watchdog, state = begun(tmp_path, 0.2)
    watchdog.run_event(Event.BEFORE_DATALOADER, state, None)  # pyright: ignore[reportArgumentType]
    deadline = time.monotonic() + 20
    while sum("nothing for" in path.read_text() for path in tmp_path.rglob("rank0-*.txt")) == 0 or len(caplog.records) < 2:
        assert time.monotonic() < deadline
        hang_here(0.1)
    watchdog.close(state, None)  # pyright: ignore[reportArgumentType]
    stacks = "".join(path.read_text() for path in sorted((tmp_path / "stacks").iterdir()))
    assert "after before_dataloader of batch 41" in stacks and "hang_here" in stacks and stacks.count("Current thread") >= 2
    first = caplog.records[0]
    assert first.levelno == logging.ERROR and "after before_dataloader of batch 41" in first.message
    assert str(tmp_path / "stacks" / "rank0-") in first.message
    assert threads() == []


def test_events_that_keep_coming_are_no_stall(tmp_path: Path) -> None:
    watchdog, state = begun(tmp_path, "2s")
    for _ in range(6):
        time.sleep(0.5)  # three seconds of evaluation
        watchdog.run_event(Event.EVAL_BATCH_END, state, None)  # pyright: ignore[reportArgumentType]
    assert threads() == ["prx-watchdog"]
    watchdog.run_event(Event.FIT_END, state, None)  # pyright: ignore[reportArgumentType]
    assert threads() == [] and not (tmp_path / "stacks").exists()


def test_watchdog_and_collector_leave_nothing_behind_whether_fit_ends_or_raises(guarded: Recipe, write_recipe: Write) -> None:
    guarded["callbacks"] = {"watchdog": {"timeout": "10m"}, "garbage_collection": {"interval": 2}}
    run(config.load([write_recipe(guarded)]))
    assert threads() == [] and gc.isenabled()
    guarded["algorithms"]["poison"]["kinds"] = {2: "nan"}
    with pytest.raises(UserError, match="one is the limit"):
        run(config.load([write_recipe(guarded), "run_name=raises", "algorithms.skip_nonfinite.limit=1"]))
    assert threads() == [] and gc.isenabled() and not list(folder_of(guarded).rglob("stacks"))


def stall(folder: Path, revived: bool) -> None:
    watchdog = Watchdog(str(folder), timeout=0.5, abort=True)
    state, logger = cast(Any, SimpleNamespace(timestamp=Timestamp())), cast(Any, None)
    watchdog.run_event(Event.FIT_START, state, logger)
    time.sleep(0.75)  # reported by now, and not yet ended
    for _ in range(40 if revived else 0):
        watchdog.run_event(Event.BATCH_END, state, logger)
        time.sleep(0.05)
    time.sleep(0 if revived else 60)


@pytest.mark.parametrize(("revived", "code"), [(False, 75), (True, 0)])
def test_with_abort_a_process_that_stays_stalled_ends_with_its_code(revived: bool, code: int, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=stall, args=(tmp_path, revived))
    process.start()
    process.join(40)
    assert process.exitcode == code
    assert any((tmp_path / "stacks").iterdir()), "reported in both cases"


@pytest.mark.parametrize(("timeout", "seconds"), [(600, 600.0), ("10m", 600.0), ("90m", 5400.0), (0.5, 0.5)])
def test_a_timeout_is_a_number_of_seconds_or_a_duration(timeout: float | str, seconds: float) -> None:
    assert Watchdog("", timeout).timeout == seconds


@pytest.mark.parametrize("timeout", [0, -1, "10ba", "soon", float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout: float | str) -> None:
    with pytest.raises(ValueError, match="timeout must be positive|is no duration"):
        Watchdog("", timeout)


# ----------------------------------------------------------------------------------------------- garbage_collection


class Ring:
    """A cycle, which only the collector frees."""

    freed = 0

    def __init__(self) -> None:
        self.self = self

    def __del__(self) -> None:
        Ring.freed += 1


def test_cycles_are_freed_at_the_interval_and_not_before() -> None:
    Ring.freed = 0
    callback, freed = GarbageCollection(interval=3), []
    state: Any = SimpleNamespace(timestamp=Timestamp())
    logger: Any = None
    try:
        callback.fit_start(state, logger)
        assert not gc.isenabled()
        for batch in range(1, 8):
            Ring()
            [[index] for index in range(5000)]  # enough to start an automatic collection
            state.timestamp = Timestamp(batch=batch)
            callback.batch_end(state, logger)
            freed.append(Ring.freed)
    finally:
        callback.close(state, logger)
    assert freed == [0, 0, 3, 3, 3, 6, 6] and gc.isenabled()


class Enabled(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> bool:
        return gc.isenabled()

    def __len__(self) -> int:
        return 2


def test_data_loader_workers_keep_their_automatic_collection() -> None:
    callback, nothing = GarbageCollection(), SimpleNamespace()
    callback.fit_start(nothing, nothing)  # pyright: ignore[reportArgumentType]
    try:
        assert not gc.isenabled()
        assert [bool(x) for x in torch.utils.data.DataLoader(Enabled(), num_workers=1)] == [True, True]
    finally:
        callback.fit_end(nothing, nothing)  # pyright: ignore[reportArgumentType]
    assert gc.isenabled()


def test_a_collector_that_somebody_else_turned_off_stays_off() -> None:
    callback, nothing = GarbageCollection(), SimpleNamespace()
    gc.disable()
    try:
        callback.fit_start(nothing, nothing)  # pyright: ignore[reportArgumentType]
        callback.fit_end(nothing, nothing)  # pyright: ignore[reportArgumentType]
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="at least 1, not 0"):
        GarbageCollection(interval=0)
