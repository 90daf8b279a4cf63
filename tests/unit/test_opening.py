"""Opening somebody's run, export or data executes nothing that they name, and reads nothing that lies elsewhere."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hostile import Leaves, Place, command, edited, pickled_call, pickled_rows, seal
from PIL import EpsImagePlugin

from prx_composer import registry
from prx_composer.commands.report import write_page
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import iterate_captions
from prx_composer.data.sources import FolderSource
from prx_composer.models import PRXBackbone, TextToImage
from prx_composer.models.autoencoder import DiffusersAutoencoder
from prx_composer.models.encoders import VisionEncoder
from prx_composer.models.huggingface import known_config
from prx_composer.recipe import config
from prx_composer.recipe.config import needs_code
from prx_composer.runs.checkpoints import MONOLITH
from prx_composer.runs.opening import load_trained
from prx_composer.runs.pretrained_models import initialise
from prx_composer.training.trial import check_recipe

Recipe = dict[str, Any]
Build = Callable[..., TextToImage]
Write = Callable[..., str]
PROMPT = ("-p", "a red circle", "--steps", 1, "--no-grid")


def encoder_of(place: Place) -> Path:
    """Makes the run's text encoder a folder that its recipe names."""

    def frozen(index: dict[str, Any]) -> None:
        encoder = index["recipe"]["model"]["text_encoder"]
        del encoder["config"]
        encoder["pretrained"] = str(place.exported / "text_encoder")

    place.change(frozen)
    return place.exported / "text_encoder"


# ----------------------------------------------------------------------------------------- each case, and what it says


def code_paths_absolute(place: Place) -> None:
    place.change(lambda index: index["recipe"].update(code_paths=[str(place.code)]))
    assert "1 image" in command("generate", place.run, *PROMPT)
    command("export", place.run, "--output", "out", "--no-samples")
    command("evaluate", place.run, "--prompts", "none.txt")


def code_paths_of_the_working_directory(place: Place) -> None:
    place.change(lambda index: index["recipe"].update(code_paths=["evil.py"]) or index.pop("needs_code"))
    assert "1 image" in command("generate", place.run, *PROMPT)


def a_backbone_that_needs_code(place: Place) -> None:
    place.change(lambda index: index["recipe"].update(code_paths=["evil.py"]))
    place.change(lambda index: index["recipe"]["model"]["backbone"].update(name="theirs"))
    for arguments in (("generate", place.run, *PROMPT), ("export", place.run, "--output", "out")):
        said = command(*arguments)
        assert "model.backbone came from Python code" in said and said.endswith("--code evil.py")


def an_algorithm_of_an_older_checkpoint_that_needs_code(place: Place) -> None:
    place.change(lambda index: index["recipe"].update(code_paths=["evil.py"], algorithms={"theirs": {}}))
    place.change(lambda index: index.pop("needs_code"))
    assert "algorithms.theirs came from Python code" in command("generate", place.run, *PROMPT)


def init_from_a_run_with_code_paths(place: Place) -> None:
    place.change(lambda index: index["recipe"].update(code_paths=[str(place.code)]))
    model = load_trained(str(place.exported)).model
    initialise(model, str(place.run))


def a_report_on_a_run_with_code_paths(place: Place) -> None:
    place.change(lambda index: index["recipe"].update(code_paths=[str(place.code)]))
    write_page(str(place.run))


def a_pickle_in_the_checkpoint(place: Place) -> None:
    checkpoint = place.run / "checkpoints" / "ba1"
    state = torch.load(checkpoint / MONOLITH, weights_only=True)
    torch.save(state | {"rng": Leaves(place.marker)}, checkpoint / MONOLITH)
    seal(checkpoint, place.index())
    assert "could execute code" in command("generate", place.run, *PROMPT)


def a_pickle_as_the_index_of_shards(place: Place, module: str = "posix", name: str = "mkdir") -> None:
    checkpoint = place.run / "checkpoints" / "ba1"
    (checkpoint / MONOLITH).unlink()
    (checkpoint / ".metadata").write_bytes(pickled_call(module, name, str(place.marker)))
    seal(checkpoint, place.index())
    assert "could execute code" in command("generate", place.run, *PROMPT)


def a_pickle_in_a_checkpoint_that_is_averaged(place: Place) -> None:
    checkpoint = place.run / "checkpoints" / "ba1"
    state = torch.load(checkpoint / MONOLITH, weights_only=True)
    torch.save(state | {"rng": Leaves(place.marker)}, checkpoint / MONOLITH)
    seal(checkpoint, place.index())
    assert "could execute code" in command("average", place.run)
    (checkpoint / MONOLITH).unlink()
    (checkpoint / ".metadata").write_bytes(pickled_call("posix", "mkdir", str(place.marker)))
    seal(checkpoint, place.index())
    assert "could execute code" in command("average", place.run)


