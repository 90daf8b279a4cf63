"""What a trained model is opened and drawn with: weights that are numbers, seeds and scales that mean something."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import command, write_run
from safetensors.torch import load_file, save_file

from prx_composer.callbacks.drawings import DigitsScore, GenerationMetrics, Images, ShapesScore
from prx_composer.callbacks.monitors import SpeedMonitor
from prx_composer.commands.export.pipeline import write_pipeline, written_aside
from prx_composer.common.errors import UserError
from prx_composer.models import TextToImage
from prx_composer.models import text_to_image as module
from prx_composer.models.flow import MAX_SEED, RoutedSelfGuidance, initial_noise
from prx_composer.models.routing import RandomRouter
from prx_composer.recipe import config
from prx_composer.runs.opening import Trained, build_model, load_trained
from prx_composer.runs.pretrained_models import initialise
from prx_composer.runs.weights import nonfinite

Recipe = dict[str, Any]
Build = Callable[..., TextToImage]
Write = Callable[..., str]
PROMPT = ("-p", "a red circle", "--steps", 1, "--no-grid")
VALUES = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_value_of_many_is_found_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{n}": torch.randn(3, 5 * n, generator=generator).to(dtype) for n in range(4)} | {"ids": torch.arange(3)}
    assert nonfinite(tensors) is None and nonfinite({}) is None
    for place in range(15):
        bad = {name: tensor.clone() for name, tensor in tensors.items()}
        bad["t1"].flatten()[place], bad["t3"].flatten()[place : place + 2] = value, value
        said = nonfinite(bad)
        assert said is not None and said.startswith("2 of 5 tensors") and said.endswith("t1 (1 of 15 values)")


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_run_whose_weights_are_no_numbers_is_not_opened(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write, value: float
) -> None:
    good, bad = tiny_model(seed=3), tiny_model(seed=3)
    with torch.no_grad():
        bad.backbone.blocks[1].gate_proj.weight[0, :2] = value  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    run = write_run(tmp_path / "run", tiny_recipe | {"algorithms": {}}, bad, write_recipe)
    write_run(tmp_path / "earlier", tiny_recipe | {"algorithms": {}}, good, write_recipe)
    earlier = run / "checkpoints" / "ba0"
    (tmp_path / "earlier" / "checkpoints" / "ba1").rename(earlier)
    for arguments in (("generate", run, *PROMPT), ("export", run, "--output", tmp_path / "out")):
        said = command(*arguments)
        assert "backbone.blocks.1.gate_proj.weight (2 of 2048 values)" in said and "1 of " in said
        assert f"Give another checkpoint of the run ({earlier})" in said
    assert not (tmp_path / "out").exists()
    assert "1 image" in command("generate", earlier, *PROMPT, "--output", tmp_path / "drawn"), "the advice is followed"
    with pytest.raises(UserError, match=r"model\.init_from: .*NaN or infinite, the first of them blocks\.1\.gate_proj"):
        initialise(tiny_model(), str(run))


def test_an_export_whose_weights_are_no_numbers_is_not_opened_and_no_beginning(tmp_path: Path, tiny_model: Build) -> None:
    with written_aside(tmp_path / "out") as partial:
        write_pipeline(Trained(tiny_model(seed=3).eval(), Path("nowhere"), "raw", 16), partial)
    for part, name in (("transformer", "img_in.weight"), ("text_encoder", "encoder.final_layer_norm.weight")):
        (file,) = (tmp_path / "out" / part).glob("*.safetensors")
        tensors = load_file(file)
        kept, tensors[name] = tensors[name], torch.full_like(tensors[name], float("nan"))
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"holds no model: 1 of .*{name}"):
            load_trained(str(tmp_path / "out"))
        with pytest.raises(UserError, match=f"model.init_from: .*{name}"):
            initialise(tiny_model(), str(tmp_path / "out"))
        save_file(tensors | {name: kept}, file, {"format": "pt"})
    load_trained(str(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------- seeds and scales


@pytest.mark.parametrize("seed", [-1, -(2**63) - 1, MAX_SEED + 1, 2**80])
def test_a_seed_that_draws_another_seed_s_picture_is_refused_everywhere(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write, seed: int
) -> None:
    run = write_run(tmp_path / "run", tiny_recipe | {"algorithms": {}}, tiny_model(seed=3), write_recipe)
    said = command("generate", run, *PROMPT, "--seed", seed, "--output", tmp_path / "drawn")
    assert f"--seed {seed}" in said and f"0 … {MAX_SEED}" in said and not (tmp_path / "drawn").exists()
    said = command("evaluate", run, "--seeds", f"0,{abs(seed)}" if abs(seed) > 1 else "-1", "--prompts", "none.txt")
    assert ("--seeds" in said and "drawn from s·1000000+i" in said) or "whole numbers from 0 on" in said
    with pytest.raises(ValueError, match="0 … 18446744073709551615"):
        tiny_model().sample(["x"], 8, 8, [seed], 1)
    for callback in (
        lambda: Images(["x"], str(tmp_path), 16, seed=seed),
        lambda: ShapesScore({"name": "shapes", "image_size": 16}, 16, seed=seed),
        lambda: DigitsScore(seed=seed),
        lambda: GenerationMetrics("nowhere", 16, seed=seed),
    ):
        with pytest.raises(ValueError, match="0 … 18446744073709551615"):
            callback()


def test_every_seed_that_is_allowed_has_a_picture_of_its_own(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write
) -> None:
    """The greatest too, also where it is the last of several."""
    noise = initial_noise([0, 1, 2**32 - 1, 2**32, 2**63, 2**63 + 1, MAX_SEED - 1, MAX_SEED], (1, 2, 2), torch.device("cpu"))
    assert len({tuple(one.flatten().tolist()) for one in noise}) == 8
    run = write_run(tmp_path / "run", tiny_recipe | {"algorithms": {}}, tiny_model(seed=3), write_recipe)
    options = ("generate", run, *PROMPT, "--images-per-prompt", 2, "--output", tmp_path / "drawn", "--guidance-scale", 1)
    assert "2 images" in command(*options, "--seed", MAX_SEED - 1)
    assert f"--seed {MAX_SEED}" in command(*options, "--seed", MAX_SEED)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "0", "0.99", "-3"])
def test_a_guidance_scale_that_means_nothing_is_refused_everywhere(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write, scale: str
) -> None:
    run = write_run(tmp_path / "run", tiny_recipe | {"algorithms": {}}, tiny_model(seed=3), write_recipe)
    said = command("generate", run, *PROMPT, f"--guidance-scale={scale}", "--output", tmp_path / "drawn")
    assert "--guidance-scale must be a number from 1 on" in said
    assert "--guidance-scale" in command("evaluate", run, f"--guidance-scale={scale}", "--prompts", "none.txt")
    value = float(scale)
    for callback in (
        lambda: Images(["x"], str(tmp_path), 16, guidance_scale=value),
        lambda: ShapesScore({"name": "shapes", "image_size": 16}, 16, guidance_scale=value),
        lambda: DigitsScore(guidance_scale=value),
        lambda: GenerationMetrics("nowhere", 16, guidance_scale=value),
    ):
        with pytest.raises(ValueError, match="guidance_scale must be a number from 1 on"):
            callback()


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: Images(["x"], "runs", 16, num_inference_steps=0), "num_inference_steps must be at least 1, not 0"),
        (lambda: DigitsScore(images=0), "the number of images must be at least 1, not 0"),
        (lambda: ShapesScore({"name": "shapes"}, 16, images_per_prompt=0), "the number of images must be at least 1"),
        (lambda: ShapesScore({"name": "shapes"}, 16, images_per_prompt_during=0), "images_per_prompt_during must be at least 1"),
        (lambda: SpeedMonitor(window_size=0), "window_size must be at least 1, not 0"),
    ],
)
def test_what_would_end_a_run_when_it_draws_or_measures_is_refused_before(callback: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        callback()


def test_guidance_by_an_empty_caption_that_was_never_trained_is_said(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """Once; not without guidance, not of a model that began with another's weights, not when the model guides itself."""

    def warned(draw: Callable[[], Any]) -> bool:
        module._warn_of_guidance.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            draw()
            draw()
        return sum("it has never learnt that" in record.message for record in caplog.records) == 1

    tiny_recipe["model"]["caption_dropout"] = 0.0
    tiny_recipe["algorithms"] = {}
    run = write_run(tmp_path / "run", tiny_recipe, tiny_model(seed=3), write_recipe)
    options = ("generate", run, *PROMPT, "--output", tmp_path / "drawn")
    assert warned(lambda: command(*options)) and warned(lambda: command(*options, "--guidance-scale", 2))
    assert not warned(lambda: command(*options, "--guidance-scale", 1))
    model = load_trained(str(run)).model
    model.guidance = RoutedSelfGuidance(RandomRouter("tread", 0, 1, 0.5))
    assert not warned(lambda: model.sample(["x"], 8, 8, [0], 1, 2.0))
    command("export", run, "--output", tmp_path / "out", "--no-samples")
    assert warned(lambda: load_trained(str(tmp_path / "out")).model.sample(["x"], 8, 8, [0], 1, 2.0))
    begun = config.load([write_recipe(tiny_recipe), "model.init_from=elsewhere"])
    assert not warned(lambda: build_model(begun, run).sample(["x"], 8, 8, [0], 1, 2.0))
    assert not warned(lambda: tiny_model().sample(["x"], 8, 8, [0], 1, 2.0))


def test_adapters_on_random_weights_are_refused(tiny_recipe: Recipe, write_recipe: Write) -> None:
    """And on weights that `init_from` names, or that a class of the user's own brings along, they are not."""
    tiny_recipe["model"]["text_encoder"]["trainable"] = False
    path = write_recipe(tiny_recipe | {"algorithms": {"lora": {"rank": 2}}})
    with pytest.raises(UserError, match=r"algorithms.lora: .* they would stay random\. Set model\.init_from"):
        config.check(config.load([path]))
    for advice in ("model.init_from=exported", "algorithms.lora=false"):
        config.check(config.load([path, advice]))
