"""LPIPS against the lpips package, torchvision and the Trainer."""

import copy
import gc
import importlib.util
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import lpips
import pytest
import torch
import torchvision
from composer.core import Event, State
from composer.devices import DeviceCPU
from torch._inductor import metrics

from prx_composer.algorithms import perceptual as algorithm_module
from prx_composer.algorithms.perceptual import LPIPS, Net, _FeatureDistance, build_network, lpips_distance
from prx_composer.common.errors import UserError
from prx_composer.models import FlowMatching, FlowOutput, TextToImage
from prx_composer.models.autoencoder import DiffusersAutoencoder
from prx_composer.models.huggingface import Frozen
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import run

Build = Callable[..., TextToImage]
Recipe = dict[str, Any]
Write = Callable[..., str]


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    return {net: build_network(net, random_weights=True).requires_grad_(False) for net in get_args(Net)}


@pytest.fixture
def squeeze(networks: dict[str, Any]) -> Any:
    return networks["squeeze"]


def images(batch_size: int = 3, height: int = 32, width: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """In [−1, 1], and near each other as in training."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch_size, 3, height, width, generator=generator) * 2 - 1
    return (target + 0.3 * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


def outputs_of(prediction: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor, flow: FlowMatching) -> FlowOutput:
    """Of a model that predicts `prediction` as x̂0, in the space that `flow` says."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    noised = flow.interpolate(clean, noise, timestep)
    if flow.prediction == "v":
        prediction = (noised - prediction) / timestep[:, None, None, None]
    return FlowOutput(prediction, clean, noise, noised, timestep, None, None, {})  # pyright: ignore[reportArgumentType]


def loss_of(flow: FlowMatching, network: Any, **options: Any) -> LPIPS:
    """As it is attached to a model that learns `flow`."""
    trick = LPIPS(net=network.pnet_type, **options)
    trick.flow, trick.network = flow, Frozen(network.to(memory_format=torch.channels_last))
    return trick


# ------------------------------------------------------------------------------------------------------ distance


@pytest.mark.parametrize("net", get_args(Net))
def test_distance_and_its_gradient_are_those_of_the_lpips_package(networks: dict[str, Any], net: Net) -> None:
    prediction, target = images()
    ours, theirs = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    distance, expected = lpips_distance(networks[net], ours, target), networks[net](theirs, target)[:, 0, 0, 0]
    torch.testing.assert_close(distance, expected, atol=1e-6, rtol=1e-6)
    distance.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None and ours.grad.any()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_images_that_are_nearly_alike_have_the_gradient_of_double_precision(networks: dict[str, Any]) -> None:
    """The closed form is a difference of sums that are nearly alike, too: its value is good to 1e-7, not to a share of itself."""
    network = networks["squeeze"]
    prediction, target = images()
    prediction = target + (prediction - target) / 30  # of 1.3 grey levels
    ours, exact = prediction.clone().requires_grad_(), prediction.double().requires_grad_()
    distance = lpips_distance(network, ours, target)
    expected = copy.deepcopy(network).double()(exact, target.double())[:, 0, 0, 0]
    torch.testing.assert_close(distance.double(), expected, atol=1e-7, rtol=0)
    distance.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None and exact.grad is not None
    assert (ours.grad - exact.grad).norm() < 1e-3 * exact.grad.norm()


def test_network_and_comparison_are_one_graph_each_way(squeeze: Any) -> None:
    """By torch's tracer and autograd's; inductor takes minutes for the convolutions on a CPU."""
    prediction, target = images()
    traced = torch.compile(lpips_distance, backend="aot_eager", fullgraph=True, dynamic=False)
    gradients = []
    for distance in (traced, lpips_distance):
        image = prediction.clone().requires_grad_()
        distance(squeeze, image, target).sum().backward()
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-4)


