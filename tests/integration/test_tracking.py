"""wandb, TensorBoard and MLflow, offline: what each of them reads back of a run, of a killed one too."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from PIL import Image
from wandb_files import offline_runs

from prx_composer.common.errors import HIDDEN
from prx_composer.recipe import config
from prx_composer.runs.checkpoints import Checkpoint, damage
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import run

Write = Callable[..., str]
Recipe = dict[str, Any]

PROMPTS = ["a red circle", "a blue ring: 50%, 'so'/so"]
KILLER = """
import os, signal
from composer.core import Callback
from prx_composer import registry

@registry.callbacks.register("killer")
class Killer(Callback):
    def after_train_batch(self, state, logger):  # the losses of the batch before this one were sent
        if int(state.timestamp.batch) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path / "staging"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield
    import wandb

    mlflow: Any = sys.modules.get("mlflow")
    while mlflow is not None and mlflow.active_run() is not None:  # of a store that could not be written when it was to end
        with suppress(Exception):
            mlflow.end_run()
    wandb.teardown()  # its service keeps the environment of the first test


@pytest.fixture
def tracked(tiny_recipe: Recipe, tmp_path: Path) -> Recipe:
    pytest.importorskip("mlflow", reason="MLflow isn't installed: uv sync --extra mlflow")
    tiny_recipe["loggers"] = {
        "wandb": {"project": "test", "log_artifacts": True},
        "tensorboard": {"log_dir": str(tmp_path / "tb")},
        "mlflow": {"tracking_uri": str(tmp_path / "mlruns"), "experiment_name": "test", "log_system_metrics": False},
    }
    tiny_recipe["callbacks"] = {
        "images": {"prompts": PROMPTS, "interval": "4ba", "num_inference_steps": 1},
        "lr_monitor": {},
    }
    return tiny_recipe


