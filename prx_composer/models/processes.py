"""What a model learns: how images are noised, what the network predicts of them, and how images are drawn with it.

The network sees x_t, a weighted sum of a clean image x0 and of unit noise ε. It is told a time t, and predicts another weighted
sum of the two, the target. Flow matching is here, DDPM and EDM are in `diffusion.py`: only their weights differ.

Shapes: B images, C channels, H × W pixels or latent pixels; times are fp32 (B,).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.autograd.function import once_differentiable

PIXEL_MIN_TIMESTEP = 0.05  # written into diffusers' PRXPixelPipeline
NUM_TRAIN_TIMESTEPS = 1000  # DDPM's steps; for flow matching only a unit: its scheduler counts t ∈ [0, 1] in thousandths


def over_image(t: Tensor) -> Tensor:
    """Return what there is one of per image, (B,), so that it goes with (B, C, H, W)."""
    return t[:, None, None, None]


class _SumOfSquares(torch.autograd.Function):
    """Σ (prediction − target)² over every image, or over where `counted` is 1, of which the prediction alone has a gradient.

    In closed form: differences are written once and read twice, where autograd's chain writes seven tensors of their size.

    Raises:
        ValueError: the target or the mask wants a gradient, too.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if any(ctx.needs_input_grad[1:]):
            raise ValueError("The loss has no gradient of its target; detach the images and noise that it is made of.")
        error = prediction - target
        if counted is not None:
            error *= counted
        ctx.save_for_backward(error)
        ctx.dtype = prediction.dtype
        return torch.linalg.vector_norm(error, dim=-1).square().flatten(1).sum(1).float()  # row by row, since CPUs add up naively

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (error,) = ctx.saved_tensors
        return torch.mul(error, over_image(2 * gradient), out=torch.empty_like(error, dtype=ctx.dtype)), None, None