def test_compile_is_asked_of_torch_with_room_for_every_image_size(tiny_model: Build) -> None:
    settings: Any = torch._dynamo.config  # pyright: ignore[reportPrivateImportUsage]
    trick = LPIPS(net="squeeze", random_weights=True, scale=1.0, compile=True)
    with settings.patch(recompile_limit=8):
        trick.build(tiny_model(in_channels=3))
        assert settings.recompile_limit > 100
    pair = images()
    assert trick.network is not None
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(trick.distance(*pair), lpips_distance(trick.network.on(pair[0].device), *pair))


@pytest.mark.slow
def test_compiled_it_passes_over_the_features_five_times_and_as_it_is_usually_written_fifteen_times() -> None:
    """In bf16, by inductor's own count: two are read twice, and the gradient is written."""

    def usual(predicted: torch.Tensor, expected: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        p, q = (
            x / (torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32) + 1e-10) for x in (predicted, expected)
        )
        return (p - q).square().mean((2, 3)) @ head

    torch.manual_seed(0)
    predicted, expected = (torch.randn(2, 64, 32, 32).relu().bfloat16().to(memory_format=torch.channels_last) for _ in range(2))
    distances, gradients, passes = [], [], []
    for distance in (_FeatureDistance.apply, usual):
        metrics.reset()
        features = predicted.clone().requires_grad_()
        distances.append(torch.compile(distance, dynamic=False, fullgraph=True)(features, expected, torch.linspace(0, 1, 64)))
        distances[-1].sum().backward()
        gradients.append(features.grad)
        passes.append(metrics.num_bytes_accessed / predicted.nbytes)
    torch.testing.assert_close(*distances)
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=2e-2)  # the usual one rounds to bf16 on its way
    assert 5 <= passes[0] < 5.5 and passes[1] > 14


def test_places_without_any_feature_have_distance_and_gradient_zero() -> None:
    dead: Any = build_network("squeeze", random_weights=True).requires_grad_(False)
    for name, parameter in dead.net.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(-1e3)
    prediction, target = images()
    distance = lpips_distance(dead, prediction.requires_grad_(), target)
    distance.sum().backward()
    assert not distance.any() and prediction.grad is not None and not prediction.grad.any()


def test_images_are_resized_antialiased_first(squeeze: Any) -> None:
    prediction, target = images(height=48, width=64)
    half = [
        torchvision.transforms.functional.resize(x, [24, 32], torchvision.transforms.InterpolationMode.BICUBIC)
        for x in (prediction, target)
    ]
    expected = squeeze(*half)[:, 0, 0, 0]
    torch.testing.assert_close(loss_of(FlowMatching(), squeeze).distance(prediction, target), expected, atol=1e-6, rtol=1e-5)


def test_values_outside_of_the_image_range_keep_their_gradient(squeeze: Any) -> None:
    prediction, target = images()
    prediction = (3 * prediction).requires_grad_()
    target.requires_grad_()
    loss_of(FlowMatching(), squeeze, scale=1.0).distance(prediction, target).sum().backward()
    assert prediction.grad is not None and prediction.grad[prediction.abs() > 1].count_nonzero() > 0
    assert target.grad is None and all(parameter.grad is None for parameter in squeeze.parameters())


@pytest.mark.parametrize("net", get_args(Net))
def test_the_smallest_side_is_the_smallest_that_the_package_can_do(networks: dict[str, Any], net: Net) -> None:
    smallest = algorithm_module._MIN_SIDE[net]
    loss = loss_of(FlowMatching(), networks[net], scale=0.5)
    assert loss.distance(*images(1, 2 * smallest, 2 * smallest)).isfinite().all()
    with pytest.raises(RuntimeError):
        networks[net](*images(1, smallest - 1, smallest))
    with pytest.raises(UserError, match=rf"scale 0.5 are .*needs {smallest} px .*algorithms.lpips.scale to [\d.]+ or more"):
        loss.distance(*images(1, 2 * smallest - 2, 2 * smallest))


# ---------------------------------------------------------------------------------------------------------- term


