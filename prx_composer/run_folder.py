"""A run's folder: who may use it, how a run is recognised again, and what it says in the end.

runs/<run_name>/config.yaml  environment.jsonl  tokenizer/  checkpoints/  metrics.jsonl  images/
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from prx_composer.callbacks.metrics_file import read_metrics
from prx_composer.config import RESUMABLE_CHANGES, Recipe
from prx_composer.errors import UserError

__all__ = [
    "CHECKPOINTS",
    "TOKENIZER",
    "as_saved",
    "check_run_folder",
    "check_same_recipe",
    "holds_run",
    "save_recipe",
    "summarise",
]

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer"


_LEFTOVERS = frozenset({TOKENIZER, f".{TOKENIZER}.partial", f".{CONFIG}.partial"})


def check_run_folder(recipe: Recipe, folder: Path) -> None:
    """A run folder is used by one run: nothing in it is overwritten, and it is resumed only with its own recipe."""
    if not holds_run(recipe, folder):
        for name in _LEFTOVERS:
            (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name, ignore_errors=True)


def holds_run(recipe: Recipe, folder: Path) -> bool:
    """Whether a run of this recipe is in the folder, to go on with; False if the folder is free.

    Raises:
        UserError: it is in use by something else.
    """
    saved = folder / CONFIG
    present = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if not path.is_dir()}
    if present <= _LEFTOVERS:  # of a run that was refused before its first step
        return False
    if not recipe.autoresume:
        raise UserError(
            f"run_folder: {folder} is already in use. Go on with that run with autoresume=true, "
            "or start another run with run_name=<another name>."
        )
    if not saved.exists():
        raise UserError(f"run_folder: {folder} is not empty and holds no run; choose another run_name or run_folder.")
    check_same_recipe(recipe, yaml.safe_load(saved.read_text()) or {}, str(folder))
    return True


def check_same_recipe(recipe: Recipe, before: dict[str, Any], what: str) -> None:
    """Raises UserError, naming every difference, unless `before` is this recipe but for what may change on a resume.

    Args:
        before: as `as_saved` gave it.
        what: that was started or written with it.
    """
    before, now = (json.loads(json.dumps(content)) for content in (before, as_saved(recipe)))  # keys as JSON has them: strings
    different = [key for key in now if key not in RESUMABLE_CHANGES and before.get(key) != now[key]]
    if different:
        paths = [path for key in different for path in _differences(before.get(key), now[key], key)]
        raise UserError(
            f"autoresume: {what} was started with another recipe; what differs: {', '.join(paths)}. "
            "Resume with the recipe in its config.yaml, or start another run with run_name=<another name>."
        )


def _differences(before: Any, now: Any, path: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        changed = [key for key in keys if before.get(key) != now.get(key)]
        return [p for key in changed for p in _differences(before.get(key), now.get(key), f"{path}.{key}")]
    return [f"{path} ({before!r} → {now!r})"]


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its YAML file gives it back."""
    return yaml.safe_load(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Makes the folder this run's."""
    partial = folder / f".{CONFIG}.partial"
    with partial.open("w") as file:
        file.write(yaml.safe_dump(as_saved(recipe), sort_keys=False, allow_unicode=True))
        file.flush()
        os.fsync(file.fileno())  # a kill must not leave half a recipe, with which nothing could be resumed
    partial.rename(folder / CONFIG)


def summarise(folder: Path) -> str:
    """One line: the score and the time, and where images, metrics and checkpoints are."""
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    last = rows[-1] if rows else {}
    facts = [f"{name} {last[name]:.3f}" for name in ("heldout_accuracy", "classifier_accuracy") if name in last]
    if "classifier_accuracy_real" in last:
        facts.append(f"(real digits {last['classifier_accuracy_real']:.3f})")
    if last.get("loss/train/total") is not None:  # not finite in the last step
        facts.append(f"loss {last['loss/train/total']:.4f}")
    if "train_seconds" in last:
        facts.append(f"{last['train_seconds'] / 60:.1f} min")
    places = [folder / name for name in ("images", "metrics.jsonl", "checkpoints") if (folder / name).exists()]
    return f"{folder.name}: {', '.join(facts)} · {' · '.join(str(place) for place in places)}"
