"""How long an optimizer step takes on n GPUs: what they compute, what they send and over which link, what their loaders deliver.

    step = max(computing + sending that it doesn't cover + a GPU's share of Muon + Muon's exchange, loading)

FSDP2 and DDP send while the GPU computes. Muon begins when the gradients are complete and ends before the next step; that its
iterations run beside most of its exchange is left out.

Bytes that a GPU sends in one optimizer step, which `benchmarks/distributed.py` counts on real ranks:

What Composer 0.32 and torch's `fully_shard` do with our models:

- FSDP2's units are the backbone's blocks and what is left of each direct child of the model. A unit gathers its weights for every
  microbatch: blocks forward, and again backward with `reshard_after_forward`; the others once, since each is the root of its own
  tree, and roots stay whole until the backward pass is over.
- Composer has gradients reduced after every microbatch, and HSDP's replicas averaged.
- Weights and gradients travel in fp32 unless `parallelism_config.fsdp.mixed_precision` says otherwise (`parallelism`'s default is
  FULL). A parameter whose rows don't divide travels padded.
- DDP all-reduces fp32 gradients once per step, with the last microbatch.
- Muon exchanges matrices once per step, in bf16 (on CPUs in fp32), as `optim.shares` plans it.

Bytes are those of rings of n ranks: (n−1)/n of the whole for a gather or a reduce-scatter, twice that for an all-reduce.
Not in it, a few hundred bytes each: the norm of gradients, losses, flags, clocks. Heads count as if their windows were open.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from composer.core import Precision
from composer.distributed.mosaic_parallelism import get_mixed_precision
from torch import nn

from prx_composer.commands.plan.conditions import Conditions, Measured
from prx_composer.commands.plan.memory import blocks_of, sharding
from prx_composer.commands.plan.timeline import Span
from prx_composer.common.errors import UserError
from prx_composer.optim.exchange import Plan, plan_for
from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel, muon_groups

LINK_SHARE = 0.8  # of a link's bandwidth that collectives of large messages reach: about 360 of NVLink 4's 450 GB/s
FP32, BF16 = 4, 2
BACKWARD = 2 / 3  # of the time of a microbatch
GATHER, REDUCE = "FSDP2 gathers weights", "FSDP2 reduces gradients"
REPLICAS, DDP = "HSDP averages replicas", "DDP averages gradients"
MUON, MUON_REPLICAS = "Muon's shards to owners and back", "Muon's results to replicas"


@dataclass(frozen=True)
class Grid:
    """How ranks are grouped: `shards` neighbours hold one copy of the weights, of which there are `replicas`."""

    replicas: int
    shards: int

    @classmethod
    def of(cls, recipe: Recipe, num_gpus: int) -> "Grid":
        shards = min(sharding(recipe, num_gpus), num_gpus)
        return cls(num_gpus // shards, shards)


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one optimizer step.

    Args:
        purpose: in words.
        bytes: sent by the GPU that sends most.
        ranks: of a group.
        window: share of the step's forward and backward passes that it can run beside; 0: nothing runs beside it.
        stride: distance of neighbours in the group, in ranks.
        pairwise: everyone sends to everyone, rather than around a ring.
    """

    purpose: str
    bytes: float
    ranks: int
    window: float
    stride: int = 1
    pairwise: bool = False


def traffic(
    planned: MetaModel, recipe: Recipe, num_gpus: int, microbatches: int, muon: Plan | None, on_gpu: bool = True
) -> list[Traffic]:
    """All that is worth counting, without what sends nothing.

    Args:
        num_gpus: of the run.
        microbatches: per optimizer step and GPU.
        muon: the `muon_plan` of the same GPUs.
        on_gpu: False for ranks on CPUs, where Muon works in fp32.
    """
    grid = Grid.of(recipe, num_gpus)
    ddp = recipe.parallelism_config is None
    found = _ddp(planned, num_gpus, microbatches) if ddp else _fsdp(planned, recipe, grid, microbatches)
    if muon is not None:
        width = BF16 if on_gpu else FP32
        to_shards, to_replicas = (width * elements for elements in muon.elements_sent())
        found.append(Traffic(MUON, to_shards, grid.shards, 0, pairwise=True))
        found.append(Traffic(MUON_REPLICAS, to_replicas, grid.replicas, 0, stride=grid.shards))
    return [one for one in found if one.bytes]


