"""A run's folder: who may use it, how a run is recognised again, and what it says in the end.

runs/<run_name>/config.yaml  tokenizer/  checkpoints/  metrics.jsonl  images/
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import yaml

from prx_composer.callbacks.metrics_file import read_metrics
from prx_composer.config import RESUMABLE_CHANGES, Recipe
from prx_composer.errors import UserError

__all__ = ["CHECKPOINTS", "CHECKPOINT_NAME", "TOKENIZER", "as_saved", "check_run_folder", "save_recipe", "summarise"]

CHECKPOINTS = "checkpoints"
CHECKPOINT_NAME = "ba{batch}-rank{rank}.pt"
CONFIG = "config.yaml"
LATEST = "latest-rank0.pt"
TOKENIZER = "tokenizer"


def check_run_folder(recipe: Recipe, folder: Path) -> None:
    """A run folder is used by one run: nothing in it is overwritten, and it is resumed only with its own recipe."""
    saved, checkpoints = folder / CONFIG, folder / CHECKPOINTS
    present = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if not path.is_dir()}
    leftovers = {TOKENIZER, f".{TOKENIZER}.partial"}
    if present <= leftovers:  # a run that was refused before its first step
        for name in leftovers:
            shutil.rmtree(folder / name, ignore_errors=True)
        return
    if not recipe.autoresume:
        raise UserError(
            f"run_folder: {folder} is already in use. Go on with that run with autoresume=true, "
            "or start another run with run_name=<another name>."
        )
    if not saved.exists():
        raise UserError(f"run_folder: {folder} is not empty and holds no run; choose another run_name or run_folder.")
    before = yaml.safe_load(saved.read_text()) or {}
    now = as_saved(recipe)
    different = [key for key in now if key not in RESUMABLE_CHANGES and before.get(key) != now[key]]
    if different:
        paths = [path for key in different for path in _differences(before.get(key), now[key], key)]
        raise UserError(
            f"autoresume: {folder} was started with another recipe; what differs: {', '.join(paths)}. "
            "Resume with the recipe in its config.yaml, or start another run with run_name=<another name>."
        )
    written = sorted(checkpoints.glob("ba*-rank0.pt"), key=lambda path: int(path.name[2:].split("-")[0]))
    if written and not (checkpoints / LATEST).exists():  # killed while Composer replaced the link, which it does last
        (checkpoints / LATEST).unlink(missing_ok=True)
        (checkpoints / LATEST).symlink_to(written[-1].name)


def _differences(before: Any, now: Any, path: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        changed = [key for key in keys if before.get(key) != now.get(key)]
        return [p for key in changed for p in _differences(before.get(key), now.get(key), f"{path}.{key}")]
    return [f"{path} ({before!r} → {now!r})"]


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its YAML file gives it back."""
    return yaml.safe_load(yaml.safe_dump(dataclasses.asdict(recipe)))


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Makes the folder this run's."""
    (folder / CONFIG).write_text(yaml.safe_dump(as_saved(recipe), sort_keys=False, allow_unicode=True))


def summarise(folder: Path) -> str:
    """One line: the score and the time, and where images, metrics and checkpoints are."""
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    last = rows[-1] if rows else {}
    facts = [f"{name} {last[name]:.3f}" for name in ("heldout_accuracy", "classifier_accuracy") if name in last]
    if "classifier_accuracy_real" in last:
        facts.append(f"(real digits {last['classifier_accuracy_real']:.3f})")
    if "loss/train/total" in last:
        facts.append(f"loss {last['loss/train/total']:.4f}")
    if "train_seconds" in last:
        facts.append(f"{last['train_seconds'] / 60:.1f} min")
    places = [folder / name for name in ("images", "metrics.jsonl", "checkpoints") if (folder / name).exists()]
    return f"{folder.name}: {', '.join(facts)} · {' · '.join(str(place) for place in places)}"
