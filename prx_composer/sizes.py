"""Batches that must divide over ranks and into microbatches, and image sizes that must divide into patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prx_composer.errors import Problems, UserError

__all__ = ["StageSizes", "batch_problems", "check_batch_sizes", "downsampling_of", "image_size_problems", "stages_of"]

STAGES = "algorithms.progressive_resolution.stages"


@dataclass(frozen=True)
class StageSizes:
    """What of a stage must divide.

    Args:
        path: what comes before `image_size` and its like in the YAML path.
        image_size: side of the square whose area the images have.
        global_batch_size, microbatch_size: images per step over all ranks, and per forward pass of one.
    """

    path: str
    image_size: int
    global_batch_size: int
    microbatch_size: int


def stages_of(values: Mapping[str, Any], num_ranks: int) -> list[StageSizes]:
    """The sizes that the loader begins with, then those of the stages, as far as they are numbers."""
    spec = values.get("algorithms", {}).get("progressive_resolution")
    listed = spec.get("stages") if isinstance(spec, dict) else None
    found = [("", values), *((f"{STAGES}[{i}].", s) for i, s in enumerate(listed if isinstance(listed, list) else []))]
    sizes = [_sizes(path, given, num_ranks) for path, given in found if isinstance(given, Mapping)]
    return [size for size in sizes if size is not None]


def _sizes(path: str, given: Mapping[str, Any], num_ranks: int) -> StageSizes | None:
    image_size, batch, micro = (
        given.get(key) for key in ("image_size", "global_train_batch_size", "device_train_microbatch_size")
    )
    if not _is_count(image_size) or not _is_count(batch) or not (micro is None or _is_count(micro)):
        return None  # said by who checks types
    return StageSizes(path, image_size, batch, max(batch // num_ranks, 1) if micro is None else micro)


def _is_count(value: Any) -> bool:
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


def batch_problems(values: Mapping[str, Any], stages: Sequence[StageSizes], num_ranks: int) -> list[str]:
    """What doesn't divide, of training and of evaluation."""
    problems = Problems()
    for stage in stages:
        with problems.noted():
            check_batch_sizes(stage.path, stage.global_batch_size, stage.microbatch_size, num_ranks)
    size = values.get("global_eval_batch_size") or values.get("global_train_batch_size")
    if values.get("eval_loader") is not None and size is not None:
        with problems.noted():
            check_batch_sizes("global_eval_batch_size as ", size, size // num_ranks or 1, num_ranks)
    return list(dict.fromkeys(problems.found))


def image_size_problems(stages: Sequence[StageSizes], patch_size: int, downsampling: int) -> list[str]:
    """Image sizes that the model cannot cut into patches."""
    multiple = patch_size * downsampling
    by = f" × autoencoder downsampling {downsampling}" if downsampling > 1 else ""
    return [
        f"{stage.path}image_size: {stage.image_size} is not divisible by model.backbone.patch_size {patch_size}{by}; "
        f"try {max(round(stage.image_size / multiple), 1) * multiple}."
        for stage in stages
        if stage.image_size < 1 or stage.image_size % multiple
    ]


def downsampling_of(config: Mapping[str, Any]) -> int | None:
    """Image side / latent side of a diffusers autoencoder; None if its configuration doesn't say."""
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return None if stages is None else 2 ** (len(stages) - 1)
