"""The newest checkpoint is copied to an object store, over connections that are cut, and a fresh machine goes on from there."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import commands
import pytest
from conftest import train_once
from test_background_checkpoints import assert_equal, content_of
from unreliable import UnreliableProxy

from prx_composer.recipe import config
from prx_composer.runs.checkpoints import Checkpoint, all_checkpoints, damage
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import run

pytestmark = pytest.mark.slow

Write = Callable[..., str]
Recipe = dict[str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that copies is a fork, as other commands of tests are."""
    monkeypatch.setattr(sys, "executable", commands.path_of("python"))


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnreliableProxy]:
    """Between this package and the server; the client `s3` reaches it directly."""
    port = urlparse(os.environ["S3_ENDPOINT_URL"]).port
    assert port is not None
    proxy = UnreliableProxy(port, seed=0, longest=4_000_000)  # a checkpoint has 1 MB
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


def keys(s3: Any) -> set[str]:
    return {entry["Key"] for entry in s3.list_objects_v2(Bucket="data").get("Contents", [])}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["batch"], row["loss/train/total"]) for row in read_metrics(folder / "metrics.jsonl")]


def test_a_fresh_machine_goes_on_from_the_copy_bit_for_bit_though_connections_were_cut(
    tiny_recipe: Recipe, write_recipe: Write, s3: Any, proxy: UnreliableProxy, shapes_data: Path, tmp_path_factory: Any
) -> None:
    whole = train_once(tmp_path_factory, shapes_data)
    path = write_recipe(tiny_recipe | {"save_folder": "s3://data/runs/tiny", "autoresume": True})
    folder = Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny"))
    run(config.load([path, "callbacks.stop_after.time=5ba"]))
    assert proxy.before + proxy.within > 0
    there = {key.removeprefix("runs/tiny/") for key in keys(s3)}
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints/")} == {"ba5"}, "the newest alone"
    assert {"config.yaml", "metrics.jsonl", "checkpoints/ba5/checkpoint.json", "checkpoints/ba5/rank0.pt"} <= there

    shutil.rmtree(folder)
    run(config.load([path]))
    assert all_checkpoints(folder / "checkpoints")[0].batch == 5, "it went on from there"
    assert losses(folder) == losses(whole) and len(losses(whole)) == 8
    for key in ("model", "optimizers"):
        assert_equal(content_of(folder, 8)[key], content_of(whole, 8)[key])
    assert any(key.startswith("runs/tiny/checkpoints/ba8/") for key in keys(s3))


def test_a_store_that_is_gone_is_said_and_training_goes_on(
    tiny_recipe: Recipe, write_recipe: Write, s3: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tiny_recipe | {"save_folder": "s3://data/runs/tiny", "save_interval": "1dur"})
    recipe = config.load([path])
    monkeypatch.setattr("prx_composer.training.run.take_up", lambda *_: monkeypatch.setenv("AWS_ACCESS_KEY_ID", ""))
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("prx_composer.data.storage.ATTEMPTS", 1)
    run(recipe)
    folder = Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny"))
    assert "ba8 could not be copied to s3://data/runs/tiny: " in caplog.text and "Training goes on" in caplog.text
    assert damage(Checkpoint(folder / "checkpoints" / "ba8", 8)) is None


def test_another_run_in_the_store_is_not_written_over(
    tiny_recipe: Recipe, write_recipe: Write, s3: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.put_object(Bucket="data", Key="runs/tiny/checkpoints/ba8/checkpoint.json", Body=json.dumps({}))
    path = write_recipe(tiny_recipe | {"save_folder": "s3://data/runs/tiny"})
    assert main([path]) == 1
    assert "save_folder: s3://data/runs/tiny already has a run" in capsys.readouterr().err
    assert len(keys(s3)) == 1