def test_velocity_and_image_prediction_of_the_same_image_are_the_same_loss(squeeze: Any) -> None:
    prediction, clean = images()
    timestep = torch.tensor([0.3, 0.6, 0.9])
    terms = []
    for flow in (FlowMatching("x", noise_scale=2.0), FlowMatching("v", noise_scale=2.0)):
        loss = loss_of(flow, squeeze, scale=1.0)
        terms.append(loss.loss(outputs_of(prediction, clean, timestep, flow), {}))
    torch.testing.assert_close(terms[0], terms[1], atol=1e-6, rtol=1e-5)


def test_noisy_images_do_not_count_and_microbatches_add_up(squeeze: Any) -> None:
    flow = FlowMatching()
    prediction, clean = images(4)
    timestep = torch.tensor([0.1, 0.8, 0.5, 0.51])
    loss = loss_of(flow, squeeze, scale=1.0, max_timestep=0.5)
    whole = loss.loss(outputs_of(prediction, clean, timestep, flow), {})
    distance = squeeze(prediction, clean)[:, 0, 0, 0]
    torch.testing.assert_close(whole, (distance[0] + distance[2]) / 4, atol=1e-6, rtol=1e-5)
    halves = [loss.loss(outputs_of(prediction[i : i + 2], clean[i : i + 2], timestep[i : i + 2], flow), {}) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.stack(halves).mean(), atol=1e-7, rtol=1e-5)


def test_a_fraction_of_the_images_stands_for_all_that_count(squeeze: Any) -> None:
    flow, (prediction, clean) = FlowMatching(), images(6)
    whole, half = (loss_of(flow, squeeze, scale=1.0, max_timestep=0.5, fraction=fraction) for fraction in (1.0, 0.4))
    seen: list[int] = []
    distance, half_distance = squeeze(prediction, clean)[:, 0, 0, 0], half.distance
    half.distance = lambda given, target: seen.append(len(given)) or half_distance(given, target)  # pyright: ignore[reportAttributeAccessIssue]

    def loss(of: LPIPS, timestep: Any, order: Any) -> Any:
        return of.loss(outputs_of(prediction[order], clean[order], timestep[order], flow), {})

    few = torch.tensor([0.9, 0.8, 0.1, 0.7, 0.3, 0.2])  # three count, and 0.4 · 6 is rounded up to three
    torch.testing.assert_close(loss(half, few, range(6)), distance[[2, 4, 5]].sum() / 6)
    torch.testing.assert_close(loss(half, few, range(6)), loss(whole, few, range(6)))
    many = torch.tensor([0.4, 0.8, 0.1, 0.5, 0.3, 0.2])  # five count: each is among the first three in three of five orders
    counting = [0, 2, 3, 4, 5]
    orders = [[*counting[first:], 1, *counting[:first]] for first in range(5)]
    mean = torch.stack([loss(half, many, order) for order in orders]).mean()
    torch.testing.assert_close(mean, loss(whole, many, range(6)))
    assert set(seen) == {3} and loss(half, torch.ones(6), range(6)) == 0


