"""The recipes of icons on tiny sets: they train, score, and score the same on two ranks."""

import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
from icon_sets import STYLES, write_sets

from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import run as train

pytest.importorskip("resvg_py")

SMALL = (
    "model.backbone.hidden_size=32", "model.backbone.depth=3", "model.backbone.num_heads=2", "model.backbone.context_in_dim=24",
    "model.text_encoder.config={model_type: t5, d_model: 24, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2, dropout_rate: 0.0}",
    "train_loader.num_workers=0", "global_train_batch_size=32", "global_eval_batch_size=16", "scheduler.t_warmup=1ba",
    "callbacks.images.num_inference_steps=1", "callbacks.icons_score.num_inference_steps=2", "progress_bar=false",
)  # fmt: skip
SCORES = [f"{name}_accuracy{top}" for name in ("heldout", "trained", "other_style", "chance") for top in ("", "/top5")]


@pytest.fixture
def here(tmp_path: Path) -> list[str]:
    """Settings that keep sets, data and runs in a folder of the test."""
    sets = write_sets(tmp_path / "sets")
    data = [f"{loader}.path={tmp_path / 'data'}" for loader in ("train_loader", "eval_loader")]
    return [*SMALL, *data, f"train_loader.source.folder={sets}", f"run_folder={tmp_path}/runs/${{run_name}}"]


def last_scores(folder: Path) -> dict[str, float]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "heldout_accuracy" in row]
    return {name: rows[-1][name] for name in SCORES}


def test_the_recipe_for_a_gpu_trains_at_toy_size(here: list[str], tmp_path: Path) -> None:
    toy: list[Any] = [
        "model.compile=false", "precision=fp32", "image_size=32", "train_loader.source.image_size=32",
        "model.backbone.patch_size=8",
        "algorithms.progressive_resolution.stages[0].image_size=16", "algorithms.progressive_resolution.stages[1].image_size=32",
        "algorithms.progressive_resolution.stages[0].global_train_batch_size=32",
        "algorithms.progressive_resolution.stages[1].global_train_batch_size=32",
        "algorithms.progressive_resolution.stages[1].device_train_microbatch_size=16",
        "algorithms.tread.start_block=1", "algorithms.tread.end_block=1", "max_duration=4ba",
        "callbacks.icons_score.interval=0.5dur",
    ]  # fmt: skip
    train.run(config.load(["yamls/icons_gpu.yaml", *here, *toy]))
    rows = read_metrics(tmp_path / "runs" / "icons_gpu" / "metrics.jsonl")
    assert [row["batch"] for row in rows if "heldout_accuracy" in row] == [2, 4]
    scores = last_scores(tmp_path / "runs" / "icons_gpu")
    assert scores["chance_accuracy"] == pytest.approx(1 / 36) and 0 < scores["other_style_accuracy"] < 1

    commands.prx("export", tmp_path / "runs" / "icons_gpu", "--output", tmp_path / "out", "--no-samples", "--license", "other")
    card = (tmp_path / "out" / "README.md").read_text()
    for style in STYLES:
        assert f"| Author of {style} | LicenseRef-Test (https://example.com/licence) |" in card
    shutil.move(tmp_path / "data", tmp_path / "moved")
    said = commands.prx("export", tmp_path / "runs" / "icons_gpu", "--output", tmp_path / "again", "--no-samples")
    assert "does not say whose work the data are: data/train/manifest.json cannot be read here" in said
    assert "Author of" not in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.slow
def test_the_score_is_the_same_on_two_ranks(here: list[str], tmp_path: Path) -> None:
    """Of weights that were trained a little, and stay as they are."""
    small = ["yamls/icons.yaml", *here, "max_duration=6ba", "eval_interval=6ba", "save_interval=6ba"]
    train.run(config.load([*small, "optimizer.lr=0.02", "optimizer.adam_lr=0.02"]))
    still = [*small, f"model.init_from={tmp_path}/runs/icons", "optimizer.lr=0.0", "optimizer.adam_lr=0.0", "max_duration=1ba"]
    for ranks in (1, 2):
        finished = commands.run("composer", "-n", ranks, "train.py", *still, f"run_name=on{ranks}", "scheduler.t_warmup=0ba")
        assert finished.returncode == 0, finished.stderr[-3000:]
    assert last_scores(tmp_path / "runs" / "on1") == last_scores(tmp_path / "runs" / "on2")
