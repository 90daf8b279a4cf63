"""Float8: products against operands rounded by hand, and that nothing but products is different."""

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from diffusers import PRXPixelPipeline
from torch import Tensor, nn
from typer.testing import CliRunner

from prx_composer.algorithms.lora import LoRA
from prx_composer.algorithms.low_precision import Float8, apply_float8, float8_layers, hardware_problem
from prx_composer.cli import app
from prx_composer.common.errors import UserError
from prx_composer.models import PRXBackbone, TextToImage
from prx_composer.models.layers import BLOCK_LAYERS
from prx_composer.optim import AdamW
from prx_composer.optim.muon import Muon
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.runs.opening import load_trained
from prx_composer.training.meta_model import MetaModel
from prx_composer.training.preflight.surroundings import check_gpus
from prx_composer.training.run import build_trainer, run
from prx_composer.training.trial import check_config

pytest.importorskip("torchao", reason="the extra float8, which CI has")

Recipe = dict[str, Any]
Write = Callable[..., str]
Build = Callable[..., TextToImage]
RECIPES = ("tensorwise", "rowwise")


def attach(model: TextToImage, *algorithms: Any) -> None:
    state = State(
        rank_zero_seed=0, run_name="test", model=model, device=DeviceCPU(), optimizers=AdamW(model), algorithms=list(algorithms)
    )
    for algorithm in algorithms:
        algorithm.apply(Event.INIT, state, Logger(state))


def rounded(x: Tensor, dim: int | None, mantissa: int, smallest: int, largest: float, power_of_2: bool) -> Tensor:
    """x (fp32) scaled so that its greatest magnitude along `dim` is `largest`, rounded to the nearest float8, and scaled back.

    In float64 and without float8 dtypes: neighbours are 2^(exponent − mantissa) apart, from the exponent `smallest` on; ties to
    even (arXiv:2209.05433, table 1).
    """
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (largest / amax.double()).float()
    if power_of_2:
        scale = 2.0 ** scale.log2().floor()
    scaled = (x * scale).double()
    exponent = scaled.abs().clamp(min=2.0**-60).log2().floor().clamp(min=smallest)
    step = 2.0 ** (exponent - mantissa)
    return (scaled / step).round().mul(step).clamp(-largest, largest) / scale.double()


def e4m3(x: Tensor, dim: int | None = None, power_of_2: bool = False) -> Tensor:
    return rounded(x, dim, 3, -6, 448.0, power_of_2)


def e5m2(x: Tensor) -> Tensor:
    return rounded(x, None, 2, -14, 57344.0, False)


# ------------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_operands_rounded_by_hand(recipe: Any, tiny_model: Build) -> None:
    """Output, input gradient and weight gradient; operands of many magnitudes, and tokens whose number is no multiple of 16."""
    backbone = tiny_model().backbone
    apply_float8(backbone, recipe, emulate=True)
    layer: Any = backbone.blocks[0].up_proj  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 32, generator=generator) * torch.logspace(-3, 2, 32)
    gradient = torch.randn(3, 7, 64, generator=generator) * torch.logspace(-4, 1, 64)
    x.requires_grad_()
    out = layer(x)
    out.backward(gradient)
    tokens, weight, given = x.detach().flatten(0, 1), layer.weight.detach(), gradient.flatten(0, 1)
    if recipe == "tensorwise":
        expected = e4m3(tokens) @ e4m3(weight).T
        expected_x, expected_weight = e5m2(given) @ e4m3(weight), e5m2(given).T @ e4m3(tokens)
    else:  # every operand has its own scale for each sum
        expected = e4m3(tokens, 1, True) @ e4m3(weight, 1, True).T
        expected_x = e4m3(given, 1, True) @ e4m3(weight, 0, True)
        expected_weight = e4m3(given, 0, True).T @ e4m3(tokens, 0, True)
    exact = [tokens @ weight.T, given @ weight, given.T @ tokens]
    found = [out.detach().flatten(0, 1), x.grad.flatten(0, 1), layer.weight.grad]  # pyright: ignore[reportOptionalMemberAccess]
    for ours, theirs, unrounded in zip(found, (expected, expected_x, expected_weight), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
        assert (ours - unrounded).norm() / unrounded.norm() > 1e-3, "something was rounded"
    assert out.dtype == layer.weight.grad.dtype == torch.float32


def test_under_autocast_outputs_are_bf16_and_weights_are_rounded_from_fp32(tiny_model: Build) -> None:
    """torch.autocast of CUDA is what torchao asks for: it can be entered without a GPU."""
    backbone = tiny_model().backbone
    apply_float8(backbone, emulate=True)
    layer: Any = backbone.blocks[0].up_proj  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        out = layer(x)
    finally:
        torch.set_autocast_enabled("cuda", False)
    expected = e4m3(x.bfloat16().float()) @ e4m3(layer.weight.detach()).T
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)


