"""Whole matrices for a function of whole matrices, when every rank has all of them (DDP) or a shard of each (FSDP2, HSDP).

Every rank works on a share that is balanced by FLOPs. Ranks form a grid: `replicas` hold equal shards, `shards` different ones.
Matrices travel in a few parts, so that one part is worked on while others are on their way. Of a part, a replica's matrices lie
in one flat buffer, shard by shard. One all-to-all brings each owner its matrices, the second takes the results back, and an
all-gather passes them to the other replicas: three collectives, whatever the number of matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from prx_composer.optim.newton_schulz import flops

Work = Callable[[int, int], int]
_PARTS = 4  # of an exchange: what of it nothing runs beside is one part there and one back


def local(tensor: Tensor | None) -> Tensor:
    """Return what this rank holds of a tensor, not a copy, and without a node of autograd, which takes the host long."""
    if not isinstance(tensor, DTensor):
        return cast(Tensor, tensor)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return tensor.to_local()
    return tensor.to_local()


class _Ranks(NamedTuple):
    """The ranks along one dimension of the grid."""

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


@dataclass
class Stack:
    """Weights of one group and one shape, each `pieces` matrices on top of each other."""

    group: int
    pieces: int
    rows: int
    columns: int
    chunk: int  # rows of a shard; a shorter last one travels at this size too
    cost: int  # FLOPs of the work on one weight
    weights: list[nn.Parameter] = field(default_factory=list)


class _Block(NamedTuple):
    """Weights of a stack with one owner; their shards lie one after the other in their replica's buffer."""

    stack: Stack
    replica: int
    shard: int
    members: list[int]
    start: int

    @property
    def size(self) -> int:
        return len(self.members) * self.stack.chunk * self.stack.columns

    def shards(self, buffer: Tensor) -> Tensor:
        """Return where this rank's shards of the k members lie in their replica's buffer: (k, rows of the shard, columns)."""
        rows = len(local(self.stack.weights[0]))
        return buffer[self.start : self.start + self.size].view(-1, self.stack.chunk, self.stack.columns)[:, :rows]


class Part:
    """Weights that travel together.

    Args:
        layout: that of all weights.
        owned: owner, as (replica, shard), → the members of each stack that it works on.
    """

    def __init__(self, layout: _Layout, owned: dict[tuple[int, int], list[tuple[Stack, list[int]]]]):
        self.layout = layout
        self.blocks: list[_Block] = []
        self.sizes = [[0] * layout.shards.size for _ in range(layout.replicas.size)]  # elements per replica and shard
        for (replica, shard), stacks in owned.items():
            for stack, members in stacks:
                self.blocks.append(_Block(stack, replica, shard, members, sum(self.sizes[replica])))
                self.sizes[replica][shard] += self.blocks[-1].size
        self.width = max(map(sum, self.sizes))

    def of(self, stack: Stack) -> list[_Block]:
        return [block for block in self.blocks if block.stack is stack]


