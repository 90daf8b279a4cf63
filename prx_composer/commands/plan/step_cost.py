"""What a step costs a GPU: seconds of computing, sending and loading on n GPUs, and bytes of memory when it is fullest.

    step = max(computing + sending that it doesn't cover + a GPU's share of Muon + Muon's exchange, loading)

FSDP2 and DDP send while the GPU computes. Muon begins when the gradients are complete and ends before the next step; that its
iterations run beside most of its exchange is left out.

The bytes that a GPU sends in one optimizer step follow from what Composer 0.32 and torch's `fully_shard` do with our models.
`benchmarks/distributed.py` counts them on real ranks:

- FSDP2's units are the backbone's blocks and what is left of each direct child of the model. A unit gathers its weights for every
  microbatch: blocks forward, and again backward with `reshard_after_forward`; the others once, since each is the root of its own
  tree, and roots stay whole until the backward pass is over.
- Composer has gradients reduced after every microbatch, and HSDP's replicas averaged.
- Weights and gradients travel in fp32 unless `parallelism_config.fsdp.mixed_precision` says otherwise (`parallelism`'s default is
  FULL; with WEIGHTS the blocks' weights alone are in 16 bits). A parameter whose rows don't divide travels padded.
- DDP all-reduces fp32 gradients once per step, with the last microbatch.
- Muon exchanges matrices once per step, in bf16 (on CPUs in fp32), as `optim.exchange` plans it.

Bytes are those of rings of n ranks: (n−1)/n of the whole for a gather or a reduce-scatter, twice that for an all-reduce.
Not in it, a few hundred bytes each: the norm of gradients, losses, flags, clocks. Heads count as if their windows were open.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from composer.core import Precision
from composer.distributed.mosaic_parallelism import get_mixed_precision
from torch import nn

from prx_composer.commands.plan.conditions import Conditions, Links, Measured, Traffic
from prx_composer.commands.plan.roofline import Own, PartTime, computing
from prx_composer.commands.plan.timeline import Span
from prx_composer.common.errors import UserError
from prx_composer.models.counting import StepCount, blocks_of
from prx_composer.models.kernels import Kernel
from prx_composer.optim.exchange import Plan, plan_for
from prx_composer.optim.muon import Muon
from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel, bytes_of, muon_groups, training_state
from prx_composer.training.trainer import WEIGHTS, low_dtype, sharding

FP32, BF16 = 4, 2
BACKWARD = 2 / 3  # of the time of a microbatch
GATHER, REDUCE = "FSDP2 gathers weights", "FSDP2 reduces gradients"
REPLICAS, DDP = "HSDP averages replicas", "DDP averages gradients"
MUON, MUON_REPLICAS = "Muon's shards to owners and back", "Muon's results to replicas"


# ---------------------------------------------------------------------------------------------------- what is sent


def traffic(
    planned: MetaModel, recipe: Recipe, num_gpus: int, microbatches: int, muon: Plan | None, on_gpu: bool = True
) -> list[Traffic]:
    """Return all that is worth counting, without what sends nothing.

    Args:
        num_gpus: of the run.
        microbatches: per optimizer step and GPU.
        muon: the `muon_plan` of the same GPUs.
        on_gpu: False for ranks on CPUs, where Muon works in fp32.
    """
    shards = sharding(recipe, num_gpus)
    replicas = num_gpus // shards
    if recipe.parallelism_config is None:
        gradients = bytes_of(planned.trained.values())
        found = [Traffic(DDP, 2 * (num_gpus - 1) / num_gpus * gradients, num_gpus, BACKWARD / microbatches)]
    else:
        found = _fsdp(planned, recipe, replicas, shards, microbatches)
    if muon is not None:
        width = BF16 if on_gpu else FP32
        to_shards, to_replicas = (width * elements for elements in muon.elements_sent())
        found.append(Traffic(MUON, to_shards, shards, 0, pairwise=True))
        found.append(Traffic(MUON_REPLICAS, to_replicas, replicas, 0, stride=shards))
    return [one for one in found if one.bytes]


def _fsdp(planned: MetaModel, recipe: Recipe, replicas: int, shards: int, microbatches: int) -> list[Traffic]:
    fsdp, widths = (recipe.parallelism_config or {}).get("fsdp") or {}, _widths(recipe)
    shard = _padded_shard(planned.trained.values(), shards)
    blocks = (p for block in blocks_of(planned.model.backbone) for p in block.parameters())
    in_blocks = _padded_shard((p for p in blocks if p.requires_grad), shards)
    gathered = (shards - 1) * (in_blocks * widths.block + (shard - in_blocks) * widths.outside)
    found = []
    reshard = fsdp.get("reshard_after_forward", True)
    if reshard is not False:  # True, or the number of neighbours that keep a copy until the backward pass
        neighbours = shards if reshard is True else int(reshard)
        again = (neighbours - 1) * in_blocks * shards / neighbours * widths.block
        if neighbours == shards:
            gathered += again
        else:
            found.append(Traffic(GATHER, microbatches * again, neighbours, 1))
    average = 2 * (replicas - 1) / replicas * shard
    return [
        Traffic(GATHER, microbatches * gathered, shards, 1),
        *found,
        Traffic(REDUCE, microbatches * (shards - 1) * shard * widths.gradient, shards, BACKWARD),
        Traffic(REPLICAS, microbatches * average * widths.gradient, replicas, BACKWARD, stride=shards),
    ]


class _Widths(NamedTuple):
    """Bytes of a number that FSDP2 gathers, of a block and of what is outside of blocks, and of one that it reduces."""

    block: int
    outside: int
    gradient: int


def _widths(recipe: Recipe) -> _Widths:
    fsdp = (recipe.parallelism_config or {}).get("fsdp") or {}
    mixed = fsdp.get("mixed_precision", "FULL")  # what `training.trainer.parallelism` gives where the recipe doesn't say
    low = low_dtype(mixed, recipe.precision)
    composers = "FULL" if mixed.upper() == WEIGHTS else mixed
    _, weights, gradients, _ = get_mixed_precision(Precision(recipe.precision), composers)
    weight = weights.itemsize if weights is not None else FP32
    block = low.itemsize if low is not None else weight
    return _Widths(block, weight, gradients.itemsize if gradients is not None else weight)


def _padded_shard(parameters: Iterable[nn.Parameter], shards: int) -> int:
    """Return the elements of one shard as it travels: every parameter is cut along its rows, and the last part is filled up."""
    return sum(-(-p.shape[0] // shards) * (p.numel() // p.shape[0]) for p in parameters)


def muon_plan(planned: MetaModel, recipe: Recipe, num_gpus: int) -> Plan | None:
    """Return which GPU orthogonalises what; None without Muon."""
    groups = muon_groups(planned.optimizer)
    if not groups:
        return None
    weights = [(number, group["pieces"], weight) for number, group in groups.items() for weight in group["params"]]
    shards = sharding(recipe, num_gpus)
    assert isinstance(planned.optimizer, Muon)
    return plan_for(weights, num_gpus // shards, shards, planned.optimizer.work)


# --------------------------------------------------------------------------------------------------------- seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one GPU.

    Args:
        compute: forward and backward passes.
        beside: sending that runs while it computes. uncovered: what of it goes on when computing could.
        optimizer: its share of Muon's iterations. exchange: of Muon's matrices, as if nothing ran beside it.
        loader: in which the loaders of its node deliver the step's images; 0: training never waits for them.
        sent: bytes by purpose.
        parts: where it is predicted from its kernels, what each part takes: together all but waiting for data.
    """

    compute: float
    beside: float
    uncovered: float
    optimizer: float
    exchange: float
    loader: float
    sent: dict[str, float]
    parts: dict[str, PartTime] = field(default_factory=dict)

    @property
    def alone(self) -> float:
        """Seconds that it would take if sending took no time and the data were there."""
        return self.compute + self.optimizer

    @property
    def waiting(self) -> float:
        """Seconds in which it waits for data."""
        return max(self.loader - self.alone - self.uncovered - self.exchange, 0.0)

    @property
    def total(self) -> float:
        return self.alone + self.uncovered + self.exchange + self.waiting

    @property
    def efficiency(self) -> float:
        """Speed, as a share of that of a GPU that sends nothing and waits for nothing."""
        return self.alone / self.total


