"""What conditions the backbone beside time and text as they come: resolution, text adapter; and which timesteps are drawn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from composer.core import Event, State
from composer.devices import DeviceCPU
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prx_composer.algorithms.low_precision import LowPrecisionNorm
from prx_composer.algorithms.resolution import ResolutionAware
from prx_composer.models import FlowMatching, TextToImage
from prx_composer.models.counting import flops_of_batch
from prx_composer.models.processes import shift_timesteps
from prx_composer.optim import AdamW

Build = Callable[..., TextToImage]
Batch = dict[str, torch.Tensor]


def attached(model: TextToImage, algorithm: Any, **options: Any) -> State:
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba", **options)
    state.optimizers = AdamW(model)
    algorithm.apply(Event.INIT, state, None)
    return state


def predict(model: TextToImage, batch: Batch) -> torch.Tensor:
    model.random.begin_step(0)
    return model(batch).prediction


def test_resolution_aware_changes_nothing_at_first_and_then_is_diffusers_resolution_embeds(
    tiny_model: Build, tiny_batch: Batch
) -> None:
    model = tiny_model()
    before = predict(model, tiny_batch)
    state = attached(model, ResolutionAware())
    assert torch.equal(predict(model, tiny_batch), before)
    embedder = model.backbone.resolution_embedder
    assert embedder is not None
    trained = {id(p) for group in state.optimizers[0].param_groups for p in group["params"]}
    assert all(id(p) in trained for p in embedder.parameters())
    torch.nn.init.normal_(embedder.mlp.out_layer.weight)

    theirs: Any = PRXTransformer2DModel(**model.backbone.config)
    theirs.load_state_dict(model.backbone.state_dict())
    x, t, text = torch.randn(2, 3, 16, 24), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 24)
    torch.testing.assert_close(model.backbone(x, t, text), theirs(x, t, text).sample, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(predict(model, tiny_batch), before)


def test_resolution_is_added_only_in_its_window_and_always_has_a_gradient(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model()
    before = predict(model, tiny_batch)
    algorithm = ResolutionAware(start="1ba", end="2ba")
    state = attached(model, algorithm)
    torch.nn.init.normal_(model.backbone.resolution_embedder.mlp.out_layer.weight)  # pyright: ignore[reportOptionalMemberAccess]
    same = []
    for _ in range(3):
        algorithm.apply(Event.BATCH_START, state, None)  # pyright: ignore[reportArgumentType]
        prediction = predict(model, tiny_batch)
        same.append(torch.allclose(prediction, before))
        model.zero_grad()
        prediction.square().mean().backward()
        assert all(p.grad is not None for p in model.backbone.parameters()), "DDP waits for every parameter"
        state.timestamp = state.timestamp.to_next_batch(1)
    assert same == [True, False, True]


def test_low_precision_norms_are_low_only_in_their_window(tiny_model: Build) -> None:
    model = tiny_model()
    algorithm = LowPrecisionNorm(start="1ba", end="2ba")
    state = attached(model, algorithm, precision="amp_bf16")
    dtypes = []
    for _ in range(3):
        algorithm.apply(Event.BATCH_START, state, None)  # pyright: ignore[reportArgumentType]
        with torch.autocast("cpu", torch.bfloat16):
            dtypes.append(model.backbone.blocks[0].img_pre_norm(torch.randn(1, 2, 32)).dtype)
        state.timestamp = state.timestamp.to_next_batch(1)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_a_text_adapter_starts_as_the_identity_hides_padding_and_is_counted(tiny_model: Build, tiny_batch: Batch) -> None:
    plain, adapted = tiny_model().backbone, tiny_model(text_adapter_depth=2).backbone
    loaded = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert loaded.missing_keys and all(name.startswith("text_adapter.") for name in loaded.missing_keys)
    x, t, text = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with torch.no_grad():
        for block in adapted.text_adapter:
            block.to_out.weight.zero_()
            block.down_proj.weight.zero_()
    torch.testing.assert_close(adapted(x, t, text, mask), plain(x, t, text, mask))
    with torch.no_grad():
        for block in adapted.text_adapter:
            torch.nn.init.normal_(block.to_out.weight, std=0.2)
            torch.nn.init.normal_(block.down_proj.weight, std=0.2)
    moved = adapted(x, t, text, mask)
    assert not torch.allclose(moved, plain(x, t, text, mask), atol=1e-4)
    other = text.clone()
    other[1, 2:] = 100.0
    torch.testing.assert_close(adapted(x, t, other, mask), moved)
    model = tiny_model(text_adapter_depth=2)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(model(tiny_batch), tiny_batch)["total"].backward()
    assert flops_of_batch(model, tiny_batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("uniform_fraction", [0.0, 1.0])
def test_timesteps_are_truncated_to_their_range_not_clamped(uniform_fraction: float) -> None:
    mean, std, shift, low, high = -0.8, 0.8, 3.0, 0.3, 0.85
    flow = FlowMatching(
        timestep_shift=shift, logit_mean=mean, logit_std=std, uniform_fraction=uniform_fraction, sampled_min=low, sampled_max=high
    )
    drawn = flow.sample_timesteps(20_000, torch.Generator().manual_seed(0)).double().numpy()
    assert low <= drawn.min() < low + 0.01 and high - 0.01 < drawn.max() <= high
    unshifted = drawn / (shift + (1 - shift) * drawn)
    edges = np.array([t / (shift + (1 - shift) * t) for t in (low, high)])
    if uniform_fraction:
        expected = scipy.stats.uniform(edges[0], edges[1] - edges[0])
        values = unshifted
    else:
        a, b = (np.log(edges / (1 - edges)) - mean) / std
        expected, values = scipy.stats.truncnorm(a, b, mean, std), np.log(unshifted / (1 - unshifted))
    assert scipy.stats.kstest(values, expected.cdf).pvalue > 1e-3


def test_the_whole_range_draws_what_it_always_drew() -> None:
    flow = FlowMatching(logit_mean=-0.8, logit_std=0.8, timestep_shift=3.0, uniform_fraction=0.0)
    normal = torch.randn(8, generator=torch.Generator().manual_seed(3))
    expected = shift_timesteps(torch.sigmoid(-0.8 + 0.8 * normal), 3.0)
    assert torch.equal(flow.sample_timesteps(8, torch.Generator().manual_seed(3)), expected)
    with pytest.raises(ValueError, match=r"sampled_min < sampled_max"):
        FlowMatching(sampled_min=0.5, sampled_max=0.5)