class Exchange:
    """A part on its way, in four steps: `send`, `work`, `pass_on`, `received`.

    They wait for no more than they need, so that another part's steps may come between them. Nothing but the results of the last
    step may be used before all are done.
    """

    def __init__(self, part: Part):
        self._part, self._layout = part, part.layout
        self._pending: Any = None
        self._flat = torch.empty(part.width, dtype=part.layout.dtype, device=part.layout.device)
        self._sizes = part.sizes[part.layout.replicas.rank]
        self._row = self._owned = self._flat[: sum(self._sizes)]

    def to_send(self, stack: Stack) -> tuple[list[int], list[Tensor]]:
        """Return indices of the weights that this replica works on, and where this rank's shards of them are to be written."""
        mine = [block for block in self._part.of(stack) if block.replica == self._layout.replicas.rank]
        return _members(mine), [place for block in mine for place in block.shards(self._flat)]

    def send(self) -> None:
        """Send shards to their owners."""
        shards = self._layout.shards
        if shards.size > 1:
            own = self._sizes[shards.rank]
            self._owned = self._flat.new_empty(shards.size * own)
            self._pending = dist.all_to_all_single(
                self._owned, self._row, [own] * shards.size, self._sizes, group=shards.group, async_op=True
            )

    def work(self, function: Callable[[Stack, Tensor], Tensor]) -> None:
        """Work on the weights that this rank owns, and send the results back.

        Args:
            function: is called with a stack and (k, rows, columns), its k weights of this rank; it must return the same shape, in
                memory of its own.
        """
        self._wait()
        replicas, shards = self._layout.replicas, self._layout.shards
        own, before = self._sizes[shards.rank], sum(self._sizes[: shards.rank])
        for block in self._part.blocks:
            if (block.replica, block.shard) == (replicas.rank, shards.rank):
                stack = block.stack
                parts = self._owned.view(shards.size, own)[:, block.start - before :][:, : block.size]
                parts = parts.unflatten(1, (len(block.members), stack.chunk, stack.columns)).transpose(0, 1)
                result = function(stack, parts.flatten(1, 2)[:, : stack.rows])
                if padding := shards.size * stack.chunk - stack.rows:
                    result = F.pad(result, (0, 0, 0, padding))
                parts.copy_(result.view(parts.shape))
        if shards.size > 1:
            self._pending = dist.all_to_all_single(
                self._row, self._owned, self._sizes, [own] * shards.size, group=shards.group, async_op=True
            )

    def pass_on(self) -> None:
        """Send results to the other replicas."""
        self._wait()
        replicas = self._layout.replicas
        self._results = self._flat
        if replicas.size > 1:
            self._results = self._flat.new_empty(replicas.size * self._part.width)
            self._pending = dist.all_gather_into_tensor(self._results, self._flat, group=replicas.group, async_op=True)

    def received(self, stack: Stack) -> list[tuple[list[int], Tensor]]:
        """Return indices of all weights of the part, some at a time, with this rank's shards of their results.

        Those of k weights are (k, rows of the shard, columns), in the weights' dtype, and may be written to.
        """
        self._wait()
        buffers = self._results.view(self._layout.replicas.size, -1)
        blocks, dtype = self._part.of(stack), stack.weights[0].dtype
        return [(block.members, block.shards(buffers[block.replica]).to(dtype)) for block in blocks]

    def _wait(self) -> None:
        """Wait for a collective; on a GPU its stream does, and the host goes on."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


def _members(blocks: list[_Block]) -> list[int]:
    return [member for block in blocks for member in block.members]


class Plan:
    """Says which rank works on which weight, and in which part it travels; all ranks make the same plan.

    Args:
        layout: that of all weights.
        weights: (group, pieces, weight), in the same order on all ranks.
        work: FLOPs of the work on a matrix with so many rows and columns.

    `cost` is the FLOPs of all of it over all ranks, `largest_share` the part of the rank with most to do.
    """

    def __init__(self, layout: _Layout, weights: list[tuple[int, int, nn.Parameter]], work: Work = flops):
        self._layout, self._shards, self._replicas = layout, layout.shards.size, layout.replicas.size
        stacks: dict[tuple[int, torch.Size], Stack] = {}
        for group, pieces, weight in weights:
            rows, columns = weight.shape
            if (group, weight.shape) not in stacks:
                cost = pieces * work(rows // pieces, columns)
                stacks[group, weight.shape] = Stack(group, pieces, rows, columns, -(-rows // self._shards), cost)
            stacks[group, weight.shape].weights.append(weight)
        self.stacks = sorted(stacks.values(), key=lambda stack: stack.cost, reverse=True)

        owners = [(replica, shard) for replica in range(self._replicas) for shard in range(self._shards)]
        load = dict.fromkeys(owners, 0)
        owned: dict[tuple[int, int], list[tuple[Stack, int]]] = {owner: [] for owner in owners}
        for stack in self.stacks:  # longest first, each to who has least to do
            for index in range(len(stack.weights)):
                owner = min(owners, key=load.__getitem__)
                owned[owner].append((stack, index))
                load[owner] += stack.cost
        self.cost = sum(load.values())
        self.largest_share = max(load.values()) / max(self.cost, 1)

        count = min(_PARTS, max(map(len, owned.values()))) if len(owners) > 1 else 1
        self.parts = [
            Part(layout, {owner: _share(each, index, count) for owner, each in owned.items()}) for index in range(count)
        ]

    def gather_rows(self, numbers: list[tuple[Stack, Tensor]]) -> list[Tensor]:
        """Return numbers of all rows of weights, from those of every rank's own rows; a collective where there are shards.

        Args:
            numbers: (stack, (..., rows of the shard)); all ranks name the same stacks, in the same order.

        Returns:
            (..., rows) each, the same on all ranks to the bit.
        """
        shards = self._layout.shards
        if shards.size == 1:
            return [own for _, own in numbers]
        padded = [F.pad(own, (0, stack.chunk - own.shape[-1])) for stack, own in numbers]
        flat = torch.cat([own.flatten() for own in padded])
        gathered = flat.new_empty(shards.size * len(flat))
        dist.all_gather_into_tensor(gathered, flat, group=shards.group)
        parts = gathered.view(shards.size, -1).split([own.numel() for own in padded], dim=1)
        whole = [part.view(-1, *own.shape).movedim(0, -2).flatten(-2) for part, own in zip(parts, padded, strict=True)]
        return [rows[..., : stack.rows] for rows, (stack, _) in zip(whole, numbers, strict=True)]

    def own_rows(self, stack: Stack, whole: Tensor) -> Tensor:
        """Return what this rank's rows of a stack's weights have of numbers of all rows, (..., rows)."""
        start = self._layout.shards.rank * stack.chunk
        return whole[..., start : start + len(local(stack.weights[0]))]

    def elements_sent(self) -> tuple[int, int]:
        """Return what the rank that sends most sends in one exchange: to other shards, there and back, and to other replicas.

        An all-gather is counted as a ring sends it: every rank sends all parts but one.
        """
        sent = torch.zeros(self._replicas, self._shards, dtype=torch.int64)
        for part in self.parts:
            sizes = torch.tensor(part.sizes)
            sent += sizes.sum(1, keepdim=True) - sizes + (self._shards - 1) * sizes
        to_replicas = (self._replicas - 1) * sum(part.width for part in self.parts)
        return int(sent.max()) if self._shards > 1 else 0, to_replicas


def _share(owned: list[tuple[Stack, int]], index: int, count: int) -> list[tuple[Stack, list[int]]]:
    """Return part `index` of `count` of an owner's weights, neighbours together: those of a stack are worked on at once."""
    found: dict[int, tuple[Stack, list[int]]] = {}
    for stack, member in owned[index * len(owned) // count : (index + 1) * len(owned) // count]:
        found.setdefault(id(stack), (stack, []))[1].append(member)
    return list(found.values())


def make_plans(weights: list[tuple[int, int, nn.Parameter]], work: Work = flops) -> list[Plan]:
    """Return one plan per layout.

    Args:
        weights: (index of a group, number of matrices in the rows of the weight, weight). Plain tensors are taken to be equal
            on all ranks, as DDP keeps them.
        work: FLOPs of the work on a matrix with so many rows and columns, by which the ranks' shares are balanced.

    Raises:
        ValueError: a DTensor that is sharded in another way than FSDP2 and HSDP do by default.
    """
    layouts: dict[_Layout, list[tuple[int, int, nn.Parameter]]] = {}
    for entry in weights:
        layouts.setdefault(_Layout.of(entry[2]), []).append(entry)
    return [Plan(layout, members, work) for layout, members in layouts.items()]


def plan_for(weights: list[tuple[int, int, nn.Parameter]], replicas: int, shards: int, work: Work = flops) -> Plan:
    """Return the plan of ranks that aren't there, to ask what they would do; it has no groups to exchange anything in.

    Args:
        weights, work: as for `make_plans`; the weights are whole, and their storage isn't touched.
        replicas, shards: of the grid of ranks.
    """
    layout = _Layout(_Ranks(None, replicas, 0), _Ranks(None, shards, 0), torch.bfloat16, torch.device("meta"))
    return Plan(layout, weights, work)
