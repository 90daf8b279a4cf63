"""Bytes of what a run carries from step to step: on one GPU, and in a checkpoint."""

import copy
import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel


@dataclass(frozen=True)
class State:
    """Bytes that a run carries from step to step, over all GPUs, each counted once.

    Args:
        weights, optimizer, ema: what a checkpoint holds.
        muon: bytes of the weights whose updates Muon orthogonalises.
    """

    weights: int
    optimizer: int
    ema: int
    muon: int = 0

    @property
    def checkpoint(self) -> int:
        return self.weights + self.optimizer + self.ema


def bytes_of(tensors: Iterable[Tensor], shards: int = 1) -> int:
    """Return the bytes of one of `shards` equal parts, cut along the first dimension, the last of which may be padded."""
    return sum(t.nbytes if shards == 1 or t.ndim == 0 else -(-t.shape[0] // shards) * t[:1].nbytes for t in tensors)


def muon_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the groups of parameters that are trained with Muon, if any are."""
    return [group for group in optimizer.param_groups if group.get("algorithm") == "muon"]


def training_state(planned: MetaModel, shards: int = 1) -> State:
    """Return the state of one GPU that holds one of `shards` parts; of the whole run with one."""
    weights = bytes_of(planned.trained.values(), shards)
    copies = sum(trick.weight_copies for trick in planned.tricks.values())
    muon = [parameter for group in muon_groups(planned.optimizer) for parameter in group["params"]]
    return State(weights, bytes_of(optimizer_state(planned), shards), copies * weights, bytes_of(muon, shards))


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the size of one checkpoint of the full state: weights, EMA and optimizer state, over all ranks.

    Raises:
        UserError: a model that the recipe doesn't describe rightly.
    """
    return training_state(MetaModel(recipe)).checkpoint


@functools.lru_cache(maxsize=8)
def optimizer_state(planned: MetaModel) -> list[Tensor]:
    """What a copy of the optimizer keeps after its first step, which it takes on tensors without content."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        groups = [
            group | {"params": [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in group["params"]]}
            for group in planned.optimizer.param_groups
        ]
        optimizer = copy.copy(planned.optimizer)
        optimizer.param_groups, optimizer.state = groups, defaultdict(dict)
        parameters = [parameter for group in groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        try:
            optimizer.step()
        except Exception as error:  # whatever an optimizer of one's own raises where tensors have no content
            name = type(optimizer).__name__
            planned.uncounted.told.append(f"optimizer: {name} is taken to keep two numbers per weight, as Adam does ({error})")
            optimizer.state = defaultdict(dict, {p: {"first": p, "second": p} for p in parameters})
        return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
