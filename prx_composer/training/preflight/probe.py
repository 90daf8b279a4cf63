"""One forward and backward pass as a stage of training makes it, from which nothing remains."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from composer.core import State
from composer.core.precision import get_precision_context
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from prx_composer.algorithms.base import Trick
from prx_composer.algorithms.token_routing import TokenRouting
from prx_composer.common.distributed import unwrapped
from prx_composer.models.huggingface import returned_afterwards
from prx_composer.schedule.moments import ScheduleWindow


def is_sharded(state: State) -> bool:
    """Whether passes are collective."""
    return any(isinstance(module, FSDPModule) for module in state.model.modules())


def forward_and_backward(state: State, batch: Any) -> dict[str, Tensor]:
    """One microbatch as Composer's Trainer does it, but for its events; returns the losses, detached.

    Under DDP the model is called without its wrapper: gradients are not reduced, and DDP does not learn the order in which they
    are ready. Under FSDP2 it is called as it is, on all ranks.
    """
    model = unwrapped(state.model)
    with get_precision_context(state.precision, state.precision_config):
        outputs = model(batch)
    with get_precision_context(state.precision, state.precision_config):
        losses = model.loss(outputs, batch)
    losses = losses if isinstance(losses, dict) else {"total": losses}
    total = losses["total"] if "total" in losses else torch.stack([loss.mean() for loss in losses.values()]).sum()
    total.backward()
    return {name: loss.detach() for name, loss in losses.items()}


@contextmanager
def undisturbed(state: State) -> Iterator[None]:
    """Puts back what passes change: gradients, buffers, modes, random streams and generators, and where frozen networks are."""
    model = unwrapped(state.model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    streams = getattr(model, "random", None)
    position = None if streams is None else (streams.step, streams.microbatch)
    generators = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), returned_afterwards():
        try:
            state.model.train()
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, training in modes:
                module.training = training
            if streams is not None and position is not None:
                streams.step, streams.microbatch = position
            random.setstate(generators[0])
            np.random.set_state(generators[1])


@contextmanager
def switched(state: State, window: ScheduleWindow, dense: bool = False) -> Iterator[None]:
    """Tricks that may act inside of `window` are on, the others off; afterwards as they were.

    Args:
        dense: routers are off, for the part of the window in which they don't act.
    """
    model = unwrapped(state.model)
    tricks = [algorithm for algorithm in state.algorithms if isinstance(algorithm, Trick)]
    try:
        for trick in tricks:
            trick.set_active(model, _may_act(trick, window, state) and not (dense and isinstance(trick, TokenRouting)))
        yield
    finally:
        for trick in tricks:
            trick.set_active(model, trick.active)


def _may_act(trick: Trick, window: ScheduleWindow, state: State) -> bool:
    return not trick.window.is_disjoint_from(window) and not trick.window.is_over(state)


def is_sometimes_dense(state: State, window: ScheduleWindow) -> bool:
    """Whether a router that may act inside of `window` may also be off there."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, TokenRouting) and _may_act(algorithm, window, state):
            own = algorithm.window
            begins = own.start.surely_by(window.start)
            lasts = own.end is None or (window.end is not None and window.end.surely_by(own.end))
            return not (begins and lasts)
    return False


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer that hasn't stepped yet will keep on this rank: one momentum for Muon's matrices, else two moments."""
    if optimizer.state:
        return 0
    size = 0
    for group in optimizer.param_groups:
        copies = 1 if group.get("algorithm") == "muon" else 2
        for parameter in group["params"]:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            size += copies * local.numel() * local.element_size()
    return size
