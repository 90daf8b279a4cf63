"""Batches that must divide over ranks and into microbatches, and image sizes that must divide into patches."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from prx_composer.common.errors import Problems, UserError

STAGES = "algorithms.progressive_resolution.stages"


def stages_of(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Path and keys of what the loader begins with, and of every stage."""
    spec = values.get("algorithms", {}).get("progressive_resolution")
    listed = spec.get("stages") if isinstance(spec, dict) else None
    stages = [(f"{STAGES}[{index}].", stage) for index, stage in enumerate(listed if isinstance(listed, list) else [])]
    return [("", values), *((path, stage) for path, stage in stages if isinstance(stage, Mapping))]


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def check_batch_sizes(path: str, global_batch_size: int, microbatch_size: int, num_ranks: int) -> None:
    """Raises UserError, naming the YAML path, unless the batch divides into ranks and whole microbatches."""
    if min(global_batch_size, microbatch_size) < 1:
        raise UserError(f"{path}global_train_batch_size and device_train_microbatch_size must be at least 1.")
    if global_batch_size % num_ranks:
        raise UserError(
            f"{path}global_train_batch_size: {global_batch_size} does not divide over {num_ranks} ranks; "
            f"try {max(global_batch_size // num_ranks, 1) * num_ranks}."
        )
    device_batch_size = global_batch_size // num_ranks
    if device_batch_size % microbatch_size:
        fitting = max(d for d in range(1, microbatch_size + 1) if device_batch_size % d == 0)
        raise UserError(
            f"{path}device_train_microbatch_size: {microbatch_size} does not divide the device batch "
            f"{global_batch_size} / {num_ranks} ranks = {device_batch_size}; try {fitting}."
        )


def batch_problems(values: Mapping[str, Any], num_ranks: int) -> list[str]:
    """What doesn't divide, of training and of evaluation; what is no number is left to who checks types."""
    problems = Problems()
    for path, stage in stages_of(values):
        batch, microbatch = stage.get("global_train_batch_size"), stage.get("device_train_microbatch_size")
        if _is_count(batch):
            microbatch = max(batch // num_ranks, 1) if microbatch is None else microbatch
            with problems.noted():
                check_batch_sizes(path, batch, microbatch if _is_count(microbatch) else 1, num_ranks)
    size = values.get("global_eval_batch_size") or values.get("global_train_batch_size")
    if values.get("eval_loader") is not None and size is not None:
        with problems.noted():
            if size < 1:
                raise UserError(f"global_eval_batch_size: {size} must be at least 1.")
            check_batch_sizes("global_eval_batch_size as ", size, size // num_ranks or 1, num_ranks)
    return list(dict.fromkeys(problems.found))


def image_size_problems(values: Mapping[str, Any], patch_size: int, downsampling: int) -> list[str]:
    """Image sizes that the model cannot cut into patches."""
    multiple = patch_size * downsampling
    by = f" × autoencoder downsampling {downsampling}" if downsampling > 1 else ""
    sizes = [(path, stage.get("image_size")) for path, stage in stages_of(values)]
    return [
        f"{path}image_size: {size} is not divisible by model.backbone.patch_size {patch_size}{by}; "
        f"try {max(round(size / multiple), 1) * multiple}."
        for path, size in sizes
        if _is_count(size) and (size < 1 or size % multiple)
    ]


def downsampling_of(config: Mapping[str, Any]) -> int | None:
    """Image side / latent side of a diffusers autoencoder; None if its configuration doesn't say."""
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return None if stages is None else 2 ** (len(stages) - 1)
