"""DDPM and EDM, the siblings of flow matching (`processes.py`): the targets of DiT, PixArt, Würstchen and MicroDiT."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from torch import Tensor

from prx_composer.models.processes import NUM_TRAIN_TIMESTEPS, Process, check_positive, over_image


@dataclass(frozen=True)
class DDPM(Process):
    """Denoising diffusion in 1000 steps (arXiv:2006.11239): x_k = α_k·x0 + σ_k·ε, with α_k² = Π(1 − β) and σ_k² = 1 − α_k².

    Times are t = k/1000, and every step is drawn as often as another. Images are drawn by DPM-Solver++ (arXiv:2211.01095).

    Args:
        prediction: what the network predicts, "eps" (the noise) or "v" (α·ε − σ·x0, arXiv:2202.00512).
        beta_schedule: the noise that each step adds, by diffusers' names: "linear" (DiT, PixArt), "scaled_linear" (Stable
            Diffusion) or "squaredcos_cap_v2" (cosine, arXiv:2102.09672; Würstchen).
        beta_start, beta_end: of the first and the last step; by default 0.0001 and 0.02. The cosine has none.
        solver_order: of the solver that draws: 2, or 1, which is DDIM.

    Raises:
        ValueError: a value outside its range.
    """

    prediction: Literal["eps", "v"] = "eps"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float | None = None
    beta_end: float | None = None
    solver_order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction must be 'eps' or 'v', not {self.prediction!r}.")
        if self.beta_schedule == "squaredcos_cap_v2" and (self.beta_start, self.beta_end) != (None, None):
            raise ValueError("beta_start and beta_end mean nothing with beta_schedule: squaredcos_cap_v2; leave them out.")
        start, end = self._range
        if not 0 < start < end < 1:
            raise ValueError(f"0 < beta_start < beta_end < 1 must hold, not {start} and {end}.")

    @property
    def _range(self) -> tuple[float, float]:
        return (0.0001 if self.beta_start is None else self.beta_start, 0.02 if self.beta_end is None else self.beta_end)

    def weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return α and σ of all steps, fp32 (1000,) each; computed on the device, so that nothing waits for a copy."""
        start, end = self._range
        if self.beta_schedule == "linear":
            betas = torch.linspace(start, end, NUM_TRAIN_TIMESTEPS, device=device)
        elif self.beta_schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, NUM_TRAIN_TIMESTEPS, device=device).square()
        else:
            part = torch.arange(NUM_TRAIN_TIMESTEPS + 1, device=device, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
            kept = torch.cos((part + 0.008) / 1.008 * torch.pi / 2).square()
            betas = (1 - kept[1:] / kept[:-1]).clamp_max(0.999).float()
        kept = torch.cumprod(1 - betas, 0)
        return kept.sqrt(), (1 - kept).sqrt()

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        step = (t * NUM_TRAIN_TIMESTEPS).round().long()
        alpha, sigma = self.weights(t.device)
        return over_image(alpha[step]), over_image(sigma[step])

    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        steps = torch.randint(NUM_TRAIN_TIMESTEPS, (batch_size,), generator=generator, device=generator.device)
        return steps.float() / NUM_TRAIN_TIMESTEPS

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._at(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "eps":
            return noise
        alpha, sigma = self._at(t)
        return alpha * noise - sigma * x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return x̂0; of a predicted noise it has the network's error times σ/α, up to 158 with linear betas."""
        alpha, sigma = self._at(t)
        return (x_t - sigma * prediction) / alpha if self.prediction == "eps" else alpha * x_t - sigma * prediction

    def noise_share(self, t: Tensor) -> Tensor:
        alpha, sigma = (weight.flatten() for weight in self._at(t))
        return sigma / (alpha + sigma)

    def time_at(self, share: Tensor) -> Tensor:
        alpha, sigma = self.weights(share.device)
        return (sigma / (alpha + sigma) - share[:, None]).abs().argmin(1).float() / NUM_TRAIN_TIMESTEPS

    def scheduler(self) -> DPMSolverMultistepScheduler:
        """Return the solver; it begins where σ/α ≤ 164, as is advised for the cosine, whose noisiest steps show nothing."""
        start, end = self._range
        return DPMSolverMultistepScheduler(
            NUM_TRAIN_TIMESTEPS,
            start,
            end,
            self.beta_schedule,
            solver_order=self.solver_order,
            prediction_type={"eps": "epsilon", "v": "v_prediction"}[self.prediction],  # pyright: ignore[reportArgumentType]
            timestep_spacing="trailing",
            lambda_min_clipped=-5.1,
        )

    def sample(self, predict: Callable[[Tensor, Tensor, int], Tensor], noise: Tensor, num_inference_steps: int) -> Tensor:
        if num_inference_steps > NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_inference_steps: a model of {NUM_TRAIN_TIMESTEPS} steps draws in no more, not in {num_inference_steps}."
            )
        return super().sample(predict, noise, num_inference_steps)


@dataclass(frozen=True)
class EDM(Process):
    """x_σ = x0 + σ·ε, preconditioned (arXiv:2206.00364, table 1; MicroDiT, arXiv:2407.15811).

    With r = √(σ² + σ_d²), the network sees c_in·x_σ = x_σ/r and is told c_noise = ln(σ)/4. Its output F gives
    x̂0 = c_skip·x_σ + c_out·F, where c_skip = σ_d²/r² and c_out = σ·σ_d/r. EDM's weight of ‖x̂0 − x0‖² is 1/c_out²; so the loss is
    the plain error of F, whose target is (x0·σ/σ_d − ε·σ_d)/r. Images are drawn by DPM-Solver++ on EDM's steps.

    Args:
        sigma_data: σ_d, standard deviation of the images or latents (EDM: 0.5; MicroDiT: 0.9).
        p_mean, p_std: ln σ of training is N(p_mean, p_std²) (EDM: −1.2 and 1.2; MicroDiT: −0.6 and 1.2, at 512 px 0 and 0.6).
        sigma_min, sigma_max: the last σ above 0, and the first, of drawing.
        rho: how closely the steps of drawing lie at low noise.
        solver_order: of the solver that draws: 2, or 1, which is Euler.

    Raises:
        ValueError: a value outside its range.
    """

    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    solver_order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        check_positive(self, "sigma_data", "p_std", "sigma_min", "rho")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max must be more than sigma_min: {self.sigma_max} and {self.sigma_min}.")

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return σ and r, (B, 1, 1, 1) each."""
        sigma = over_image((4 * t).exp())
        return sigma, (sigma.square() + self.sigma_data**2).sqrt()

    def sample_timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return (self.p_mean + self.p_std * torch.randn(batch_size, generator=generator, device=generator.device)) / 4

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma, r = self._at(t)
        return (x0 + sigma * noise) / r

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma, r = self._at(t)
        return (x0 * (sigma / self.sigma_data) - noise * self.sigma_data) / r

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        sigma, r = self._at(t)
        return (self.sigma_data**2 * x_t + self.sigma_data * sigma * prediction) / r

    def noise_share(self, t: Tensor) -> Tensor:
        return torch.sigmoid(4 * t)  # σ/(1 + σ)

    def time_at(self, share: Tensor) -> Tensor:
        return torch.logit(share) / 4

    def scheduler(self) -> EDMDPMSolverMultistepScheduler:
        return EDMDPMSolverMultistepScheduler(
            self.sigma_min, self.sigma_max, self.sigma_data, rho=self.rho, solver_order=self.solver_order
        )

    def time_of(self, timestep: Tensor) -> Tensor:
        return timestep.float()
