"""`text_embedding: auto`: what is chosen by what lies beside the data, what is said, and what a run that goes on keeps."""

import copy
import json
import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY_T5, tiny_recipe_in

from prx_composer.commands.encode import TextOptions, store_text
from prx_composer.common.errors import UserError
from prx_composer.data.stored import encoded_folder
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.runs.stored_text import TextChoice, choose_of_loader, choose_text
from prx_composer.training.components import Components
from prx_composer.training.run import run
from prx_composer.training.trial import check_config

Spec = dict[str, Any]
AUTO = ["train_loader.text_embedding=auto"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path, tokenizer: Any) -> Path:
    """A folder with a recipe, its frozen encoder, its data, and what was stored of their captions."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("auto")
    torch.manual_seed(0)
    sizes: Spec = {key: value for key, value in TINY_T5.items() if key != "model_type"}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    shutil.copytree(shapes_data, folder / "data")
    store_text(TextOptions(recipe=[written(folder, recipe_in(folder))], storage="int8"))
    return folder


def recipe_in(folder: Path) -> Spec:
    recipe = tiny_recipe_in(folder, folder / "data")
    recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(folder / "encoder"), "max_tokens": 40}
    recipe["train_loader"] = {"name": "image_caption", "path": str(folder / "data")}
    return recipe | {"preflight": False, "save_num_checkpoints_to_keep": -1}


def written(folder: Path, recipe: Spec, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(folder / name)


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """A copy of it, whose data may be harmed. Its encoder is that of the original."""
    shutil.copytree(begun / "data", tmp_path / "data")
    recipe = recipe_in(tmp_path)
    recipe["model"]["text_encoder"]["pretrained"] = str(begun / "encoder")
    written(tmp_path, recipe)
    return tmp_path


@pytest.fixture
def choose(folder: Path) -> Callable[..., TextChoice]:
    def chosen(*changes: str, key: str = "train_loader") -> TextChoice:
        recipe, found = choose_text(config.load([str(folder / "recipe.yaml"), *AUTO, *changes]))
        (choice,) = [one for one in found if one.key == key]
        assert getattr(recipe, key)["text_embedding"] == choice.name
        return choice

    return chosen


def stored_in(data: Path) -> Path:
    return encoded_folder(data, "train", "text", "caption")


def test_what_is_stored_and_fits_is_read_wherever_the_data_lie(folder: Path, choose: Callable[..., TextChoice]) -> None:
    choice = choose()
    assert (choice.name, choice.why) == ("text", "stored")
    assert choice.said.startswith("train_loader.text_embedding: the stored embeddings 'text' of ")
    (folder / "data").rename(folder / "moved")
    assert choose(f"train_loader.path={folder / 'moved'}").name == "text"
    loader = Components(config.load([str(folder / "recipe.yaml"), *AUTO, f"train_loader.path={folder / 'moved'}"]), meta=False)
    assert [column.storage for column in loader.loader("train_loader").dataloader.dataset.text_columns.values()] == ["int8"]  # pyright: ignore[reportAttributeAccessIssue]


def change_captions(data: Path) -> None:
    """Give the data other captions, of the same lengths."""
    for shard in (data / "train").glob("*/*.mds"):
        shard.write_bytes(shard.read_bytes().replace(b"red", b"tan"))


def forget_the_data(data: Path) -> None:
    file = stored_in(data) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": None}))


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda data: shutil.rmtree(stored_in(data).parent), r"since there is no \S+/encoded/text/caption\. To store"),
    "half": (
        lambda data: (stored_in(data) / "manifest.json").unlink(),
        r"since there is only a part of \S+/text/caption\. To store",
    ),
    "other captions": (change_captions, r"but it was made of other data than lies beside it: its column 'caption' has changed"),
    "nobody knows of which": (forget_the_data, "but it doesn't say of which captions it was made"),
    "a shard is gone": (lambda data: next(stored_in(data).glob("*/*.mds")).unlink(), r"shards of \w+ are missing or cut short"),
    "a shard is short": (lambda data: next(stored_in(data).glob("*/*.mds")).write_bytes(b""), "are missing or cut short"),
    "no manifest": (lambda data: (stored_in(data) / "manifest.json").write_text("{"), "but it cannot be read"),
    "another manifest": (lambda data: (stored_in(data) / "manifest.json").write_text("[]"), "but it cannot be read"),
    "another name": (
        lambda data: stored_in(data).parent.rename(data / "train/encoded/t5"),
        r"\(but t5, which text_embedding could",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_not_whole_or_of_other_captions_is_named_and_not_read(
    harm: str, folder: Path, choose: Callable[..., TextChoice]
) -> None:
    HARMS[harm][0](folder / "data")
    choice = choose()
    assert (choice.name, choice.why) == (None, "lacking") and re.search(HARMS[harm][1], choice.said), choice.said
    in_the_way = harm not in ("nothing", "half", "another name")
    assert ("delete that folder first" in choice.said) == in_the_way


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["model.text_encoder.pretrained=google/t5-v1_1-small"],
            r"made with encoder \S+/encoder \(the recipe: google/t5-v1_1-small\)",
        ),
        (["model.text_encoder.max_tokens=12"], r"made with max_tokens 40 \(the recipe: 12\)"),
        (["model.text_encoder.revision=abc"], r"made with revision None \(the recipe: abc\)"),
        (["model.backbone.context_in_dim=32"], r"made with width 24 \(the recipe: 32\)"),
    ],
)
def test_what_another_encoder_made_is_not_read(changes: list[str], said: str, choose: Callable[..., TextChoice]) -> None:
    choice = choose(*changes)
    assert (choice.name, choice.why) == (None, "lacking") and re.search(said, choice.said), choice.said


def test_where_nothing_can_be_stored_one_line_says_why(folder: Path, choose: Callable[..., TextChoice]) -> None:
    for changes, why, said in (
        (["model.text_encoder.trainable=true"], "never", "every step: model.text_encoder is trained along"),
        (["model.text_encoder.pretrained=null", f"model.text_encoder.config={json.dumps(TINY_T5)}"], "never", "random weights"),
        (["train_loader.captions={caption: {shuffle: true}}"], "never", r"captions.caption: with shuffle: true"),
        (["train_loader.remote=s3://data/set"], "lacking", "isn't looked whether s3://data/set has embeddings; if so, name them"),
        (["train_loader.path=nowhere"], "unknown", "not decided here, where the data aren't"),
        (["train_loader.path=nowhere", "train_loader.source={name: shapes}"], "never", "nowhere/train are still to be made"),
    ):
        choice = choose(*changes)
        assert (choice.name, choice.why) == (None, why) and re.search(said, choice.said), choice.said


def test_a_wrong_recipe_is_no_error_of_this_choice(folder: Path) -> None:
    recipe = config.load([str(folder / "recipe.yaml"), *AUTO])
    for loader in ({"path": 5}, {"mix": 3}, {"captions": ["caption"]}, {"captions": {"none": 1.0}}, {"split": None}):
        wrong = Recipe(**vars(recipe) | {"train_loader": recipe.train_loader | loader})
        assert choose_text(wrong)[1][0].why in ("unknown", "stored")
    for encoder in (None, 3, {}):
        wrong = Recipe(**vars(recipe) | {"model": recipe.model | {"text_encoder": encoder}})
        assert choose_text(wrong)[1][0].name is None


def test_of_a_mixture_every_data_set_must_be_stored(folder: Path, choose: Callable[..., TextChoice]) -> None:
    shutil.copytree(folder / "data", folder / "other")
    mix = f"train_loader={{name: image_caption, path: {folder}, mix: {{data: {{}}, other: {{}}}}, text_embedding: auto}}"
    assert choose(mix).name == "text"
    shutil.rmtree(stored_in(folder / "other"))
    choice = choose(mix)
    assert choice.name is None and re.search(rf"there is no {stored_in(folder / 'other')}\.", choice.said)
    assert str(stored_in(folder / "data")) not in choice.said


def test_the_command_that_is_said_stores_what_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both loaders, of another split, and of a mixture."""
    shutil.rmtree(folder / "data" / "train" / "encoded")
    shutil.copytree(folder / "data", folder / "other")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["train_loader"] = {"name": "image_caption", "path": str(folder), "mix": {"data": {}}, "text_embedding": "auto"}
    held_out = {"path": str(folder / "other"), "split": "heldout", "captions": {"caption": 1.0}}
    file = written(folder, recipe | {"eval_loader": {"name": "image_caption", "text_embedding": "auto"} | held_out})
    monkeypatch.setattr(sys, "argv", ["train.py", file, "seed=3"])
    loaded = config.load([file, "seed=3"])
    for choice in choose_text(loaded)[1]:
        assert choice.why == "lacking"
        (command,) = re.findall(r"`(prx encode .*)`", choice.said)
        arguments = shlex.split(command)[3:]
        split = arguments.pop() if "--split" in arguments else "train"
        store_text(TextOptions(recipe=[a for a in arguments if a != "--split"], split=split))
    assert [choice.name for choice in choose_text(loaded)[1]] == ["text", "text"]