def muon_plan(planned: MetaModel, recipe: Recipe, num_gpus: int) -> Plan | None:
    """Return which GPU orthogonalises what; None without Muon."""
    groups = muon_groups(planned.optimizer)
    if not groups:
        return None
    index = {id(group): number for number, group in enumerate(planned.optimizer.param_groups)}
    weights = [(index[id(group)], group["pieces"], weight) for group in groups for weight in group["params"]]
    grid = Grid.of(recipe, num_gpus)
    return plan_for(weights, grid.replicas, grid.shards)


def _ddp(planned: MetaModel, num_gpus: int, microbatches: int) -> list[Traffic]:
    gradients = sum(p.numel() * p.element_size() for p in planned.trained.values())
    return [Traffic(DDP, 2 * (num_gpus - 1) / num_gpus * gradients, num_gpus, BACKWARD / microbatches)]


def _fsdp(planned: MetaModel, recipe: Recipe, grid: Grid, microbatches: int) -> list[Traffic]:
    fsdp = (recipe.parallelism_config or {}).get("fsdp") or {}
    weight, gradient = _widths(recipe, fsdp)
    shard = _padded_shard(planned.trained.values(), grid.shards)
    gathered = (grid.shards - 1) * shard
    found = []
    reshard = fsdp.get("reshard_after_forward", True)
    if reshard is not False:  # True, or the number of neighbours that keep a copy until the backward pass
        neighbours = grid.shards if reshard is True else int(reshard)
        blocks = (p for block in blocks_of(planned) for p in block.parameters())
        part = _padded_shard((p for p in blocks if p.requires_grad), grid.shards) * grid.shards / neighbours
        again = (neighbours - 1) * part
        if neighbours == grid.shards:
            gathered += again
        else:
            found.append(Traffic(GATHER, microbatches * again * weight, neighbours, 1))
    average = 2 * (grid.replicas - 1) / grid.replicas * shard
    return [
        Traffic(GATHER, microbatches * gathered * weight, grid.shards, 1),
        *found,
        Traffic(REDUCE, microbatches * (grid.shards - 1) * shard * gradient, grid.shards, BACKWARD),
        Traffic(REPLICAS, microbatches * average * gradient, grid.replicas, BACKWARD, stride=grid.shards),
    ]


