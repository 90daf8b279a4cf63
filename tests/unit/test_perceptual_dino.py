"""P-DINO against transformers called directly, closed forms and the Trainer."""

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import transformers
from composer.core import Event, State
from composer.devices import DeviceCPU
from scipy.spatial.distance import cosine

from prx_composer.algorithms.perceptual import PerceptualDINO, fit_size, patch_dissimilarity
from prx_composer.common.errors import UserError
from prx_composer.models import FlowMatching, FlowOutput, TextToImage
from prx_composer.models.encoders import TeacherSpec, VisionEncoder
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import run

Build = Callable[..., TextToImage]
Recipe = dict[str, Any]
Write = Callable[..., str]

DINO = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7)
CONFIG = dict(model_type="dinov2_with_registers", num_register_tokens=2, **DINO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino")
    transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(num_register_tokens=2, **DINO)).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def teacher(folder: Path) -> VisionEncoder:
    return VisionEncoder(str(folder))


def images(batch_size: int = 2, height: int = 28, width: int = 35) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1)), target


def outputs_of(prediction: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor, flow: FlowMatching) -> FlowOutput:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    noised = flow.interpolate(clean, noise, timestep)
    if flow.prediction == "v":
        prediction = (noised - prediction) / timestep[:, None, None, None]
    return FlowOutput(prediction, clean, noise, noised, timestep, None, None, {})  # pyright: ignore[reportArgumentType]


def loss_of(flow: FlowMatching, teacher: VisionEncoder, **options: Any) -> PerceptualDINO:
    """As it is attached to a model that learns `flow`."""
    trick = PerceptualDINO(image_size=28, **options)
    trick.flow, trick.encoder = flow, teacher
    return trick


def test_dissimilarity_is_one_minus_the_cosine_of_transformers_patch_features(teacher: VisionEncoder, folder: Path) -> None:
    prediction, target = images()
    model = transformers.Dinov2WithRegistersModel.from_pretrained(folder).eval()
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        features = [model(pixel_values=normalise((x + 1) / 2)).last_hidden_state[:, 3:].numpy() for x in (prediction, target)]
    expected = [np.mean([cosine(p, t) for p, t in zip(*pair, strict=True)]) for pair in zip(*features, strict=True)]
    torch.testing.assert_close(patch_dissimilarity(teacher, prediction, target), torch.tensor(expected).float())


def test_gradients_reach_the_prediction_outside_of_the_image_range_too_and_nothing_else(teacher: VisionEncoder) -> None:
    prediction, target = images()
    prediction = (3 * prediction).requires_grad_()
    target.requires_grad_()
    loss_of(FlowMatching(), teacher).distance(prediction, target).sum().backward()
    assert prediction.grad is not None and prediction.grad[prediction.abs() > 1].count_nonzero() > 0
    assert target.grad is None and all(parameter.grad is None for parameter in teacher._frozen.module.parameters())


@pytest.mark.parametrize("sides", [(256, 256), (512, 512), (768, 1344), (1536, 640), (16, 24), (2048, 512)])
@pytest.mark.parametrize("multiple", [14, 16])
def test_fitted_sizes_keep_area_and_aspect_ratio_to_half_a_patch(sides: tuple[int, int], multiple: int) -> None:
    height, width = fit_size(*sides, 224, multiple)
    assert height % multiple == width % multiple == 0
    ratio = math.sqrt(sides[0] / sides[1])
    assert abs(height - 224 * ratio) <= multiple / 2 and abs(width - 224 / ratio) <= multiple / 2


def test_a_compiled_teacher_gives_the_same_features_and_gradients(traced: None, teacher: VisionEncoder, folder: Path) -> None:
    compiled = VisionEncoder(TeacherSpec(pretrained=str(folder), compile=True))
    image = torch.linspace(-1, 1, 3 * 28 * 35).reshape(1, 3, 28, 35)
    found = []
    for encoder in (teacher, compiled):
        leaf = image.clone().requires_grad_()
        features = encoder(leaf)
        features.square().sum().backward()
        found.append((features.detach(), leaf.grad))
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)


def test_fitted_sizes_at_the_edges() -> None:
    assert fit_size(512, 512, 224, 14) == (224, 224), "the teacher's own size is met exactly"
    assert fit_size(16, 16, 224, 14) == (224, 224), "small images grow"
    assert fit_size(10_000, 10, 28, 14)[1] == 14, "at least one patch"