class StepTimes:
    """The seconds of a step in each of a recipe's stages.

    Args:
        conditions: without a speed, computing is what the kernels of a step take. With a utilisation, a step alone takes its
            FLOPs ÷ (utilisation × reachable peak), Muon's share included. With a measured throughput, computing is what remains
            of the measured step without Muon's share and exchange on the GPUs that were measured; on as many GPUs as planned
            the step takes what was measured.

    Attributes:
        muon_flops: of Muon's iterations in one step, all GPUs together.
    """

    def __init__(self, planned: MetaModel, recipe: Recipe, conditions: Conditions):
        self._planned, self._recipe, self._conditions = planned, recipe, conditions
        measured_on = {one.gpus for one in (conditions.throughput or {}).values() if one.gpus}
        self._plans = {n: muon_plan(planned, recipe, n) for n in {conditions.num_gpus, *measured_on}}
        plan = self._plans[conditions.num_gpus]
        self.muon_flops = 0 if plan is None else plan.cost

    def of(self, span: Span, segments: Sequence["Segment"]) -> StepTime:
        """Return those of a stage that consists of segments; raise UserError if its image size wasn't measured."""
        c = self._conditions
        batch = span.batch_size // c.num_gpus
        found = self._traffic(c.num_gpus, batch // span.microbatch_size)
        beside = [(one.window, seconds) for one, seconds in found if one.window]
        optimizer, exchange = self._muon(c.num_gpus)
        parts: dict[str, PartTime] = {}
        flops = sum(segment.share * segment.count.total_flops for segment in segments)
        if c.predicted:
            copied = sum(2 * one.bytes * one.ranks / (one.ranks - 1) for one, _ in found if one.purpose in (GATHER, REDUCE))
            sending = sum(seconds for _, seconds in beside)
            shards = sharding(self._recipe, c.num_gpus)
            casts = self._recipe.parallelism_config is None or _widths(self._recipe).block == FP32
            parts = computing(self._planned, self._recipe, c.gpu, segments, Own(batch, shards, copied, sending), casts)
            compute = sum(part.seconds for part in parts.values())
            # A unit's weights must be there before its first pass, and its gradients are reduced after the last.
            ends = sum(seconds for _, seconds in beside) / max(len(blocks_of(self._planned.model.backbone)), 1)
            late = max(uncovered(compute, beside), ends if self._recipe.parallelism_config else 0.0)
            parts["Muon: matrix products"] = PartTime(optimizer, flops=self._share_of_muon(c.num_gpus))
            parts["sending that computing doesn't cover"] = PartTime(late)
            parts["Muon's exchange"] = PartTime(exchange)
        elif c.throughput is None:
            assert c.utilisation is not None
            alone = batch * flops / (c.utilisation * c.gpu.reachable_tflops * 1e12)
            optimizer = min(optimizer, alone)  # near the peak there may be no room for all of it
            compute = alone - optimizer
            late = uncovered(compute, beside)
        else:
            measured = _measured(c.throughput, span.image_size)
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
            parts={name: part for name, part in parts.items() if part.seconds},
        )

    def _traffic(self, num_gpus: int, microbatches: int) -> list[tuple[Traffic, float]]:
        """Return what is sent, each with the seconds that it takes."""
        c = self._conditions
        links = Links(c.gpu.link * 1e9, c.between_nodes * 1e9, min(c.gpus_per_node, num_gpus))
        found = traffic(self._planned, self._recipe, num_gpus, microbatches, self._plans[num_gpus])
        return [(one, links.seconds(one)) for one in found]

    def _muon(self, num_gpus: int) -> tuple[float, float]:
        """Return the seconds of the share of the GPU with most to do, and of the exchange."""
        exchange = sum(seconds for one, seconds in self._traffic(num_gpus, 1) if not one.window)
        return self._share_of_muon(num_gpus) / (self._conditions.gpu.reachable_tflops * 1e12), exchange

    def _share_of_muon(self, num_gpus: int) -> float:
        """Return the FLOPs of the GPU with most to do."""
        plan = self._plans[num_gpus]
        return 0.0 if plan is None else plan.largest_share * self.muon_flops