def test_the_loader_of_evaluation_alone_may_be_left_open(folder: Path, choose: Callable[..., TextChoice]) -> None:
    loader = f"eval_loader={{name: image_caption, path: {folder / 'data'}, text_embedding: auto}}"
    assert choose(loader, "train_loader.text_embedding=null", key="eval_loader").name == "text"
    shutil.rmtree(stored_in(folder / "data"))
    choice = choose(loader, "train_loader.text_embedding=null", key="eval_loader")
    assert f"train_loader.mix=null train_loader.path={folder / 'data'}" in choice.said


def test_a_plug_in_that_knows_no_model_chooses_by_the_data(folder: Path) -> None:
    spec = {"path": str(folder / "data"), "text_embedding": "auto"}
    assert choose_of_loader(spec, "loader") == spec | {"text_embedding": "text"}
    shutil.rmtree(stored_in(folder / "data"))
    assert choose_of_loader(spec, "loader") == spec | {"text_embedding": None}


def test_a_check_says_what_is_chosen_and_needs_no_data(folder: Path) -> None:
    def lines(*changes: str) -> list[str]:
        results = check_config(config.load([str(folder / "recipe.yaml"), *AUTO, *changes]))
        assert not [str(result) for result in results if result.mark == "✗"]
        return [str(result) for result in results if "text_embedding" in result.text]

    assert [line[0] for line in lines()] == ["✓"]
    assert [line[0] for line in lines("train_loader.path=nowhere")] == ["–"]
    assert [line[0] for line in lines("model.text_encoder.max_tokens=13")] == ["!"]