def expected_of(recipe: Recipe) -> dict[str, dict[int, float]]:
    """name → step → value, as metrics.jsonl has them."""
    rows = read_metrics(Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"])) / "metrics.jsonl")
    names = ("loss/train/total", "loss/train/flow", "lr-AdamW/group0")
    return {name: {row["batch"]: row[name] for row in rows if name in row} for name in names}


def mlflow_run(tmp_path: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(str(tmp_path / "mlruns"))
    (experiment,) = client.search_experiments(filter_string="name = 'test'")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def events_of(tmp_path: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "tiny"))
    events.Reload()
    return events


def test_every_tracker_reads_back_the_recipe_every_metric_and_the_drawings(
    tracked: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    run(config.load([write_recipe(tracked)]))
    expected = expected_of(tracked)
    assert all(list(values) == list(range(1, 9)) for values in expected.values())
    grids = {step: np.asarray(Image.open(tmp_path / "runs" / "tiny" / "images" / f"ba00000{step}.png")) for step in (4, 8)}

    (at_wandb,) = offline_runs(tmp_path)
    assert at_wandb.config["model"]["backbone"] == tracked["model"]["backbone"]
    assert at_wandb.config["optimizer"] == tracked["optimizer"] and at_wandb.config["callbacks"]["images"]["prompts"] == PROMPTS
    for name, values in expected.items():
        assert {row["_step"]: row[name] for row in at_wandb.history if name in row} == values
    assert [row["_step"] for row in at_wandb.history] == list(range(1, 9)), "one row for each batch"
    drawings = {row["_step"]: row for row in at_wandb.history if "images" in row}
    assert list(drawings) == [4, 8] and all(row["images"]["captions"] == PROMPTS for row in drawings.values())
    for (_, _, _, files), step in zip(at_wandb.named("run_table"), (4, 8), strict=True):
        table = json.loads(files["images_table.table.json"].read_text())
        assert table["columns"] == ["step", "prompt", "image"]
        assert [row[:2] for row in table["data"]] == [[step, prompt] for prompt in PROMPTS]
        for index, row in enumerate(table["data"]):
            pixels, every, left = np.asarray(Image.open(files[row[2]["path"]])), 128 // {4: 8, 8: 16}[step], 8 + index * 136
            assert (pixels == grids[step][8 : 8 + 128 : every, left : left + 128 : every]).all()

    events = events_of(tmp_path)
    for name, values in expected.items():
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(values)
    assert [image.step for image in events.Images("images")] == [4, 8]
    assert b"hidden_size: 32" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]

    client, found = mlflow_run(tmp_path)
    assert found.info.status == "FINISHED" and found.info.run_name == "tiny"
    assert found.data.params["model.backbone.hidden_size"] == "32" and found.data.params[
        "callbacks.images.prompts"
    ] == json.dumps(PROMPTS)
    assert found.data.params["algorithms.progressive_resolution.stages.1.image_size"] == "16"
    for name in ("loss/train/total", "loss/train/flow"):
        assert {m.step: m.value for m in client.get_metric_history(found.info.run_id, name)} == pytest.approx(expected[name])
    assert found.data.metrics["lr-AdamW/group0"] == expected["lr-AdamW/group0"][8]
    images = [a.path for a in client.list_artifacts(found.info.run_id, "images") if a.path.endswith(".png")]
    assert len(images) == 4 and sum("a red circle" in path for path in images) == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_run_of_every_tracker(tracked: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    path = write_recipe(tracked | {"autoresume": True, "code_paths": [str(tmp_path / "killer.py")]})
    process = commands.run("python", commands.REPOSITORY / "train.py", path, "callbacks.killer={}", cwd=None, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert not Checkpoint(tmp_path / "runs" / "tiny" / "checkpoints" / "ba4", 4).path.with_name("ba6").exists()
    run(config.load([path, "max_duration=10ba"]))
    expected = expected_of(tracked)
    assert list(expected["loss/train/total"]) == list(range(1, 11))

    before, after = offline_runs(tmp_path)
    assert before.id == after.id == json.loads((tmp_path / "runs" / "tiny" / "tracking.json").read_text())["wandb"]
    assert [row["_step"] for row in after.history] == [5, 6, 7, 8, 9, 10], "from the checkpoint on"
    assert all(row["loss/train/total"] == expected["loss/train/total"][row["_step"]] for row in before.history + after.history)

    events = events_of(tmp_path)
    assert len(list((tmp_path / "tb" / "tiny").iterdir())) <= 3
    for name, values in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in values.items()
        ], "every step once"

    client, found = mlflow_run(tmp_path)
    history = client.get_metric_history(found.info.run_id, "loss/train/total")
    assert len({m.step for m in history}) == len(history), "every step once"
    assert {5, 6, 7, 8, 9, 10} <= {m.step for m in history}  # what it had in memory is lost with a kill
    assert all(m.value == pytest.approx(expected["loss/train/total"][m.step]) for m in history)
    assert found.info.status == "FINISHED" and found.data.params["max_duration"] == "8ba"
    recipe = Path(client.download_artifacts(found.info.run_id, "config.yaml", str(tmp_path))).read_text()
    assert "max_duration: 10ba" in recipe


def test_a_stopped_run_goes_on_in_the_same_run_with_every_step_once(tracked: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    path = write_recipe(tracked | {"autoresume": True})
    run(config.load([path, "callbacks.stop_after.time=5ba"]))
    run(config.load([path, "max_duration=10ba"]))
    expected = expected_of(tracked)
    before, after = offline_runs(tmp_path)
    assert before.id == after.id
    assert [row["_step"] for part in (before, after) for row in part.history] == list(range(1, 11))
    assert all(row["loss/train/total"] == expected["loss/train/total"][row["_step"]] for row in before.history + after.history)
    assert before.config["max_duration"] == "8ba" and after.config["max_duration"] == "10ba"
    models = [artifact for part in (before, after) for artifact in part.named("model")]
    assert [set(aliases) for _, _, aliases, _ in models] == [{"latest", f"ba{batch}"} for batch in (2, 4, 5, 6, 8, 10)]
    assert {name for _, name, _, _ in models} == {f"{after.id}-checkpoint"}
    assert [event.step for event in events_of(tmp_path).Scalars("loss/train/total")] == list(range(1, 11))
    client, found = mlflow_run(tmp_path)
    history = client.get_metric_history(found.info.run_id, "loss/train/total")
    assert sorted(m.step for m in history) == list(range(1, 11)) and found.info.status == "FINISHED"


def test_a_checkpoint_artefact_is_whole_and_stays_when_the_checkpoint_is_deleted(
    tracked: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    run(config.load([write_recipe(tracked), "max_duration=4ba", "save_num_checkpoints_to_keep=1"]))
    (part,) = offline_runs(tmp_path)
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["ba4"]
    for (_, _, _, files), batch in zip(part.named("model"), (2, 4), strict=True):
        copy = tmp_path / f"copy{batch}"
        copy.mkdir()
        for name, place in files.items():
            (copy / name).write_bytes(place.read_bytes())
        assert sorted(files) == ["checkpoint.json", "rank0.pt"] and damage(Checkpoint(copy, batch)) is None
        assert json.loads((copy / "checkpoint.json").read_text())["batch"] == batch


def test_without_asking_no_checkpoint_is_logged(tracked: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    run(config.load([write_recipe(tracked), "max_duration=2ba", "loggers.wandb.log_artifacts=false"]))
    (part,) = offline_runs(tmp_path)
    assert part.history and not part.named("model")


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(
    tracked: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "file"))  # where artefacts are copied to
    (tmp_path / "breaker.py").write_text(BREAKER)
    path = write_recipe(tracked | {"code_paths": [str(tmp_path / "breaker.py")]})
    assert main([path, f"callbacks.breaker.store={tmp_path / 'mlruns'}"]) == 0
    warned = [record.getMessage() for record in caplog.records if "Training goes on; this is said once." in record.getMessage()]
    assert len([line for line in warned if line.startswith("loggers.wandb: a checkpoint could not be logged")]) == 1, warned
    for what in ("images", "the run's end"):
        assert len([line for line in warned if line.startswith(f"loggers.mlflow: {what} could not be logged")]) == 1, warned
    assert len(list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())) == 4
    assert len(expected_of(tracked)["loss/train/total"]) == 8
    (part,) = offline_runs(tmp_path)
    assert len(part.history) == 8 and not part.named("model")


BREAKER = """
import shutil
from composer.core import Callback
from prx_composer import registry

@registry.callbacks.register("breaker")
class Breaker(Callback):
    def __init__(self, store: str):
        self.store = store
    def batch_start(self, state, logger):
        if int(state.timestamp.batch) == 3:
            shutil.rmtree(self.store)
            open(self.store, "w").close()
"""


def test_no_tracker_learns_a_secret(
    tracked: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3t-value"
    tracked["variables"] = {"hf_token": secret, "proxy": f"http://me:{secret}@proxy:3128"}
    path = write_recipe(tracked)
    arguments = [path, "max_duration=2ba", f"variables.api_key={secret}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    run(config.load(arguments))
    assert secret in (tmp_path / "runs" / "tiny" / "config.yaml").read_text(), "the run's own recipe is what it was given"
    places = [tmp_path / name for name in ("wandb", "tb", "mlruns", "staging")] + [
        tmp_path / "runs" / "tiny" / "environment.jsonl"
    ]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    assert len(files) > 10 and not [file for file in files if secret.encode() in file.read_bytes()]
    (part,) = offline_runs(tmp_path)
    assert part.config["variables"]["hf_token"] == HIDDEN


def test_a_recipe_of_any_shape_becomes_parameters_that_mlflow_takes(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    from mlflow.entities import Param

    from prx_composer.loggers.tracking_servers import parameters

    recipe = {
        "long": "x" * 9000,
        "many": {f"k{i}": i for i in range(300)},
        "odd:key(é)": 1,
        "none": None,
        "empty": {},
        "list": [],
    }
    recipe |= {"nested": [{"a": [1, 2]}, [3, {"b": True}]], "deep": {"k" * 200: {"l" * 200: 1}}}
    found = dict(parameters(recipe))
    client = mlflow.MlflowClient(str(tmp_path / "store"))
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    items = [Param(key, value) for key, value in found.items()]
    for start in range(0, len(items), 100):
        client.log_batch(run_id, params=items[start : start + 100])
    assert client.get_run(run_id).data.params == found
    assert found["nested.0.a"] == "[1, 2]" and found["nested.1.1.b"] == "true" and found["many.k299"] == "299"
    assert len(found["long"]) == 500 and found["none"] == "null" and found["empty"] == "{}"
