"""The stages of a run as they went, beside what the recipe planned."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from prx_composer.commands.plan.timeline import timeline
from prx_composer.commands.report.reported_run import Run
from prx_composer.common.errors import UserError
from prx_composer.recipe.config import Recipe


@dataclass(frozen=True)
class Switch:
    """A vertical mark: a stage begins after this step."""

    batch: int
    label: str


@dataclass(frozen=True)
class StageRow:
    """A stage as it went.

    Args:
        image_size: pixels.
        until, batch_size: as the recipe has them.
        start, end: steps before its first and at its last.
        planned_end: by the recipe; None if that can't be said.
        seconds: of training.
        speed: median images per second and GPU.
        loss: the median of its last tenth of steps.
    """

    image_size: int | None
    until: str | None
    batch_size: int | None
    start: int
    end: int
    planned_end: int | None
    seconds: float | None
    speed: float | None
    loss: float | None


def _starts(run: Run) -> list[tuple[int, int | None]]:
    """Return for each stage the step before its first, and its image size."""
    column = run.history.columns.get("stage/image_size")
    if column is None:
        return [(0, run.recipe.get("image_size"))] if run.history.steps else []
    batches, values = column.batches, column.values
    changes = [0, *(np.flatnonzero(np.diff(values)) + 1)]
    return [(0 if index == 0 else int(batches[index - 1]), int(values[index])) for index in changes]


def switches(run: Run) -> list[Switch]:
    """Return where a stage followed another."""
    return [Switch(start, f"{size} px") for start, size in _starts(run)[1:]]


def stage_rows(run: Run) -> list[StageRow]:
    """Return the stages that were trained, in order."""
    starts, history = _starts(run), run.history
    listed: Any = run.part("algorithms", "progressive_resolution").get("stages") or []
    planned = _planned_ends(run)
    ends = [*(start for start, _ in starts[1:]), history.steps][: len(starts)]
    rows = []
    for index, ((start, size), end) in enumerate(zip(starts, ends, strict=True)):
        given = listed[index] if index < len(listed) and isinstance(listed[index], dict) else {}
        before, after = (0.0 if start == 0 else history.seconds_at(start)), history.seconds_at(end)
        rows.append(
            StageRow(
                size,
                given.get("until"),
                given.get("global_train_batch_size", run.recipe.get("global_train_batch_size")),
                start,
                end,
                planned[index] if index < len(planned) else None,
                None if before is None or after is None else after - before,
                _median(run, "throughput/device/samples_per_sec", start, end),
                _median(run, "loss/train/total", end - max((end - start) // 10, 1), end),
            )
        )
    return rows


def _planned_ends(run: Run) -> list[int]:
    """Return the last steps of the stages by the recipe; none if they cannot be said."""
    try:
        return [span.end for span in timeline(Recipe(**run.recipe), run.ranks or 1, None).spans]
    except (UserError, TypeError, ValueError, AttributeError, KeyError):  # of another version, or in epochs
        return []


def _median(run: Run, name: str, start: int, end: int) -> float | None:
    """Return the median of a metric over the steps in (start, end]."""
    column = run.history.columns.get(name)
    if column is None:
        return None
    batches, values = column.batches, column.values
    inside = values[(batches > start) & (batches <= end) & np.isfinite(values)]
    return float(np.median(inside)) if len(inside) else None


def gpu_hours(run: Run) -> float | None:
    """Return the GPU-hours of all starts, each with its own number of processes.

    Time that ran beside no record of a start is counted with the processes of the first that is known.
    """
    if run.elapsed is None or run.ranks is None:
        return None
    recorded = [s for s in run.starts if isinstance(s.get("ranks"), int) and isinstance(s.get("spent"), int | float)]
    if not recorded:
        return run.elapsed * run.ranks / 3600
    ends = [*(min(float(start["spent"]), run.elapsed) for start in recorded), run.elapsed]
    total = ends[0] * recorded[0]["ranks"]
    total += sum(max(end - begin, 0) * s["ranks"] for s, (begin, end) in zip(recorded, pairwise(ends), strict=True))
    return total / 3600
