"""A run's folder as a report reads it: what is there, and in words what is missing."""

import difflib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from prx_composer.commands.report.history import History
from prx_composer.common.errors import UserError
from prx_composer.common.secrets import redacted, redacted_text
from prx_composer.runs.environment import ENVIRONMENT
from prx_composer.runs.folder import CONFIG

METRICS = "metrics.jsonl"
SHOWN_NEIGHBOURS = 5


@dataclass
class Run:
    """Args:
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
        """A mapping inside of the recipe; empty if there is none."""
        found: Any = self.recipe
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def ranks(self) -> int | None:
        """Processes of the last start, one per GPU; from the speeds where the run didn't record it."""
        if self.starts and isinstance(self.starts[-1].get("ranks"), int):
            return self.starts[-1]["ranks"]
        together = self.history.last("throughput/samples_per_sec")
        each = self.history.last("throughput/device/samples_per_sec")
        return round(together / each) if together and each and together == together and each == each else None

    @property
    def devices(self) -> dict[str, int]:
        """Name → number, of the last start."""
        devices = self.starts[-1].get("devices") if self.starts else None
        return devices if isinstance(devices, dict) else {}


def read_run(path: str) -> Run:
    """Raises UserError, naming runs nearby, for a path that isn't a run's folder."""
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
    """The objects of a file of JSON lines; what isn't one is left out."""
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
