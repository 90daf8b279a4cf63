"""A run's folder: who may use it, how a run is recognised again, and what it says in the end.

runs/<run_name>/config.yaml  environment.jsonl  changes.jsonl  data.json  tokenizer/  frozen/  checkpoints/
                 metrics.jsonl  images/
"""

import dataclasses
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from composer.utils import dist

from prx_composer.common.errors import UserError
from prx_composer.data.contents import loader_identity, same, told
from prx_composer.recipe.config import Recipe, resolved
from prx_composer.recipe.resume import DATA, Change, changed, data_changed, differences, hidden, is_allowed, refusal
from prx_composer.runs.checkpoints import Checkpoint, newest_checkpoint, newest_whole_checkpoint

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
CHANGES = "changes.jsonl"
DATA_FILE = "data.json"
TOKENIZER = "tokenizer"
FROZEN = "frozen"  # see frozen_parts.py


_LEFTOVERS = frozenset({TOKENIZER, FROZEN, f".{TOKENIZER}.partial", f".{CONFIG}.partial", DATA_FILE, f".{DATA_FILE}.partial"})


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
    check_same_recipe(recipe, *_recipe_of(folder))
    return True


def _recipe_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The recipe that a run goes on from, and what has it: its newest checkpoint, or before there is one, its last start."""
    newest = newest_checkpoint(folder)
    try:
        if newest is not None:
            return newest.index()["recipe"], str(newest.path)
    except (OSError, ValueError, KeyError):  # damaged, which is said when it is to be loaded
        pass
    return yaml.safe_load((folder / CONFIG).read_text()) or {}, str(folder)


def check_same_recipe(recipe: Recipe, before: dict[str, Any], what: str, ranks: int | None = None) -> list[Change]:
    """Return what differs and may: by `resume.RULES`, by the recipe's `resume.allow`, or since an earlier start was allowed it.

    Args:
        before: as `as_saved` gave it, perhaps of an older version.
        what: that was started or written with it.
        ranks: of this run.

    Raises:
        UserError: with every key that may not differ, why, and what to type.
    """
    folder = Path(recipe.run_folder)
    ranks = dist.get_world_size() if ranks is None else ranks
    changes = recipe_changes(before, as_saved(recipe), ranks)
    changes = _with_data(changes, recipe, folder, before)
    known = {key: change["now"] for start in read_changes(folder) for key, change in start["changes"].items()}
    allow = recipe.resume.get("allow", [])
    refused = [change for change in changes if not is_allowed(change, allow, known)]
    if refused:
        raise UserError(refusal(refused, what, _command_as_before(folder, before, refused, ranks)))
    return changes


def _command_as_before(folder: Path, before: dict[str, Any], refused: list[Change], ranks: int) -> str | None:
    """What goes on with the old recipe: the config.yaml of the last start, unless that has other values of these keys too."""
    file = folder / CONFIG
    if not file.exists():
        return None
    others = {change.key for change in recipe_changes(before, yaml.safe_load(file.read_text()) or {}, ranks)}
    if others & {change.key for change in refused}:
        return None
    return shlex.join(["composer", "train.py", str(file), f"run_folder={folder}", "autoresume=true"])


def recipe_changes(before: dict[str, Any], now: dict[str, Any], ranks: int) -> list[Change]:
    """Return what differs between two recipes and is not free, with every default written out."""
    before, now = (json.loads(json.dumps(content, default=str)) for content in (before, now))  # keys as JSON has them: strings
    if not changed(differences(before, now)):  # as nearly always: nothing needs to be looked up
        return []
    return changed(differences(resolved(before, ranks), resolved(now, ranks)))


def _with_data(changes: list[Change], recipe: Recipe, folder: Path, recipe_before: dict[str, Any]) -> list[Change]:
    """Judges data by what they are instead of by where they lie, once that is known."""
    before = _read_data(folder) or loader_identity(recipe_before.get("train_loader"))  # older runs didn't note it
    now = loader_identity(recipe.train_loader)
    named = [change for change in changes if change.rule.may == "data"]
    if before is not None and now is not None:
        rest = [change for change in changes if change not in named]
        return rest if same(before, now) else [*rest, Change(DATA, told(before), told(now))]
    makes = recipe.train_loader.get("source") or any(
        part.get("source") for part in (recipe.train_loader.get("mix") or {}).values()
    )
    fetched = recipe.train_loader.get("remote") and not any(change.key.endswith("remote") for change in named)
    if before is not None and (makes or fetched):  # compared once they are there
        return [change for change in changes if change not in named or not change.key.endswith("path")]
    return changes


def _read_data(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / DATA_FILE).read_text())["train_loader"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclasses.dataclass(frozen=True)
class GoingOn:
    """How a run goes on.

    Args:
        load_path: of its newest whole checkpoint, or None if it begins.
        changes: what differs from the recipe that is in the checkpoint, and may.
        other_data: whether the data, or their order, may be others than the checkpoint's.
    """

    load_path: str | None = None
    changes: tuple[Change, ...] = ()
    other_data: bool = False


def going_on(recipe: Recipe, folder: Path, unfit: Callable[[Checkpoint], str | None]) -> GoingOn:
    """Return where a run goes on from, and what changes there, which is said in the log; on one rank.

    Args:
        unfit: what else makes a checkpoint one that cannot be gone on from; see `newest_whole_checkpoint`.

    Raises:
        UserError: no checkpoint is whole, or one of another recipe.
    """
    checkpoint = newest_whole_checkpoint(folder / CHECKPOINTS, unfit) if recipe.autoresume else None
    if checkpoint is None:
        return GoingOn()
    index = checkpoint.index()
    changes = check_same_recipe(recipe, index["recipe"], str(checkpoint.path))
    for change in changes:
        log.warning("From batch %d on: %s. %s", checkpoint.batch, change, change.rule.follows)
    if index["ranks"] != dist.get_world_size():
        log.warning(
            "%s was written by %d ranks; with %d the samples stay the same, but not the noise drawn for them.",
            checkpoint.path, index["ranks"], dist.get_world_size(),
        )  # fmt: skip
    since = [key for start in read_changes(folder) if start["batch"] >= checkpoint.batch for key in start["changes"]]
    other_data = data_changed([*since, *(change.key for change in changes), *map(str, recipe.resume.get("allow", []))])
    return GoingOn(checkpoint.load_path, tuple(changes), other_data)


# ------------------------------------------------------------------------------------------------- what changed, kept


def read_changes(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a run that changed something: `batch`, `time` and `changes`, key → `before`, `now`, `rule`."""
    file, found = folder / CHANGES, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return [start for start in found if isinstance(start, dict) and isinstance(start.get("changes"), dict)]


def record_changes(folder: Path, batch: int, changes: Sequence[Change]) -> None:
    """Adds a line for a start that changed something.

    Args:
        batch: of the checkpoint that it goes on from.
    """
    if not changes:
        return
    shown = {
        change.key: {"before": hidden(change.key, change.before), "now": hidden(change.key, change.now), "may": change.rule.may}
        for change in changes
    }
    line = {"batch": batch, "time": datetime.now(UTC).isoformat(timespec="seconds"), "changes": shown}
    with (folder / CHANGES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as its YAML file gives it back, without `resume`, which is of one start and not of the run."""
    content = {key: value for key, value in dataclasses.asdict(recipe).items() if key != "resume"}
    return yaml.safe_load(yaml.safe_dump(content, sort_keys=False))


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Makes the folder this run's, and notes what its data are."""
    if (data := loader_identity(recipe.train_loader)) is not None:
        _write_whole(folder / DATA_FILE, json.dumps({"train_loader": data}, indent=1) + "\n")
    _write_whole(folder / CONFIG, yaml.safe_dump(as_saved(recipe), sort_keys=False, allow_unicode=True))


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a kill must not leave half a recipe, with which nothing could be resumed
    partial.rename(path)


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
