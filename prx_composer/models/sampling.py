"""From noise to image: Euler steps of diffusers' flow-matching scheduler, and how predictions are guided."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from prx_composer.models.flow import FlowMatching

__all__ = ["ClassifierFreeGuidance", "Guidance", "TextConditioning", "initial_noise", "sample_flow"]

NUM_TRAIN_TIMESTEPS = 1000  # only a unit: the scheduler counts t ∈ [0, 1] in thousandths


class TextConditioning(NamedTuple):
    """Encoded text."""

    embedding: Tensor  # (B, T, C)
    mask: Tensor  # bool (B, T), True = real token


class Denoise(Protocol):
    """One call of the backbone: x_t (B, C, H, W), t (B,) → prediction (B, C, H, W)."""

    def __call__(self, x_t: Tensor, t: Tensor, text: TextConditioning) -> Tensor: ...


class Guidance(Protocol):
    """What `model.guidance` must be: combines predictions for x_t into one, in the space the network predicts in."""

    def __call__(
        self, denoise: Denoise, x_t: Tensor, t: Tensor, text: TextConditioning, null: TextConditioning, scale: float
    ) -> Tensor: ...


class ClassifierFreeGuidance:
    """p = p(∅) + s·(p(text) − p(∅)) (arXiv:2207.12598), both halves in one call of the backbone; s = 1 skips ∅."""

    def __call__(
        self, denoise: Denoise, x_t: Tensor, t: Tensor, text: TextConditioning, null: TextConditioning, scale: float
    ) -> Tensor:
        if scale == 1.0:
            return denoise(x_t, t, text)
        both = TextConditioning(torch.cat([null.embedding, text.embedding]), torch.cat([null.mask, text.mask]))
        unconditional, conditional = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)


def initial_noise(seeds: list[int], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Unit noise (B, C, H, W), one seed per image: the same picture alone, in any batch and on any device."""
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(device)


def sample_flow(
    predict: Callable[[Tensor, Tensor], Tensor], flow: FlowMatching, noise: Tensor, num_inference_steps: int
) -> Tensor:
    """Integrates dx/dt = v̂ from t = 1 to 0.

    Args:
        predict: x_t (B, C, H, W), t (B,) → what the network predicts, guidance included.
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
    for timestep in timesteps:
        t = (timestep.float() / NUM_TRAIN_TIMESTEPS).expand(x_t.shape[0])
        velocity = flow.to_velocity(predict(x_t, t), x_t, t)
        x_t = scheduler.step(velocity, timestep, x_t, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    return x_t