def test_a_plan_says_what_it_assumed_and_what_stored_text_would_gain(folder: Path) -> None:
    from prx_composer.commands.plan.conditions import Conditions, find_gpu
    from prx_composer.commands.plan.plan import make_plan

    conditions = Conditions(find_gpu("h200"), utilisation=0.3)
    file, flops = str(folder / "recipe.yaml"), {}
    for name, changes in (
        ("stored", AUTO),
        ("online", ["train_loader.text_embedding=null"]),
        ("away", [*AUTO, "train_loader.path=x"]),
    ):
        plan = make_plan(config.load([file, *changes]), conditions)
        told = [text for text in plan.assumptions if "text_embedding" in text]
        flops[name] = plan.stages[0].flops
        assert len(told) == (name == "away") and ("text encoder" in flops[name]) == (name != "stored")
    assert flops["away"] == flops["online"]
    share = flops["away"]["text encoder"] / sum(flops["away"].values())
    assert f"Stored text saves its share of the FLOPs, {share:.0%} at 8 px" in told[0]


# ------------------------------------------------------------------------------------------------------------------------- runs


def losses_of(recipe: Spec, name: str) -> list[float]:
    rows = Path(recipe["run_folder"].replace("${run_name}", name), "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss/train/total"] for row in rows]


def test_a_run_that_began_online_goes_on_so_to_the_bit_and_one_that_lost_its_embeddings_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"autoresume": True}
    recipe["algorithms"] = {}
    file, changes = written(folder, recipe), ["max_duration=4ba"]
    hidden = folder / "hidden"
    stored_in(folder / "data").rename(hidden)
    run(config.load([file, "run_name=whole", *changes]))
    with caplog.at_level(logging.INFO, logger="prx_composer"):
        run(config.load([file, *AUTO, "max_duration=2ba"]))
        (said,) = [record.message for record in caplog.records if "text_embedding" in record.message]
        assert said.startswith("train_loader.text_embedding: captions are encoded in every step by ")
        assert "text_embedding: null" in (folder / "runs" / "tiny" / "config.yaml").read_text()
        hidden.rename(stored_in(folder / "data"))
        caplog.clear()
        run(config.load([file, *AUTO, *changes]))
        (said,) = [record.message for record in caplog.records if "text_embedding" in record.message]
        assert said.endswith("on: train_loader.text_embedding=text 'resume.allow=[train_loader.text_embedding]'")
    assert losses_of(recipe, "tiny") == losses_of(recipe, "whole")

    from_here = [*changes, "train_loader.text_embedding=text", "resume.allow=[train_loader.text_embedding]"]
    run(config.load([file, *from_here, "max_duration=6ba"]))  # what the line said
    run(config.load([file, *AUTO, "max_duration=8ba"]))  # goes on with them
    assert "text_embedding: text" in (folder / "runs" / "tiny" / "config.yaml").read_text()
    stored_in(folder / "data").rename(hidden)
    with pytest.raises(
        UserError, match=r"this run began with the stored embeddings 'text', and now there is no .* Put them back"
    ):
        run(config.load([file, *AUTO, "max_duration=9ba"]))
    said = [result for result in check_config(config.load([file, *AUTO])) if "Put them back" in result.text]
    assert [result.mark for result in said] == ["✗"]
    run(config.load([file, "train_loader.text_embedding=null", "resume.allow=[train_loader.text_embedding]", "max_duration=9ba"]))
    assert len(losses_of(recipe, "tiny")) == 9


def test_a_run_that_finds_stored_embeddings_is_the_one_that_names_them(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["eval_loader"] = copy.deepcopy(recipe["train_loader"]) | {"text_embedding": "auto"}
    file = written(folder, recipe)
    named = ["train_loader.text_embedding=text", "eval_loader.text_embedding=text"]
    for name, changes in (("auto", AUTO), ("named", named)):
        run(config.load([file, f"run_name={name}", "max_duration=2ba", *changes]))
    assert losses_of(recipe, "auto") == losses_of(recipe, "named")
