"""Optimizers and their parameters: groups with and without weight decay, whether all is finite, and what a step will keep."""

import contextlib
import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from composer.core import State
from composer.optim import ComposerScheduler
from composer.utils import dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from prx_composer.common.distributed import clean_name
from prx_composer.models.kernels import Recorder, Watching
from prx_composer.optim.exchange import local
from prx_composer.schedule.clock import time_budget_of
from prx_composer.schedule.moments import Moment, count_after_step


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of trained parameters: matrices with `weight_decay`; biases, gains and embeddings without."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def add_parameters(optimizer: torch.optim.Optimizer | None, module: nn.Module) -> None:
    """Let an optimizer train a module that came after it, such as an algorithm's projector; do nothing without an optimizer."""
    if optimizer is None:
        return
    for group in parameter_groups(module, float(optimizer.defaults.get("weight_decay", 0.0))):
        optimizer.add_param_group(group)


def drop_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Take parameters that are trained no more out of an optimizer that hasn't stepped yet."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, fused, over the parameter groups of a model.

    Args:
        model: what is trained.
        lr: learning rate per step.
        betas: decay of the first and second moment per step.
        eps: added to the root of the second moment.
        weight_decay: per step, as a fraction of lr; on matrices only.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, not {list(betas)}.")
        groups = parameter_groups(model, weight_decay)
        super().__init__(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=True)


# ------------------------------------------------------------------------------------------- finite numbers


_AT_ONCE = 256  # tensors between two answers of the device


def magnitudes(tensors: list[Tensor]) -> Tensor:
    """Return one number per tensor, on their device: finite if every element is, else NaN or infinite. Wait for nothing."""
    # Sums of magnitudes hand NaN and infinity on, and don't overflow where the squares of a 2-norm would.
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors, 1)])  # pyright: ignore[reportPrivateImportUsage]


def not_finite(tensors: list[Tensor]) -> Tensor:
    """Return a scalar on the tensors' device: 0 if every element is finite, else NaN. Wait for nothing."""
    tensors = [tensor for tensor in tensors if tensor.numel()]  # a rank's shard of a small parameter may be empty
    return 0 * magnitudes(tensors).sum() if tensors else torch.zeros(())


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale gradients, in place, so that the 2-norm of all together is at most `largest`. Wait for nothing.

    It is what `torch.nn.utils.clip_grad_norm_` makes of them, to the last bit. Of sharded gradients every rank works on what it
    holds, and one number is summed over the ranks: with torch's, the host handles every gradient as a DTensor four times.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    first: Any = gradients[0] if gradients else None
    alike = isinstance(first, DTensor) and all(
        isinstance(one, DTensor) and one.device_mesh == first.device_mesh and one.placements == first.placements
        for one in gradients
    )
    if not alike:  # whole on every rank; or torch says what is wrong with them
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        return
    own = [local(gradient) for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(own)
    for dim, placement in enumerate(first.placements):
        if placement.is_shard():
            norm = norm**2
            torch.distributed.all_reduce(norm, group=first.device_mesh.get_group(dim))
            norm = norm**0.5
    torch._foreach_mul_(own, torch.clamp(largest / (norm + 1e-6), max=1.0))  # pyright: ignore[reportPrivateImportUsage]


def trained(state: State) -> list[nn.Parameter]:
    """Return what the optimizers would update in this step: the parameters that have a gradient."""
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]


