"""A run's folder as a report reads it: what is there, and in words what is missing.

metrics.jsonl is read as columns, whatever a crash, a resume or another program left in it.
"""

import difflib
import json
import math
import re
from array import array
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from prx_composer.common.errors import UserError, redacted, redacted_text
from prx_composer.runs.folder import CONFIG, ENVIRONMENT

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
        starts: the lines of environment.jsonl, one for every start.
        elapsed: seconds that were paid for, with what a crash lost; None if unknown.
        grids: step → picture of the samples.
        spikes: the lines of spikes.jsonl.
        written: when metrics.jsonl was last written, UTC.
        missing: sentences about what isn't there.
    """

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    history: History
    starts: list[dict[str, Any]]
    elapsed: float | None
    grids: dict[int, Path]
    spikes: list[dict[str, Any]]
    written: datetime | None
    missing: list[str] = field(default_factory=list)

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
        """The processes of the last start, one per GPU; from the speeds where the run didn't record it."""
        if self.starts and isinstance(self.starts[-1].get("ranks"), int):
            return self.starts[-1]["ranks"]
        together = self.history.last("throughput/samples_per_sec")
        each = self.history.last("throughput/device/samples_per_sec")
        return round(together / each) if together and each and together == together and each == each else None

    @property
    def devices(self) -> dict[str, int]:
        """The devices of the last start: name → number."""
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
    run = Run(
        folder,
        recipe,
        recipe_text,
        history,
        starts,
        elapsed,
        dict(sorted(grids.items())),
        _lines(folder / "spikes.jsonl"),
        written,
    )
    run.missing = _missing(run)
    return run


def _recipe(folder: Path) -> tuple[str, dict[str, Any]]:
    file = folder / CONFIG
    if not file.exists():
        return "", {}
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
    """Return the objects of a file of JSON lines; what isn't one is left out."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _missing(run: Run) -> list[str]:
    has, history = (run.folder / CONFIG).exists(), run.history
    facts = {
        f"There is no {CONFIG}: the recipe isn't known.": not has,
        f"{CONFIG} is no YAML that can be read.": has and not run.recipe,
        f"There is no {METRICS}: nothing is known of the losses and the speed.": run.written is None,
        f"{METRICS} has no line yet: no step was finished.": run.written is not None and not history.steps,
        f"{history.unreadable} lines of {METRICS} cannot be read (a crash cuts one) and are left out.": history.unreadable > 0,
        f"{history.repeated} steps were trained again after a resume; the later values are shown.": history.repeated > 0,
        f"There is no {ENVIRONMENT}, which newer runs write: versions and machine aren't known.": not run.starts,
        "No images were drawn (callbacks.images).": not run.grids,
    }
    return [sentence for sentence, holds in facts.items() if holds]


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
