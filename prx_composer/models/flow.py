"""Flow matching on the straight path x_t = (1 − t)·x0 + t·s·ε, with t = 1 noise and s the noise scale.

Velocity v = dx_t/dt = s·ε − x0. The network predicts x0 (JiT, arXiv:2511.13720) or v; the loss is taken in v-space.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Moves timesteps towards noise for larger images: t ← k·t / (1 + (k − 1)·t) (SD3, arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _over_image(t: Tensor) -> Tensor:
    return t[:, None, None, None]


@dataclass(frozen=True)
class FlowMatching:
    """The process that is learned.

    Args:
        prediction: what the network outputs, "x" (the clean image) or "v" (the velocity).
        timestep_shift: k of `shift_timesteps`; 1 = none, 3 for 512 and 1024 px pixels.
        min_timestep: x-prediction divides by max(t, min_timestep), in the loss and in sampling.
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

    def __post_init__(self) -> None:
        if self.prediction not in ("x", "v"):
            raise ValueError(f"prediction must be 'x' or 'v', not {self.prediction!r}.")
        for name in ("timestep_shift", "noise_scale", "logit_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")
        for name in ("min_timestep", "uniform_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}.")
        if not 0 <= self.sampled_min < self.sampled_max <= 1:
            raise ValueError(f"0 ≤ sampled_min < sampled_max ≤ 1 must hold, not {self.sampled_min} and {self.sampled_max}.")
        if self.prediction == "x" and self.min_timestep == 0:
            raise ValueError("min_timestep must be positive with prediction: x, which divides by it.")

    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """(batch_size,) fp32 on the generator's device; no host synchronisation, a fixed number of draws."""
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
        """Standard normal draws → draws of the normal truncated to where the logit-normal timestep lies in [low, high]."""
        edges = torch.logit(torch.tensor([low, high], dtype=torch.float64))
        below, above = torch.special.ndtr((edges - self.logit_mean) / self.logit_std).tolist()  # on the CPU: no waiting
        probability = below + (above - below) * torch.special.ndtr(normal.double())
        return torch.special.ndtri(probability).float()

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of clean images and unit noise, both (B, C, H, W), at t (B,)."""
        t = _over_image(t)
        return (1 - t) * x0 + t * (self.noise_scale * noise)

    def velocity(self, x0: Tensor, noise: Tensor) -> Tensor:
        """v = s·ε − x0."""
        return self.noise_scale * noise - x0

    def to_velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output as a velocity; for x-prediction v̂ = (x_t − x̂0) / max(t, min_timestep)."""
        if self.prediction == "v":
            return prediction
        return (x_t - prediction) / _over_image(t).clamp_min(self.min_timestep)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output as a clean image, x̂0 = x_t − t·v̂."""
        if self.prediction == "x":
            return prediction
        return x_t - _over_image(t) * prediction

    def squared_error(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean squared error in v-space of every image, or of the part where `counted` (B, 1, H, W) is 1: (B,) fp32.

        For x-prediction both velocities are clamped the same way (JiT, algorithm 1), so that the error is
        ‖x0 − x̂0‖² / max(t, min_timestep)² and vanishes for a perfect prediction at every t.
        """
        if self.prediction == "v":
            error = prediction.float() - self.velocity(x0, noise).float()
        else:
            error = (prediction.float() - x0.float()) / _over_image(t.float()).clamp_min(self.min_timestep)
        if counted is None:
            return error.square().flatten(1).mean(1)
        return (error.square() * counted).flatten(1).sum(1) / (counted.flatten(1).sum(1) * error.shape[1])
