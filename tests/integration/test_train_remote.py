"""Training from an object store: S3 as moto serves it on loopback, over connections that are dropped."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import commands
import pytest
from conversions import fetch_all, jpeg, sample, settings, write_tar
from typer.testing import CliRunner
from unreliable import UnreliableProxy

from prx_composer.cli import app
from prx_composer.commands.convert import run_conversion
from prx_composer.data.sources import all_scenes
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import run

pytestmark = pytest.mark.slow

Recipe = dict[str, Any]


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnreliableProxy]:
    """Between this package and the server; the client `s3` reaches it directly."""
    port = urlparse(os.environ["S3_ENDPOINT_URL"]).port
    assert port is not None
    proxy = UnreliableProxy(port, seed=0, longest=100_000, outage=10)
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


@pytest.fixture
def recipe(tiny_recipe: Recipe, encoder_folder: Path, tmp_path: Path) -> Recipe:
    """With a frozen encoder of random but seeded weights from a folder."""
    tiny_recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(encoder_folder), "max_tokens": 14}
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(tmp_path / "local")}
    return tiny_recipe | {"preflight": False, "autoresume": True}


def put_data(s3: Any, recipe: Recipe, file: str, tmp_path: Path) -> None:
    """Tars in the store are converted to s3://data/set, and its embeddings are stored beside it; a copy lies in `local`."""
    scenes = all_scenes()
    for number in range(12):
        members = []
        for i in range(20):
            index, size = 20 * number + i, [(16, 16), (12, 20)][i % 2]
            members += sample(f"{index:04d}", jpeg(*size, index), scenes[index].caption)
        s3.upload_file(str(write_tar(tmp_path / "tars" / f"{number}.tar", members)), "data", f"in/{number}.tar")
    chosen = settings("webdataset", tmp_path, input="s3://data/in", image_size=16, multiple=4, unit_bytes=1)
    assert run_conversion(chosen, "s3://data/set")["counts"]["kept"] == 240
    local = fetch_all(s3, "set", tmp_path / "local")
    CliRunner().invoke(app, ["encode", "text", file, "--part", "40"], catch_exceptions=False)
    for path in (local / "train" / "encoded").rglob("*.*"):
        s3.upload_file(str(path), "data", f"set/{path.relative_to(local)}")


def losses(recipe: Recipe) -> dict[int, float]:
    rows = read_metrics(Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"])) / "metrics.jsonl")
    return {row["batch"]: row["loss/train/total"] for row in rows}


def test_a_run_that_is_killed_and_loses_its_shards_repeats_the_one_on_a_disk_bit_for_bit(
    recipe: Recipe, write_recipe: Any, s3: Any, proxy: UnreliableProxy, tmp_path: Path
) -> None:
    put_data(s3, recipe, write_recipe(recipe), tmp_path)
    recipe["train_loader"]["text_embedding"] = "text"
    near = recipe | {"run_name": "near"}
    cache = tmp_path / "cache"
    far = recipe | {"train_loader": recipe["train_loader"] | {"path": str(cache), "remote": "s3://data/set", "num_workers": 1}}
    path = write_recipe(far, "far.yaml")
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    process = commands.start("python", "train.py", path, "max_duration=400ba", start_new_session=True)
    deadline = time.monotonic() + 120
    while not (checkpoints / "ba4").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = max(int(folder.name.removeprefix("ba")) for folder in checkpoints.iterdir() if folder.name.startswith("ba"))
    assert len(list(cache.rglob("*.mds"))) > 4
    shutil.rmtree(cache)

    end = f"max_duration={reached + 6}ba"
    run(config.load([path, end]))
    run(config.load([write_recipe(near, "near.yaml"), end]))
    assert losses(far) == losses(near) and len(losses(near)) == reached + 6
    assert proxy.before > 0 and proxy.within > 0 and proxy.refused == 10