def a_dotted_name_in_the_index_of_shards(place: Place) -> None:
    a_pickle_as_the_index_of_shards(place, "torch.distributed.checkpoint.filesystem", "os.mkdir")


def a_function_in_the_index_of_shards(place: Place) -> None:
    a_pickle_as_the_index_of_shards(place, "torch.distributed.checkpoint.filesystem", "FileSystemWriter")


def a_tokenizer_of_remote_code(place: Place, folder: Path | None = None) -> None:
    folder = folder or place.run / "tokenizer"
    (folder / "evil.py").write_text(place.code.read_text())
    edited(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    assert "Python code of its own" in command("generate", folder.parent, *PROMPT)


def an_exported_tokenizer_of_remote_code(place: Place) -> None:
    a_tokenizer_of_remote_code(place, place.exported / "tokenizer")


def a_text_encoder_of_remote_code(place: Place) -> None:
    folder = encoder_of(place)
    (folder / "evil.py").write_text(place.code.read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    edited(folder / "config.json", model_type="theirs", architectures=["Evil"], auto_map=auto)
    assert "Python code of its own" in command("generate", place.run, *PROMPT)
    assert "Python code of its own" in command("generate", place.exported, *PROMPT)
    assert known_config(str(folder)) is None
    with pytest.raises(ValueError, match="Python code of its own"):
        VisionEncoder(str(folder))


def a_configuration_with_remote_code(place: Place) -> None:
    """In the recipe itself."""
    place.change(
        lambda index: index["recipe"]["model"]["text_encoder"]["config"].update(auto_map={"AutoModel": "evil--evil.Evil"})
    )
    assert "no such setting" in command("generate", place.run, *PROMPT)


def an_attention_kernel_of_the_hub(place: Place) -> None:
    folder = encoder_of(place)
    edited(folder / "config.json", _attn_implementation="theirs/kernel")
    assert "may download code" in command("generate", place.run, *PROMPT)


def a_pickle_as_weights_of_the_text_encoder(place: Place) -> None:
    folder = encoder_of(place)
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Leaves(place.marker)}, folder / "pytorch_model.bin")
    command("generate", place.exported, *PROMPT)


def a_pickle_as_weights_of_the_backbone(place: Place) -> None:
    folder = place.exported / "transformer"
    next(folder.glob("*.safetensors")).unlink()
    torch.save(Leaves(place.marker), folder / "diffusion_pytorch_model.bin")
    assert "could execute code and are not read" in command("generate", place.exported, *PROMPT)


def an_autoencoder_of_another_library(place: Place) -> None:
    """diffusers' AutoModel imports whatever module model_index.json names."""
    folder = place.path / "theirs"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PRXPipeline", "vae": ["alias", "Evil"]}))
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "Evil", "auto_map": {"AutoModel": "evil.Evil"}}))
    (folder / "vae" / "evil.py").write_text(place.code.read_text())
    with pytest.raises(ValueError, match="no autoencoder that diffusers has"):
        DiffusersAutoencoder(str(folder), subfolder="vae")


def a_recipe_with_python_tags(place: Place) -> None:
    text = f"run_name: !!python/object/apply:os.mkdir [{str(place.marker)!r}]\n"
    (place.run / "config.yaml").write_text(text)
    write_page(str(place.run))
    with pytest.raises(UserError, match="not valid YAML"):
        config.load([str(place.run / "config.yaml")])


def a_column_of_pickles(place: Place) -> None:
    data = pickled_rows(place)
    with pytest.raises(ValueError, match="pickled objects"):
        _ = ImageCaptionDataset(str(data), "train").row(0)
    with pytest.raises(ValueError, match="pickled objects"):
        list(iterate_captions(data / "train", "caption"))
    assert "pickled objects" in command("evaluate", place.exported, "--data", data, "--metrics", "clip_score")


def a_column_of_pickles_in_preflight(place: Place) -> None:
    data = pickled_rows(place)
    recipe = place.index()["recipe"]
    recipe["train_loader"] = {"name": "image_caption", "path": str(data)}
    (place.path / "own.yaml").write_text(yaml.safe_dump(recipe | {"run_folder": "elsewhere", "code_paths": []}))
    said = "\n".join(str(result) for result in check_recipe(config.load(["own.yaml"]), step=False))
    assert "✗" in said and "pickled objects" in said


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def fake_ghostscript(place: Place) -> None:
    """Pillow hands PostScript to whatever is called `gs`."""
    folder = place.path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\nmkdir -p {place.marker}\n")
    (folder / "gs").chmod(stat.S_IRWXU)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    EpsImagePlugin.gs_binary = None  # looked for once