# -------------------------------------------------------------------------------------------------- what is swapped


def test_block_matrices_are_swapped_and_every_name_value_and_parameter_stays(tiny_model: Build) -> None:
    model = tiny_model()
    values, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    attach(model, Float8(emulate=True))
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    swapped = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert swapped == {f"backbone.blocks.{block}.{layer}" for block in range(2) for layer in BLOCK_LAYERS}
    plain = [name for name, module in model.backbone.named_modules() if type(module) is nn.Linear]
    assert {"img_in", "txt_in", "time_in.in_layer", "blocks.1.modulation.lin", "final_layer.linear"} <= set(plain)


def test_layers_can_be_excluded_by_the_end_of_their_names(tiny_model: Build) -> None:
    backbone = tiny_model().backbone
    names = float8_layers(backbone, ["txt_kv_proj", "blocks.0.up_proj"])
    assert len(names) == 2 * len(BLOCK_LAYERS) - 3 and "blocks.1.up_proj" in names
    assert apply_float8(backbone, emulate=True, exclude=["txt_kv_proj", "blocks.0.up_proj"]) == names
    odd = PRXBackbone(hidden_size=32, num_heads=2, depth=1, mlp_ratio=2.3)
    with pytest.raises(ValueError, match="32 inputs and 73 outputs"):
        float8_layers(odd)
    assert len(float8_layers(odd, ["gate_proj", "up_proj", "down_proj"])) == 3


def test_muon_trains_the_same_matrices(tiny_model: Build) -> None:
    def groups(model: TextToImage, optimizer: Muon) -> list[set[str]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]

    model = tiny_model()
    expected = groups(model, Muon(model))
    before = Muon(model, lr=1e-2)
    attach(model, Float8(emulate=True))
    assert groups(model, before) == groups(model, Muon(model)) == expected
    weights = {name: parameter.detach().clone() for name, parameter in model.backbone.named_parameters()}
    model.backbone(torch.ones(1, 3, 8, 8), torch.tensor([0.5]), torch.ones(1, 3, 24)).square().mean().backward()
    before.step()
    names = [f"{name}.weight" for name in float8_layers(model.backbone)]
    assert not any(torch.equal(model.backbone.get_parameter(name), weights[name]) for name in names)


# ---------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Float8 beneath EMA, Muon, routing and two stages."""
    tiny_recipe["algorithms"] = {
        "float8": {"emulate": True},
        "tread": {"start_block": 1, "end_block": 2, "rate": 0.5},
    } | tiny_recipe["algorithms"]
    tiny_recipe["model"]["backbone"]["depth"] = 3
    tiny_recipe["optimizer"] = {"name": "muon", "lr": 1e-3}
    return tiny_recipe


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses(recipe: Recipe) -> list[float]:
    return [row["loss/train/total"] for row in read_metrics(folder_of(recipe) / "metrics.jsonl")]


