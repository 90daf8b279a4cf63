"""Whole runs through train.py's own entry: artefacts, exact resume, and what a user sees when something is wrong."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import build_trainer, run

Write = Callable[..., str]
Recipe = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


def losses(folder: Path) -> dict[int, float]:
    return {row["batch"]: row["loss/train/total"] for row in read_metrics(folder / "metrics.jsonl") if "loss/train/total" in row}


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def final_state(folder: Path, batch: int = 8) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"ba{batch}" / "rank0.pt", weights_only=False)["state"]  # our own run's


# ----------------------------------------------------------------------------------------------- artefacts


def test_a_run_leaves_images_metrics_checkpoints_tokenizer_and_a_closing_line(
    tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_recipe["callbacks"] = {
        "images": {"prompts": ["a red circle", "a blue ring"], "interval": "4ba", "num_inference_steps": 2},
        "shapes_score": {"images_per_prompt": 1, "num_inference_steps": 2},
    }
    tiny_recipe["eval_loader"] = {"name": "image_caption", "path": tiny_recipe["train_loader"]["path"], "split": "heldout"}
    assert main([write_recipe(tiny_recipe), "eval_interval=4ba", "progress_bar=true"]) == 0
    folder = folder_of(tiny_recipe)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["batch"] for row in rows] == list(range(1, 9))
    assert all({"seconds", "loss/train/total", "loss/train/flow"} <= row.keys() for row in rows)
    assert [row["stage/image_size"] for row in rows] == [8] * 4 + [16] * 4
    assert rows[-1]["train_seconds"] > 0 and 0 <= rows[-1]["heldout_accuracy"] <= 1
    assert [row["batch"] for row in rows if "metrics/eval/validation_loss" in row] == [4, 8]
    assert sorted(p.name for p in (folder / "images").iterdir()) == ["ba000004.png", "ba000008.png"]
    assert Image.open(folder / "images" / "ba000008.png").width > 2 * 128
    cells = [np.asarray(Image.open(folder / "images" / f"ba00000{batch}.png"))[8 : 8 + 128, 8 : 8 + 128] for batch in (4, 8)]
    for cell, image_size in zip(cells, (8, 16), strict=True):  # drawn, and evaluated, at the size of the stage that ends
        pixels = cell[:: 128 // image_size, :: 128 // image_size]
        assert (cell == pixels.repeat(128 // image_size, 0).repeat(128 // image_size, 1)).all()
    assert not (cells[1] == cells[1][::16, ::16].repeat(16, 0).repeat(16, 1)).all()
    assert (folder / "tokenizer" / "tokenizer.json").exists() and (folder / "config.yaml").exists()
    said = capsys.readouterr()
    last = said.out.strip().splitlines()[-1]
    assert "heldout_accuracy" in last and str(folder / "images") in last and str(folder / "checkpoints") in last
    assert last.endswith(f"prx report {folder}")
    assert not {"\r", "\x1b"} & set(said.out + said.err), "what is no terminal gets neither a bar nor colours"
    assert [line.partition(":")[0] for line in caplog.messages if line.startswith("Batch ")] == [
        "Batch 1, 12.5% of the run",
        "Batch 4",  # what an evaluation measured
        "Batch 8",
    ]


def test_the_loss_goes_down(tiny_recipe: Recipe, write_recipe: Write) -> None:
    run(
        config.load(
            [write_recipe(tiny_recipe), "max_duration=60ba", "algorithms.progressive_resolution=false", "optimizer.lr=3e-3"]
        )
    )
    curve = list(losses(folder_of(tiny_recipe)).values())
    assert sum(curve[-10:]) < 0.7 * sum(curve[:10])


def test_watching_does_not_change_the_run(tiny_recipe: Recipe, write_recipe: Write) -> None:
    run(config.load([write_recipe(tiny_recipe)]))
    watched = copy.deepcopy(tiny_recipe) | {"run_name": "watched"}
    watched["callbacks"] = {"images": {"prompts": ["a red circle"], "interval": "1ba", "num_inference_steps": 2}}
    watched["eval_loader"] = {"name": "image_caption", "path": watched["train_loader"]["path"], "split": "heldout"}
    run(config.load([write_recipe(watched), "eval_interval=2ba", "loggers={metrics_file: {interval: 1}}"]))
    assert losses(folder_of(tiny_recipe)) == losses(folder_of(watched))


def test_images_are_drawn_from_the_averaged_weights(tiny_recipe: Recipe, write_recipe: Write) -> None:
    prompts = ["a red circle"]
    tiny_recipe["callbacks"] = {
        "images": {"prompts": prompts, "interval": "8ba", "num_inference_steps": 2, "guidance_scale": 2.0}
    }
    trainer = build_trainer(config.load([write_recipe(tiny_recipe), "optimizer.lr=0.02"]))
    trainer.fit()
    model: Any = trainer.state.model
    raw = model.generate(prompts, 16, 16, [0], 2, 2.0)
    with model.sampling_weights():
        averaged = model.generate(prompts, 16, 16, [0], 2, 2.0)
    trainer.close()
    from prx_composer.common.pages import image_grid

    drawn = list(Image.open(folder_of(tiny_recipe) / "images" / "ba000008.png").getdata())
    assert drawn == list(image_grid(averaged, prompts).getdata()) != list(image_grid(raw, prompts).getdata())


# -------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("stop", "switch"),
    [("2ba", 4), ("4ba", 4), ("10ba", 4), ("4ba", 5), ("5ba", 5)],
    ids=["in stage 1", "at the switch", "in stage 2", "before a switch at an epoch's end", "at a switch at an epoch's end"],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    stop: str, switch: int, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    scheduler = {"name": "linear_decay_with_warmup", "t_warmup": "0.2dur"}
    tiny_recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = f"{switch}ba"
    whole = tiny_recipe | {"max_duration": "12ba", "scheduler": scheduler}
    run(config.load([write_recipe(whole)]))
    assert read_metrics(folder_of(whole) / "metrics.jsonl")[10]["time/sample_in_epoch"] == (10 - switch) * 24, (
        "a pass has its own stage's length"
    )
    parts = copy.deepcopy(whole) | {"run_name": "parts", "autoresume": True}
    path = write_recipe(parts, "parts.yaml")
    run(config.load([path, f"callbacks.stop_after.time={stop}"]))
    assert max(losses(folder_of(parts))) == int(stop[:-2])
    run(config.load([path]))

    assert losses(folder_of(parts)) == losses(folder_of(whole)) and len(losses(folder_of(parts))) == 12
    expected, found = final_state(folder_of(whole), 12), final_state(folder_of(parts), 12)
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    averages = [state["callbacks"]["AverageState"]["average"] for state in (expected, found)]
    assert all(torch.equal(averages[1][name], value) for name, value in averages[0].items())
    assert found["timestamp"]["Timestamp"]["epoch"] == expected["timestamp"]["Timestamp"]["epoch"]


def test_resuming_across_the_end_of_an_epoch_repeats_the_uninterrupted_run(tiny_recipe: Recipe, write_recipe: Write) -> None:
    """240 samples in batches of 48 are an epoch of five batches; stop at its end and in the middle of the next."""
    tiny_recipe["algorithms"] = {}
    tiny_recipe["train_loader"]["num_workers"] = 1
    run(config.load([write_recipe(tiny_recipe), "max_duration=12ba", "save_interval=12ba"]))
    parts = copy.deepcopy(tiny_recipe) | {"run_name": "parts", "autoresume": True}
    for stop in ("5ba", "7ba", "12ba"):
        run(config.load([write_recipe(parts), f"max_duration={stop}", "save_interval=1ba"]))
    assert losses(folder_of(parts)) == losses(folder_of(tiny_recipe)) and len(losses(folder_of(parts))) == 12


def test_epochs_are_a_duration_too(tiny_recipe: Recipe, write_recipe: Write) -> None:
    del tiny_recipe["algorithms"]["progressive_resolution"]
    tiny_recipe["callbacks"] = {"images": {"prompts": ["a red circle"], "interval": "1ep", "num_inference_steps": 1}}
    run(config.load([write_recipe(tiny_recipe), "max_duration=2ep", "save_interval=1ep"]))
    rows = read_metrics(folder_of(tiny_recipe) / "metrics.jsonl")
    assert [row["batch"] for row in rows] == list(range(1, 11)), "240 samples in batches of 48, twice"
    assert "loss/train/total" in rows[-1] and "train_seconds" in rows[-1]
    assert sorted(p.name for p in (folder_of(tiny_recipe) / "images").iterdir()) == ["ba000005.png", "ba000010.png"]


def test_a_finished_run_says_so_and_ends_well(
    tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tiny_recipe | {"autoresume": True})
    assert main([path, "max_duration=2ba"]) == 0
    before = {p: p.read_bytes() for p in folder_of(tiny_recipe).rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main([path, "max_duration=2ba", "save_interval=1ba"]) == 0
    assert "already been trained for 2ba" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in folder_of(tiny_recipe).rglob("*") if p.is_file()} == before


# ----------------------------------------------------------------------------------------------- bad input


def changed(recipe: Recipe, path: str, value: Any) -> Recipe:
    recipe = copy.deepcopy(recipe)
    target = recipe
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    return recipe


BAD: dict[str, tuple[str, Any, str]] = {
    "misspelt key": ("optimzer", {}, "optimzer: no such key in a recipe. Did you mean 'optimizer'?"),
    "misspelt component": ("algorithms.emma", {}, "Did you mean 'ema'?"),
    "misspelt argument": ("optimizer.lrr", 1.0, "optimizer.lrr: no such argument. Did you mean 'lr'?"),
    "batch of no ranks": ("device_train_microbatch_size", 7, "device_train_microbatch_size: 7 does not divide the device batch"),
    "stage batch": (
        "algorithms.progressive_resolution.stages",
        [{"image_size": 16, "global_train_batch_size": 48, "device_train_microbatch_size": 36}],
        "algorithms.progressive_resolution.stages[0].device_train_microbatch_size: 36",
    ),
    "image size": ("image_size", 18, "image_size: 18 is not divisible by model.backbone.patch_size 4"),
    "stage image size": (
        "algorithms.progressive_resolution.stages",
        [{"image_size": 10, "global_train_batch_size": 48, "device_train_microbatch_size": 48}],
        "stages[0].image_size: 10 is not divisible by model.backbone.patch_size 4",
    ),
    "caption column": (
        "train_loader.captions",
        {"prompt": 1.0},
        "no caption column 'prompt'; the data set has caption, short_caption",
    ),
    "other source": ("train_loader.source.heldout", 31, "was made with other settings of this source (heldout)"),
    "context width": ("model.backbone.context_in_dim", 99, "set context_in_dim: 24"),
    "precision": ("precision", "amp_bf16", "precision: amp_bf16 needs a GPU"),
    "scheduler": ("scheduler", {"name": "constant", "t_max": "3 weeks"}, "scheduler.t_max: '3 weeks' is no time"),
    "size of images": (
        "callbacks.images",
        {"prompts": ["x"], "height": 18},
        "callbacks.images.height: 18 is not",
    ),
    "clipping": ("algorithms.gradient_clipping.clipping_type", "nrm", "clipping_type: expected 'norm' or 'value' or 'adaptive'"),
    "score of other data": (
        "callbacks.shapes_score",
        {"image_size": 18},
        "callbacks.shapes_score.image_size: 18 is not",
    ),
    "tokens": ("max_duration", "1000tok", "max_duration: 1000tok must be a number of batches, epochs or samples"),
    "epochs with stages": ("max_duration", "3ep", "max_duration: 3ep cannot be in epochs"),
    "encoder setting": (
        "model.text_encoder.config.num_layrs",
        3,
        "config.num_layrs: t5 has no such setting. Did you mean 'num_layers'?",
    ),
    "dtype": ("model.text_encoder.dtype", "bf16", "model.text_encoder.dtype: expected 'float32' or 'bfloat16' or 'float16'"),
    "fsdp mapping": ("parallelism_config", {"fsdp": True}, "parallelism_config.fsdp must be a mapping"),
    "window": ("algorithms.ema", {"half_life": "4 moons"}, "algorithms.ema"),
    "fsdp": ("parallelism_config", {"fsdp": {"sharding": "full"}}, "parallelism_config.fsdp.sharding: no such argument"),
    "missing weights": (
        "model.text_encoder",
        {"name": "huggingface", "pretrained": "nobody/no-such-encoder", "tokenizer": {"train": True}},
        "model.text_encoder: nobody/no-such-encoder cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_users_mistake_ends_in_one_message_and_nothing_is_trained(
    name: str, tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path, value, message = BAD[name]
    assert main([write_recipe(changed(tiny_recipe, path, value))]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err
    assert not (folder_of(tiny_recipe) / "metrics.jsonl").exists()
    assert main([write_recipe(tiny_recipe), "max_duration=1ba", "autoresume=true"]) == 0, "the mended recipe runs"


def test_an_empty_or_missing_data_folder_is_named(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del tiny_recipe["train_loader"]["source"]
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        tiny_recipe["train_loader"]["path"] = str(tmp_path / folder)
        assert main([write_recipe(tiny_recipe), f"run_name={folder}"]) == 1
        error = capsys.readouterr().err
        assert "train_loader" in error and str(tmp_path / folder) in error and "Traceback" not in error


def test_a_run_folder_in_use_is_not_touched(tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tiny_recipe)
    assert main([path, "max_duration=2ba"]) == 0
    folder = folder_of(tiny_recipe)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main([path]) == 1
    assert "already in use" in capsys.readouterr().err
    assert main([path, "autoresume=true", "optimizer.lr=0.5"]) == 1
    assert "optimizer.lr (0.001 → 0.5)" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    stranger = folder.with_name("thesis")
    stranger.mkdir()
    (stranger / "chapter1.tex").write_text("precious")
    assert main([path, "run_name=thesis", "autoresume=true"]) == 1
    assert "holds no run" in capsys.readouterr().err and len(list(stranger.iterdir())) == 1


def test_a_checkpoint_of_other_data_is_refused(
    tiny_recipe: Recipe, write_recipe: Write, shapes_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same path, but someone put other data there between the run and its resume."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(data)}
    del tiny_recipe["algorithms"]["progressive_resolution"]
    path = write_recipe(tiny_recipe | {"autoresume": True, "global_train_batch_size": 24})
    assert main([path, "max_duration=2ba"]) == 0
    shutil.rmtree(data / "train")
    shutil.copytree(shapes_data / "heldout", data / "train")
    assert main([path]) == 1
    assert "data ('240 samples" in capsys.readouterr().err


def test_corrupt_images_are_counted_and_survived(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    from prx_composer.data.format import Bucket, BucketWriter, RawSample
    from prx_composer.data.sources import ShapesSource

    with BucketWriter(tmp_path / "data" / "train", 16, ("caption", "short_caption")) as writer:
        for index, (_, sample) in enumerate(ShapesSource(16, images_per_scene=1).samples()):
            encoded = sample.image[:40] if index % 50 == 7 else sample.image
            writer.write(Bucket(16, 16), RawSample(encoded, 16, 16, sample.captions, sample.key))
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(tmp_path / "data"), "max_undecodable": 0.1}
    assert main([write_recipe(tiny_recipe)]) == 0
    rows = read_metrics(folder_of(tiny_recipe) / "metrics.jsonl")
    assert len(losses(folder_of(tiny_recipe))) == 8 and max(row.get("data/undecodable", 0) for row in rows) > 0
    again = tiny_recipe | {"run_name": "strict"}
    again["train_loader"] = again["train_loader"] | {"max_undecodable": 0.001}
    assert main([write_recipe(again), "max_duration=40ba"]) == 1


def test_an_algorithm_of_ones_own_joins_by_name(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    code = tmp_path / "brightness.py"
    code.write_text(
        """
import torch
from composer.core import Algorithm, Event
from prx_composer import registry
from prx_composer.models import AuxiliaryLoss

class Brightness(AuxiliaryLoss):
    def forward(self, outputs, batch):
        return (outputs.prediction.mean() - outputs.clean.mean()).square()

@registry.algorithms.register("brightness")
class BrightnessLoss(Algorithm):
    def __init__(self, weight: float = 1.0):
        self.weight = weight
    def match(self, event, state):
        return event == Event.INIT
    def apply(self, event, state, logger):
        state.model.auxiliary_losses["brightness"] = Brightness(self.weight)
"""
    )
    tiny_recipe["code_paths"] = [str(code)]
    tiny_recipe["algorithms"]["brightness"] = {"weight": 0.1}
    run(config.load([write_recipe(tiny_recipe), "max_duration=2ba"]))
    rows = read_metrics(folder_of(tiny_recipe) / "metrics.jsonl")
    for row in rows:
        assert row["loss/train/total"] == pytest.approx(row["loss/train/flow"] + row["loss/train/brightness"], rel=1e-6)


def test_a_metrics_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"batch": 1}) + '\n{"batch": 2, "loss')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"batch": 1}]
