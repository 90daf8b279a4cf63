"""Bytes of a run's state, of its checkpoints and of what one GPU holds at its fullest."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from prx_composer import registry
from prx_composer.commands.plan.cost_parts import ImageShape, Part
from prx_composer.commands.plan.planned_model import PlannedModel
from prx_composer.common.errors import UserError
from prx_composer.models.activations import backbone_activations
from prx_composer.models.layers import PRXBlock
from prx_composer.optim.muon import Muon, muon_parameters
from prx_composer.recipe.arguments import entries, split
from prx_composer.recipe.config import Recipe

FP32 = 4
RESERVE = 0.1  # of a GPU's memory: CUDA's context, communication buffers, fragments, what runs without gradients


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


def _bytes(parameters: Iterable[nn.Parameter], shards: int = 1) -> int:
    """Of one of `shards` equal parts, cut along the first dimension, the last of which may be padded."""
    return sum(p.element_size() * (p.numel() if shards == 1 else -(-p.shape[0] // shards) * p[:1].numel()) for p in parameters)


def muon_matrices(planned: PlannedModel, recipe: Recipe) -> list[nn.Parameter]:
    """The weights that the recipe trains with Muon, if it does; raises UserError if there is nothing for it to train."""
    name, arguments = split(recipe.optimizer, "optimizer")
    cls = registry.optimizers.get(name, "optimizer")
    if not (inspect.isclass(cls) and issubclass(cls, Muon)):
        return []
    try:
        return list(muon_parameters(planned.model, arguments.get("exclude") or ()).values())
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error


def training_state(planned: PlannedModel, recipe: Recipe, shards: int = 1) -> State:
    """Of one GPU that holds one of `shards` parts; of the whole run with one.

    Raises:
        UserError: an optimizer that has nothing to train.
    """
    trained = list(planned.trained.values())
    weights = _bytes(trained, shards)
    average = weights if any(name == "ema" for name, _ in entries(recipe.algorithms, "algorithms")) else 0
    name, arguments = split(recipe.optimizer, "optimizer")
    cls = registry.optimizers.get(name, "optimizer")
    if not inspect.isclass(cls):
        cls = object
    if matrices := muon_matrices(planned, recipe):
        taken = {id(p) for p in matrices}
        rest, muon = [p for p in trained if id(p) not in taken], _bytes(matrices, shards)
        return State(weights, muon + 2 * _bytes(rest, shards) + FP32 * len(rest), average, muon)
    if issubclass(cls, torch.optim.SGD):
        return State(weights, weights if arguments.get("momentum") else 0, average)
    if not issubclass(cls, torch.optim.Adam | torch.optim.AdamW):
        planned.unknown.append(f"optimizer: {name} is taken to keep two numbers per weight, as Adam does")
    moments = 3 if arguments.get("amsgrad") else 2
    return State(weights, moments * weights + FP32 * len(trained), average)


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


def memory(
    planned: PlannedModel,
    recipe: Recipe,
    num_gpus: int,
    batch_size: int,
    microbatch_size: int,
    segments: list[tuple[ImageShape, list[Part]]],
) -> Memory:
    """Of one GPU in one stage.

    Args:
        batch_size, microbatch_size: of one GPU.
        segments: for each part of the stage, what an image is then and which parts are active.
    """
    shards = sharding(recipe, num_gpus)
    state = training_state(planned, recipe, shards)
    fsdp = (recipe.parallelism_config or {}).get("fsdp") or {}
    trained = planned.trained
    casts = 2 * sum(p.numel() for p in trained.values() if p.ndim >= 2) if planned.amp else 0
    config = planned.model.backbone.config

    def of_image(shape: ImageShape, parts: list[Part]) -> int:
        denoiser = backbone_activations(
            config,
            shape.image_tokens,
            shape.text_tokens,
            amp=planned.amp,
            tokens_per_block=list(shape.tokens_per_block),
            checkpointing=bool(fsdp.get("activation_checkpointing")),
        )
        return denoiser + sum(part.activations(shape) for part in parts)

    return Memory(
        weights=state.weights,
        gradients=state.weights,
        optimizer=state.optimizer,
        ema=state.ema,
        gathered=_gathered(planned, recipe, num_gpus),
        frozen=max(sum(part.frozen for part in parts) for _, parts in segments),
        casts=casts,
        batch=batch_size * 3 * max(shape.image_size for shape, _ in segments) ** 2,
        activations=microbatch_size * max(of_image(shape, parts) for shape, parts in segments),
        # fp32 updates, their 16-bit copies on the way, the iteration's own, and fp32 results
        optimizer_step=state.muon * 14 // FP32,
    )


def _gathered(planned: PlannedModel, recipe: Recipe, num_gpus: int) -> int:
    trained = planned.trained
    whole = _bytes(trained.values())
    if recipe.parallelism_config is None:
        return whole if num_gpus > 1 else 0
    blocks = [
        _bytes(p for p in module.parameters() if p.requires_grad)
        for module in planned.model.backbone.modules()
        if isinstance(module, PRXBlock)
    ]
    outside = whole - sum(blocks)
    fsdp = recipe.parallelism_config.get("fsdp") or {}
    weights = outside + 2 * max(blocks) if fsdp.get("reshard_after_forward", True) else whole
    return weights + outside + 2 * max(blocks)  # gradients: of a block at work, and of one on its way