def _measured(throughput: dict[int, Measured], image_size: int) -> Measured:
    if image_size not in throughput:
        sizes = ", ".join(map(str, sorted(throughput)))
        raise UserError(
            f"--throughput: nothing was measured at image_size {image_size}, only at {sizes}; measure it, or give --mfu."
        )
    return throughput[image_size]


def uncovered(compute: float, sending: list[tuple[float, float]]) -> float:
    """Return the seconds by which sending outlasts what it runs beside.

    Args:
        compute: seconds of forward and backward passes.
        sending: (share of them, counted from their end, that it can run beside; its seconds). One is sent after the other.
    """
    return max(0.0, *(sum(s for w, s in sending if w <= window) - window * compute for window, _ in sending), 0.0)


# ---------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU when it is fullest, by what they are for.

    Args:
        weights, gradients, optimizer, ema: this GPU's part of them, fp32.
        gathered: FSDP2: whole weights and gradients of the blocks at work and of what lies outside of blocks; DDP: its buckets.
        frozen: text encoder and teachers.
        casts: 16-bit copies of the weights that autocast makes and the backward pass needs; none of what is gathered in 16 bits.
        batch: the uint8 images of a step.
        activations: of one microbatch.
        optimizer_step: what Muon needs while it works; not at the same time as casts and activations.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    frozen: int
    casts: int
    batch: int
    activations: int
    optimizer_step: int

    @property
    def peak(self) -> int:
        resident = self.weights + self.gradients + self.optimizer + self.ema + self.frozen + self.batch
        return resident + max(self.gathered + self.casts + self.activations, self.optimizer_step)


