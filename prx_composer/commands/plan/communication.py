"""Bytes that a GPU sends in one optimizer step, by what they are for; `benchmarks/distributed.py` counts them on real ranks.

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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from composer.core import Precision
from composer.distributed.mosaic_parallelism import get_mixed_precision
from torch import nn

from prx_composer import registry
from prx_composer.commands.plan.memory import muon_matrices, sharding
from prx_composer.commands.plan.planned_model import PlannedModel
from prx_composer.models.layers import PRXBlock
from prx_composer.optim.exchange import Plan, plan_for
from prx_composer.recipe.arguments import split
from prx_composer.recipe.config import Recipe, build

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
    planned: PlannedModel, recipe: Recipe, num_gpus: int, microbatches: int, muon: Plan | None, on_gpu: bool = True
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


def muon_plan(planned: PlannedModel, recipe: Recipe, num_gpus: int) -> Plan | None:
    """Which GPU orthogonalises what; None without Muon. Raises UserError for an optimizer with nothing to train."""
    if not muon_matrices(planned, recipe):
        return None
    name, arguments = split(recipe.optimizer, "optimizer")
    groups = build(registry.optimizers, name, arguments, "optimizer", model=planned.model).param_groups
    muon = [(index, group) for index, group in enumerate(groups) if group["algorithm"] == "muon"]
    weights = [(index, group["pieces"], weight) for index, group in muon for weight in group["params"]]
    grid = Grid.of(recipe, num_gpus)
    return plan_for(weights, grid.replicas, grid.shards)


def _ddp(planned: PlannedModel, num_gpus: int, microbatches: int) -> list[Traffic]:
    gradients = sum(p.numel() * p.element_size() for p in planned.trained.values())
    return [Traffic(DDP, 2 * (num_gpus - 1) / num_gpus * gradients, num_gpus, BACKWARD / microbatches)]


def _fsdp(planned: PlannedModel, recipe: Recipe, grid: Grid, microbatches: int) -> list[Traffic]:
    fsdp = (recipe.parallelism_config or {}).get("fsdp") or {}
    weight, gradient = _widths(recipe, fsdp)
    shard = _padded_shard(planned.trained.values(), grid.shards)
    gathered = (grid.shards - 1) * shard
    found = []
    reshard = fsdp.get("reshard_after_forward", True)
    if reshard is not False:  # True, or the number of neighbours that keep a copy until the backward pass
        neighbours = grid.shards if reshard is True else int(reshard)
        blocks = (p for m in planned.model.backbone.modules() if isinstance(m, PRXBlock) for p in m.parameters())
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
