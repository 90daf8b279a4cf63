"""Training begins with the weights that `model.init_from` names."""

import copy
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import PRXTransformer2DModel
from safetensors.torch import save_file
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.export.pipeline import write_pipeline, written_aside
from prx_composer.common.errors import UserError
from prx_composer.models import TextToImage
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.runs.opening import Trained, load_trained
from prx_composer.runs.pretrained_models import initialise
from prx_composer.training import main
from prx_composer.training.run import build_trainer, run

Recipe = dict[str, Any]
Write = Callable[..., str]
Build = Callable[..., TextToImage]


@pytest.fixture
def folder(tiny_model: Build, tmp_path: Path) -> Path:
    """A diffusers folder whose weights no run begins with by itself."""
    with written_aside(tmp_path / "them") as partial:
        write_pipeline(Trained(tiny_model(seed=5).eval(), Path("nowhere"), "raw", 16), partial)
    return tmp_path / "them"


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses(recipe: Recipe) -> list[float]:
    return [row["loss/train/total"] for row in read_metrics(folder_of(recipe) / "metrics.jsonl")]


def test_a_run_begins_with_the_weights_of_a_diffusers_folder(folder: Path, tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["model"]["init_from"] = str(folder)
    model: Any = build_trainer(config.load([write_recipe(tiny_recipe)])).state.model
    for name, tensor in PRXTransformer2DModel.from_pretrained(folder / "transformer").state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[name]), name
    source = load_trained(str(folder)).model
    assert torch.equal(source.text_encoder.network.state_dict()["shared.weight"], model.text_encoder.encoder.shared.weight)


