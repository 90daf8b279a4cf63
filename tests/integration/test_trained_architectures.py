"""Classes of diffusers are trained with the tricks, sharded, compiled and resumed as our own backbone is, or refused by name."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from architectures import ROUTED, TINY, backbone, inputs, of_pixels
from composer import Trainer
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from conftest import TINY_T5
from stacks import TEACHER

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

TRICKS: dict[str, dict[str, Any]] = {
    "contrastive_flow_matching": {},
    "ema": {"half_life": "2ba"},
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 0.1},
    "irepa": {"teacher": TEACHER, "block": 1},
    "low_precision_norm": {},
    "lpips": {"net": "squeeze", "random_weights": True, "scale": 1.25},
    "perceptual_dino": {"teacher": TEACHER, "image_size": 16},
    "repa": {"teacher": TEACHER, "block": 1, "projector_hidden": 16},
    "skip_nonfinite": {},
}
ROUTES: dict[str, dict[str, Any]] = {
    "deferred_masking": {"mixer_blocks": 1, "rate": 0.5},
    "sprint": {"start_block": 1, "end_block": 1, "rate": 0.5},
    "tread": {"start_block": 1, "end_block": 1, "rate": 0.5, "self_guidance": True},
}
REFUSED: dict[str, dict[str, Any]] = {
    "float8": {"emulate": True},
    "internal_guidance": {},
    "readouts": {},
    "repa": TRICKS["repa"] | {"adapter": {"depth": 1, "mask_rate": 0.2}},
    "resolution_aware": {},
}
TREAD = {"start_block": 1, "end_block": 1, "rate": 0.5}
CAPTIONS = ["a red circle", "a blue square", "a green ring", "a red cross"]


def model_of(name: str, tokenizer: Any) -> TextToImage:
    torch.manual_seed(0)
    pooled = {"pooled_projection_dim": TINY_T5["d_model"]} if "pooled_projection_dim" in TINY[name] else {}
    made = DiffusersBackbone(**{"class": name}, **(of_pixels(name) | pooled))
    if name.startswith("DiT"):
        return TextToImage(made, ClassLabels(train_label_tokenizer(CAPTIONS)))  # pyright: ignore[reportArgumentType]
    encoder = HuggingFaceTextEncoder(tokenizer, config=TINY_T5, max_tokens=14, pooled="mean" if pooled else None)
    return TextToImage(made, encoder)  # pyright: ignore[reportArgumentType]


def trained(model: TextToImage, tricks: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Three steps in microbatches of two, by Muon; returns the logged loss terms."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    batch = {"image": image, **model.text_encoder.tokenize(CAPTIONS), "sample_id": torch.arange(4)}
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        optimizers=build(registry.optimizers, "muon", {"lr": 1e-2}, "optimizer", model=model),
        algorithms=[build(registry.algorithms, name, dict(tricks[name]), f"algorithms.{name}") for name in tricks],
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
    return {name: [float(value) for _, value in points] for name, points in logger.data.items() if name.startswith("loss/")}


@pytest.mark.parametrize("name", TINY)
def test_tricks_train_on_every_class_or_are_refused_by_name(name: str, tokenizer: Any) -> None:
    model = model_of(name, tokenizer)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    tricks = TRICKS | ({"tread": TREAD} if name in ROUTED else {})
    terms = trained(model, tricks)
    assert {
        "loss/train/repa",
        "loss/train/irepa",
        "loss/train/lpips",
        "loss/train/perceptual_dino",
        "loss/train/contrastive_flow_matching",
    } <= terms.keys()
    assert all(len(values) == 3 and torch.isfinite(torch.tensor(values)).all() for values in terms.values())
    after = model.backbone.state_dict()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2  # what lies behind two gates that begin at zero moves later
    for trick, arguments in REFUSED.items():
        if trick == "float8" and importlib.util.find_spec("torchao") is None:
            continue
        with pytest.raises(UserError, match=f"algorithms.{trick}"):
            trained(model_of(name, tokenizer), {trick: arguments})


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "trick", ["tread", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deferred_masking", "sprint"))]
)
def test_routes_train_and_draw_where_tokens_are_a_plain_sequence(trick: str, name: str, tokenizer: Any) -> None:
    model = model_of(name, tokenizer)
    if name not in ROUTED:
        with pytest.raises(UserError, match=f"algorithms.{trick} cannot route tokens through {name}"):
            trained(model, {trick: ROUTES[trick]})
        return
    terms = trained(model, {trick: ROUTES[trick]})
    assert all(torch.isfinite(torch.tensor(values)).all() for values in terms.values())
    assert model.generate(["a red circle", ""], 16, 16, num_inference_steps=2).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", TINY)
def test_lora_adapts_every_class(name: str, tokenizer: Any) -> None:
    model = model_of(name, tokenizer)
    frozen = {key: value.clone() for key, value in model.backbone.named_parameters()}
    optimizer = build(registry.optimizers, "adamw", {"lr": 1e-2}, "optimizer", model=model)
    build(registry.algorithms, "lora", {"rank": 2}, "algorithms.lora").attach(model, optimizer)
    adapted = {key for key, value in model.backbone.named_parameters() if value.requires_grad}
    assert adapted and all("lora_" in key for key in adapted)
    assert sum(key.endswith("base_layer.weight") for key, _ in model.backbone.named_parameters()) * 2 == len(adapted)
    assert len(frozen) + len(adapted) == len(list(model.backbone.parameters()))


@pytest.mark.slow
def test_sharded_blocks_have_the_same_losses_gradients_and_taps() -> None:
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


@pytest.mark.parametrize("name", ["Lumina2Transformer2DModel", pytest.param("DiTTransformer2DModel", marks=pytest.mark.slow)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    name: str, tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    tiny_recipe["model"]["backbone"] = {"name": "diffusers", "class": name, **of_pixels(name)}
    if name.startswith("DiT"):
        tiny_recipe["model"]["backbone"]["num_embeds_ada_norm"] = 300
        tiny_recipe["model"]["text_encoder"] = {"name": "labels", "tokenizer": {"train": True, "by": "caption"}}
    tiny_recipe["algorithms"]["tread"] = dict(TREAD)
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
