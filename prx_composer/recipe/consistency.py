"""Stages of a recipe, and numbers that must fit one another: batches the ranks, image sizes the patches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from prx_composer.common.errors import Problems, UserError, at_path
from prx_composer.schedule.moments import ScheduleWindow

Values = Mapping[str, Any]

# -------------------------------------------------------------------------------------------------------------------- stages

STAGES = "algorithms.progressive_resolution.stages"


def stages_of(values: Values) -> list[tuple[str, Mapping[str, Any]]]:
    """Return path and keys of what the loader begins with, and of every stage."""
    spec = values.get("algorithms", {}).get("progressive_resolution")
    listed = spec.get("stages") if isinstance(spec, dict) else None
    stages = [(f"{STAGES}[{index}].", stage) for index, stage in enumerate(listed if isinstance(listed, list) else [])]
    return [("", values), *((path, stage) for path, stage in stages if isinstance(stage, Mapping))]


@dataclass(frozen=True)
class PlannedStage:
    """A span of the run with one image size and one batch.

    Args:
        path: what comes before `image_size` and its like in the YAML path.
        image_size: side of the square whose area the images have.
        global_batch_size, microbatch_size: images per step over all ranks, and per forward pass of one.
        num_ranks: that share a batch.
        window: from when to when it lasts.
    """

    path: str
    image_size: int
    global_batch_size: int
    microbatch_size: int
    num_ranks: int
    window: ScheduleWindow

    @property
    def device_batch_size(self) -> int:
        return self.global_batch_size // self.num_ranks

    def __str__(self) -> str:
        return f"{self.image_size} px, batch {self.global_batch_size}"


def planned_stages(values: Values, num_ranks: int) -> list[PlannedStage]:
    """Return the stages of a recipe that is right, or the whole run as the only one. The last goes on to the end of the run."""
    planned, start = list[PlannedStage](), "0ba"
    listed = stages_of(values)[1:] or [("", values)]
    for path, stage in listed:
        batch_size: int = stage["global_train_batch_size"]
        microbatch_size = microbatch_of(batch_size, stage.get("device_train_microbatch_size"), num_ranks)
        until = stage.get("until") if path != listed[-1][0] else None
        with at_path(f"{path}until"):
            window = ScheduleWindow(start, until)
        planned.append(PlannedStage(path, stage["image_size"], batch_size, microbatch_size, num_ranks, window))
        start = until or start
    return planned


def strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every string in a value of a recipe, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, f"{path}[{index}]")


# ------------------------------------------------------------------------------------------------------------------ sizes


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def microbatch_of(global_batch_size: int, given: int | None, num_ranks: int) -> int:
    """Return the images per forward pass of one rank: by default its whole share of the batch."""
    return max(global_batch_size // num_ranks, 1) if given is None else given


def check_batch_sizes(path: str, global_batch_size: int, microbatch_size: int, num_ranks: int) -> None:
    """Raise UserError, naming the YAML path, unless the batch divides into ranks and whole microbatches."""
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


def batch_problems(values: Values, num_ranks: int) -> list[str]:
    """Return what doesn't divide, of training and of evaluation; what is no number is left to who checks types."""
    problems = Problems()
    for path, stage in stages_of(values):
        batch, microbatch = stage.get("global_train_batch_size"), stage.get("device_train_microbatch_size")
        if _is_count(batch):
            microbatch = microbatch_of(batch, microbatch, num_ranks)
            with problems.noted():
                check_batch_sizes(path, batch, microbatch if _is_count(microbatch) else 1, num_ranks)
    size = values.get("global_eval_batch_size") or values.get("global_train_batch_size")
    if values.get("eval_loader") is not None and size is not None:
        with problems.noted():
            if size < 1:
                raise UserError(f"global_eval_batch_size: {size} must be at least 1.")
            check_batch_sizes("global_eval_batch_size as ", size, size // num_ranks or 1, num_ranks)
    return list(dict.fromkeys(problems.found))


def image_size_problems(values: Values, patch_size: int, downsampling: int) -> list[str]:
    """Return the image sizes that the model cannot cut into patches."""
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
    """Return image side / latent side of a diffusers autoencoder; None if its configuration doesn't say."""
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return None if stages is None else 2 ** (len(stages) - 1)