def test_what_import_writes_trains_on_and_is_exported_again(
    folder: Path, tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    fragment = tmp_path / "from_them.yaml"
    result = CliRunner().invoke(app, ["import", str(folder), "--output", str(fragment)])
    assert result.exit_code == 0, result.exception
    written = yaml.safe_load(fragment.read_text())["model"]
    assert written["init_from"] == str(folder) and written["flow"]["prediction"] == "x"
    tiny_recipe["model"]["backbone"] |= {"depth": 7}  # the fragment has the last word
    tiny_recipe["max_duration"] = "2ba"
    recipe = write_recipe(tiny_recipe)
    assert main([recipe, str(fragment)]) == 0
    opened = load_trained(str(folder_of(tiny_recipe)), "raw").model
    before = PRXTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    moved = [(opened.backbone.state_dict()[name] - tensor).abs().max() for name, tensor in before.items()]
    assert 0 < max(moved) < 0.05, "two steps away"


def test_what_import_writes_draws_timesteps_as_the_run_did(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    flow = {"logit_mean": 0.8, "logit_std": 0.6, "shift_uniform": False, "timestep_shift": 2.0}
    tiny_recipe["model"]["flow"] = flow
    run(config.load([write_recipe(tiny_recipe | {"algorithms": {}, "max_duration": "1ba", "preflight": False})]))
    out, fragment = tmp_path / "out", tmp_path / "on.yaml"
    for command in (("export", folder_of(tiny_recipe), "--output", out, "--no-samples"), ("import", out, "--output", fragment)):
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    written = yaml.safe_load(fragment.read_text())["model"]["flow"]
    assert flow.items() <= written.items() and written["uniform_fraction"] == 0.1  # which may be another below the fragment


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_file_of_safetensors_is_enough(tiny_model: Build, tmp_path: Path, prefix: str) -> None:
    source, target = tiny_model(seed=1), tiny_model(seed=2)
    save_file({prefix + name: tensor for name, tensor in source.backbone.state_dict().items()}, tmp_path / "raw.safetensors")
    initialise(target, str(tmp_path / "raw.safetensors"))
    assert all(torch.equal(tensor, target.backbone.state_dict()[name]) for name, tensor in source.backbone.state_dict().items())


def test_a_run_is_begun_with_another_run_s_average_its_tied_weights_too(
    tiny_recipe: Recipe, write_recipe: Write, tiny_model: Build
) -> None:
    run(config.load([write_recipe(tiny_recipe)]))
    target = tiny_model(seed=9)
    initialise(target, str(folder_of(tiny_recipe)))
    average = load_trained(str(folder_of(tiny_recipe)), "ema").model
    plain = load_trained(str(folder_of(tiny_recipe)), "raw").model
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name
    assert not torch.equal(plain.text_encoder.encoder.shared.weight, average.text_encoder.encoder.shared.weight)


def test_what_a_run_s_weights_mean_otherwise_is_said_and_the_advice_keeps_its_words(
    tiny_recipe: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """Words that are random vectors are another seed's, or others' of other captions, though every weight fits."""
    tiny_recipe["model"]["text_encoder"]["trainable"] = False
    path = write_recipe(tiny_recipe | {"algorithms": {}, "max_duration": "1ba", "preflight": False})
    run(config.load([path]))
    begun = f"model.init_from={folder_of(tiny_recipe)}"

    def embedding(*changes: str) -> torch.Tensor:
        caplog.clear()
        trainer = build_trainer(config.load([path, "run_name=second", begun, *changes]))
        model: Any = trainer.state.model
        trainer.close()
        return model.encode_prompts(["red"], torch.device("cpu")).embedding[0, 0]

    words, task = "other words than model.text_encoder makes", "was trained with model.flow"
    own = embedding()
    assert words not in caplog.text and task not in caplog.text
    embedding("model.flow.prediction=v")
    assert task in caplog.text and words not in caplog.text
    embedding("model.backbone.theta=500")
    assert "computes otherwise in this model.backbone, with weights of the same sizes: theta was 10000 and is 500" in caplog.text
    assert task not in caplog.text and words not in caplog.text
    for change in ("seed=9", "train_loader.captions={short_caption: 1}", "model.text_encoder.config.initializer_factor=2.0"):
        assert not torch.equal(embedding(change), own) and words in caplog.text and task not in caplog.text
        advice = shlex.split(caplog.text.partition("keep its own, add  ")[2].splitlines()[0])
        if not change.startswith("model"):
            assert torch.equal(embedding(change, *advice), own) and words not in caplog.text


def test_what_an_export_s_weights_mean_otherwise_is_said_too(
    tiny_recipe: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tiny_recipe["model"]["text_encoder"]["trainable"] = False
    path = write_recipe(tiny_recipe | {"algorithms": {}, "max_duration": "1ba", "preflight": False})
    run(config.load([path]))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(folder_of(tiny_recipe)), "--output", str(out), "--no-samples"])
    assert result.exit_code == 0, result.output
    for changes, said in (
        ([], None),
        (["model.flow.prediction=v"], "was trained with model.flow"),
        (["model.backbone.theta=500"], "computes otherwise in this model.backbone"),
        (["seed=9"], "other words than model.text_encoder makes"),
    ):
        caplog.clear()
        build_trainer(config.load([path, "run_name=second", f"model.init_from={out}", *changes])).close()
        warned = [record.getMessage() for record in caplog.records if "model.init_from" in record.getMessage()]
        assert len(warned) == 1 + (said is not None) and (said is None or said in warned[1]), warned
    advice = shlex.split(warned[1].partition("keep its own, add  ")[2])  # of the other words
    caplog.clear()
    build_trainer(config.load([path, "run_name=third", f"model.init_from={out}", "seed=9", *advice])).close()
    assert "other words" not in caplog.text


def test_a_run_with_resolution_aware_is_begun_from_as_the_refusal_says(tiny_recipe: Recipe, write_recipe: Write) -> None:
    path = write_recipe(tiny_recipe | {"algorithms": {"resolution_aware": {}}, "max_duration": "1ba", "preflight": False})
    run(config.load([path]))
    second = [write_recipe(tiny_recipe | {"algorithms": {}, "preflight": False}, "second.yaml"), "run_name=second"]
    second.append(f"model.init_from={folder_of(tiny_recipe)}")
    with pytest.raises(UserError, match="It was trained with resolution_aware: set ") as refused:
        build_trainer(config.load(second))
    (remedy,) = [word.rstrip(",") for word in str(refused.value).split() if word.startswith("model.backbone.resolution_embeds")]
    build_trainer(config.load([*second, remedy])).close()


def test_a_run_with_other_words_is_refused_with_what_takes_its_words(tiny_recipe: Recipe, write_recipe: Write) -> None:
    """Its text encoder is trained along, and the captions of the second run have another number of words."""
    path = write_recipe(tiny_recipe | {"algorithms": {}, "max_duration": "1ba", "preflight": False})
    run(config.load([path]))
    second = [path, "run_name=second", f"model.init_from={folder_of(tiny_recipe)}", "train_loader.captions={short_caption: 1}"]
    with pytest.raises(UserError, match=r"does not fit model\.text_encoder: shared\.weight is .* has its sizes, and ") as refused:
        build_trainer(config.load(second))
    (words,) = [word for word in str(refused.value).split() if word.startswith("model.text_encoder.tokenizer=")]
    build_trainer(config.load([*second, "run_name=third", words])).close()


def test_sizes_that_differ_are_named_by_parameter_before_anything_is_trained(
    folder: Path, tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_recipe["model"]["init_from"] = str(folder)
    tiny_recipe["model"]["backbone"] |= {"mlp_ratio": 3.0, "depth": 1}
    path = write_recipe(tiny_recipe)
    result = CliRunner().invoke(app, ["check", path, "--no-step"])
    assert result.exit_code == 1
    (wrong,) = [line for line in result.output.splitlines() if line.startswith("✗")]
    assert "model.init_from" in wrong and "blocks.0.gate_proj.weight is (64, 32) there and (96, 32) here" in wrong
    assert "blocks.1." in wrong and "is only there" in wrong
    assert main([path, "preflight=false"]) == 1
    said = capsys.readouterr().err
    assert "blocks.0.gate_proj.weight is (64, 32) there" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "model.init_from: There is no nowhere"),
        ({"name": "x"}, "model.init_from: expected a string or null"),
        (".", "model.init_from: . is no run folder"),
    ],
)
def test_a_source_that_is_none_is_said_by_its_path(tiny_recipe: Recipe, write_recipe: Write, source: Any, said: str) -> None:
    tiny_recipe["model"]["init_from"] = source
    result = CliRunner().invoke(app, ["check", write_recipe(tiny_recipe), "--no-step"])
    assert result.exit_code == 1 and said in result.output


def test_a_resumed_run_goes_on_from_its_checkpoint_and_not_from_init_from_again(
    folder: Path, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    """Bit for bit, and even when the folder is gone."""
    tiny_recipe |= {"autoresume": True}
    tiny_recipe["model"]["init_from"] = str(folder)
    whole, parts = copy.deepcopy(tiny_recipe) | {"run_name": "whole"}, copy.deepcopy(tiny_recipe) | {"run_name": "parts"}
    run(config.load([write_recipe(whole)]))
    path = write_recipe(parts, "parts.yaml")
    run(config.load([path, "callbacks.stop_after.time=4ba"]))
    shutil.rmtree(folder)
    run(config.load([path]))
    assert losses(parts) == losses(whole) and len(losses(whole)) == 8
    with pytest.raises(UserError, match=r"model.init_from \("):
        run(config.load([path, "model.init_from=elsewhere"]))


def test_the_trained_model_is_opened_when_its_beginning_is_gone(folder: Path, tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["model"]["init_from"] = str(folder)
    run(config.load([write_recipe(tiny_recipe)]))
    shutil.rmtree(folder)
    trained = load_trained(str(folder_of(tiny_recipe)))
    assert replace(trained, recipe=None).batch == 8
