"""Whole runs on a time budget. In one process the training clock is the test's own, so that nothing depends on the load."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer.algorithms.resolution import ProgressiveResolution
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics, save_recipe
from prx_composer.schedule import clock as clock_module
from prx_composer.schedule.moments import ScheduleWindow
from prx_composer.training import main
from prx_composer.training.run import build_trainer, run

Write = Callable[..., str]
Recipe = dict[str, Any]
STEP, EVALUATION = 1.0, 2.0  # seconds


class Pace(Callback):
    """Passes the time: a step takes a second, an evaluation two. Notes what windows and stages say at each step's start."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.window = ScheduleWindow(end="0.5budget")
        self.seen: list[tuple[bool, int]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.now += STEP
        stages = next(a for a in state.algorithms if isinstance(a, ProgressiveResolution))
        self.seen.append((self.window.contains(state), stages.stages.index(stages.stage)))

    def eval_end(self, state: State, logger: Logger) -> None:
        self.now += EVALUATION


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    pace = Pace()
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(monotonic=lambda: pace.now))
    return pace


@pytest.fixture
def budgeted(tiny_recipe: Recipe) -> Recipe:
    """20 seconds of budget, two stages by budget, and everything that a run does at its end."""
    tiny_recipe["eval_loader"] = {"name": "image_caption", "path": tiny_recipe["train_loader"]["path"], "split": "heldout"}
    tiny_recipe["callbacks"] = {
        "images": {"prompts": ["a red circle"], "interval": "1000ba", "num_inference_steps": 2},
        "shapes_score": {"images_per_prompt": 1, "num_inference_steps": 2},
        "lr_monitor": {},
    }
    tiny_recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "1000ba or 0.5budget"
    tiny_recipe["scheduler"] = {"name": "warmup_stable_decay", "t_warmup": "2ba", "decay": 0.3}
    intervals = {"eval_interval": "1000ba", "save_interval": "1000ba"}
    return tiny_recipe | intervals | {"max_duration": "100000ba", "time_budget": "20s", "autoresume": True}


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def train(recipe: Recipe, write_recipe: Write, pace: Pace, *changes: str) -> list[dict[str, Any]]:
    loaded = config.load([write_recipe(recipe), *changes])
    trainer = build_trainer(loaded)
    save_recipe(loaded, folder_of(recipe))
    trainer.state.callbacks.append(pace)
    trainer.fit()
    trainer.close()
    return read_metrics(folder_of(recipe) / "metrics.jsonl")


def test_a_run_ends_inside_its_budget_with_everything_and_goes_on_with_a_larger_one(
    budgeted: Recipe, write_recipe: Write, pace: Pace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(budgeted)
    config_path = write_recipe(budgeted)
    rows = train(budgeted, write_recipe, pace)
    spent = pace.now - 1000
    assert 20 - STEP - 0.2 * EVALUATION < spent <= 20, "another step would not have fitted"
    assert json.loads((folder / "clock.json").read_text()) == {"elapsed": spent}
    last = len(rows)
    evaluated = [row["batch"] for row in rows if "metrics/eval/validation_loss" in row]
    assert evaluated == [row["batch"] for row in rows if "heldout_accuracy" in row] == [1, 2, last], "rehearsed, then done"
    assert sorted(p.name for p in (folder / "images").iterdir()) == [f"ba{n:06d}.png" for n in (1, 2, last)]
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {f"ba{n}" for n in (1, 2, last)}
    checkpoint = torch.load(folder / "checkpoints" / f"ba{last}" / "rank0.pt", weights_only=False)["state"]  # our own run's
    assert checkpoint["callbacks"]["AverageState"]["average"].keys() <= checkpoint["model"].keys()
    assert rows[-1]["lr-AdamW/group0"] == 0 < rows[-3]["lr-AdamW/group0"] < rows[3]["lr-AdamW/group0"]
    assert [row["budget/elapsed"] + row["budget/remaining"] for row in rows] == pytest.approx([20] * last)

    in_stage_1 = [stage == 0 for _, stage in pace.seen]
    assert [window for window, _ in pace.seen] == in_stage_1, "the stage and a window end at the same batch"
    assert in_stage_1 == [True] + [row["budget/elapsed"] < 10 for row in rows[:-1]]

    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main([config_path]) == 0
    assert "tiny has used 19s of its time budget of 20s" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

    pace.seen.clear()
    pace.now += 500  # nobody trains in the meantime
    rows = train(budgeted, write_recipe, pace, "time_budget=45s")
    assert 45 - STEP - 0.2 * EVALUATION < pace.now - 1500 <= 45
    assert rows[last]["budget/elapsed"] == pytest.approx(spent + STEP)
    assert set(pace.seen) == {(False, 1)}, "what was passed stays passed: 20 s are less than half of 45 s"
    assert [row["batch"] for row in rows if "metrics/eval/validation_loss" in row] == [1, 2, last, len(rows)]


def test_a_budget_that_is_not_needed_changes_no_bit(budgeted: Recipe, write_recipe: Write) -> None:
    """Neither do its rehearsals, nor an alternative that comes later."""
    changed = ["max_duration=8ba", "scheduler={name: warmup_stable_decay, t_warmup: 2ba}"]
    plain = copy.deepcopy(budgeted) | {"run_name": "plain", "time_budget": None}
    plain["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "4ba"
    budgeted["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "4ba or 0.9budget"
    run(config.load([write_recipe(plain, "plain.yaml"), *changed]))
    for stop in ("4ba or 0.9budget", "8ba"):
        run(config.load([write_recipe(budgeted), *changed, "time_budget=24h", f"callbacks.stop_after.time={stop}"]))
    found, expected = (
        {row["batch"]: row["loss/train/total"] for row in read_metrics(folder_of(recipe) / "metrics.jsonl")}
        for recipe in (budgeted, plain)
    )
    assert found == expected and len(found) == 8


UNEVEN = """
import json, os, time
from composer.core import Callback
from composer.utils import dist
from prx_composer import registry
from prx_composer.schedule.clock import clock_of

@registry.callbacks.register("uneven")
class Uneven(Callback):
    def __init__(self, folder: str = "."):
        self.folder, self.steps = folder, []
    def batch_start(self, state, logger):
        time.sleep(0.05 + 0.2 * dist.get_global_rank())
    def batch_end(self, state, logger):
        clock = clock_of(state)
        self.steps.append([int(state.timestamp.batch), clock.elapsed, clock.paused, state.optimizers[0].param_groups[0]["lr"]])
    def fit_end(self, state, logger):
        with open(os.path.join(self.folder, f"rank{dist.get_global_rank()}.json"), "w") as file:
            json.dump(self.steps, file)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_agree_on_the_time_and_stop_at_the_same_batch(budgeted: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "uneven.py").write_text(UNEVEN)
    budgeted |= {"time_budget": "8s", "code_paths": [str(tmp_path / "uneven.py")]}
    budgeted["callbacks"]["uneven"] = {"folder": str(tmp_path)}
    done = commands.run("composer", "-n", 2, "train.py", write_recipe(budgeted), timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) >= 2
    rows = read_metrics(folder_of(budgeted) / "metrics.jsonl")
    assert len(rows) == len(first) and rows[-1]["lr-AdamW/group0"] == 0
    assert "metrics/eval/validation_loss" in rows[-1] and "heldout_accuracy" in rows[-1]
    assert (folder_of(budgeted) / "checkpoints" / f"ba{len(rows)}").is_dir()
