"""How many checkpoints a run writes, how long that takes, and how much disk they need at once."""

import math
from dataclasses import dataclass

from prx_composer.commands.plan.timeline import Timeline
from prx_composer.common.errors import UserError, at_path
from prx_composer.recipe.config import Recipe
from prx_composer.schedule.moments import SECONDS, Point


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
