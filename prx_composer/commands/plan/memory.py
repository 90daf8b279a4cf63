"""What one GPU holds at its fullest, and the checkpoints that a run writes."""

import math
from dataclasses import dataclass

from torch import nn

from prx_composer.commands.plan.timeline import Timeline
from prx_composer.common.errors import UserError, at_path
from prx_composer.models.counting import StepCount
from prx_composer.recipe.config import Recipe
from prx_composer.schedule.moments import SECONDS, Point
from prx_composer.training.meta_model import MetaModel, bytes_of, training_state

FP32 = 4
RESERVE = 0.1  # of a GPU's memory: CUDA's context, communication buffers, fragments, what runs without gradients


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU when it is fullest, by what they are for.

    Args:
        weights, gradients, optimizer, ema: this GPU's part of them, fp32.
        gathered: FSDP2: whole weights and gradients of the blocks at work and of what lies outside of blocks; DDP: its buckets.
        frozen: text encoder and teachers.
        casts: 16-bit copies of the weights that autocast makes and the backward pass needs.
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
    def resident(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.frozen + self.batch

    @property
    def peak(self) -> int:
        return self.resident + max(self.gathered + self.casts + self.activations, self.optimizer_step)


def sharding(recipe: Recipe, num_gpus: int) -> int:
    """Into how many parts the state is cut: one under DDP; under FSDP2 all GPUs, or `shard_degree` of them (HSDP)."""
    if recipe.parallelism_config is None:
        return 1
    degree = (recipe.parallelism_config.get("fsdp") or {}).get("shard_degree", -1)
    return num_gpus if degree == -1 else degree


@dataclass(frozen=True)
class Segment:
    """A part of a stage in which the same tricks are active.

    Args:
        share: of the stage's steps.
        count: of a step.
        frozen: bytes of the frozen weights that it needs.
    """

    share: float
    count: StepCount
    frozen: int


def memory(
    planned: MetaModel,
    recipe: Recipe,
    num_gpus: int,
    image_size: int,
    batch_size: int,
    microbatch_size: int,
    segments: list[Segment],
) -> Memory:
    """Return the memory of one GPU in one stage.

    Args:
        batch_size, microbatch_size: of one GPU.
        segments: of the stage.
    """
    state = training_state(planned, sharding(recipe, num_gpus))
    fsdp = (recipe.parallelism_config or {}).get("fsdp") or {}
    checkpointing = bool(fsdp.get("activation_checkpointing"))
    counts = [segment.count for segment in segments]
    return Memory(
        weights=state.weights,
        gradients=state.weights,
        optimizer=state.optimizer,
        ema=state.ema,
        gathered=_gathered(planned, recipe, num_gpus),
        frozen=max(segment.frozen for segment in segments),
        casts=max(count.copies for count in counts),
        batch=batch_size * 3 * image_size**2,
        activations=microbatch_size * max(count.kept_with_checkpoints if checkpointing else count.kept for count in counts),
        # fp32 updates, their 16-bit copies on the way, the iteration's own, and fp32 results
        optimizer_step=state.muon * 14 // FP32,
    )


def blocks_of(planned: MetaModel) -> list[nn.Module]:
    """Return what FSDP2 shards as one unit each: nothing of a backbone that doesn't say."""
    backbone = planned.model.backbone
    is_unit = getattr(backbone, "fsdp_wrap_fn", lambda module: False)
    return [module for module in backbone.modules() if is_unit(module)]


def _gathered(planned: MetaModel, recipe: Recipe, num_gpus: int) -> int:
    whole = bytes_of(planned.trained.values())
    if recipe.parallelism_config is None:
        return whole if num_gpus > 1 else 0
    blocks = [bytes_of(p for p in block.parameters() if p.requires_grad) for block in blocks_of(planned)]
    outside = whole - sum(blocks)
    fsdp = recipe.parallelism_config.get("fsdp") or {}
    weights = outside + 2 * max(blocks, default=0) if fsdp.get("reshard_after_forward", True) else whole
    return weights + outside + 2 * max(blocks, default=0)  # gradients: of a block at work, and of one on its way


@dataclass(frozen=True)
class CheckpointPlan:
    """Checkpoints of the full state: bytes and seconds of one, how many over the run, bytes of those that lie on disk at once."""

    bytes: int
    seconds: float
    count: int
    on_disk: int


def plan_checkpoints(size: int, recipe: Recipe, line: Timeline, training_hours: float, disk: float) -> CheckpointPlan:
    """Counts them as the recipe's `save_interval` has it.

    Args:
        size: bytes of one.
        line: the run in steps.
        training_hours: for intervals in time.
        disk: bytes per second at which one is written.

    Raises:
        UserError: an interval that is none, or in epochs of data whose size isn't known.
    """
    with at_path("save_interval"):
        interval = Point.parse_interval(recipe.save_interval)
    length = {SECONDS: training_hours * 3600, "ba": line.steps, "sp": line.samples, "dur": 1.0}
    if line.epoch is not None:
        length["ep"] = line.samples / line.epoch
    if interval.unit not in length:
        raise UserError(f"save_interval: {recipe.save_interval} of data that isn't here; say how many images with --samples.")
    count = max(1, math.ceil(length[interval.unit] / interval.value - 1e-9))  # the last is written at the end, whenever that is
    kept = count if recipe.save_num_checkpoints_to_keep < 0 else min(count, max(recipe.save_num_checkpoints_to_keep, 1) + 1)
    return CheckpointPlan(size, size / disk, count, kept * size)
