"""Classes of diffusers are trained with the tricks, sharded, compiled and resumed as our own backbone is, or refused by name."""

import copy
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from architectures import POOLED_WIDTH, TINY, backbone, inputs, of_pixels
from class_tricks import END, GIVEN, PAGE, START, algorithm, refusals, table
from composer import Trainer
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from conftest import TINY_T5

from prx_composer import registry
from prx_composer.callbacks.checkpointing import RandomStep
from prx_composer.commands.plan.conditions import Conditions, find_gpu
from prx_composer.commands.plan.plan import make_plan
from prx_composer.common.errors import UserError
from prx_composer.models import HuggingFaceTextEncoder, TextToImage
from prx_composer.models.class_labels import ClassLabels, train_label_tokenizer
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.routing import Route
from prx_composer.recipe import config
from prx_composer.recipe.arguments import build
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import run
from prx_composer.training.trial import check_config

REPOSITORY = Path(__file__).parents[2]

CAPTIONS = ["a red circle", "a blue square", "a green ring", "a red cross"]


def model_of(name: str, tokenizer: Any) -> TextToImage:
    torch.manual_seed(0)
    pooled = {width: TINY_T5["d_model"]} if (width := POOLED_WIDTH[name]) else {}
    made = DiffusersBackbone(**{"class": name}, **(of_pixels(name) | pooled))
    if name.startswith("DiT"):
        return TextToImage(made, ClassLabels(train_label_tokenizer(CAPTIONS)))  # pyright: ignore[reportArgumentType]
    encoder = HuggingFaceTextEncoder(tokenizer, config=TINY_T5, max_tokens=14, pooled="mean" if pooled else None)
    return TextToImage(made, encoder)  # pyright: ignore[reportArgumentType]


