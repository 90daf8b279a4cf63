"""Algorithms against formulas; their place in a run is tested in tests/integration."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Event, State
from composer.devices import DeviceCPU
from torch import nn

from prx_composer.algorithms.ema import EMA, WeightAverage
from prx_composer.algorithms.low_precision import LowPrecisionNorm, apply_low_precision_norm
from prx_composer.algorithms.resolution import ProgressiveResolution, ResolutionAware, Stage
from prx_composer.common.distributed import clean_name
from prx_composer.common.errors import UserError
from prx_composer.models import TextToImage
from prx_composer.recipe.consistency import check_batch_sizes
from prx_composer.schedule.moments import ScheduleWindow

Build = Callable[..., TextToImage]


def state_of(model: Any, **options: Any) -> State:
    return State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), **options)


# ----------------------------------------------------------------------------------------------------- EMA


def test_average_is_the_closed_form() -> None:
    module = nn.Linear(1, 1, bias=False)
    values = np.random.default_rng(0).normal(size=12)
    with torch.no_grad():
        module.weight.fill_(values[0])
    average = WeightAverage(module)
    for value in values[1:]:
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(0.8)
    weights = np.array([0.8**11] + [0.2 * 0.8 ** (11 - k) for k in range(1, 12)])
    assert average.average["weight"].item() == pytest.approx(float(weights @ values), abs=1e-6)


def drive(ema: EMA, model: TextToImage, batches: int) -> None:
    """Trains in place: every batch adds one to every weight."""
    state = state_of(model, max_duration="100ba")
    ema.apply(Event.INIT, state, None)  # pyright: ignore[reportArgumentType]
    ema.apply(Event.BEFORE_LOAD, state, None)  # pyright: ignore[reportArgumentType]
    for _ in range(batches):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        state.timestamp = state.timestamp.to_next_batch(1)
        ema.apply(Event.BATCH_END, state, None)  # pyright: ignore[reportArgumentType]


def test_half_life_and_interval_mean_what_they_say(tiny_model: Build) -> None:
    name = "backbone.img_in.bias"
    for ema, smoothing in ((EMA(half_life="10ba"), 0.5**0.1), (EMA(smoothing=0.9), 0.9)):
        model = tiny_model()
        start = model.backbone.img_in.bias.detach().clone()
        drive(ema, model, 20)
        expected = sum((1 - smoothing) * smoothing ** (20 - k) * k for k in range(1, 21))
        torch.testing.assert_close(ema.average.average[name] - start, torch.full_like(start, expected))  # pyright: ignore
    lazy, model = EMA(smoothing=0.9, update_interval="5ba"), tiny_model()
    start = model.backbone.img_in.bias.detach().clone()
    drive(lazy, model, 20)
    expected = sum((1 - 0.9**5) * 0.9 ** (20 - k) * k for k in (5, 10, 15, 20))
    torch.testing.assert_close(lazy.average.average[name] - start, torch.full_like(start, expected))  # pyright: ignore


def test_window_starts_from_the_weights_of_that_moment_and_ends(tiny_model: Build) -> None:
    model = tiny_model()
    start = model.backbone.img_in.bias.detach().clone()
    ema = EMA(smoothing=0.5, start="4ba", end="6ba")
    drive(ema, model, 10)
    assert ema.average is not None
    torch.testing.assert_close(ema.average.average["backbone.img_in.bias"], start + 0.5 * 4 + 0.5 * 5)


def test_the_model_is_lent_the_average_and_gets_every_bit_back(tiny_model: Build) -> None:
    model, ema = tiny_model(), EMA(smoothing=0.9)
    drive(ema, model, 5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with model.sampling_weights():
        inside = dict(model.named_parameters())
        assert all(not torch.equal(inside[name], before[name]) for name in before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(RuntimeError), model.sampling_weights():
        raise RuntimeError("sampling failed")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_before_its_start_the_plain_weights_are_lent(tiny_model: Build) -> None:
    model, ema = tiny_model(), EMA(smoothing=0.9, start="50ba")
    drive(ema, model, 5)
    before = model.backbone.img_in.bias.detach().clone()
    with model.sampling_weights():
        assert torch.equal(model.backbone.img_in.bias, before)


def test_state_has_plain_names_and_refuses_another_model(tiny_model: Build) -> None:
    ema = EMA(smoothing=0.9)
    drive(ema, tiny_model(), 2)
    assert ema.average is not None
    state = ema.average.state_dict()
    assert set(state) == {name for name, _ in tiny_model().named_parameters()}
    assert (
        clean_name("module.backbone._orig_mod.blocks.0._fsdp_wrapped_module.up_proj.weight") == "backbone.blocks.0.up_proj.weight"
    )
    other = EMA(smoothing=0.9)
    drive(other, tiny_model(depth=1), 1)
    assert other.average is not None
    with pytest.raises(ValueError, match="another model"):
        other.average.load_state_dict(state)


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"smoothing": 0.9, "half_life": "5ba"},
        {"smoothing": 1.0},
        {"half_life": "2ep"},
        {"smoothing": 0.9, "update_interval": "0ba"},
    ],
)
def test_ema_arguments_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="smoothing|half_life|update_interval"):
        EMA(**bad)


# --------------------------------------------------------------------------------------- low-precision norm


class OwnNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def norms() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.LayerNorm(16),
        nn.LayerNorm(16, elementwise_affine=False),
        nn.RMSNorm(16, eps=1e-6),
        nn.RMSNorm(16, elementwise_affine=False),
        OwnNorm(16),
    )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.normal_()
    return layers


def test_norms_are_replaced_with_their_parameters_and_subclasses_are_not() -> None:
    layers = norms()
    before = dict(layers.named_parameters())
    assert apply_low_precision_norm(layers) == 4
    assert type(layers[4]) is OwnNorm
    assert all(before[name] is parameter for name, parameter in layers.named_parameters())
    assert apply_low_precision_norm(layers) == 0, "a second application finds nothing to do"


def test_replaced_norms_agree_in_fp32_and_run_in_bf16_under_autocast() -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    plain, low = norms(), norms()
    apply_low_precision_norm(low)
    torch.testing.assert_close(low(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for reference, layer in zip(plain[:4], low[:4], strict=True):
            output = layer(x.bfloat16())
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.float(), reference(x).float(), atol=0.06, rtol=0.02)


def test_it_says_so_when_it_does_nothing(tiny_model: Build) -> None:
    model = tiny_model()
    with pytest.warns(NoEffectWarning, match="precision: fp32"):
        LowPrecisionNorm().apply(Event.INIT, state_of(model, precision="fp32"), None)  # pyright: ignore[reportArgumentType]
    assert type(model.backbone.blocks[0].img_pre_norm) is nn.LayerNorm
    with pytest.warns(NoEffectWarning, match="no LayerNorm"):
        LowPrecisionNorm().apply(Event.INIT, state_of(nn.Linear(1, 1), precision="amp_bf16"), None)  # pyright: ignore


def test_the_backbone_computes_the_same_with_low_precision_norms(tiny_model: Build, tiny_batch: dict[str, torch.Tensor]) -> None:
    plain, low = tiny_model().eval(), tiny_model().eval()
    LowPrecisionNorm().apply(Event.INIT, state_of(low, precision="amp_bf16"), None)  # pyright: ignore[reportArgumentType]

    def prediction(model: TextToImage) -> torch.Tensor:
        model.random.begin_step(0)
        return model(tiny_batch).prediction.detach()

    expected = prediction(plain)
    torch.testing.assert_close(prediction(low), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        approximate = prediction(low)
    assert (approximate.float() - expected).norm() < 0.03 * expected.norm()


# ----------------------------------------------------------------------------------- windows and resolution


@pytest.mark.parametrize(
    ("start", "end", "active"),
    [("0ba", None, range(10)), ("3ba", "6ba", range(3, 6)), ("0.5dur", None, range(5, 10)), ("40sp", "0.9dur", range(4, 9))],
)
def test_windows_in_any_unit(tiny_model: Build, start: str, end: str | None, active: range) -> None:
    state = state_of(tiny_model(), max_duration="10ba")
    window = ScheduleWindow(start, end)
    inside = []
    for batch in range(10):
        if window.contains(state):
            inside.append(batch)
        state.timestamp = state.timestamp.to_next_batch(10)
    assert inside == list(active)


def stage(**changes: Any) -> Stage:
    return Stage(**({"until": None, "image_size": 16, "global_train_batch_size": 8, "device_train_microbatch_size": 4} | changes))


def test_a_run_stays_in_its_stage_when_one_that_is_over_is_left_out_of_the_recipe(caplog: pytest.LogCaptureFixture) -> None:
    stages = [Stage(8, 4, until="2ba"), Stage(16, 4, until="6ba"), Stage(24, 4)]
    before = ProgressiveResolution(stages)
    before._current = 1
    for given, index in ((stages, 1), (stages[1:], 0), ([Stage(4, 4, until="1ba"), *stages], 2)):
        after = ProgressiveResolution(given)
        after.load_state_dict(before.state_dict())
        assert after.stage == stages[1], index
        assert (f"the run is in stages[{index}] now" in caplog.text) == (given is not stages)
    changed = ProgressiveResolution([stages[0], Stage(16, 8, until="7ba"), stages[2]])
    changed.load_state_dict(before.state_dict())
    assert changed.stage.global_train_batch_size == 8  # a stage whose values were changed stays the second


def test_a_model_s_own_resolution_embedding_is_left_alone(tiny_model: Any) -> None:
    model = tiny_model(resolution_embeds=True)
    trick = ResolutionAware()
    with pytest.warns(match="adds nothing"):
        trick.attach(model, None)
    trick.set_active(model, False)
    assert model.backbone.resolution_embedder.active


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one"),
        ([stage(), stage()], r"stages\[0\].until is missing"),
        ([stage(until="5ba"), stage(until="5ba"), stage()], r"stages\[1\].until: 5ba must be later"),
    ],
)
def test_impossible_stages_are_refused(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveResolution(stages)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((10, 2, 4), "10 does not divide over 4 ranks; try 8"), ((24, 5, 2), "= 12; try 4"), ((0, 1, 1), "at least 1")],
)
def test_batch_sizes_that_do_not_divide_come_with_one_that_does(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_batch_sizes("", *sizes)
    check_batch_sizes("", 24, 4, 2)
