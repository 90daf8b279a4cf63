"""Stored columns: from `prx encode` to the loss, killed on the way, made by two ranks, and refused where they don't belong."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from conftest import TINY_T5

from prx_composer.cli import app
from prx_composer.common.errors import UserError
from prx_composer.data.stored import encoded_folder, pack, unpack
from prx_composer.recipe import config
from prx_composer.runs.opening import load_trained
from prx_composer.training.run import build_trainer, run

Recipe = dict[str, Any]
TINY_ENCODER: Recipe = {"name": "huggingface", "config": TINY_T5, "tokenizer": {"train": True}, "max_tokens": 14}
Write = Callable[..., str]


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path, shapes_data: Path, encoder_folder: Path) -> Recipe:
    """Frozen encoder with random but seeded weights from a folder, and data of its own."""
    import shutil

    shutil.copytree(shapes_data, tmp_path / "data")
    tiny_recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(encoder_folder), "max_tokens": 14}
    tiny_recipe["train_loader"]["path"] = str(tmp_path / "data")
    return tiny_recipe | {"preflight": False}


def encode(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    if ranks == 1:
        return commands.run("prx", "encode", *arguments)
    return commands.run("composer", "-n", ranks, "-m", "prx_composer.cli", "encode", *arguments)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def invoke(*arguments: str) -> str:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["encode", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def first_loss(recipe_file: str, *overrides: str) -> dict[str, float]:
    """Every term of the first step's loss."""
    trainer = build_trainer(config.load([recipe_file, "max_duration=1ba", *overrides]))
    trainer.fit()
    losses = dict(trainer.state.total_loss_dict)
    trainer.close()
    return losses


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 1e-3), ("int8", 1e-2), ("float32", 1e-6)])
def test_stored_embeddings_give_the_loss_of_the_encoder_run_online(
    recipe: Recipe, write_recipe: Write, tmp_path: Path, storage: str, tolerance: float
) -> None:
    file = write_recipe(recipe)
    said = invoke("text", file, "--storage", storage, "--part", "100", "--batch-size", "16")
    assert "captions by" in said and ("relative error of a token" in said) == (storage == "int8")
    online = first_loss(file, "run_name=online")
    stored = first_loss(file, "run_name=stored", "train_loader.text_embedding=text")
    for name in online:
        assert stored[name] == pytest.approx(online[name], rel=tolerance), name