@dataclass(frozen=True)
class Segment:
    """A part of a stage in which the same tricks are active.

    Args:
        share: of the stage's steps.
        count: of a step.
        frozen: bytes of the frozen weights that it needs.
        active: names of these tricks.
    """

    share: float
    count: StepCount
    frozen: int
    active: frozenset[str] = frozenset()

    @property
    def kernels(self) -> Sequence[Kernel]:
        return self.count.kernels

    @property
    def images(self) -> int:
        return self.count.images


def memory(planned: MetaModel, recipe: Recipe, num_gpus: int, span: Span, segments: list[Segment]) -> Memory:
    """Return the memory of one GPU in one stage, which consists of segments."""
    state = training_state(planned, sharding(recipe, num_gpus))
    fsdp = (recipe.parallelism_config or {}).get("fsdp") or {}
    checkpointing = bool(fsdp.get("activation_checkpointing"))
    counts, widths = [segment.count for segment in segments], _widths(recipe)
    in_blocks, outside = widths.block == FP32, widths.outside == FP32  # what autocast has left to cast
    casts = [in_blocks * count.block_copies + outside * (count.copies - count.block_copies) for count in counts]
    kept = max(count.kept_with_checkpoints if checkpointing else count.kept for count in counts)
    return Memory(
        weights=state.weights,
        gradients=state.weights,
        optimizer=state.optimizer,
        ema=state.ema,
        gathered=_gathered(planned, recipe, num_gpus),
        frozen=max(segment.frozen for segment in segments),
        casts=max(casts),
        batch=span.batch_size // num_gpus * 3 * span.image_size**2,
        activations=span.microbatch_size * kept,
        # fp32 updates, their 16-bit copies on the way, the iteration's own, and fp32 results
        optimizer_step=state.muon * 14 // FP32,
    )


def _gathered(planned: MetaModel, recipe: Recipe, num_gpus: int) -> int:
    whole = bytes_of(planned.trained.values())
    if recipe.parallelism_config is None:
        return whole if num_gpus > 1 else 0
    blocks = [bytes_of(p for p in block.parameters() if p.requires_grad) for block in blocks_of(planned.model.backbone)]
    outside, at_work = whole - sum(blocks), 2 * max(blocks, default=0)  # a block at work, and one on its way
    fsdp, widths = recipe.parallelism_config.get("fsdp") or {}, _widths(recipe)
    together = at_work if fsdp.get("reshard_after_forward", True) else sum(blocks)
    return (together * widths.block + outside * widths.outside) // FP32 + at_work + outside
