"""A run as a report reads it from its folder: what it logged, its stages as they went, and in words what is missing.

metrics.jsonl is read as columns, whatever a crash, a resume or another program left in it.
"""

import difflib
import json
import math
import re
from array import array
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from prx_composer.commands.plan.timeline import timeline
from prx_composer.common.errors import UserError, redacted, redacted_text
from prx_composer.recipe.config import Recipe
from prx_composer.runs.folder import CONFIG, ENVIRONMENT, read_metrics

METRICS = "metrics.jsonl"
SHOWN_NEIGHBOURS = 5
Numbers = NDArray[np.float64]


class Column:
    """A metric: `batches`, strictly increasing, and `values`, NaN where they were not finite."""

    def __init__(self) -> None:
        self._batches, self._values = array("q"), array("d")

    def append(self, batch: int, value: float) -> None:
        self._batches.append(batch)
        self._values.append(value)

    def rewind(self, batch: int) -> None:
        """Forget `batch` and all after it."""
        while self._batches and self._batches[-1] >= batch:
            self._batches.pop()
            self._values.pop()

    def times(self, factor: float) -> "Column":
        """Return the same metric in another unit."""
        scaled = Column()
        scaled._batches, scaled._values = self._batches, array("d", (value * factor for value in self._values))
        return scaled

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def batches(self) -> Numbers:
        return np.array(self._batches, dtype=np.float64)

    @property
    def values(self) -> Numbers:
        return np.array(self._values, dtype=np.float64)

    @property
    def last(self) -> float:
        return self._values[-1]


class History:
    """What a run logged, as columns.

    A step that comes again, after a resume from an older checkpoint, replaces what was there from it on. Lines that cannot be
    read, as a crash cuts them, are counted in `unreadable` and left out.
    """

    def __init__(self, path: Path):
        self.columns: dict[str, Column] = {}
        self.unreadable = 0
        self.repeated = 0  # lines that later ones replaced
        steps = Column()
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    self._read(line, steps)
        self.columns = {name: column for name, column in self.columns.items() if len(column)}
        self.batches = steps.batches
        self.seconds = steps.values  # of training, at each of `batches`

    def _read(self, line: bytes, steps: Column) -> None:
        try:
            row = json.loads(line)
            batch = int(row["batch"])
        except (ValueError, TypeError, KeyError):
            self.unreadable += bool(line.strip())
            return
        if len(steps) and batch <= steps._batches[-1]:
            before = len(steps)
            for column in (steps, *self.columns.values()):
                column.rewind(batch)
            self.repeated += before - len(steps)
        seconds = row.get("seconds")
        steps.append(batch, float(seconds) if isinstance(seconds, int | float) else math.nan)
        for name, value in row.items():
            if name not in ("batch", "seconds") and (value is None or isinstance(value, int | float)):
                self.columns.setdefault(name, Column()).append(batch, math.nan if value is None else float(value))

    @property
    def steps(self) -> int:
        return int(self.batches[-1]) if len(self.batches) else 0

    @property
    def finished(self) -> bool:
        """Say whether the last line is a finished run's."""
        column = self.columns.get("train_seconds")
        return column is not None and bool(column.batches[-1] == self.steps)

    def last(self, name: str) -> float | None:
        column = self.columns.get(name)
        return column.last if column is not None else None

    def seconds_at(self, batch: float) -> float | None:
        """Return the seconds of training at the end of a step."""
        known = np.isfinite(self.seconds)
        return float(np.interp(batch, self.batches[known], self.seconds[known])) if known.any() else None


def spread(items: list[int], most: int) -> list[int]:
    """Return at most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


@dataclass
class Run:
    """A run, as its folder has it.

    Args:
        recipe: as saved, without secrets; empty if it wasn't.
        recipe_text: the file's, without secrets; None without a file.
        starts: the lines of environment.jsonl, one for every start.
        elapsed: seconds that were paid for, with what a crash lost; None if unknown.
        grids: step → picture of the samples.
        spikes: the lines of spikes.jsonl.
        written: when metrics.jsonl was last written, UTC.
    """

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str | None
    history: History
    starts: list[dict[str, Any]]
    elapsed: float | None
    grids: dict[int, Path]
    spikes: list[dict[str, Any]]
    written: datetime | None

    @property
    def name(self) -> str:
        return str(self.recipe.get("run_name") or self.folder.resolve().name)

    def part(self, *keys: str) -> dict[str, Any]:
        """Return a mapping inside of the recipe; empty if there is none."""
        found: Any = self.recipe
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def ranks(self) -> int | None:
        """Return how many processes the last start had, one per GPU; from the speeds where the run didn't record it."""
        if self.starts and isinstance(self.starts[-1].get("ranks"), int):
            return self.starts[-1]["ranks"]
        together = self.history.last("throughput/samples_per_sec")
        each = self.history.last("throughput/device/samples_per_sec")
        return round(together / each) if together and each and together == together and each == each else None

    @property
    def devices(self) -> dict[str, int]:
        """Return the devices of the last start: name → number."""
        devices = self.starts[-1].get("devices") if self.starts else None
        return devices if isinstance(devices, dict) else {}