def test_tars_are_converted_encoded_checked_and_trained_on(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    from conversions import convert, write_tars
    from stacks import TEACHER

    convert("webdataset", write_tars(tmp_path / "tars", 4, 16), tmp_path / "converted", image_size=16, multiple=4)
    recipe["algorithms"] = {"repa": {"teacher": TEACHER, "block": 1, "projector_hidden": 16}}
    recipe["train_loader"] = {"name": "image_caption", "path": str(tmp_path / "converted")}
    file = write_recipe(recipe | {"preflight": True, "image_size": 16, "max_duration": "3ba"})
    invoke("text", file, "--name", "t5", "--part", "7")
    invoke("features", file, "--name", "dino", "--part", "5")
    stored = {"features": {"column": "dino", "width": 12}, "teacher": None}
    overrides = [f"algorithms.repa={json.dumps(recipe['algorithms']['repa'] | stored)}", "train_loader.features=[dino]"]
    said = run(config.load([file, *overrides, "train_loader.text_embedding=t5"]))
    assert "loss" in said


def test_a_run_on_stored_text_of_several_encoders_learns_what_it_learns_online_and_keeps_its_encoders(
    recipe: Recipe, write_recipe: Write, tmp_path: Path, tokenizer: Any
) -> None:
    import shutil

    from architectures import of_pixels
    from texts import CLIP
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(tokenizer), **CLIP)).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    t5 = recipe["model"]["text_encoder"] | {"attend_padding": True}
    clip = t5 | {"pretrained": str(tmp_path / "clip"), "layer": -2, "pooled": "projected"}
    sizes = of_pixels("SD3Transformer2DModel") | {"pooled_projection_dim": 6}
    recipe["model"]["backbone"] = {"name": "diffusers", "class": "SD3Transformer2DModel", **sizes}
    recipe["model"]["text_encoder"] = {"name": "several", "encoders": {"clip": clip, "t5": t5}}
    file = write_recipe(recipe)
    assert f"captions by {tmp_path / 'clip'} + {tmp_path / 'encoder'}" in invoke("text", file, "--storage", "float32")
    rows = []
    for name, overrides in (("online", []), ("stored", ["train_loader.text_embedding=text"])):
        run(config.load([file, f"run_name={name}", "max_duration=2ba", "autoresume=true", *overrides]))
        folder = Path(recipe["run_folder"].replace("${run_name}", name))
        rows.append([json.loads(line)["loss/train/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert rows[1] == pytest.approx(rows[0], rel=1e-4) and rows[0][0] != rows[0][-1]
    turned = "model.text_encoder.tokens=[t5, clip]"
    with pytest.raises(UserError, match="train_loader.text_embedding: .*weights or tokenizer"):
        build_trainer(config.load([file, "run_name=turned", "train_loader.text_embedding=text", turned]))
    for gone in ("clip", "encoder"):
        shutil.rmtree(tmp_path / gone)
    run(config.load([file, "run_name=online", "max_duration=3ba", "autoresume=true"]))
    opened = load_trained(str(Path(recipe["run_folder"].replace("${run_name}", "online"))))
    assert opened.batch == 3 and opened.model.generate(["a red circle"], 16, 16, num_inference_steps=1).shape[0] == 1


def test_only_valid_tokens_are_stored(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    from streaming import LocalDataset

    invoke("text", write_recipe(recipe), "--part", "64")
    folder = encoded_folder(tmp_path / "data", "train", "text", "caption")
    images, stored = (LocalDataset(str(path / "16x16")) for path in (tmp_path / "data" / "train", folder))
    assert len(images) == len(stored)
    for index in range(0, len(images), 37):
        words = len(images[index]["caption"].split()) + 1  # and the end token
        assert unpack(stored[index], "bfloat16").shape == (words, 24)


@pytest.mark.slow
def test_kills_and_other_numbers_of_ranks_leave_the_same_bytes(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    file = write_recipe(recipe)
    folder = tmp_path / "data" / "train" / "encoded"
    undisturbed = encode("text", file, "--part", "4", "--name", "a")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    for _ in range(3):
        process = commands.start("prx", "encode", "text", file, "--part", 4, "--name", "b", start_new_session=True)
        # glob rather than rglob: folders vanish under it while the command works.
        before = len(glob(f"{folder}/b/**/*.mds", recursive=True))
        while process.poll() is None and len(glob(f"{folder}/b/**/*.mds", recursive=True)) < before + 5:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not list((folder / "b").rglob("manifest.json"))
    finished = encode("text", file, "--part", "4", "--name", "b", ranks=2)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    assert bytes_of(folder / "b") == bytes_of(folder / "a")


def test_stored_embeddings_of_another_encoder_are_refused_by_name(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    file = write_recipe(recipe)
    invoke("text", file)
    moved = T5EncoderModel.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.01)
    moved.save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match=rf"train_loader.text_embedding.*made by {tmp_path / 'encoder'}.*weights or"):
        build_trainer(config.load([file, "train_loader.text_embedding=text"]))
    with pytest.raises(UserError, match=r"stored are up to 14 tokens.*Set max_tokens"):
        build_trainer(config.load([file, "train_loader.text_embedding=text", "model.text_encoder.max_tokens=12", "run_name=b"]))
    with pytest.raises(UserError, match=r"text_embedding: nothing is stored in .*prx encode text.*There is: text.*text"):
        build_trainer(config.load([file, "train_loader.text_embedding=txet", "run_name=c"]))
    other = ["train_loader.text_embedding=text", "train_loader.captions={short_caption: 1}", "run_name=d"]
    with pytest.raises(UserError, match=r"nothing is stored in \S*/short_caption; .* What has that name is of caption alone\.$"):
        build_trainer(config.load([file, *other]))


def test_going_on_with_other_settings_is_refused(recipe: Recipe, write_recipe: Write) -> None:
    file = write_recipe(recipe)
    invoke("text", file, "--part", "64")
    with pytest.raises(UserError, match=r"part_size was 64 and is 32, storage was 'bfloat16' and is 'int8'"):
        invoke("text", file, "--part", "32", "--storage", "int8")


def test_what_no_run_could_read_is_not_stored(tiny_recipe: Recipe, recipe: Recipe, write_recipe: Write) -> None:
    recipe["model"]["backbone"]["context_in_dim"] = 32
    with pytest.raises(UserError, match="embeddings are 24 wide; set context_in_dim: 24"):
        invoke("text", write_recipe(recipe))
    tiny_recipe["model"]["text_encoder"] = {**TINY_ENCODER, "trainable": True}
    with pytest.raises(UserError, match="trained along"):
        invoke("text", write_recipe(tiny_recipe))
    tiny_recipe["model"]["text_encoder"] = TINY_ENCODER
    with pytest.raises(UserError, match="has random weights of its own: what is stored would fit no run"):
        invoke("text", write_recipe(tiny_recipe))
    assert not list((Path(recipe["train_loader"]["path"]) / "train").rglob("text*"))


def test_without_a_tokenizer_an_encoder_has_its_own(recipe: Recipe, write_recipe: Write) -> None:
    """As a recipe says it over one that trains a tokenizer: by null."""
    recipe["model"]["text_encoder"]["tokenizer"] = None
    file = write_recipe(recipe)
    invoke("text", file)
    online, stored = first_loss(file), first_loss(file, "train_loader.text_embedding=text", "run_name=stored")
    assert stored == pytest.approx(online, rel=1e-2)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "int8"])
def test_what_is_packed_comes_back_rounded(storage: str) -> None:
    values = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 7, 100, 1e3])[:, None]
    back = unpack({"shape": "5x24", "values": pack(values, storage)}, storage)
    expected = values if storage == "int8" else values.to(getattr(torch, storage))
    coarse = values.abs().amax(1, keepdim=True) / 127 * 0.5 if storage == "int8" else 0
    assert back.shape == values.shape and ((back.float() - expected.float()).abs() <= coarse + values.abs() / 256).all()


