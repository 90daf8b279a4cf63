"""Data are told apart by what is in them. A run goes on with the same wherever they lie, and with others only if told to."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import _line, compare

from prx_composer.common.errors import UserError
from prx_composer.data.contents import data_identity, same_data, split_identity
from prx_composer.recipe import config
from prx_composer.recipe.arguments import split_folders
from prx_composer.runs.folder import as_saved, check_same_recipe, save_recipe

Recipe = dict[str, Any]
Write = Callable[..., str]


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    tiny_recipe["eval_loader"] = {"name": "image_caption", "path": tiny_recipe["train_loader"]["path"], "split": "heldout"}
    return tiny_recipe | {"autoresume": True}


@pytest.fixture
def started(recipe: Recipe, write_recipe: Write) -> str:
    """The path of a recipe of which a run folder exists."""
    path = write_recipe(recipe)
    loaded = config.load([path])
    Path(loaded.run_folder).mkdir(parents=True)
    save_recipe(loaded, Path(loaded.run_folder))
    return path


def test_the_position_in_other_data_is_that_of_a_new_pass(shapes_data: Path) -> None:
    """The data set's own message, and what it says to type; samples of the old data are not counted to the new pass."""
    from prx_composer.data.dataset import ImageCaptionDataset

    old, new = (ImageCaptionDataset(str(shapes_data), split) for split in ("train", "heldout"))
    state = old.state_dict(48)
    old.load_state_dict(state)
    assert old.take_start_sample() == 48
    with pytest.raises(UserError, match=r"Resume with the same data and weights; .* add  'resume.allow=\[data\]'  or"):
        new.load_state_dict(state)
    new.other_data_allowed = True
    new.load_state_dict(state)
    assert new.take_start_sample() == 0 and new.state_dict(48 + 24)["sample_in_epoch"] == 24
    assert new.take_start_sample() == 0 and new.state_dict(24)["sample_in_epoch"] == 24, "the next pass is counted from its start"


def test_data_are_recognised_wherever_they_lie_and_others_are_not(started: str, shapes_data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(shapes_data, moved)
    arguments = [f"train_loader.path={moved}", f"eval_loader.path={moved}"]
    assert [change.key for change in compare(started, *arguments)] == ["eval_loader.path"]
    (shard,) = (moved / "train" / "16x16").glob("*.mds")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 255
    shard.write_bytes(content)  # the same sizes
    with pytest.raises(UserError, match=r"what differs: data\.") as refused:
        compare(started, *arguments)
    typed = shlex.split(_line(str(refused.value), "To go on with the new values from here: add  "))
    assert typed == ["resume.allow=[data]"]
    assert "data" in [change.key for change in compare(started, *arguments, *typed)]


def test_other_data_under_the_same_name_are_refused(
    recipe: Recipe, shapes_data: Path, tmp_path: Path, write_recipe: Write
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    recipe["train_loader"] = {"name": "image_caption", "path": str(data)}
    loaded = config.load([write_recipe(recipe)])
    Path(loaded.run_folder).mkdir(parents=True)
    save_recipe(loaded, Path(loaded.run_folder))
    assert check_same_recipe(loaded, as_saved(loaded), "it", 1) == []
    shutil.rmtree(data / "train")
    shutil.copytree(shapes_data / "heldout", data / "train")
    with pytest.raises(UserError, match=r"  data \('240 samples, fingerprint .* → '30 samples, fingerprint"):
        check_same_recipe(loaded, as_saved(loaded), "it", 1)


def test_data_of_a_run_that_did_not_note_them_are_compared_while_both_are_there(
    started: str, shapes_data: Path, tmp_path: Path
) -> None:
    (Path(config.load([started]).run_folder) / "data.json").unlink()
    shutil.copytree(shapes_data, tmp_path / "copy")
    assert compare(started, f"train_loader.path={tmp_path}/copy") == []


def test_what_is_not_known_makes_no_difference_and_what_is_not_there_has_no_identity(shapes_data: Path, tmp_path: Path) -> None:
    known = split_identity(shapes_data / "train")
    assert known is not None and known["samples"] == 240 and known["content"]
    assert same_data({"": known}, {"": known | {"content": None}})
    assert not same_data({"": known}, {"": known | {"content": "0"}})
    assert not same_data({"": known}, {"": known | {"layout": "0"}})
    assert not same_data({"": known}, {"a": known})
    assert split_identity(tmp_path) is None and data_identity(split_folders({"name": "mine", "path": str(shapes_data)})) is None
    mixed = data_identity(
        split_folders({"name": "image_caption", "mix": {"a": {"path": str(shapes_data)}, "b": {"path": str(tmp_path)}}})
    )
    assert mixed is None, "not all of it is there"
    both = {
        "name": "image_caption",
        "mix": {"a": {"path": str(shapes_data)}, "b": {"path": str(shapes_data), "split": "heldout"}},
    }
    assert json.dumps(data_identity(split_folders(both))).count("layout") == 2