def trained(model: TextToImage, tricks: Iterable[str] = (), optimizer: str = "muon") -> dict[str, list[float]]:
    """Three steps in microbatches of two; returns the logged loss terms."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    batch = {"image": image, **model.text_encoder.tokenize(CAPTIONS), "sample_id": torch.arange(4)}
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        optimizers=build(registry.optimizers, optimizer, {"lr": 1e-2}, "optimizer", model=model),
        algorithms=[algorithm(trick) for trick in tricks],
        callbacks=[RandomStep()],
        loggers=logger,
        train_dataloader=DataSpec([batch] * 3, get_num_samples_in_batch=lambda b: len(b["image"])),
        device_train_microbatch_size=2,
        max_duration="3ba",
        progress_bar=False,
        seed=0,
    )
    warnings.filterwarnings("ignore")
    trainer.fit()
    trainer.close()
    terms = {name: [float(value) for _, value in points] for name, points in logger.data.items() if name.startswith("loss/")}
    assert all(len(values) == 3 and torch.isfinite(torch.tensor(values)).all() for values in terms.values())
    return terms


def weights_of(model: TextToImage) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.backbone.state_dict().items()}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


LOSSES = {"contrastive_flow_matching", "internal_guidance", "irepa", "lpips", "perceptual_dino", "readouts", "repa"}
TOGETHER = LOSSES - {"internal_guidance"} | {"ema", "gradient_clipping", "skip_nonfinite", "timestep_phases", "tread"}


@pytest.mark.parametrize("name", TINY)
def test_tricks_train_together_on_every_class(name: str, tokenizer: Any) -> None:
    model, tricks = model_of(name, tokenizer), sorted(TOGETHER - refusals(name).keys())
    before = weights_of(model)
    assert {f"loss/train/{trick}" for trick in LOSSES & {*tricks}} <= trained(model, tricks).keys()
    after = model.backbone.state_dict()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2  # what lies behind two gates that begin at zero moves later


def test_the_page_has_what_the_code_answers() -> None:
    assert set(registry.algorithms.builtin) == {trick for trick in GIVEN if "." not in trick} | {"progressive_resolution"}
    assert PAGE.read_text().split(START)[1].partition(END)[0].strip() == table().strip(), "run: python tests/class_tricks.py"


def hold(trick: str, name: str, tokenizer: Any, plain: dict[str, torch.Tensor]) -> None:
    """Train a pair, and hold that the trick did what it is for; `plain` are the weights without it. Or see it refused."""
    if trick == "float8" and importlib.util.find_spec("torchao") is None:
        return
    model = model_of(name, tokenizer)
    if (reason := refusals(name).get(trick)) is not None:
        assert f"algorithms.{trick} " in reason and name in reason
        with pytest.raises(UserError, match=re.escape(reason)):
            trained(model, [trick])
        return
    if trick == "lora":  # which is for trained weights: behind a last layer that stays at zero, nothing is learnt
        for parameter in model.backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    before = weights_of(model)
    terms, after = trained(model, [trick], "adamw" if trick == "lora" else "muon"), weights_of(model)
    assert (f"loss/train/{trick}" in terms) == (trick in LOSSES)
    if trick == "lora":
        kept = {key.replace(".base_layer", ""): value for key, value in after.items() if "lora_" not in key}
        assert kept.keys() == before.keys() and are_equal(before, kept)
        moved = [bool(value.any()) for key, value in after.items() if "lora_B" in key]
        assert sum(moved) > 0.9 * len(moved)  # the last block's text is read by nobody
    elif trick == "low_precision_norm":  # which does nothing in fp32
        hold_norms(name)
    elif trick in ("ema", "skip_nonfinite"):
        assert are_equal(after, plain)
        with model.sampling_weights():
            assert are_equal(weights_of(model), after) == (trick == "skip_nonfinite")
    else:
        assert not are_equal(after, plain)
    if trick in ("internal_guidance", "sprint", "tread"):
        assert model.generate(["a red circle", ""], 16, 16, num_inference_steps=2).shape == (2, 3, 16, 16)


def hold_norms(name: str) -> None:
    """Hold that there are norms to replace, with which it predicts hardly something else under autocast, outside of a Trainer."""
    model = torch.nn.Module()
    model.backbone = backbone(name)
    found, low = [], algorithm("low_precision_norm")
    for active in (False, True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(model.backbone(**inputs(model.backbone)).float())
        if not active:
            low.attach(model, None)
        low.set_active(model, not active)
    assert low._norms and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.long, id="all"), pytest.param(False, id="some")])
@pytest.mark.parametrize("name", TINY)
def test_each_trick_alone_does_something_to_each_class_or_is_refused_by_name(name: str, whole: bool, tokenizer: Any) -> None:
    plain = model_of(name, tokenizer)
    trained(plain)
    for trick in list(GIVEN)[0 if whole else list(TINY).index(name) :: 1 if whole else len(TINY)]:
        hold(trick, name, tokenizer, weights_of(plain))


@pytest.mark.slow
def test_copied_and_sharded_classes_train_as_whole_ones() -> None:
    finished = commands.run("composer", "-n", 2, Path(__file__).with_name("fsdp_architectures.py"), timeout=280)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "Lumina2Transformer2DModel"])
def test_graphs_of_blocks_compute_the_same_with_taps_and_routes(name: str, traced: None) -> None:
    found = {}
    for kind in ("eager", "compiled"):
        ours = backbone(name)
        ours.taps, x = (0, 1), inputs(ours, 8, 8)
        if kind == "compiled":
            ours.compile_graphs(per_block=True)
        kept = torch.stack([torch.arange(16)[shift::2] for shift in (0, 1, 0)])
        prediction, taps = ours(**x, route=Route(1, 2, kept), return_taps=True)
        (prediction.square().mean() + taps[1].square().mean()).backward()
        found[kind] = [prediction, *taps.values(), *(p.grad for p in ours.parameters())]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="model.compile: blocks"):
        backbone(name).compile_graphs(per_block=False)


RESUMED = {"Lumina2Transformer2DModel": [], "DiTTransformer2DModel": [pytest.mark.slow]}  # CI has no time for more


@pytest.mark.parametrize("name", [pytest.param(name, marks=RESUMED.get(name, [pytest.mark.long])) for name in TINY])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    name: str, tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    tiny_recipe["model"]["backbone"] = {"name": "diffusers", "class": name, **of_pixels(name)}
    if name.startswith("DiT"):
        tiny_recipe["model"]["backbone"]["num_embeds_ada_norm"] = 300
        tiny_recipe["model"]["text_encoder"] = {"name": "labels", "tokenizer": {"train": True, "by": "caption"}}
    if width := POOLED_WIDTH[name]:
        tiny_recipe["model"]["backbone"][width] = TINY_T5["d_model"]
        tiny_recipe["model"]["text_encoder"]["pooled"] = "mean"
    tiny_recipe["algorithms"] |= {trick: dict(GIVEN[trick]) for trick in ("tread",) if trick not in refusals(name)}
    tiny_recipe |= {"max_duration": "4ba"}
    tiny_recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "2ba"
    parts = copy.deepcopy(tiny_recipe) | {"run_name": "parts", "autoresume": True}
    run(config.load([write_recipe(tiny_recipe)]))
    run(config.load([write_recipe(parts, "parts.yaml"), "callbacks.stop_after.time=3ba"]))
    run(config.load([write_recipe(parts, "parts.yaml")]))
    folder = Path(tiny_recipe["run_folder"].replace("${run_name}", "")).resolve()
    losses = [
        [row["loss/train/total"] for row in read_metrics(folder / run_name / "metrics.jsonl") if "loss/train/total" in row]
        for run_name in ("tiny", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


RECIPES = sorted((REPOSITORY / "yamls" / "architectures").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_pass_the_check(file: Path) -> None:
    assert not [str(result) for result in check_config(config.load([str(file)])) if result.mark == "✗"]


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_planned(file: Path) -> None:
    recipe = config.load([str(file)])
    stage = make_plan(recipe, Conditions(find_gpu("h100"), utilisation=0.3)).stages[0]
    assert stage.flops["denoiser"] > 0 and stage.memory.frozen >= 0


def test_captions_become_labels_and_those_that_training_never_saw_are_none() -> None:
    encoder = ClassLabels(train_label_tokenizer([*CAPTIONS, *CAPTIONS[:1]]))
    tokens = encoder.tokenize(["A RED circle", *CAPTIONS[1:], "", "a red"])
    labels = encoder(**tokens).flatten().tolist()
    assert sorted(labels[:4]) == [0, 1, 2, 3] and labels[0] == 0 and labels[4:] == [-1, -1]
    assert encoder.num_labels == 4
    few = DiffusersBackbone(
        **{"class": "DiTTransformer2DModel"}, **(of_pixels("DiTTransformer2DModel") | {"num_embeds_ada_norm": 3})
    )
    with pytest.raises(ValueError, match="has 3 classes, and the captions are 4; set num_embeds_ada_norm: 4"):
        TextToImage(few, encoder)  # pyright: ignore[reportArgumentType]