@pytest.mark.parametrize("kind", RECIPES)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(kind: str, recipe: Recipe, write_recipe: Write) -> None:
    recipe["algorithms"]["float8"]["recipe"] = kind
    recipe["callbacks"] = {"images": {"prompts": ["a red circle"], "interval": "4ba", "num_inference_steps": 2}}
    run(config.load([write_recipe(recipe)]))
    parts = copy.deepcopy(recipe) | {"run_name": "parts", "autoresume": True}
    path = write_recipe(parts, "parts.yaml")
    run(config.load([path, "callbacks.stop_after.time=5ba"]))
    run(config.load([path]))
    assert losses(recipe) == losses(parts) and len(losses(recipe)) == 8
    ours, theirs = (load_trained(str(folder_of(r))).model.state_dict() for r in (recipe, parts))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_a_run_has_the_loss_and_the_checkpoint_of_one_without_and_is_exported_without_torchao(
    recipe: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss within the rounding; the checkpoint in its names, dtypes and shapes."""
    plain = copy.deepcopy(recipe) | {"run_name": "plain"}
    del plain["algorithms"]["float8"]
    for each in (recipe, plain):
        run(config.load([write_recipe(each)]))
    assert all(math.isfinite(loss) for loss in losses(recipe)) and losses(recipe) != losses(plain)
    assert losses(recipe) == pytest.approx(losses(plain), rel=0.02)
    saved = [torch.load(folder_of(r) / "checkpoints/ba8/rank0.pt", weights_only=False)["state"] for r in (recipe, plain)]
    averages = [state["callbacks"]["AverageState"]["average"] for state in saved]
    for ours, theirs in ((saved[0]["model"], saved[1]["model"]), averages):
        assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {name: (t.dtype, t.shape) for name, t in theirs.items()}

    monkeypatch.setitem(sys.modules, "torchao", None)
    result = CliRunner().invoke(app, ["export", str(folder_of(recipe)), "--output", str(tmp_path / "out"), "--no-samples"])
    assert result.exit_code == 0, result.output
    exported = PRXPixelPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    assert all(torch.equal(tensor, averages[0][f"backbone.{name}"]) for name, tensor in exported.items())


def test_compiled_blocks_compute_what_eager_ones_do(traced: None, tiny_model: Build) -> None:
    model = tiny_model(depth=1)
    apply_float8(model.backbone, emulate=True)
    compiled = copy.deepcopy(model.backbone)
    compiled.compile_graphs(per_block=True)
    image, text = torch.randn(2, 3, 16, 24), torch.randn(2, 5, 24)
    for backbone in (model.backbone, compiled):
        backbone(image, torch.tensor([0.3, 0.8]), text).square().mean().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), model.backbone.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()), msg=name)


def test_a_plan_counts_the_run_without_it_and_says_so(recipe: Recipe, write_recipe: Write) -> None:
    plain = copy.deepcopy(recipe)
    del plain["algorithms"]["float8"]
    ours, theirs = (MetaModel(config.load([write_recipe(r)])) for r in (recipe, plain))
    assert list(ours.trained) == list(theirs.trained)
    assert [line for line in ours.uncounted.told if line not in theirs.uncounted.told] == [
        "algorithms.float8: what it saves is not known to the plan: time and memory are those of a run without it"
    ]


# ------------------------------------------------------------------------------------------------------- refusals


def problems(recipe: Recipe, write_recipe: Write, ranks: int = 1, *changes: str) -> list[str]:
    return [r.text for r in check_config(config.load([write_recipe(recipe), *changes]), ranks) if r.mark == "✗"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["algorithms.float8.recipe=blockwise"], "algorithms.float8.recipe: expected 'tensorwise' or 'rowwise', not 'blockwise'"),
        (["algorithms.float8.exclude=[qkv]"], "algorithms.float8: exclude: 'qkv' ends the name of no layer"),
        (
            ["model.backbone.mlp_ratio=2.3"],
            "algorithms.float8: model.backbone.blocks.0.gate_proj has 32 inputs and 73 outputs, which must be multiples of 16",
        ),
        (["algorithms.lora={}", "model.init_from=elsewhere"], "algorithms.float8 cannot be combined with algorithms.lora"),
    ],
)
def test_prx_check_says_in_one_line_what_float8_does_not_go_with(
    changes: list[str], said: str, recipe: Recipe, write_recipe: Write
) -> None:
    assert not problems(recipe, write_recipe, 2)
    (problem,) = problems(recipe, write_recipe, 2, *changes)
    assert problem.startswith(said)


def test_without_torchao_it_is_said_what_to_install(
    recipe: Recipe, write_recipe: Write, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    (problem,) = problems(recipe, write_recipe)
    assert problem.startswith("algorithms.float8: torchao isn't installed") and problem.endswith("--extra float8")
    with pytest.raises(UserError, match=r"torchao isn't installed"):
        apply_float8(tiny_model().backbone, emulate=True)


def test_without_a_gpu_that_has_float8_only_emulation_trains(
    recipe: Recipe, write_recipe: Write, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated = config.load([write_recipe(recipe)])
    real = config.load([write_recipe(recipe), "algorithms.float8.emulate=false"])
    if not torch.cuda.is_available():
        assert [result.mark for result in check_gpus(emulated, [Float8(emulate=True)], 1, 1)] == ["✓"]
        (found,) = check_gpus(real, [Float8()], 1, 1)
        assert found.mark == "✗" and "capability 8.9 or more" in found.text and "emulate=true" in found.text
        with pytest.raises(UserError, match="there is no CUDA device here"):
            build_trainer(real)
        with pytest.raises(UserError, match="there is no CUDA device here"):
            attach(tiny_model(), Float8())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An old GPU")
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        assert (hardware_problem() is None) == fits
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert "An old GPU has 8.6" in str(hardware_problem())


def test_at_the_start_of_a_run_lora_is_refused_in_either_order(tiny_model: Build) -> None:
    for algorithms in ([LoRA(), Float8(emulate=True)], [Float8(emulate=True), LoRA()]):
        with pytest.raises(UserError, match=r"algorithms.float8 cannot be combined with algorithms.lora"):
            attach(tiny_model(trainable_text=False), *algorithms)
    model = tiny_model(trainable_text=False)
    attach(model, LoRA())
    with pytest.raises(UserError, match=r"cannot be combined with algorithms.lora"):
        apply_float8(model.backbone, emulate=True)
    other: Any = State(0, "test", nn.Linear(1, 1), DeviceCPU())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"needs a model with a `backbone`"):
        Float8(emulate=True).apply(Event.INIT, other, Logger(other))
    with pytest.raises(ValueError, match="neither tensorwise nor rowwise"):
        Float8(recipe="delayed")  # pyright: ignore[reportArgumentType]