@dataclass(frozen=True)
class Process(ABC):
    """What `model.flow` must be, a frozen dataclass. A sibling says how it noises and what is predicted; the loss follows.

    Times are what the network is told, on a scale of the process's own; `noise_share` compares them with other processes'.
    """

    @abstractmethod
    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw times of training: fp32 (batch_size,) on the generator's device, by a fixed number of draws, without waiting."""

    @abstractmethod
    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network sees, x_t, of clean images and unit noise, both (B, C, H, W), at t (B,)."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict at t (B,), (B, C, H, W)."""

    @abstractmethod
    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return a prediction as a clean image, x̂0."""

    @abstractmethod
    def noise_share(self, t: Tensor) -> Tensor:
        """Return the noise's weight in x_t over the sum of both weights, in [0, 1]: the t of as noisy a straight path."""

    @abstractmethod
    def time_at(self, share: Tensor) -> Tensor:
        """Return the time (B,) at which the noise has this share, or the nearest that there is."""

    @abstractmethod
    def scheduler(self) -> Any:
        """Return diffusers' scheduler that draws with such a network."""

    def divisor(self, t: Tensor) -> Tensor | None:
        """Return what errors are divided by in the loss, (B,); None for those that aren't."""
        return None

    def squared_error(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean squared error of every image's target, or of where `counted` (B, 1, H, W) is 1: fp32 (B,)."""
        prediction = prediction.float() if prediction.dtype.itemsize > 4 else prediction  # as the target is
        squares: Any = _SumOfSquares.apply(prediction, self.target(x0, noise, t).float(), counted)
        count = x0[0].numel() if counted is None else counted.flatten(1).sum(1) * x0.shape[1]
        divisor = self.divisor(t.float())
        return squares / count if divisor is None else squares / count / divisor / divisor

    def velocity_error(self, prediction: Tensor, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the mean squared error of the straight path's velocity at the same share of noise, fp32 (B,).

        It is ‖x̂0 − x0‖² / share², whatever the network predicts, so that numbers compare between processes.
        """
        error = (self.to_x0(prediction.float(), x_t, t) - x0) / over_image(self.noise_share(t))
        return error.square().flatten(1).mean(1)

    def sample(self, predict: Callable[[Tensor, Tensor, int], Tensor], noise: Tensor, num_inference_steps: int) -> Tensor:
        """Draw images by the steps of diffusers' scheduler. A perfect prediction gives the exact image.

        Args:
            predict: x_t (B, C, H, W), t (B,), index of the step → what the network predicts, guidance included.
            noise: unit noise (B, C, H, W).
            num_inference_steps: calls of the network; DDPM with a cosine schedule leaves out those of nothing but noise.

        Returns:
            The clean images or latents (B, C, H, W).
        """
        scheduler = self.scheduler()
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        x = noise * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            x_t = scheduler.scale_model_input(x, timestep)
            t = self.time_of(timestep).expand(x.shape[0])
            x = scheduler.step(predict(x_t, t, index), timestep, x, return_dict=False)[0]
        return x

    def time_of(self, timestep: Tensor) -> Tensor:
        """Return the time of one of the scheduler's timesteps; by default they are thousandths."""
        return timestep.float() / NUM_TRAIN_TIMESTEPS


def check_positive(process: Any, *names: str) -> None:
    for name in names:
        if getattr(process, name) <= 0:
            raise ValueError(f"{name} must be positive, not {getattr(process, name)}.")


# ------------------------------------------------------------------------------------------------------ flow matching


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move timesteps towards noise for larger images: t ← k·t / (1 + (k − 1)·t) (SD3, arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class FlowMatching(Process):
    """The straight path x_t = (1 − t)·x0 + t·s·ε, with t = 1 noise, of velocity v = dx_t/dt = s·ε − x0.

    The network predicts x0 (JiT, arXiv:2511.13720) or v; the loss is taken in v-space. Images are drawn by Euler steps, the last
    of which ends on x̂0.

    Args:
        prediction: what the network outputs, "x" (the clean image) or "v" (the velocity).
        timestep_shift: k of `shift_timesteps`; 1 = none, 3 for 512 and 1024 px pixels.
        min_timestep: the loss of x-prediction divides by max(t, min_timestep).
        clamp_sampling: whether the steps of sampling divide by max(t, 0.05), as those of diffusers' PRXPixelPipeline do, whatever
            the loss divides by. Below 0.05 such a step goes only the t / 0.05th part of its way: the image keeps most of the last
            step's noise.
        noise_scale: standard deviation s of the noise at t = 1.
        logit_mean, logit_std: timesteps are sigmoid(N(logit_mean, logit_std²)) …
        uniform_fraction: … mixed with this fraction of uniform ones.
        shift_uniform: whether the uniform ones are shifted too. PRX leaves them as they are, so that more of them have little
            noise: with a shift of 3 and a tenth of them, 1.04% of all timesteps are below 0.1 instead of 0.40%.
        sampled_min, sampled_max: training timesteps, after the shift, are drawn from [sampled_min, sampled_max]: both
            distributions are truncated to it, not clamped.

    Raises:
        ValueError: a value outside its range.
    """

    prediction: Literal["x", "v"] = "x"
    timestep_shift: float = 1.0
    min_timestep: float = 0.05
    noise_scale: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    uniform_fraction: float = 0.1
    shift_uniform: bool = True
    sampled_min: float = 0.0
    sampled_max: float = 1.0
    clamp_sampling: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in ("x", "v"):
            raise ValueError(f"prediction must be 'x' or 'v', not {self.prediction!r}.")
        check_positive(self, "timestep_shift", "noise_scale", "logit_std")
        for name in ("min_timestep", "uniform_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}.")
        if not 0 <= self.sampled_min < self.sampled_max <= 1:
            raise ValueError(f"0 ≤ sampled_min < sampled_max ≤ 1 must hold, not {self.sampled_min} and {self.sampled_max}.")
        if self.prediction == "x" and self.min_timestep == 0:
            raise ValueError("min_timestep must be positive with prediction: x, which divides by it.")

    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        normal = torch.randn(batch_size, generator=generator, device=device)
        uniform, choice = torch.rand(2, batch_size, generator=generator, device=device)
        if (self.sampled_min, self.sampled_max) != (0.0, 1.0):
            low, high = (t / (self.timestep_shift + (1 - self.timestep_shift) * t) for t in (self.sampled_min, self.sampled_max))
            first, last = (low, high) if self.shift_uniform else (self.sampled_min, self.sampled_max)
            uniform = first + (last - first) * uniform
            normal = self._truncate(normal, low, high)
        logit_normal = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        is_uniform = choice < self.uniform_fraction
        if self.shift_uniform:
            return shift_timesteps(torch.where(is_uniform, uniform, logit_normal), self.timestep_shift)
        return torch.where(is_uniform, uniform, shift_timesteps(logit_normal, self.timestep_shift))

    def _truncate(self, normal: Tensor, low: float, high: float) -> Tensor:
        """Turn standard normal draws into draws of the normal truncated to where its timestep lies in [low, high]."""
        edges = torch.logit(torch.tensor([low, high], dtype=torch.float64))
        below, above = torch.special.ndtr((edges - self.logit_mean) / self.logit_std).tolist()  # on the CPU: no waiting
        probability = below + (above - below) * torch.special.ndtr(normal.double())
        return torch.special.ndtri(probability).float()

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(x0, noise if self.noise_scale == 1 else self.noise_scale * noise, over_image(t).to(x0.dtype))

    def velocity(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return v = s·ε − x0."""
        return self.noise_scale * noise - x0

    def to_velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's output as a velocity; for x-prediction v̂ = (x_t − x̂0) / max(t, 0.05), as diffusers has it."""
        if self.prediction == "v":
            return prediction
        return (x_t - prediction) / over_image(t).clamp_min(PIXEL_MIN_TIMESTEP)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "x":
            return prediction
        return x_t - over_image(t) * prediction

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x0 if self.prediction == "x" else self.velocity(x0, noise)

    def divisor(self, t: Tensor) -> Tensor | None:
        """Return max(t, min_timestep) for x-prediction.

        Both velocities are clamped the same way (JiT, algorithm 1), so that the error ‖x0 − x̂0‖² / max(t, min_timestep)² vanishes
        for a perfect prediction at every t.
        """
        return t.clamp_min(self.min_timestep) if self.prediction == "x" else None

    def noise_share(self, t: Tensor) -> Tensor:
        return t

    def time_at(self, share: Tensor) -> Tensor:
        return share

    def velocity_error(self, prediction: Tensor, x_t: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss without its clamp."""
        return replace(self, min_timestep=torch.finfo(torch.float32).tiny).squared_error(prediction, x0, noise, t)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(NUM_TRAIN_TIMESTEPS, shift=self.timestep_shift)

    def sample(self, predict: Callable[[Tensor, Tensor, int], Tensor], noise: Tensor, num_inference_steps: int) -> Tensor:
        """Integrate dx/dt = v̂ from t = 1 to 0.

        With x-prediction an Euler step from t to t′ is x_t′ = x̂0 + (t′/t)·(x_t − x̂0): it lies between x_t and x̂0, and the last
        one ends on x̂0, so that a perfect prediction gives the exact image. With `clamp_sampling` it is the step of diffusers'
        pipeline.
        """
        scheduler = self.scheduler()
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        x_t = noise * self.noise_scale
        exact = self.prediction == "x" and not self.clamp_sampling
        timesteps: Tensor = scheduler.timesteps  # pyright: ignore[reportAssignmentType]
        sigmas: Tensor = scheduler.sigmas  # pyright: ignore[reportAssignmentType]
        for index, timestep in enumerate(timesteps):
            t = self.time_of(timestep).expand(x_t.shape[0])
            prediction = predict(x_t, t, index)
            if exact:
                x_t = prediction + sigmas[index + 1] / sigmas[index] * (x_t - prediction)
            else:
                velocity = self.to_velocity(prediction, x_t, t)
                x_t = scheduler.step(velocity, timestep, x_t, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
        return x_t