def test_images_are_resized_antialiased_to_the_fitted_size(teacher: VisionEncoder) -> None:
    prediction, target = images(height=96, width=160)
    sides = fit_size(96, 160, 28, 7)
    assert sides == (21, 35)
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    resized = [torchvision.transforms.functional.resize(x, list(sides), bicubic) for x in (prediction, target)]
    distance = loss_of(FlowMatching(), teacher).distance(prediction, target)
    torch.testing.assert_close(distance, patch_dissimilarity(teacher, *resized))


def test_velocity_and_image_prediction_of_the_same_image_are_the_same_loss(teacher: VisionEncoder) -> None:
    prediction, clean = images()
    timestep = torch.tensor([0.3, 0.9])
    terms = []
    for flow in (FlowMatching("x", noise_scale=2.0), FlowMatching("v", noise_scale=2.0)):
        loss = loss_of(flow, teacher)
        terms.append(loss.loss(outputs_of(prediction, clean, timestep, flow), {}))
    torch.testing.assert_close(terms[0], terms[1], atol=1e-6, rtol=1e-5)


def test_noisy_images_do_not_count_and_microbatches_add_up(teacher: VisionEncoder) -> None:
    flow = FlowMatching()
    prediction, clean = images(4, 28, 28)
    timestep = torch.tensor([0.1, 0.8, 0.5, 0.51])
    loss = loss_of(flow, teacher, max_timestep=0.5)
    whole = loss.loss(outputs_of(prediction, clean, timestep, flow), {})
    distance = patch_dissimilarity(teacher, prediction, clean)
    torch.testing.assert_close(whole, (distance[0] + distance[2]) / 4)
    halves = [loss.loss(outputs_of(prediction[i : i + 2], clean[i : i + 2], timestep[i : i + 2], flow), {}) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_window_opens_closes_and_lets_the_teacher_go_and_no_checkpoint_has_it(tiny_model: Build) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba", optimizers=[optimizer])
    algorithm = PerceptualDINO(TeacherSpec(config=CONFIG), image_size=28, start="2ba", end="4ba")
    algorithm.apply(Event.INIT, state, None)  # pyright: ignore[reportArgumentType]
    loss: Any = model.auxiliary_losses["perceptual_dino"]
    assert list(model.state_dict()) == names and not list(loss.parameters()) and algorithm.needs_whole_image
    alive = weakref.ref(algorithm.encoder._frozen.module)  # pyright: ignore[reportOptionalMemberAccess]
    active = []
    for _ in range(6):
        algorithm.apply(Event.BATCH_START, state, None)  # pyright: ignore[reportArgumentType]
        gc.collect()
        active.append((loss.active, alive() is not None))
        state.timestamp = state.timestamp.to_next_batch(1)
    assert active == 2 * [(False, True)] + 2 * [(True, True)] + 2 * [(False, False)]


def test_models_and_sizes_that_it_cannot_be_used_with_are_refused() -> None:
    pixels = SimpleNamespace(autoencoder=SimpleNamespace(channels=3, downsampling=1), flow=FlowMatching())
    latents = SimpleNamespace(autoencoder=SimpleNamespace(channels=16, downsampling=8), flow=FlowMatching())
    with pytest.raises(UserError, match="algorithms.perceptual_dino.*latents of 16 channels.*pixels"):
        PerceptualDINO().build(latents)
    with pytest.raises(ValueError, match="image_size must be at least 7"):
        PerceptualDINO(TeacherSpec(config=CONFIG), image_size=6).build(pixels)
    with pytest.raises(ValueError, match="max_timestep"):
        PerceptualDINO(max_timestep=2.0)


def test_a_run_trains_on_it_and_logs_it(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["algorithms"]["perceptual_dino"] = {"teacher": {"config": CONFIG}, "image_size": 28, "end": "5ba"}
    run(config.load([write_recipe(tiny_recipe), "max_duration=6ba", "save_interval=6ba"]))
    rows = read_metrics(Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny")) / "metrics.jsonl")
    terms = [row.get("loss/train/perceptual_dino") for row in rows]
    assert all(0 < term <= 0.02 for term in terms[:5]) and terms[5] is None, "0.01 · (1 − cos), in both resolution stages"
    for row, term in zip(rows, terms, strict=True):
        assert row["loss/train/total"] == pytest.approx(row["loss/train/flow"] + (term or 0.0), rel=1e-5)


def test_a_missing_teacher_is_one_message_before_training(
    tiny_recipe: Recipe, write_recipe: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    """Offline, as conftest says."""
    tiny_recipe["algorithms"]["perceptual_dino"] = {"teacher": "nobody/has-this-encoder"}
    assert main([write_recipe(tiny_recipe)]) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for part in ("algorithms.perceptual_dino.teacher: nobody/has-this-encoder cannot be loaded", "give its folder"):
        assert part in errors[0]