def _widths(recipe: Recipe, fsdp: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a weight on its way, and of a gradient."""
    _, weights, gradients, _ = get_mixed_precision(Precision(recipe.precision), fsdp.get("mixed_precision", "FULL"))
    weight = weights.itemsize if weights is not None else FP32
    return weight, gradients.itemsize if gradients is not None else weight


def _padded_shard(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Elements of one shard as it travels: every parameter is cut along its rows, and the last part is filled up."""
    return sum(-(-p.shape[0] // shards) * (p.numel() // p.shape[0]) for p in parameters)


@dataclass(frozen=True)
class Links:
    """What GPUs send over, in bytes per second in one direction.

    Args:
        inside: of a node, per GPU. between: nodes, per GPU.
        per_node: GPUs of one node; neighbours in rank share it.
    """

    inside: float
    between: float
    per_node: int

    @classmethod
    def of(cls, conditions: Conditions, num_gpus: int) -> "Links":
        network = conditions.network if conditions.network is not None else conditions.gpu.network
        return cls(conditions.gpu.link * 1e9, network * 1e9, min(conditions.gpus_per_node, num_gpus))

    def seconds(self, sent: Traffic) -> float:
        """Of a step's collectives of one kind, one after the other, without latency.

        A ring crosses a node's border once, however many of its members are in the node, and may use the adapters of all of them
        for it. In a pairwise exchange each byte for another node goes through the sender's own.
        """
        span = sent.ranks * sent.stride
        aligned = math.gcd(span, self.per_node)
        if aligned == span:
            return sent.bytes / (LINK_SHARE * self.inside)
        together = max(aligned // sent.stride, 1)  # members of a group that share a node
        if sent.pairwise:
            outside = sent.bytes * (sent.ranks - together) / (sent.ranks - 1)
            return max((sent.bytes - outside) / self.inside, outside / self.between) / LINK_SHARE
        return sent.bytes / (LINK_SHARE * min(self.inside, self.between * together))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one GPU.

    Args:
        compute: forward and backward passes.
        beside: sending that runs while it computes. uncovered: what of it goes on when computing could.
        optimizer: its share of Muon's iterations. exchange: of Muon's matrices, as if nothing ran beside it.
        loader: in which the loaders of its node deliver the step's images; 0: training never waits for them.
        sent: bytes by purpose.
    """

    compute: float
    beside: float
    uncovered: float
    optimizer: float
    exchange: float
    loader: float
    sent: dict[str, float]

    @property
    def alone(self) -> float:
        """If sending took no time and the data were there."""
        return self.compute + self.optimizer

    @property
    def waiting(self) -> float:
        """For data."""
        return max(self.loader - self.alone - self.uncovered - self.exchange, 0.0)

    @property
    def total(self) -> float:
        return self.alone + self.uncovered + self.exchange + self.waiting

    @property
    def efficiency(self) -> float:
        """Speed, as a share of that of a GPU that sends nothing and waits for nothing."""
        return self.alone / self.total


class StepTimes:
    """Of a recipe's stages.

    Args:
        conditions: with a utilisation, a step alone takes its FLOPs ÷ (utilisation × reachable peak), Muon's share included. With
            a measured throughput, computing is what remains of the measured step without Muon's share and exchange on the GPUs
            that were measured; on as many GPUs as planned the step takes what was measured.
    """

    def __init__(self, planned: MetaModel, recipe: Recipe, conditions: Conditions):
        self._planned, self._recipe, self._conditions = planned, recipe, conditions
        measured_on = {one.gpus for one in (conditions.throughput or {}).values() if one.gpus}
        self._plans = {n: muon_plan(planned, recipe, n) for n in {conditions.num_gpus, *measured_on}}
        plan = self._plans[conditions.num_gpus]
        self.muon_flops = 0 if plan is None else plan.cost * int(recipe.optimizer.get("newton_schulz_steps", 5))

    def of(self, span: Span, flops: float) -> StepTime:
        """Of a stage with `flops` of training per image; raises UserError if nothing was measured at its image size."""
        c = self._conditions
        batch = span.batch_size // c.num_gpus
        found = self._traffic(c.num_gpus, batch // span.microbatch_size)
        beside = [(one.window, seconds) for one, seconds in found if one.window]
        optimizer, exchange = self._muon(c.num_gpus)
        if c.throughput is None:
            assert c.utilisation is not None
            alone = batch * flops / (c.utilisation * c.gpu.reachable_tflops * 1e12)
            optimizer = min(optimizer, alone)  # near the peak there may be no room for all of it
            compute = alone - optimizer
            late = uncovered(compute, beside)
        else:
            measured = self._measured(span.image_size)
            gpus, own = measured.gpus or c.num_gpus, measured.batch or batch
            compute = max(own / measured.images_per_second - sum(self._muon(gpus)), 0.0) * batch / own
            late = 0.0 if (gpus, own) == (c.num_gpus, batch) else uncovered(compute, beside)
        return StepTime(
            compute=compute,
            beside=sum(seconds for _, seconds in beside),
            uncovered=late,
            optimizer=optimizer,
            exchange=exchange,
            loader=0.0 if c.loader is None else batch * c.per_node / c.loader,
            sent={one.purpose: one.bytes for one, _ in found},
        )

    def _traffic(self, num_gpus: int, microbatches: int) -> list[tuple[Traffic, float]]:
        """With seconds."""
        links = Links.of(self._conditions, num_gpus)
        found = traffic(self._planned, self._recipe, num_gpus, microbatches, self._plans[num_gpus])
        return [(one, links.seconds(one)) for one in found]

    def _muon(self, num_gpus: int) -> tuple[float, float]:
        """Seconds of a GPU's share, of the one with most to do, and of the exchange."""
        plan = self._plans[num_gpus]
        work = 0.0 if plan is None else plan.largest_share * self.muon_flops
        exchange = sum(seconds for one, seconds in self._traffic(num_gpus, 1) if not one.window)
        return work / (self._conditions.gpu.reachable_tflops * 1e12), exchange

    def _measured(self, image_size: int) -> Measured:
        there = self._conditions.throughput or {}
        if image_size not in there:
            sizes = ", ".join(map(str, sorted(there)))
            raise UserError(
                f"--throughput: nothing was measured at image_size {image_size}, only at {sizes}; measure it, or give --mfu."
            )
        return there[image_size]


def uncovered(compute: float, sending: list[tuple[float, float]]) -> float:
    """Seconds by which sending outlasts what it runs beside.

    Args:
        compute: seconds of forward and backward passes.
        sending: (share of them, counted from their end, that it can run beside; its seconds). One is sent after the other.
    """
    return max(0.0, *(sum(s for w, s in sending if w <= window) - window * compute for window, _ in sending), 0.0)
