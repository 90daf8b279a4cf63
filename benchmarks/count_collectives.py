"""A callback for code_paths: what every collective of a training step sends, counted where torch dispatches it."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from prx_composer import registry
from prx_composer.commands.plan.communication import DDP, GATHER, MUON, MUON_REPLICAS, REDUCE

SMALL = "all else"


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for item in value for t in _tensors(item)]


class _Counter(TorchDispatchMode):
    """Adds up bytes by purpose; `in_optimizer` says whether the backward pass is over."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.in_optimizer = self.in_hook = False

    def add(self, purpose: str, sent: float) -> None:
        self.bytes[purpose] += sent
        self.calls[purpose] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with what the tensor consists of
        if getattr(func, "namespace", "") == "c10d" and not self.in_hook:
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        ranks = dist.get_world_size()  # of every group: there are no replicas of shards on gloo
        if name == "_allgather_base_":
            self.add(MUON_REPLICAS if self.in_optimizer else GATHER, (ranks - 1) * args[1].nbytes)
        elif name == "_reduce_scatter_base_":
            self.add(REDUCE, (ranks - 1) * args[0].nbytes)
        elif name == "alltoall_base_":
            sent, to_each = args[1], list(args[4]) or [len(args[1]) // ranks] * ranks
            self.add(MUON, sent.nbytes * (1 - to_each[dist.get_rank()] / max(sum(to_each), 1)))
        elif name not in ("barrier", "monitored_barrier_"):
            tensors = args[0] if name.startswith(("allreduce", "broadcast")) else args[1]
            self.add(SMALL, 2 * (ranks - 1) / ranks * sum(tensor.nbytes for tensor in _tensors(tensors)))


@registry.callbacks.register("count_collectives")
class CountCollectives(Callback):
    """Writes `rank-<n>.json` with the bytes and calls of one step, by purpose.

    DDP's own all-reduces leave from C++ and pass no Python; its buckets are counted by a communication hook that reduces them as
    DDP would.

    Args:
        folder: for the files.
        batch: the step that is counted, from 0; a later one than those in which DDP makes its buckets anew.
    """

    def __init__(self, folder: str, batch: int = 3):
        self._folder, self._batch = Path(folder), batch
        self._counter: _Counter | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if isinstance(state.model, DistributedDataParallel):
            state.model.register_comm_hook(None, self._reduce)

    # DDP insists on these annotations.
    def _reduce(self, _: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        if self._counter is None:
            return allreduce_hook(dist.group.WORLD, bucket)  # pyright: ignore[reportArgumentType]
        ranks = dist.get_world_size()
        self._counter.add(DDP, 2 * (ranks - 1) / ranks * bucket.buffer().nbytes)
        self._counter.in_hook = True
        try:
            return allreduce_hook(dist.group.WORLD, bucket)  # pyright: ignore[reportArgumentType]
        finally:
            self._counter.in_hook = False

    def batch_start(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self._batch:
            self._counter = _Counter()
            self._counter.__enter__()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if self._counter is not None:
            self._counter.in_optimizer = True

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            found = {"bytes": self._counter.bytes, "calls": self._counter.calls}
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
            self._counter = None
