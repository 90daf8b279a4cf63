"""Flow matching: the process, what a training step leaves for the losses, and how images are drawn.

The path is straight, x_t = (1 − t)·x0 + t·s·ε, with t = 1 noise and s the noise scale. Its velocity is v = dx_t/dt = s·ε − x0.
The network predicts x0 (JiT, arXiv:2511.13720) or v; the loss is taken in v-space. Images are drawn by Euler steps, the last of
which ends on x̂0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from prx_composer.models.randomness import generator_from, seeded_generator
from prx_composer.models.routing import Route, Router

PIXEL_MIN_TIMESTEP = 0.05  # written into diffusers' PRXPixelPipeline


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move timesteps towards noise for larger images: t ← k·t / (1 + (k − 1)·t) (SD3, arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _over_image(t: Tensor) -> Tensor:
    return t[:, None, None, None]


@dataclass(frozen=True)
class FlowMatching:
    """The process that a model learns.

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
        """Draw timesteps: fp32 (batch_size,) on the generator's device, without waiting for it, by a fixed number of draws."""
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
        """Return x_t of clean images and unit noise, both (B, C, H, W), at t (B,)."""
        t = _over_image(t)
        return (1 - t) * x0 + t * (self.noise_scale * noise)

    def velocity(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return v = s·ε − x0."""
        return self.noise_scale * noise - x0

    def to_velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's output as a velocity; for x-prediction v̂ = (x_t − x̂0) / max(t, 0.05), as diffusers has it."""
        if self.prediction == "v":
            return prediction
        return (x_t - prediction) / _over_image(t).clamp_min(PIXEL_MIN_TIMESTEP)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's output as a clean image, x̂0 = x_t − t·v̂."""
        if self.prediction == "x":
            return prediction
        return x_t - _over_image(t) * prediction

    def squared_error(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean squared error in v-space of every image, or of where `counted` (B, 1, H, W) is 1: fp32 (B,).

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


# ------------------------------------------------------------------------------------------------------------- training


class TextConditioning(NamedTuple):
    """Encoded captions."""

    embedding: Tensor  # (B, T, C)
    mask: Tensor  # bool (B, T), True = real token


@dataclass
class FlowOutput:
    """What a forward pass of training leaves for the losses.

    Args:
        prediction: (B, C, H, W), x̂0 or v̂, as `FlowMatching.prediction` says.
        clean: (B, C, H, W), x0.
        noise: (B, C, H, W), of unit variance.
        noised: (B, C, H, W), x_t.
        timestep: (B,), from 0 (the image) to 1 (noise).
        text: the captions' embeddings and their mask.
        route: which tokens the routed blocks saw; None: all.
        taps: block index → its output (B, N or K, D); the backbone's TIME_VECTOR → (B, D).
        counted: (B, 1, H, W), 1 where the prediction counts and 0 where tokens were discarded; None: everywhere.
    """

    prediction: Tensor
    clean: Tensor
    noise: Tensor
    noised: Tensor
    timestep: Tensor
    text: TextConditioning
    route: Route | None
    taps: dict[int, Tensor]
    counted: Tensor | None = None


class AuxiliaryLoss(nn.Module):
    """Base of what fills `model.auxiliary_losses`: `forward(FlowOutput, batch) → scalar`, times `weight` while `active`."""

    def __init__(self, weight: float):
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must not be negative, but is {weight}.")
        self.weight = weight
        self.active = True


class AuxiliaryLosses(nn.Module):
    """The auxiliary losses by name, called as one module so that FSDP gathers their parameters (it refuses a ModuleDict).

    They are kept in the order of their names: neither sums nor gradient norms depend on the order of a recipe's lines.
    """

    def __setitem__(self, name: str, loss: AuxiliaryLoss) -> None:
        self.add_module(name, loss)
        self._modules = dict(sorted(self._modules.items()))

    def __getitem__(self, name: str) -> AuxiliaryLoss:
        return self.get_submodule(name)  # pyright: ignore[reportReturnType]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def named(self) -> dict[str, AuxiliaryLoss]:
        return dict(self.named_children())  # pyright: ignore[reportReturnType]

    def with_parameters(self, function: Callable[[], Tensor]) -> Tensor:
        """Return what a function returns that uses parameters of a loss outside of it, as a guidance does: FSDP gathers them."""
        return self(None, {}, function)

    def forward(self, outputs: FlowOutput | None, batch: Mapping[str, Any], function: Callable[[], Tensor] | None = None) -> Any:
        """Return the weighted terms of the active losses by name, or what `with_parameters` asks for.

        A loss that is not active gives parameters of its own a gradient of zero: DDP waits for every parameter.
        """
        if function is not None:
            return function()
        terms = {}
        for name, loss in self.named().items():
            if loss.active:
                terms[name] = loss.weight * loss(outputs, batch)
            elif idle := [parameter.sum() for parameter in loss.parameters() if parameter.requires_grad]:
                terms[name] = 0.0 * torch.stack(idle).sum()
        return terms


# ------------------------------------------------------------------------------------------------------------- sampling


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


class SamplingStep(NamedTuple):
    """A step of a batch of images: what is drawn, how strongly it is guided, and what a guidance may draw random numbers from."""

    text: TextConditioning
    null: TextConditioning  # the empty prompt, as often
    scale: float  # of the guidance; 1 = unguided
    step_index: int
    seeds: list[int]  # one per image
    num_tokens: int  # image tokens of the backbone


class Denoise(Protocol):
    """A call of the backbone: x_t (B, C, H, W), t (B,) → prediction (B, C, H, W)."""

    def __call__(self, x_t: Tensor, t: Tensor, text: TextConditioning, route: Route | None = None) -> Tensor: ...


class Guidance(Protocol):
    """What `model.guidance` must be: it combines predictions for x_t into one, in the space the network predicts in."""

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


class InternalGuidance(ClassifierFreeGuidance):
    """p = p(middle) + s·(p(final) − p(middle)), both of one forward pass (arXiv:2512.24176); s = 1 is p(final).

    With classifier-free guidance, whose scale is the step's, each of its two predictions is such a p, as in the authors' code.

    Args:
        both: x_t, t, text → what the network predicts, and what a readout of one of its middle blocks does, in one pass.
        scale: s, from 1 on.
        interval: lowest and highest t at which it guides; elsewhere p is p(final).
    """

    def __init__(
        self,
        both: Callable[[Tensor, Tensor, TextConditioning], tuple[Tensor, Tensor]],
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ):
        self.both, self.scale, self.interval = both, scale, interval

    def __call__(self, denoise: Denoise, x_t: Tensor, t: Tensor, step: SamplingStep) -> Tensor:
        return super().__call__(denoise if self.scale == 1 else self._extrapolate, x_t, t, step)

    def _extrapolate(self, x_t: Tensor, t: Tensor, text: TextConditioning, route: Route | None = None) -> Tensor:
        final, middle = self.both(x_t, t, text)
        lowest, highest = self.interval
        inside = _over_image((t >= lowest) & (t <= highest))
        return torch.where(inside, middle + self.scale * (final - middle), final)


def initial_noise(seeds: list[int], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return unit noise (B, C, H, W), of one seed per image: an image is the same alone, in any batch and on any device."""
    noise = [torch.randn(shape, generator=generator_from(seed)) for seed in seeds]
    return torch.stack(noise).to(device)


def sample_flow(
    predict: Callable[[Tensor, Tensor, int], Tensor], flow: FlowMatching, noise: Tensor, num_inference_steps: int
) -> Tensor:
    """Integrate dx/dt = v̂ from t = 1 to 0.

    With x-prediction an Euler step from t to t′ is x_t′ = x̂0 + (t′/t)·(x_t − x̂0): it lies between x_t and x̂0, and the last one
    ends on x̂0, so that a perfect prediction gives the exact image. With `clamp_sampling` it is the step of diffusers' pipeline.

    Args:
        predict: x_t (B, C, H, W), t (B,), index of the step → what the network predicts, guidance included.
        flow: the process the network was trained on; its `timestep_shift` also spaces the steps.
        noise: unit noise (B, C, H, W).
        num_inference_steps: Euler steps.

    Returns:
        The clean images or latents (B, C, H, W).
    """
    scheduler = FlowMatchEulerDiscreteScheduler(NUM_TRAIN_TIMESTEPS, shift=flow.timestep_shift)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    x_t = noise * flow.noise_scale
    exact = flow.prediction == "x" and not flow.clamp_sampling
    timesteps: Tensor = scheduler.timesteps  # pyright: ignore[reportAssignmentType]
    sigmas: Tensor = scheduler.sigmas  # pyright: ignore[reportAssignmentType]
    for index, timestep in enumerate(timesteps):
        t = (timestep.float() / NUM_TRAIN_TIMESTEPS).expand(x_t.shape[0])
        prediction = predict(x_t, t, index)
        if exact:
            x_t = prediction + sigmas[index + 1] / sigmas[index] * (x_t - prediction)
        else:
            velocity = flow.to_velocity(prediction, x_t, t)
            x_t = scheduler.step(velocity, timestep, x_t, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    return x_t