def postscript_in_place_of_a_grid(place: Place) -> None:
    fake_ghostscript(place)
    (place.run / "images").mkdir()
    (place.run / "images" / "ba000001.png").write_bytes(POSTSCRIPT)
    write_page(str(place.run))


def postscript_in_place_of_an_image(place: Place) -> None:
    fake_ghostscript(place)
    for read in (lambda: decode_image(POSTSCRIPT, 16, 16), lambda: FolderSource(str(place.path), 16, 8)):
        (place.path / "a.png").write_bytes(POSTSCRIPT)
        (place.path / "captions.jsonl").write_text(json.dumps({"file": "a.png", "caption": "x"}))
        with pytest.raises((ValueError, *UNDECODABLE)):
            read()


CASES = [
    postscript_in_place_of_an_image,
    code_paths_absolute,
    code_paths_of_the_working_directory,
    a_backbone_that_needs_code,
    an_algorithm_of_an_older_checkpoint_that_needs_code,
    init_from_a_run_with_code_paths,
    a_report_on_a_run_with_code_paths,
    a_pickle_in_the_checkpoint,
    a_pickle_as_the_index_of_shards,
    a_pickle_in_a_checkpoint_that_is_averaged,
    a_dotted_name_in_the_index_of_shards,
    a_function_in_the_index_of_shards,
    a_tokenizer_of_remote_code,
    an_exported_tokenizer_of_remote_code,
    a_text_encoder_of_remote_code,
    a_configuration_with_remote_code,
    an_attention_kernel_of_the_hub,
    a_pickle_as_weights_of_the_text_encoder,
    a_pickle_as_weights_of_the_backbone,
    an_autoencoder_of_another_library,
    a_recipe_with_python_tags,
    a_column_of_pickles,
    a_column_of_pickles_in_preflight,
    postscript_in_place_of_a_grid,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_opening_executes_nothing(case: Callable[[Place], None], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back afterwards
    case(place)
    assert not place.executed()


# --------------------------------------------------------------------------------------------------- the user's own code


class Wider(PRXBackbone):
    """As a user's code file has it."""


OWN = """
from prx_composer import registry
from prx_composer.models import PRXBackbone

@registry.backbones.register("theirs")
class Wider(PRXBackbone):
    pass
"""


def test_the_code_that_the_user_names_is_used(place: Place) -> None:
    """By following what the refusal prints."""
    (place.path / "own backbone.py").write_text(OWN)
    place.change(lambda index: index["recipe"].update(code_paths=["own backbone.py"]))
    place.change(lambda index: index["recipe"]["model"]["backbone"].update(name="theirs"))
    try:
        refusal = command("generate", place.run, *PROMPT)
        assert refusal.endswith("--code 'own backbone.py'")
        assert "1 image" in command("generate", place.run, *PROMPT, "--code", "own backbone.py")
        assert type(load_trained(str(place.run)).model.backbone).__name__ == "Wider"
        assert "--code: there is no Python file none.py" in command("generate", place.run, *PROMPT, "--code", "none.py")
    finally:
        registry.catalogue.REGISTRY.pop(("prx_composer", "backbones", "theirs"))


def test_a_checkpoint_says_what_of_it_needs_code(tiny_recipe: Recipe) -> None:
    """A class of one's own under a name that this package has is told from this package's; a loss is none of the model."""
    recipe = tiny_recipe | {"algorithms": {"ema": {}, "loss": {}, "shaping": {}, "off": False}}
    assert needs_code(recipe | {"algorithms": {"ema": {}, "sprint": {}}}) == []
    keys = [("backbones", "prx"), ("algorithms", "loss"), ("algorithms", "shaping")]
    registry.backbones.register("prx")(Wider)
    registry.algorithms.register("loss")(type("Loss", (), {}))
    registry.algorithms.register("shaping")(type("Shaping", (), {"shapes_sampling": True}))
    try:
        assert needs_code(recipe) == ["model.backbone", "algorithms.shaping"]
    finally:
        for kind, name in keys:
            registry.catalogue.REGISTRY.pop(("prx_composer", kind, name))


@pytest.mark.parametrize("algorithms", [{}, {"loss": {}}])
def test_a_run_with_a_loss_of_its_own_opens_without_code(place: Place, algorithms: Recipe) -> None:
    place.change(lambda index: index["recipe"].update(code_paths=["gone.py"], algorithms=algorithms))
    assert load_trained(str(place.run)).batch == 1


def test_a_class_that_was_replaced_by_the_run_s_code_is_not_taken_from_here(place: Place) -> None:
    place.change(lambda index: index.update(needs_code=["model.backbone"]) or index["recipe"].update(code_paths=["own.py"]))
    with pytest.raises(UserError, match=r"model\.backbone came from .*: own\.py"):
        load_trained(str(place.run))
