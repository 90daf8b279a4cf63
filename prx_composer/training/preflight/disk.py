"""Who the run folder belongs to, whether it can be written, and whether the checkpoints fit."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from composer.core import TimeUnit

from prx_composer.recipe.config import Recipe
from prx_composer.runs.folder import CHECKPOINTS, holds_run
from prx_composer.schedule.moments import SECONDS, Point, parse_duration
from prx_composer.training.components import Components
from prx_composer.training.preflight.result import Result, failed, guarded, passed, skipped
from prx_composer.training.state_bytes import checkpoint_bytes


def check_storage(recipe: Recipe, parts: Components) -> Iterator[Result]:
    """Who the run folder belongs to, whether it can be written, and whether the checkpoints fit its file system."""
    folder = Path(recipe.run_folder)
    if (problem := why_not_writable(folder)) is not None:
        yield failed(f"run_folder: {folder} cannot be written: {problem}. Set run_folder to another place.")
        return

    def whose() -> Iterator[Result]:
        fact = "holds this run, which goes on" if holds_run(recipe, folder) else "is free and can be written"
        yield passed("run_folder", f"{folder} {fact}")

    yield from guarded(whose())
    if parts.problems:
        yield skipped("disk", "names and arguments must be right first")
    else:
        yield from guarded(_check_room(recipe, folder))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def why_not_writable(folder: Path) -> str | None:
    """Makes a file in a folder, or in the nearest parent that is there, and deletes it again; returns why that fails, or None."""
    parent = _existing(folder)
    if not parent.is_dir():
        return f"{parent} is a file"
    try:
        with tempfile.TemporaryFile(dir=parent, prefix=".prx-check-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def checkpoints_to_keep(recipe: Recipe) -> int | None:
    """How many checkpoints lie on the disk at most: one more than are kept, while it is written. None if that can't be known."""
    keep = recipe.save_num_checkpoints_to_keep
    if keep >= 0:
        return max(keep, 1) + 1
    try:
        interval, duration = Point.parse_interval(recipe.save_interval), Point.parse(recipe.max_duration)
    except ValueError:
        return None
    if interval.unit == TimeUnit.DURATION.value:
        return math.ceil(1 / interval.value)
    if interval.unit == SECONDS and recipe.time_budget is not None:
        return math.ceil(parse_duration(recipe.time_budget) / interval.value)
    return math.ceil(duration.value / interval.value) if interval.unit == duration.unit else None


def _check_room(recipe: Recipe, folder: Path) -> Iterator[Result]:
    count = checkpoints_to_keep(recipe)
    if count is None:
        units = f"save_interval {recipe.save_interval} and max_duration {recipe.max_duration} are not in one unit"
        yield skipped("disk", f"save_num_checkpoints_to_keep is {recipe.save_num_checkpoints_to_keep} (all), and {units}")
        return
    try:
        size = checkpoint_bytes(recipe)
    except (ValueError, OSError) as error:
        yield skipped("disk", f"the size of a checkpoint is not known ({error})")
        return
    written = sum(path.stat().st_size for path in (folder / CHECKPOINTS).rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(_existing(folder)).free, max(count * size - written, 0)
    what = f"{count} checkpoints of {size / 1e9:.2f} GB"
    if written:
        what += f", {written / 1e9:.2f} GB of which are there"
    if free < needed:
        fitting = int((free + written) / size) - 1
        keep = f"save_num_checkpoints_to_keep to {fitting} or less, or " if fitting >= 1 else ""
        remedy = f"Set {keep}run_folder to a larger disk{', where you have moved it' if written else ''}."
        yield failed(
            f"run_folder: {_existing(folder)} has {free / 1e9:.2f} GB free, but the run needs {needed / 1e9:.2f} GB for {what}. "
            + remedy
        )
    else:
        yield passed("disk", f"{free / 1e9:,.1f} GB free, {needed / 1e9:.2f} GB needed for {what}")