def test_arguments_out_of_range_are_refused() -> None:
    for bad in ({"scale": 0.0}, {"max_timestep": 0.0}, {"max_timestep": 1.5}, {"fraction": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LPIPS(**bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="weights and random_weights"):
        LPIPS(weights="vgg16.pth", random_weights=True)


# ----------------------------------------------------------------------------------------------------- algorithm


def state_of(model: TextToImage) -> State:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba", optimizers=[optimizer])


def test_window_opens_closes_and_lets_the_network_go_and_no_checkpoint_has_it(tiny_model: Build) -> None:
    model = tiny_model()
    names = list(model.state_dict())
    state = state_of(model)
    algorithm = LPIPS(net="squeeze", random_weights=True, start="2ba", end="4ba")
    algorithm.apply(Event.INIT, state, None)  # pyright: ignore[reportArgumentType]
    loss: Any = model.auxiliary_losses["lpips"]
    assert list(model.state_dict()) == names and not list(loss.parameters()) and algorithm.needs_whole_image
    alive = weakref.ref(algorithm.network.module)  # pyright: ignore[reportOptionalMemberAccess]
    active = []
    for _ in range(6):
        algorithm.apply(Event.BATCH_START, state, None)  # pyright: ignore[reportArgumentType]
        gc.collect()
        active.append((loss.active, alive() is not None))
        state.timestamp = state.timestamp.to_next_batch(1)
    assert active == 2 * [(False, True)] + 2 * [(True, True)] + 2 * [(False, False)]


def test_a_model_of_latents_is_refused_by_name(tiny_model: Build) -> None:
    config = dict(block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4)
    config |= dict(up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4)
    pixels = tiny_model(in_channels=3)
    latents = SimpleNamespace(autoencoder=DiffusersAutoencoder(config=config), flow=pixels.flow)
    with pytest.raises(UserError, match="algorithms.lpips.*latents of 4 channels.*pixels"):
        LPIPS(random_weights=True).build(latents)


def test_a_run_trains_on_it_and_logs_it(tiny_recipe: Recipe, write_recipe: Write, capfd: pytest.CaptureFixture[str]) -> None:
    del tiny_recipe["algorithms"]["progressive_resolution"]
    tiny_recipe["algorithms"]["lpips"] = {"net": "squeeze", "scale": 2.0, "random_weights": True, "end": "2ba"}
    run(config.load([write_recipe(tiny_recipe), "max_duration=3ba", "save_interval=1ba"]))
    folder = Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny"))
    rows = read_metrics(folder / "metrics.jsonl")
    terms = [row.get("loss/train/lpips") for row in rows]
    assert terms[0] > 0 and terms[1] > 0 and terms[2] is None
    for row, term in zip(rows, terms, strict=True):
        assert row["loss/train/total"] == pytest.approx(row["loss/train/flow"] + (term or 0.0), rel=1e-5)
    assert "perceptual loss" not in capfd.readouterr().out, "the lpips package prints when it is asked to be verbose"


# ------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def torchvision_weights(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    model = torchvision.models.squeezenet1_1()
    torch.save(model.state_dict(), tmp_path / "squeezenet.pth")
    return tmp_path / "squeezenet.pth"


def features_of(file: Path, image: torch.Tensor) -> torch.Tensor:
    model = torchvision.models.squeezenet1_1()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.features(image)


def test_weights_by_file_and_from_the_cache_are_torchvisions(
    torchvision_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    image, _ = images()
    expected = features_of(torchvision_weights, image)
    by_file: Any = build_network("squeeze", weights=str(torchvision_weights))
    torch.testing.assert_close(by_file.net(image)[-1], expected)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    torchvision_weights.rename(cache / url.rpartition("/")[2])
    cached: Any = build_network("squeeze")
    torch.testing.assert_close(cached.net(image)[-1], expected)
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "squeeze.pth", map_location="cpu", weights_only=True)
    assert torch.equal(cached.lin3.model[-1].weight, heads["lin3.model.1.weight"])
    assert capfd.readouterr().out == ""


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"algorithms.lpips.weights: there is no file .*nowhere.pth"):
        build_network("vgg", weights=str(tmp_path / "nowhere.pth"))
    (tmp_path / "page.pth").write_text("<html>")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("page.pth", "other.pth"):
        with pytest.raises(UserError, match=rf"algorithms.lpips.weights: .*{name} is no SqueezeNet 1.1 of torchvision's"):
            build_network("squeeze", weights=str(tmp_path / name))


def test_missing_weights_are_one_message_before_training(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    for variable in ("https_proxy", "HTTPS_PROXY"):  # no network: connections are refused at once
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    tiny_recipe["algorithms"]["lpips"] = {}
    assert main([write_recipe(tiny_recipe)]) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    file = tmp_path / "empty" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    for part in ("algorithms.lpips needs the VGG16 weights of torchvision", str(file), "algorithms.lpips.weights"):
        assert part in errors[0]


def test_the_lpips_package_is_imported_only_when_a_network_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    spec = importlib.util.spec_from_file_location("fresh", algorithm_module.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(ImportError, match="lpips"):
        fresh.build_network("squeeze", random_weights=True)