def bad_tensor(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with an element that isn't finite, of what this rank holds; None if all are."""
    held = ((name, local(tensor).detach()) for name, tensor in named)
    asked = ((name, torch.isfinite(tensor).all()) for name, tensor in held if tensor.is_floating_point() and tensor.numel())
    while some := list(itertools.islice(asked, _AT_ONCE)):
        names, answers = zip(*some, strict=True)
        good = torch.stack([answer.to(answers[0].device) for answer in answers]).tolist()
        if not all(good):
            return names[good.index(False)]
    return None


def bad_state(state: State) -> str | None:
    """Return what of a run's state isn't finite, in words: a weight, an average, an optimizer's state; None if all of it is.

    It is a collective and waits for the device; every rank gets the same answer.
    """
    return first_of_ranks(bad_tensor(_kept(state)))


def first_of_ranks(found: str | None) -> str | None:
    """Return, of what the ranks have found, what the first of them has that found anything. It is a collective."""
    return next((of_rank for of_rank in dist.all_gather_object(found) if of_rank is not None), None)


def plain_names(state: State) -> dict[Tensor, str]:
    """Return the model's parameters and their names, without what DDP, FSDP and compile put around them."""
    return {parameter: clean_name(name) for name, parameter in state.model.named_parameters()}


def _kept(state: State) -> Iterator[tuple[str, Tensor]]:
    """Return what a checkpoint has of floating-point numbers, with what callbacks name in `kept_tensors`.

    Buffers are left out: an infinite one may well be meant, as a mask is.
    """
    names = plain_names(state)
    for parameter, name in names.items():
        yield f"the weight {name}", parameter
    for callback in state.callbacks:
        yield from getattr(callback, "kept_tensors", lambda: ())()
    for optimizer in state.optimizers:
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {slot} of {names.get(parameter, 'a parameter')}", value


DECAYS = {
    "linear": lambda part: 1 - part,
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "1-sqrt": lambda part: 1 - math.sqrt(part),
}


def run_progress(state: State) -> float:
    """Part of the run that is done after the step in hand: of `max_duration` or of the time budget, whichever is further."""
    assert state.max_duration is not None
    done = count_after_step(state, state.max_duration.unit.value) / state.max_duration.value
    budget = time_budget_of(state)
    return min(max(done, budget.progress if budget is not None else 0.0), 1.0)


class WarmupStableDecay(ComposerScheduler):
    """Warm-up, then the full rate, then decay over the last part of the run (arXiv:2405.18392).

    The last part is of `max_duration` or of the time that the budget leaves for steps, whichever ends the run: the rate reaches
    `alpha_f` either way, and never rises on the way. As it is constant before, a run can be extended: raise `max_duration` or
    `time_budget`, and go on from a checkpoint before the decay. From a later one the rate goes back up at once.

    Args:
        t_warmup: when the full rate is reached, a `Moment` ("1000ba", "0.01dur", "5m"); it grows linearly until then.
        decay: part of the run, from 0 (none) to 1.
        shape: of the decay; "1-sqrt" falls fast at first, and did best in the paper.
        alpha_f: multiplier of the learning rate at the end.

    Raises:
        ValueError: a value out of range, or no time.
    """

    def __init__(
        self,
        t_warmup: str = "0ba",
        decay: float = 0.1,
        shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt",
        alpha_f: float = 0.0,
    ):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, a part of the run, not {decay}.")
        if shape not in DECAYS:
            raise ValueError(f"shape must be one of {', '.join(DECAYS)}, not {shape!r}.")
        self.warmup = Moment(t_warmup)
        self.decay, self.shape, self.alpha_f = decay, shape, alpha_f

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        left = 1 - run_progress(state)
        decayed = 1 - left / self.decay if left < self.decay else 0.0
        rest = DECAYS[self.shape](decayed)
        return min(self.warmup.progress(state), self.alpha_f + (1 - self.alpha_f) * rest)


# ------------------------------------------------------------------------------------------- what an optimizer will keep


def state_after_a_step(optimizer: Optimizer, recorder: Recorder | None = None) -> tuple[list[Tensor], str]:
    """Return what an optimizer keeps on this rank after its first step, and in words what of it is guessed.

    A copy takes that step on tensors without content; one that needs content, since it reads a number, say, on small tensors.

    Args:
        recorder: notes what the step without content does.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(Exception):
        copied, _ = _about_to_step(optimizer)
        with contextlib.nullcontext() if recorder is None else Watching(recorder):
            type(copied).step(copied)  # not what a scheduler has put in its place, which steps the original
        return [value for _, value in _state_of(copied)], ""
    copied, shapes = _about_to_step(optimizer, longest_side=2)
    guessed = ""
    try:
        if dist.get_world_size() > 1:
            raise RuntimeError("its step may wait for the other ranks")  # and not all of them may ask
        type(copied).step(copied)
    except Exception as error:  # whatever an optimizer of one's own raises
        guessed = f"{type(optimizer).__name__} is taken to keep two numbers per weight, as Adam does ({error})"
        copied.state = defaultdict(dict, {parameter: {"first": parameter, "second": parameter} for parameter in shapes})
    state = [
        torch.empty(shapes[parameter], dtype=value.dtype, device="meta") if value.shape == parameter.shape else value
        for parameter, value in _state_of(copied)
    ]
    return state, guessed


def _about_to_step(optimizer: Optimizer, longest_side: int | None = None) -> tuple[Optimizer, dict[Tensor, torch.Size]]:
    """Return a copy of an optimizer that hasn't stepped, over other parameters that have gradients, and their shapes.

    Args:
        longest_side: what the sides of the copy's parameters are cut to; the shapes returned are the uncut ones.
    """
    shapes, groups = dict[Tensor, torch.Size](), []
    for group in optimizer.param_groups:
        own = [local(parameter) for parameter in group["params"]]
        sides = [[min(side, longest_side or side) for side in p.shape] for p in own]
        others = [nn.Parameter(torch.zeros(cut, dtype=p.dtype)) for cut, p in zip(sides, own, strict=True)]
        shapes |= {other: p.shape for other, p in zip(others, own, strict=True)}
        groups.append(group | {"params": others})
    copied = copy.copy(optimizer)
    copied.param_groups, copied.state = groups, defaultdict(dict)
    for parameter in shapes:
        parameter.grad = torch.zeros_like(parameter)
    return copied, shapes


def _state_of(optimizer: Optimizer) -> list[tuple[Any, Tensor]]:
    state = optimizer.state.items()
    return [(parameter, value) for parameter, kept in state for value in kept.values() if isinstance(value, Tensor)]
