"""REPA against transformers called directly, closed forms and whole runs; the refusals of all alignment losses."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alignment import COLUMNS, DINO, ROWS, SIZES, Batch, Build, attach, make_teacher, repa, transformers_features
from PIL import Image

from prx_composer.algorithms.repa import IREPA, REPA, Adapter, Alignment, StoredFeatures
from prx_composer.common.errors import UserError
from prx_composer.models import PRXBackbone, TextToImage
from prx_composer.models.autoencoder import DiffusersAutoencoder
from prx_composer.models.encoders import TeacherSpec, resize_antialiased
from prx_composer.models.routing import RandomRouter
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import build_trainer, run

Recipe = dict[str, Any]
Write = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_minus_the_cosine_with_transformers_own_features(tiny_model: Build, tiny_batch: Batch, folder: Path) -> None:
    model, algorithm = tiny_model(), repa(teacher=str(folder))
    attach(model, algorithm)
    outputs = model(tiny_batch)
    weights = algorithm.head.state_dict()
    projected = outputs.taps[1]
    for layer in (0, 2, 4):
        projected = F.linear(projected, weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"])
        projected = F.silu(projected) if layer < 4 else projected
    features = transformers_features(folder, tiny_batch["image"])
    expected = -F.cosine_similarity(projected, features, dim=-1).mean()
    torch.testing.assert_close(algorithm.loss(outputs, tiny_batch), expected)
    terms = model.loss(outputs, tiny_batch)
    torch.testing.assert_close(terms["repa"], 0.5 * expected)
    torch.testing.assert_close(terms["total"], terms["flow"] + terms["repa"])


def test_images_are_resized_as_pil_does_with_antialiasing() -> None:
    image = torch.rand(1, 3, 31, 47, generator=torch.Generator().manual_seed(0))
    channels = [Image.fromarray(channel.numpy()).resize((12, 8), Image.Resampling.BICUBIC) for channel in image[0]]
    expected = torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])
    torch.testing.assert_close(resize_antialiased(image, 8, 12)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch_size", [2, 8], ids=["shrunk for the teacher", "enlarged for the teacher"])
def test_a_teachers_patch_shows_what_the_backbones_token_shows(tiny_model: Build, tiny_batch: Batch, patch_size: int) -> None:
    """At an aspect ratio of 3:2, with one random colour per token."""
    model, seen = tiny_model(), []
    algorithm = repa(teacher=TeacherSpec(config=DINO | {"patch_size": patch_size}))
    attach(model, algorithm)
    teacher = algorithm.source.args[0]  # pyright: ignore
    teacher._frozen.module.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    colours = torch.randint(0, 256, (4, 3, ROWS, COLUMNS), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = tiny_batch | {"image": colours.repeat_interleave(4, 2).repeat_interleave(4, 3)}
    algorithm.loss(model(batch), batch)
    assert seen[0]["pixel_values"].shape == (4, 3, ROWS * patch_size, COLUMNS * patch_size)
    pixels = 255 * (seen[0]["pixel_values"] * teacher._std + teacher._mean)
    shown = F.avg_pool2d(pixels, patch_size)
    error = [(shown - colours.roll(shift, (2, 3))).abs().mean() for shift in ((0, 0), (0, 1), (1, 0))]
    assert error[0] < 10 and min(error[1:]) > 60  # of 255; antialiasing lets neighbours in


def test_with_latents_too_a_token_has_its_own_patch(tiny_model: Build, tiny_batch: Batch) -> None:
    """16×24 px are 8×12 latent pixels in patches of 4: 2×3 tokens."""
    autoencoder = DiffusersAutoencoder(
        config=dict(
            block_out_channels=[8, 8],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
            latent_channels=4,
        )
    )
    pixels = tiny_model()
    backbone = PRXBackbone(**(pixels.backbone.config | {"in_channels": 4}))
    model = TextToImage(backbone, pixels.text_encoder, autoencoder=autoencoder)
    algorithm = repa()
    attach(model, algorithm)
    outputs = model(tiny_batch)
    assert outputs.taps[1].shape[1] == 6
    assert algorithm.source(tiny_batch, 2, 3).shape == (4, 6, 16)  # pyright: ignore[reportOptionalCall]
    assert algorithm.loss(outputs, tiny_batch).isfinite()


TEACHERS = [
    DINO,
    dict(model_type="dinov3_vit", image_size=16, patch_size=4, intermediate_size=32, num_register_tokens=2, **SIZES),
    dict(model_type="siglip_vision_model", image_size=16, patch_size=4, intermediate_size=32, **SIZES),
    dict(model_type="clip_vision_model", image_size=16, patch_size=4, intermediate_size=32, **SIZES),
]


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: teacher["model_type"])
@pytest.mark.parametrize(
    "algorithm", [lambda teacher: repa(teacher=teacher), lambda teacher: IREPA(teacher, block=1)], ids=["repa", "irepa"]
)
def test_gradients_reach_backbone_and_head_but_not_the_teacher(
    algorithm: Callable[[TeacherSpec], Alignment], teacher: dict[str, Any], tiny_model: Build, tiny_batch: Batch
) -> None:
    model, aligning = tiny_model(), algorithm(TeacherSpec(config=teacher))
    attach(model, aligning)
    aligning.loss(model(tiny_batch), tiny_batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in aligning.term.parameters())
    assert model.backbone.img_in.weight.grad.any() and model.backbone.final_layer.linear.weight.grad is None  # pyright: ignore
    frozen = aligning.source.args[0]._frozen.module  # pyright: ignore
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    names = [name for name in model.state_dict() if name.startswith("auxiliary_losses")]
    assert names and all(".head." in name for name in names), "no teacher in a checkpoint"


def test_the_heads_first_weights_depend_on_seed_and_algorithm_alone(tiny_model: Build, folder: Path) -> None:
    def first_weights(algorithm: Alignment, *before: Alignment, global_seed: int = 0) -> dict[str, torch.Tensor]:
        model = tiny_model()
        torch.manual_seed(global_seed)
        for other in before:
            attach(model, other)
        attach(model, algorithm)
        return {name: value.clone() for name, value in algorithm.head.state_dict().items()}

    expected = first_weights(repa())
    stored = StoredFeatures("dino", 16)
    for found in (
        first_weights(repa(), IREPA(TeacherSpec(config=DINO), block=0), global_seed=1),
        first_weights(repa(teacher=str(folder))),
        first_weights(repa(teacher=None, features=stored)),
    ):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(value.dtype == torch.float32 for value in expected.values())


# ---------------------------------------------------------------------------------------------------- routing


HEADS: dict[str, Callable[..., Alignment]] = {
    "mlp": repa,
    "adapter": lambda **arguments: repa(adapter=Adapter(mask_rate=0.0), **arguments),
    "convolution": lambda **arguments: IREPA(block=1, **arguments),
}


@pytest.mark.parametrize("discard", [False, True], ids=["route", "discard"])
@pytest.mark.parametrize("head", HEADS)
def test_only_the_kept_tokens_features_count(head: str, discard: bool, tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model()
    model.backbone.router = RandomRouter("tread", 1, 2, 0.5, discard)
    algorithm = HEADS[head](teacher=None, features=StoredFeatures("dino", 16))
    attach(model, algorithm)
    algorithm.transform = lambda features: features  # iREPA's statistics are those of the whole image, by design
    features = torch.randn(4, ROWS, COLUMNS, 16, generator=torch.Generator().manual_seed(0))
    outputs = model(tiny_batch)
    assert outputs.taps[1].shape == (4, 12, 32)

    def loss(changed: torch.Tensor) -> torch.Tensor:  # (B, N), where the features are changed
        sign = 1 - 2 * changed.unflatten(1, (ROWS, COLUMNS))[..., None].float()
        return algorithm.loss(outputs, tiny_batch | {"dino": sign * features})

    kept = torch.zeros(4, ROWS * COLUMNS, dtype=torch.bool).scatter(1, outputs.route.kept_indices, True)
    as_it_is = loss(torch.zeros_like(kept))
    assert torch.equal(loss(~kept), as_it_is)
    torch.testing.assert_close(loss(kept), -as_it_is)
    assert as_it_is.abs() > 1e-4


@pytest.mark.parametrize("head", HEADS)
def test_a_route_that_keeps_every_token_changes_nothing(head: str, tiny_model: Build, tiny_batch: Batch) -> None:
    model, algorithm = tiny_model(), HEADS[head](teacher=TeacherSpec(config=DINO))
    attach(model, algorithm)
    model.random.begin_step(0)
    dense = algorithm.loss(model(tiny_batch), tiny_batch)
    model.backbone.router = RandomRouter("tread", 0, 2, 1e-6)
    model.random.begin_step(0)
    outputs = model(tiny_batch)
    assert outputs.route.kept_indices.shape == (4, ROWS * COLUMNS)
    torch.testing.assert_close(algorithm.loss(outputs, tiny_batch), dense)


@pytest.mark.parametrize("head", HEADS)
def test_under_autocast_the_loss_is_about_the_same_and_gradients_stay_fp32(
    head: str, tiny_model: Build, tiny_batch: Batch
) -> None:
    model, algorithm = tiny_model(), HEADS[head](teacher=TeacherSpec(config=DINO))
    model.backbone.router = RandomRouter("tread", 1, 2, 0.5)
    attach(model, algorithm)
    losses = []
    for enabled in (False, True):
        model.random.begin_step(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(algorithm.loss(model(tiny_batch), tiny_batch))
    losses[1].backward()
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], atol=0.01, rtol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in algorithm.term.parameters())


def test_a_block_outside_of_the_route_is_compared_whole(tiny_model: Build, tiny_batch: Batch, folder: Path) -> None:
    model, algorithm = tiny_model(), repa(teacher=str(folder), block=0)
    model.backbone.router = RandomRouter("tread", 1, 2, 0.5)
    attach(model, algorithm)
    outputs = model(tiny_batch)
    assert outputs.route is not None and outputs.taps[0].shape[1] == ROWS * COLUMNS
    projected = algorithm.head.layers(outputs.taps[0])  # pyright: ignore
    expected = -F.cosine_similarity(projected, transformers_features(folder, tiny_batch["image"]), dim=-1).mean()
    torch.testing.assert_close(algorithm.loss(outputs, tiny_batch), expected)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (REPA, {}, "either `teacher`"),
        (REPA, {"teacher": "x", "features": StoredFeatures("y", 8)}, "either `teacher`"),
        (REPA, {"teacher": "x", "block": -1}, "block must not be negative"),
        (IREPA, {"teacher": "x", "weight": -0.5}, "weight must not be negative"),
        (REPA, {"teacher": "x", "projector_hidden": 0}, "projector_hidden must be at least 1"),
        (IREPA, {"teacher": "x", "gamma": 1.5}, "gamma must lie in"),
        (IREPA, {"teacher": "x", "kernel_size": 2}, "kernel_size must be odd"),
        (Adapter, {"depth": 0}, "depth must be at least 1"),
        (Adapter, {"mask_rate": 1.0}, "mask_rate must lie in"),
        (StoredFeatures, {"column": "dino", "width": 0}, "width must be the number of channels"),
    ],
)
def test_arguments_out_of_range_are_refused(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_a_block_that_is_not_there_is_named(tiny_model: Build) -> None:
    with pytest.raises(UserError, match=r"algorithms\.repa\.block: 7 is no block"):
        attach(tiny_model(), REPA(TeacherSpec(config=DINO)))


BAD = {
    "weights that cannot be had": (
        {"teacher": "nobody/no-such-teacher"},
        ["algorithms.repa.teacher: nobody/no-such-teacher cannot be loaded", "hf auth login"],
    ),
    "a teacher without patches": (
        {"teacher": {"config": {"model_type": "t5"}}},
        ["algorithms.repa.teacher: ", "patch"],
    ),
    "neither teacher nor features": ({}, ["algorithms.repa: give either `teacher`"]),
    "an adapter's misspelt argument": (
        {"teacher": {"config": DINO}, "adapter": {"mask_ratio": 0.2}},
        ["algorithms.repa.adapter.mask_ratio: no such argument. Did you mean 'mask_rate'?"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_users_mistake_ends_in_one_message_before_training(
    name: str, tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, messages = BAD[name]
    tiny_recipe["algorithms"]["repa"] = {"block": 1, **arguments}
    assert main([write_recipe(tiny_recipe)]) == 1
    printed = capsys.readouterr().err
    assert all(message in printed for message in messages) and "Traceback" not in printed
    assert not (Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny")) / "metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------- runs


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses(recipe: Recipe) -> list[dict[str, float]]:
    rows = [row for row in read_metrics(folder_of(recipe) / "metrics.jsonl") if "loss/train/total" in row]
    return [{name: value for name, value in row.items() if name.startswith("loss/train/")} for row in rows]


def test_when_the_window_closes_the_teacher_goes_and_training_goes_on(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["algorithms"]["repa"] = {"teacher": {"config": DINO}, "block": 1, "projector_hidden": 16, "end": "4ba"}
    trainer = build_trainer(config.load([write_recipe(tiny_recipe), "max_duration=6ba", "optimizer.lr=0.01"]))
    model: Any = trainer.state.model
    loss = model.auxiliary_losses["repa"]
    (algorithm,) = (trick for trick in trainer.state.algorithms if isinstance(trick, REPA))
    teacher = weakref.ref(algorithm.source.args[0])  # pyright: ignore
    module = weakref.ref(algorithm.source.args[0]._frozen.module)  # pyright: ignore
    first = {name: p.detach().clone() for name, p in loss.named_parameters()}
    trainer.fit(duration="4ba")
    assert model.backbone.taps == (1,) and teacher() is not None
    trained = {name: p.detach().clone() for name, p in loss.named_parameters()}
    assert all((trained[name] != value).any() for name, value in first.items()), "the optimizer trains every part of the head"
    trainer.fit(duration="2ba")
    gc.collect()
    assert teacher() is None and module() is None and model.backbone.taps == ()
    trainer.close()
    terms = [row["loss/train/repa"] for row in losses(tiny_recipe)]
    assert len(terms) == 6 and all(-0.5 <= term < 0.5 and term != 0 for term in terms[:4]) and terms[4:] == [0.0, 0.0]


def test_a_resumed_run_with_adapter_and_route_repeats_the_uninterrupted_one_bit_for_bit(
    tiny_recipe: Recipe, write_recipe: Write
) -> None:
    repa = {"teacher": {"config": DINO}, "block": 0, "adapter": {"depth": 1, "mask_rate": 0.3}}
    tiny_recipe["algorithms"] |= {"tread": {"start_block": 0, "end_block": 0}, "repa": repa}
    run(config.load([write_recipe(tiny_recipe)]))
    parts = copy.deepcopy(tiny_recipe) | {"run_name": "parts", "autoresume": True}
    run(config.load([write_recipe(parts), "callbacks.stop_after.time=2ba"]))
    run(config.load([write_recipe(parts)]))
    assert losses(parts) == losses(tiny_recipe) and len(losses(parts)) == 8
    states = [
        torch.load(folder_of(recipe) / "checkpoints" / "ba8" / "rank0.pt", weights_only=False)["state"]["model"]  # our own runs'
        for recipe in (tiny_recipe, parts)
    ]
    assert states[0].keys() == states[1].keys() and any("repa.head.mask_token" in name for name in states[0])
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not any("teacher" in name or "embeddings" in name for name in states[0])