def read_run(path: str) -> Run:
    """Read a run. Raise UserError, naming runs nearby, for a path that isn't a run's folder."""
    folder = Path(path)
    if not _is_run(folder):
        raise UserError(_no_run(folder))
    try:
        recipe_text, recipe = _recipe(folder)
        history = History(folder / METRICS)
        written = datetime.fromtimestamp((folder / METRICS).stat().st_mtime, UTC) if (folder / METRICS).exists() else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    starts = [start | {"command": redacted_text(str(start.get("command") or ""))} for start in _lines(folder / ENVIRONMENT)]
    clock = _lines(folder / "clock.json")
    elapsed = clock[0].get("elapsed") if clock else None
    if not isinstance(elapsed, int | float):
        elapsed = history.last("train_seconds")
    if elapsed is None and history.steps:
        elapsed = history.seconds_at(history.steps)
    matches = ((re.fullmatch(r"ba(\d+)\.png", file.name), file) for file in sorted((folder / "images").glob("ba*.png")))
    grids = {int(match[1]): file for match, file in matches if match}
    spikes = _lines(folder / "spikes.jsonl")
    return Run(folder, recipe, recipe_text, history, starts, elapsed, dict(sorted(grids.items())), spikes, written)


def _recipe(folder: Path) -> tuple[str | None, dict[str, Any]]:
    file = folder / CONFIG
    if not file.exists():
        return None, {}
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        recipe = None
    if not isinstance(recipe, dict):
        return redacted_text(text), {}
    shown = redacted(recipe)
    return text if shown == recipe else yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), shown


def _lines(file: Path) -> list[dict[str, Any]]:
    return read_metrics(file) if file.exists() else []


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / METRICS).is_file()


def _no_run(folder: Path) -> str:
    what = "is no folder" if not folder.is_dir() else f"holds no run (neither {CONFIG} nor {METRICS})"
    places = [folder, folder.parent, Path("runs")]
    nearby = {
        str(child): child
        for place in places
        if place.is_dir()
        for child in sorted(place.iterdir())
        if child.is_dir() and _is_run(child)
    }
    close = difflib.get_close_matches(folder.name, [child.name for child in nearby.values()], n=SHOWN_NEIGHBOURS, cutoff=0.5)
    ordered = sorted(nearby, key=lambda path: close.index(nearby[path].name) if nearby[path].name in close else len(close))
    hint = f"Runs nearby: {', '.join(ordered[:SHOWN_NEIGHBOURS])}" if ordered else "There is none nearby either"
    more = f" and {len(ordered) - SHOWN_NEIGHBOURS} more" if len(ordered) > SHOWN_NEIGHBOURS else ""
    return f"{folder} {what}. {hint}{more}."


# ------------------------------------------------------------------------------------------------- stages and cost


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


def stage_starts(run: Run) -> list[tuple[int, int | None, int]]:
    """Return for each stage that was trained the step before its first, its image size, and its place in the recipe."""
    sizes, places = (run.history.columns.get(f"stage/{name}") for name in ("image_size", "index"))
    if sizes is None:
        return [(0, run.recipe.get("image_size"), 0)] if run.history.steps else []
    told = places or sizes  # both are logged together, but for the first runs
    firsts = [0, *(np.flatnonzero(np.diff(told.values)) + 1)]
    before = [0, *(int(told.batches[index - 1]) for index in firsts[1:])]
    index = [int(places.values[at]) for at in firsts] if places else range(len(firsts))
    return [(step, int(sizes.values[at]), place) for step, at, place in zip(before, firsts, index, strict=True)]


def stage_rows(run: Run) -> list[StageRow]:
    """Return the stages that were trained, in order."""
    starts, history = stage_starts(run), run.history
    listed: Any = run.part("algorithms", "progressive_resolution").get("stages") or []
    planned = _planned_ends(run)
    ends = [*(start for start, _, _ in starts[1:]), history.steps][: len(starts)]
    rows = []
    for (start, size, index), end in zip(starts, ends, strict=True):
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