def test_a_run_on_stored_embeddings_learns_in_microbatches_what_it_learns_online(recipe: Recipe, write_recipe: Write) -> None:
    file = write_recipe(recipe)
    invoke("text", file, "--storage", "float32")
    rows = []
    for name, overrides in (("online", []), ("stored", ["train_loader.text_embedding=text"])):
        run(config.load([file, f"run_name={name}", "max_duration=6ba", *overrides]))
        folder = Path(recipe["run_folder"].replace("${run_name}", name))
        rows.append([json.loads(line)["loss/train/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert rows[1] == pytest.approx(rows[0], rel=1e-4) and rows[0][0] != rows[0][-1]


def test_stored_features_give_repa_the_loss_of_its_teacher_run_online(recipe: Recipe, write_recipe: Write) -> None:
    from stacks import TEACHER

    teacher = TEACHER | {"config": TEACHER["config"] | {"initializer_range": 0.3}}
    recipe["algorithms"] = {"repa": {"teacher": teacher, "block": 1, "projector_hidden": 16}}
    file = write_recipe(recipe)
    torch.manual_seed(recipe.get("seed", 17))
    said = invoke("features", file, "--name", "dino", "--storage", "float32", "--part", "50")
    assert "features of" in said and "random dinov2" in said
    online = first_loss(file, "run_name=online")
    stored = {"features": {"column": "dino", "width": 12}, "teacher": None}
    overrides = [f"algorithms.repa={json.dumps(recipe['algorithms']['repa'] | stored)}", "train_loader.features=[dino]"]
    trained = first_loss(file, "run_name=stored", *overrides)
    assert trained.keys() == online.keys() and trained["loss/train/flow"] == pytest.approx(online["loss/train/flow"], rel=1e-6)
