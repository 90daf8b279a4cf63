"""Whole matrices for a function of whole matrices, when every rank has all of them (DDP) or a shard of each (FSDP2, HSDP).

Every rank works on a share that is balanced by FLOPs. Ranks form a grid: `replicas` hold equal shards, `shards` different ones.
A replica's matrices lie in one flat buffer, shard by shard. One all-to-all brings each owner its matrices, the second takes
the results back, and an all-gather passes them to the other replicas: three collectives, whatever the number of matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["Plan", "Stack", "local", "make_plans", "plan_for"]


def local(tensor: Tensor | None) -> Tensor:
    """What this rank holds of a tensor, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else cast(Tensor, tensor)


class _Ranks(NamedTuple):
    """One dimension of the grid."""

    group: Any
    size: int
    rank: int


class _Layout(NamedTuple):
    """What weights must have in common to travel together."""

    replicas: _Ranks
    shards: _Ranks
    dtype: torch.dtype  # on the wire and of the work: bf16, on the CPU at least fp32
    device: torch.device

    @classmethod
    def of(cls, weight: Tensor) -> "_Layout":
        alone = _Ranks(None, 1, 0)
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else torch.bfloat16
        if not isinstance(weight, DTensor):
            distributed = dist.is_available() and dist.is_initialized()
            world = _Ranks(dist.group.WORLD, dist.get_world_size(), dist.get_rank()) if distributed else alone
            return cls(world, alone, dtype, weight.device)
        mesh, placements = weight.device_mesh, weight.placements
        kinds = [type(p) for p in placements]
        if kinds not in ([Replicate], [Shard], [Replicate, Shard]) or any(isinstance(p, Shard) and p.dim for p in placements):
            raise ValueError(f"Weights must be placed as Shard(0), Replicate or (Replicate, Shard(0)), not {placements}.")
        ranks = [_Ranks(mesh.get_group(i), mesh.size(i), mesh.get_local_rank(i)) for i in range(mesh.ndim)]
        return cls(ranks[0] if Replicate in kinds else alone, ranks[-1] if Shard in kinds else alone, dtype, weight.device)


class _Block(NamedTuple):
    """Weights of a stack with one owner; their shards lie one after the other in their replica's buffer."""

    replica: int
    shard: int
    members: list[int]
    start: int


