"""Sampling against diffusers' own pipeline and against the exact solution."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from prx_composer.models import FlowMatching, TextToImage
from prx_composer.models.flow import SamplingStep, initial_noise
from prx_composer.models.randomness import derive_seed, generator_from, seeded_generator

Build = Callable[..., TextToImage]
PROMPT = "a red circle on the left of a white background"


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 8)])
def test_draws_what_the_prx_pixel_pipeline_draws(tiny_model: Build, guidance_scale: float, height: int, width: int) -> None:
    flow = FlowMatching(noise_scale=2.0, timestep_shift=3.0, min_timestep=0.3, clamp_sampling=True)  # of the loss alone
    model = tiny_model(flow=flow, resolution_embeds=True, bottleneck_size=6)
    transformer = PRXTransformer2DModel(**model.backbone.config)
    transformer.load_state_dict(model.backbone.state_dict())
    pipeline = PRXPixelPipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        model.text_encoder.encoder,  # pyright: ignore[reportArgumentType]
        model.text_encoder.tokenizer,
        default_sample_size=16,
        prompt_max_tokens=14,
        noise_scale=2.0,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise([7], (3, height, width), torch.device("cpu"))
    options: Any = dict(height=height, width=width, num_inference_steps=6, guidance_scale=guidance_scale)
    expected = pipeline(PROMPT, latents=noise * 2.0, output_type="pt", use_resolution_binning=False, **options).images

    device = torch.device("cpu")
    text, null = model.encode_prompts([PROMPT], device), model.encode_prompts([""], device)
    with torch.no_grad():
        ours = model.flow.sample(
            lambda x_t, t, index: model.guidance(
                model._predict, x_t, t, SamplingStep(text, null, guidance_scale, index, [0], 24)
            ),
            noise,
            6,
        )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    drawn = model.generate([PROMPT], seeds=[7], **options)
    assert (
        torch.equal(drawn, model.autoencoder.decode(expected))
        or (drawn.int() - model.autoencoder.decode(expected).int()).abs().max() <= 1
    )


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_euler_follows_a_straight_path_exactly(prediction: str) -> None:
    flow = FlowMatching(prediction=prediction, noise_scale=2.0, timestep_shift=3.0)  # pyright: ignore[reportArgumentType]
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    target = x0 if prediction == "x" else flow.velocity(x0, noise)
    torch.testing.assert_close(flow.sample(lambda x_t, t, index: target, noise, 9), x0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("min_timestep", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("noise_scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_perfect_denoiser_stays_on_the_path_and_gives_the_exact_image(
    shift: float, noise_scale: float, min_timestep: float
) -> None:
    """At every step, also where several last ones lie below `min_timestep`, by which the loss divides."""
    flow = FlowMatching(noise_scale=noise_scale, timestep_shift=shift, min_timestep=min_timestep)
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def perfect(x_t: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
        torch.testing.assert_close(x_t, flow.interpolate(x0, noise, t), atol=1e-5 * noise_scale, rtol=0)
        return x0

    for steps in (1, 2, 3, 10, 28, 50, 250):
        assert (flow.sample(perfect, noise, steps) - x0).abs().max() <= 1e-5


def test_clamped_steps_leave_the_part_of_the_noise_that_diffusers_leaves() -> None:
    """Of the last step of PRX's 28: t = 0.009, of which a step that divides by 0.05 goes 18%."""
    flow = FlowMatching(noise_scale=2.0, timestep_shift=3.0, clamp_sampling=True)
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    last: list[float] = []

    def perfect(x_t: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
        last[:] = [t[0].item()]
        return x0

    drawn = flow.sample(perfect, noise, 28)
    left = (1 - last[0] / 0.05) * last[0]
    torch.testing.assert_close(drawn, x0 + left * (2 * noise - x0), atol=1e-5, rtol=0)
    assert 0.81 < 1 - last[0] / 0.05 < 0.83


def test_an_image_depends_on_its_own_prompt_and_seed_only(tiny_model: Build) -> None:
    model = tiny_model()
    prompts = [PROMPT, "a blue ring in the centre of a black background", "a green cross on the right of a grey background"]
    options: Any = dict(height=16, width=16, num_inference_steps=3, guidance_scale=2.0)
    together = model.generate(prompts, seeds=[5, 6, 7], **options)
    alone = model.generate(prompts[1:2], seeds=[6], **options)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1  # kernels may round differently by batch size
    other = model.generate(prompts[1:2], seeds=[8], **options)
    assert (other[0].int() - alone[0].int()).abs().max() > 10


def test_guidance_uses_one_backbone_call_per_step(tiny_model: Build) -> None:
    model = tiny_model()
    calls: list[int] = []
    model.backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    model.generate([PROMPT] * 2, 16, 16, num_inference_steps=5, guidance_scale=3.0)
    model.generate([PROMPT] * 2, 16, 16, num_inference_steps=5, guidance_scale=1.0)
    assert calls == [4] * 5 + [2] * 5


def test_generating_leaves_mode_and_random_state_alone(tiny_model: Build) -> None:
    model = tiny_model().train()
    before = torch.get_rng_state()
    model.generate([PROMPT], 16, 16, num_inference_steps=2)
    assert model.training and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_who_watches_sees_the_image_predicted_at_every_step_and_changes_nothing(tiny_model: Build, prediction: Any) -> None:
    model, seen = tiny_model(flow=FlowMatching(prediction)), []
    watched = model.sample(
        [PROMPT] * 2, 16, 24, [1, 2], 3, watch=lambda index, predicted: seen.append((index, predicted.clone()))
    )
    assert torch.equal(watched, model.sample([PROMPT] * 2, 16, 24, [1, 2], 3))
    assert [index for index, _ in seen] == [0, 1, 2]
    torch.testing.assert_close(seen[-1][1], watched)
    assert not torch.allclose(seen[0][1], watched)

    def leave(index: int, predicted: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train().generate([PROMPT], 16, 16, watch=leave)
    assert model.training


def test_impossible_requests_are_refused(tiny_model: Build) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="divisible by 4"):
        model.generate([PROMPT], 18, 16)
    with pytest.raises(ValueError, match="seeds"):
        model.generate([PROMPT], 16, 16, seeds=[1, 2])


def test_every_bit_of_a_seed_decides_what_a_cpu_generator_draws() -> None:
    """Below 2³² it is torch's own, and above it numpy's Mersenne Twister with the two halves as its key."""
    for seed in (0, 17, 2**32 - 1):
        own = torch.Generator().manual_seed(seed)
        assert torch.equal(torch.randn(50, generator=generator_from(seed)), torch.randn(50, generator=own))
    source = np.random.default_rng(0)
    for low, high in [(0, 1), (17, 1), (17, 2), (2**32 - 1, 2**31 - 1), *source.integers(1, 2**32, (20, 2)).tolist()]:
        raw = np.frombuffer(np.random.RandomState([low, high]).bytes(4 * 1500), "<u4")
        drawn = torch.rand(1500, generator=generator_from(low + (high << 32)))
        assert np.array_equal(drawn.numpy(), ((raw & 0xFFFFFF) / 2**24).astype(np.float32))
    seeds = [5 + (high << 32) for high in range(300)]  # all of them drew the same
    assert len({tuple(torch.rand(2, generator=generator_from(seed)).tolist()) for seed in seeds}) == 300
    noise = initial_noise([5, 5 + 2**32, 5], (1, 2, 2), torch.device("cpu"))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])


def test_a_derived_generator_uses_all_of_its_seed() -> None:
    seed = derive_seed(1, 2, zlib.crc32(b"noise"))
    drawn = torch.rand(3, generator=seeded_generator(torch.device("cpu"), "noise", 1, 2))
    assert seed >= 2**32 and torch.equal(drawn, torch.rand(3, generator=generator_from(seed)))
    assert not torch.equal(drawn, torch.rand(3, generator=generator_from(seed % 2**32)))
