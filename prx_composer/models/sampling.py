"""From noise to image: Euler steps of diffusers' flow-matching scheduler, and how predictions are guided."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from prx_composer.models.flow import FlowMatching
from prx_composer.models.randomness import generator_from, seeded_generator
from prx_composer.models.routing import Route, Router

MAX_SEED = 2**64 - 1  # torch takes −1 for this one, and none beyond
NUM_TRAIN_TIMESTEPS = 1000  # only a unit: the scheduler counts t ∈ [0, 1] in thousandths


def check_seeds(seeds: Sequence[int], what: str = "seed") -> None:
    """Raise ValueError for a seed that a generator doesn't take, or takes for another one."""
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"{what}: the seeds of images lie in 0 … {MAX_SEED} (64 bits), and {seed} does not.")


def check_guidance_scale(scale: float, what: str = "guidance_scale") -> None:
    """Raise ValueError unless the scale is a number from 1 on."""
    if not (math.isfinite(scale) and scale >= 1):
        raise ValueError(f"{what} must be a number from 1 on (1 = unguided), not {scale}.")


class TextConditioning(NamedTuple):
    """Encoded text."""

    embedding: Tensor  # (B, T, C)
    mask: Tensor  # bool (B, T), True = real token


class SamplingStep(NamedTuple):
    """A step of a batch of images: what it is drawn for, how strongly, and all that a guidance may take random numbers from."""

    text: TextConditioning
    null: TextConditioning  # the empty prompt, as often
    scale: float  # of the guidance; 1 = unguided
    step_index: int
    seeds: list[int]  # one per image
    num_tokens: int  # image tokens of the backbone


class Denoise(Protocol):
    """One call of the backbone: x_t (B, C, H, W), t (B,) → prediction (B, C, H, W)."""

    def __call__(self, x_t: Tensor, t: Tensor, text: TextConditioning, route: Route | None = None) -> Tensor: ...


class Guidance(Protocol):
    """What `model.guidance` must be: combines predictions for x_t into one, in the space the network predicts in."""

    def __call__(self, denoise: Denoise, x_t: Tensor, t: Tensor, step: SamplingStep) -> Tensor: ...


class ClassifierFreeGuidance:
    """p = p(∅) + s·(p(text) − p(∅)) (arXiv:2207.12598), both halves in one call of the backbone; s = 1 skips ∅."""

    def __call__(self, denoise: Denoise, x_t: Tensor, t: Tensor, step: SamplingStep) -> Tensor:
        if step.scale == 1.0:
            return denoise(x_t, t, step.text)
        both = TextConditioning(*(torch.cat(parts) for parts in zip(step.null, step.text, strict=True)))
        unconditional, conditional = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return unconditional + step.scale * (conditional - unconditional)


class RoutedSelfGuidance:
    """p = p(routed) + s·(p(dense) − p(routed)), both with the text (TREAD, arXiv:2501.04765; arXiv:2601.01608); s = 1 is dense.

    A model trained with routed tokens guides itself away from what it predicts when it sees fewer of them: 1 + (1 − rate)
    forward passes on the routed blocks where classifier-free guidance takes two. Every image and step has a route of its own.
    """

    def __init__(self, router: Router):
        self.router = router

    def __call__(self, denoise: Denoise, x_t: Tensor, t: Tensor, step: SamplingStep) -> Tensor:
        dense = denoise(x_t, t, step.text)
        route = None if step.scale == 1.0 else self._route(step, x_t.device)
        if route is None:
            return dense
        routed = denoise(x_t, t, step.text, route)
        return routed + step.scale * (dense - routed)

    def _route(self, step: SamplingStep, device: torch.device) -> Route | None:
        cpu = torch.device("cpu")
        generators = [seeded_generator(cpu, "self_guidance", seed, step.step_index) for seed in step.seeds]
        drawn = [self.router.draw(1, step.num_tokens, generator) for generator in generators]
        if drawn[0] is None:
            return None
        kept = torch.cat([route.kept_indices for route in drawn if route is not None]).to(device)
        return Route(drawn[0].start, drawn[0].end, kept, drawn[0].discard)


def initial_noise(seeds: list[int], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Unit noise (B, C, H, W), one seed per image: the same picture alone, in any batch and on any device."""
    noise = [torch.randn(shape, generator=generator_from(seed)) for seed in seeds]
    return torch.stack(noise).to(device)


def sample_flow(
    predict: Callable[[Tensor, Tensor, int], Tensor], flow: FlowMatching, noise: Tensor, num_inference_steps: int
) -> Tensor:
    """Integrates dx/dt = v̂ from t = 1 to 0.

    Args:
        predict: x_t (B, C, H, W), t (B,), index of the step → what the network predicts, guidance included.
        flow: the process the network was trained on; its `timestep_shift` also spaces the steps.
        noise: unit noise (B, C, H, W).
        num_inference_steps: Euler steps.

    Returns:
        the clean image or latent (B, C, H, W).
    """
    scheduler = FlowMatchEulerDiscreteScheduler(NUM_TRAIN_TIMESTEPS, shift=flow.timestep_shift)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    x_t = noise * flow.noise_scale
    timesteps: Tensor = scheduler.timesteps  # pyright: ignore[reportAssignmentType]
    for index, timestep in enumerate(timesteps):
        t = (timestep.float() / NUM_TRAIN_TIMESTEPS).expand(x_t.shape[0])
        velocity = flow.to_velocity(predict(x_t, t, index), x_t, t)
        x_t = scheduler.step(velocity, timestep, x_t, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    return x_t
