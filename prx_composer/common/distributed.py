"""Ranks: how they share work and agree on numbers, and what a backend gets wrong, met where PyTorch lets one."""

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


def share(count: int) -> list[int]:
    """Return this rank's part of the numbers below `count`.

    All ranks get equally many, since sharded models want to be called equally often. Where the numbers don't divide, the last
    ones are repeated, and `gathered` drops them.
    """
    ranks, rank = dist.get_world_size(), dist.get_global_rank()
    return [min(index, count - 1) for index in range(rank, -(-count // ranks) * ranks, ranks)]


def gathered(rows: Tensor, count: int) -> Tensor:
    """Return the rows that ranks made of their `share`, in the order of the numbers: (count, …), on the CPU of every rank."""
    if dist.get_world_size() == 1:
        return rows[:count].cpu()
    parts = [part.cpu() for part in dist.all_gather(rows.contiguous())]
    return torch.stack(list(parts), 1).flatten(0, 1)[:count]


def from_rank_zero(value: Any) -> Any:
    """Return on every rank the value that rank 0 has."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class HostGroup:
    """Let the hosts of all ranks agree on numbers, while their devices compute; made on all ranks at once.

    Args:
        timeout: seconds that a rank waits for the others.
    """

    def __init__(self, timeout: float):
        self._group: Any = None
        # The default group of a run on GPUs is NCCL alone, which cannot reduce on the CPU.
        if dist.get_world_size() > 1 and torch_dist.get_backend() != "gloo":
            self._group = torch_dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of every rank's values, one by one."""
        return self._reduced(values, torch_dist.ReduceOp.MAX)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the values' sums over all ranks; whole numbers are exact up to 2⁵³."""
        return self._reduced(values, torch_dist.ReduceOp.SUM)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if dist.get_world_size() == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        torch_dist.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()

    def close(self) -> None:
        if self._group is not None:
            torch_dist.destroy_process_group(self._group)
            self._group = None


def average_on_gloo(model: nn.Module) -> bool:
    """Make FSDP2 average gradients over CPU ranks; return whether that was needed.

    On torch 2.7 gloo's reduce-scatter takes AVG for SUM, so every gradient is world_size times too large. Adam hides it,
    but gradient clipping doesn't. Whether it is so is asked of the backend, not read off a version.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units or not torch_dist.is_initialized() or torch_dist.get_backend() != "gloo":
        return False
    ranks = torch_dist.get_world_size()
    answer = torch.empty(1)
    torch_dist.reduce_scatter_tensor(answer, torch.ones(ranks), op=torch_dist.ReduceOp.AVG)
    if answer.item() == 1:
        return False

    def divide(reduced: Tensor) -> None:
        reduced.div_(ranks)

    for unit in units:
        unit.set_all_reduce_hook(divide)  # despite its name it is called after a reduce-scatter too
    return True


class GlooAverage(Callback):
    """Apply `average_on_gloo` once the model is sharded."""

    def before_load(self, state: State, logger: Logger) -> None:
        average_on_gloo(state.model)


_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def clean_name(name: str) -> str:
    """Return a parameter's name without what DDP, FSDP, compile or checkpointing put around it."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part not in _WRAPPERS)


def unwrapped(model: nn.Module) -> Any:
    """Return the model itself, without what DDP puts around it; FSDP2 puts nothing."""
    return model.module if isinstance(model, DistributedDataParallel) else model