@dataclass
class Stack:
    """Weights of one group and one shape, each `pieces` matrices on top of each other."""

    group: int
    pieces: int
    rows: int
    columns: int
    chunk: int  # rows of a shard; a shorter last one travels at this size too
    weights: list[nn.Parameter] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)

    def cost(self) -> int:
        """FLOPs of a Newton–Schulz iteration on one weight."""
        short, long = sorted((self.rows // self.pieces, self.columns))
        return self.pieces * (4 * short**2 * long + 2 * short**3)

    def size(self, block: _Block) -> int:
        return len(block.members) * self.chunk * self.columns


class Plan:
    """Which rank works on which weight, and where it lies in the buffers; all ranks make the same plan.

    Args:
        layout: that of all weights.
        weights: (group, pieces, weight), in the same order on all ranks.

    `cost` is the FLOPs of one Newton–Schulz iteration over all ranks, `largest_share` the part of the rank with most to do.
    """

    def __init__(self, layout: _Layout, weights: list[tuple[int, int, nn.Parameter]]):
        self._layout = layout
        stacks: dict[tuple[int, torch.Size], Stack] = {}
        for group, pieces, weight in weights:
            rows, columns = weight.shape
            chunk = -(-rows // layout.shards.size)
            stack = stacks.setdefault((group, weight.shape), Stack(group, pieces, rows, columns, chunk))
            stack.weights.append(weight)
        self.stacks = sorted(stacks.values(), key=Stack.cost, reverse=True)

        owners = [(replica, shard) for replica in range(layout.replicas.size) for shard in range(layout.shards.size)]
        load = dict.fromkeys(owners, 0)
        owned: dict[tuple[int, int], list[list[int]]] = {owner: [[] for _ in self.stacks] for owner in owners}
        for number, stack in enumerate(self.stacks):  # longest first, each to who has least to do
            for index in range(len(stack.weights)):
                owner = min(owners, key=load.__getitem__)
                owned[owner][number].append(index)
                load[owner] += stack.cost()

        sizes = [[0] * layout.shards.size for _ in range(layout.replicas.size)]  # elements per replica and shard
        for replica, shard in owners:
            for stack, members in zip(self.stacks, owned[replica, shard], strict=True):
                if members:
                    stack.blocks.append(_Block(replica, shard, members, sum(sizes[replica])))
                    sizes[replica][shard] += stack.size(stack.blocks[-1])
        self._width = max(map(sum, sizes))
        self._sizes = sizes[layout.replicas.rank]
        self._all_sizes = sizes
        self.cost = sum(load.values())
        self.largest_share = max(load.values()) / max(self.cost, 1)

    def elements_sent(self) -> tuple[int, int]:
        """By the rank that sends most in one `exchange`: to other shards, there and back, and to other replicas.

        An all-gather is counted as a ring sends it: every rank all parts but one.
        """
        shards, replicas = self._layout.shards.size, self._layout.replicas.size
        to_shards = max(sum(sizes) - own + (shards - 1) * own for sizes in self._all_sizes for own in sizes)
        return to_shards if shards > 1 else 0, (replicas - 1) * self._width

    def buffer(self) -> Tensor:
        """Uninitialised; `to_send` says where to write."""
        return torch.empty(self._width, dtype=self._layout.dtype, device=self._layout.device)

    def to_send(self, stack: Stack, flat: Tensor) -> tuple[list[int], list[Tensor]]:
        """Indices of the weights that this replica works on, and the places of this rank's shards of them in the buffer."""
        return self._shards(stack, flat.expand(self._layout.replicas.size, -1), [self._layout.replicas.rank])

    def received(self, stack: Stack, results: Tensor) -> tuple[list[int], list[Tensor]]:
        """Indices of all weights, and this rank's shards of their results in the weights' dtype."""
        return self._shards(stack, results, range(self._layout.replicas.size), stack.weights[0].dtype)

    def _shards(self, stack: Stack, buffers: Tensor, replicas: Any, dtype: Any = None) -> tuple[list[int], list[Tensor]]:
        members: list[int] = []
        shards: list[Tensor] = []
        rows = len(local(stack.weights[0]))
        for block in stack.blocks:
            if block.replica in replicas:
                members += block.members
                block_flat = buffers[block.replica, block.start : block.start + stack.size(block)]
                shards += block_flat.view(-1, stack.chunk, stack.columns)[:, :rows].to(dtype or buffers.dtype).unbind()
        return members, shards

    def exchange(self, flat: Tensor, work: Callable[[Stack, Tensor], Tensor]) -> Tensor:
        """Calls `work` with (k, rows, columns) for the k weights of each stack that this rank owns, and returns all results.

        Args:
            flat: a filled `buffer`; overwritten.
            work: must return the shape that it got, in memory of its own.

        Returns:
            (replicas, elements), for `received`.
        """
        replicas, shards = self._layout.replicas, self._layout.shards
        own, before = self._sizes[shards.rank], sum(self._sizes[: shards.rank])
        row = flat[: sum(self._sizes)]
        owned = row
        if shards.size > 1:
            owned = flat.new_empty(shards.size * own)
            dist.all_to_all_single(owned, row, [own] * shards.size, self._sizes, group=shards.group)
        for stack in self.stacks:
            for block in stack.blocks:
                if (block.replica, block.shard) == (replicas.rank, shards.rank):
                    parts = owned.view(shards.size, own)[:, block.start - before :][:, : stack.size(block)]
                    parts = parts.unflatten(1, (len(block.members), stack.chunk, stack.columns)).transpose(0, 1)
                    result = work(stack, parts.flatten(1, 2)[:, : stack.rows])
                    if padding := shards.size * stack.chunk - stack.rows:
                        result = F.pad(result, (0, 0, 0, padding))
                    parts.copy_(result.view(parts.shape))
        if shards.size > 1:
            dist.all_to_all_single(row, owned, self._sizes, [own] * shards.size, group=shards.group)
        if replicas.size == 1:
            return flat[None]
        gathered = flat.new_empty(replicas.size * self._width)
        dist.all_gather_into_tensor(gathered, flat, group=replicas.group)
        return gathered.view(replicas.size, -1)


def make_plans(weights: list[tuple[int, int, nn.Parameter]]) -> list[Plan]:
    """One plan per layout.

    Args:
        weights: (index of a group, number of matrices in the rows of the weight, weight). Plain tensors are taken to be equal
            on all ranks, as DDP keeps them.

    Raises:
        ValueError: a DTensor that is sharded in another way than FSDP2 and HSDP do by default.
    """
    layouts: dict[_Layout, list[tuple[int, int, nn.Parameter]]] = {}
    for entry in weights:
        layouts.setdefault(_Layout.of(entry[2]), []).append(entry)
    return [Plan(layout, members) for layout, members in layouts.items()]


def plan_for(weights: list[tuple[int, int, nn.Parameter]], replicas: int, shards: int) -> Plan:
    """The plan of ranks that aren't there, to ask what they would do; it has no groups to exchange anything in.

    Args:
        weights: as for `make_plans`, whole; their storage isn't touched.
        replicas, shards: of the grid of ranks.
    """
    return Plan(_Layout(_Ranks(None, replicas, 0), _Ranks(None, shards, 0), torch.bfloat16, torch.device("meta")), weights)
