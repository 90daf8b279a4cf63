"""What a forward pass leaves for the losses, and how predictions are guided when images are drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from prx_composer.models.processes import over_image
from prx_composer.models.randomness import generator_from, seeded_generator
from prx_composer.models.routing import Route, Router

# ------------------------------------------------------------------------------------------------------------- training


NONE_POOLED = torch.zeros(0, 0)


class TextConditioning(NamedTuple):
    """Encoded captions."""

    embedding: Tensor  # (B, T, C)
    mask: Tensor  # bool (B, T), True = real token
    pooled: Tensor = NONE_POOLED  # (B, P); empty where no encoder gives one

    def beside(self) -> dict[str, Tensor]:
        """Return what a backbone is given beside the embedding: the mask, and the pooled vectors if there are any."""
        return {"attention_mask": self.mask} | ({"pooled": self.pooled} if self.pooled.shape[1] else {})


@dataclass
class FlowOutput:
    """What a forward pass of training leaves for the losses.

    Args:
        prediction: (B, C, H, W), of the process's target.
        clean: (B, C, H, W), x0.
        noise: (B, C, H, W), of unit variance.
        noised: (B, C, H, W), x_t as the network sees it.
        timestep: (B,), as the network is told it; see `Process.noise_share`.
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
        interval: lowest and highest share of noise at which it guides; elsewhere p is p(final).
        noise_share: of a time; see `Process`.
    """

    def __init__(
        self,
        both: Callable[[Tensor, Tensor, TextConditioning], tuple[Tensor, Tensor]],
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        noise_share: Callable[[Tensor], Tensor] = lambda t: t,
    ):
        self.both, self.scale, self.interval, self.noise_share = both, scale, interval, noise_share

    def __call__(self, denoise: Denoise, x_t: Tensor, t: Tensor, step: SamplingStep) -> Tensor:
        return super().__call__(denoise if self.scale == 1 else self._extrapolate, x_t, t, step)

    def _extrapolate(self, x_t: Tensor, t: Tensor, text: TextConditioning, route: Route | None = None) -> Tensor:
        final, middle = self.both(x_t, t, text)
        (lowest, highest), share = self.interval, self.noise_share(t)
        inside = over_image((share >= lowest) & (share <= highest))
        return torch.where(inside, middle + self.scale * (final - middle), final)


def initial_noise(seeds: list[int], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return unit noise (B, C, H, W), of one seed per image: an image is the same alone, in any batch and on any device."""
    noise = [torch.randn(shape, generator=generator_from(seed)) for seed in seeds]
    return torch.stack(noise).to(device)
