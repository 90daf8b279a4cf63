"""A run's folder: who may use it, how a run is recognised again, what it ran on, and what it says in the end.

runs/<run_name>/config.yaml  environment.jsonl  changes.jsonl  data.json  tokenizer/  frozen/  checkpoints/
                 metrics.jsonl  images/

A line of environment.jsonl says what a start of the run ran on and with. Host, user and secrets are not in it.
"""

import contextlib
import dataclasses
import json
import logging
import os
import platform
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from composer.utils import dist

from prx_composer.common.errors import UserError, redacted_text
from prx_composer.common.files import write_whole
from prx_composer.common.installation import PACKAGES, commit, training, version_of
from prx_composer.data.contents import data_identity, in_words, same_data
from prx_composer.recipe.arguments import skip_files, split_folders
from prx_composer.recipe.config import Recipe, resolved
from prx_composer.recipe.resume import ABSENT, DATA, Change, advice, hidden, rule_of
from prx_composer.runs.checkpoints import Checkpoint, newest_checkpoint, newest_whole_checkpoint, without_new_callbacks

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
COMPILED = "compiled"  # by torch, for the next start
CONFIG = "config.yaml"
CHANGES = "changes.jsonl"
DATA_FILE = "data.json"
ENVIRONMENT = "environment.jsonl"
TOKENIZER = "tokenizer"
FROZEN = "frozen"  # parts of the model, see model_parts.py


def check_run_folder(recipe: Recipe, folder: Path) -> None:
    """Make sure that one run alone uses a folder: nothing in it is overwritten, and it is resumed only with its own recipe."""
    if not holds_run(recipe, folder):
        for path in folder.iterdir() if folder.is_dir() else []:
            if _is_leftover(path.name) and path.name != COMPILED:
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _is_leftover(name: str) -> bool:
    """Return whether a file or folder may be of a run that was refused before its first step, or killed while it wrote."""
    written = tuple(f".{begun}." for begun in (TOKENIZER, CONFIG, DATA_FILE))
    return name in (TOKENIZER, FROZEN, DATA_FILE, COMPILED) or name.startswith(written)


def holds_run(recipe: Recipe, folder: Path) -> bool:
    """Return whether a run of this recipe is in the folder, to go on with; False if the folder is free.

    Raises:
        UserError: it is in use by something else.
    """
    present = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if not path.is_dir()}
    if all(map(_is_leftover, present)):
        return False
    if not recipe.autoresume:
        raise UserError(
            f"run_folder: {folder} is already in use. Go on with that run with autoresume=true, "
            "or start another run with run_name=<another name>."
        )
    if not (folder / CONFIG).exists():
        raise UserError(f"run_folder: {folder} is not empty and holds no run; choose another run_name or run_folder.")
    check_same_recipe(recipe, *recipe_of(folder))
    return True


def recipe_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the recipe that a run goes on from, and what has it: its newest checkpoint, or, without one, its last start."""
    newest = newest_checkpoint(folder)
    try:
        if newest is not None:
            return newest.index()["recipe"], str(newest.path)
    except (OSError, ValueError, KeyError):  # damaged, which is said when it is to be loaded
        pass
    return yaml.safe_load((folder / CONFIG).read_text()) or {}, str(folder)


# ---------------------------------------------------------------------------------------------------------- with another recipe


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
        raise UserError(refusal(refused, what, _command_as_before(folder, before, refused, ranks), list(map(str, allow))))
    return changes


def recipe_changes(before: dict[str, Any], now: dict[str, Any], ranks: int) -> list[Change]:
    """Return what differs between two recipes and is not free, with every default written out."""
    before, now = (json.loads(json.dumps(content, default=str)) for content in (before, now))  # keys as JSON has them: strings
    if not changed(differences(before, now)):  # as nearly always: nothing needs to be looked up
        return []
    return changed(differences(resolved(before, ranks), resolved(now, ranks)))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return every key that differs between two recipes, as YAML gives them; of lists of one length, item by item."""
    return [change for key in [*now, *(key for key in before if key not in now)] for change in _different(before, now, key, key)]


def _different(before: Mapping[str, Any], now: Mapping[str, Any], key: str, path: str) -> Iterable[Change]:
    old, new = before.get(key, ABSENT), now.get(key, ABSENT)
    if old == new and isinstance(old, bool) == isinstance(new, bool):
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("name") == new.get("name"):
        for inner in [*new, *(inner for inner in old if inner not in new)]:
            yield from _different(old, new, inner, f"{path}.{inner}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(isinstance(i, Mapping) for i in new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _different({"": pair[0]}, {"": pair[1]}, "", f"{path}[{index}]")
    else:
        yield Change(path, old, new)


def changed(changes: Iterable[Change]) -> list[Change]:
    """Return those that change anything, which the free ones do not."""
    return [change for change in changes if change.rule.may != "free"]


def _with_data(changes: list[Change], recipe: Recipe, folder: Path, recipe_before: dict[str, Any]) -> list[Change]:
    """Judge data by what they are instead of by where they lie, once that is known."""
    before = _read_data(folder) or _identity(recipe_before.get("train_loader"))  # older runs didn't note it
    now = _identity(recipe.train_loader)
    named = [change for change in changes if change.rule.may == "data"]
    if before is not None and now is not None:
        rest = [change for change in changes if change not in named]
        return rest if same_data(before, now) else [*rest, Change(DATA, in_words(before), in_words(now))]
    parts = [recipe.train_loader, *(recipe.train_loader.get("mix") or {}).values()]
    makes = any(part.get("source") for part in parts)
    fetched = recipe.train_loader.get("remote") and not any(change.key.endswith("remote") for change in named)
    if before is not None and (makes or fetched):  # compared once they are there
        return [change for change in changes if change not in named or not change.key.endswith("path")]
    return changes


def _identity(loader: dict[str, Any] | None) -> dict[str, Any] | None:
    return data_identity(split_folders(loader), skip_files(loader))


def _read_data(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / DATA_FILE).read_text())["train_loader"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_allowed(change: Change, allow: Sequence[str], known: Mapping[str, Any] | None = None) -> bool:
    """Return whether a change needs no further word: by its rule, by `resume.allow`, or since an earlier start was allowed it.

    Args:
        known: key → value of what this run was allowed before.
    """
    if change.rule.may in ("free", "logged"):
        return True
    if change.rule.may == "never":
        return False
    if known is not None and change.key in known and known[change.key] == change.now:
        return True
    return any(change.key == key or change.key.startswith((f"{key}.", f"{key}[")) for key in map(str, allow))


def refusal(changes: Sequence[Change], what: str, as_before: str | None = None, allowed: Sequence[str] = ()) -> str:
    """Return what to say of changes that are not allowed: each with its values and its reason, and what to type.

    Args:
        what: that was started or written with the other recipe.
        as_before: a command that goes on with the old recipe, if it can be named.
        allowed: what `resume.allow` names already; of two on a command line, only the last one counts.
    """
    asked = [change for change in changes if change.rule.may != "never"]
    never = [change for change in changes if change.rule.may == "never"]
    lines = [f"autoresume: {what} was started with another recipe; what differs: {', '.join(change.key for change in changes)}."]
    for change in changes:
        rule = change.rule
        end = f" This cannot change within a run. {rule.follows}" if rule.may == "never" else f" If it is allowed: {rule.follows}"
        lines.append(f"  {change}: {rule.why}{end}")
    back = shlex.join(_as_before(changes))
    if asked:
        first = f"keep {shlex.join(_as_before(never))}, and " if never and _as_before(never) else ""
        lines.append(
            f"To go on with the new values from here: {first}add  {advice([*allowed, *(change.key for change in asked)])}"
        )
    if as_before:
        lines.append(f"To go on with the old recipe: {as_before}")
    elif back:
        lines.append(f"To go on with the old values: add  {back}")
    lines.append("To train from the beginning: add  run_name=NEW run_folder=runs/NEW")
    return "\n".join(lines)


def _as_before(changes: Sequence[Change]) -> list[str]:
    return [f"{change.key}={_typed(change.before)}" for change in changes if change.before != ABSENT and change.key != DATA]


def _typed(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def _command_as_before(folder: Path, before: dict[str, Any], refused: list[Change], ranks: int) -> str | None:
    """Return what goes on with the old recipe: the last start's config.yaml, unless it has other values of these keys too."""
    file = folder / CONFIG
    if not file.exists():
        return None
    others = {change.key for change in recipe_changes(before, yaml.safe_load(file.read_text()) or {}, ranks)}
    if others & {change.key for change in refused}:
        return None
    return shlex.join([*training(), str(file), f"run_folder={folder}", "autoresume=true"])


# --------------------------------------------------------------------------------------------------------------------- going on


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

    @property
    def ignored(self) -> Callable[[dict[str, Any]], None] | None:
        """What Composer's `load_ignore_keys` takes."""
        return None if self.load_path is None else without_new_callbacks(self.load_path)


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


def data_changed(keys: Iterable[str]) -> bool:
    """Return whether changes of these keys may have given a run other samples, or another order of them."""
    return any(key.partition(".")[0] in (DATA, "train_loader") and rule_of(key).may in ("data", "asked") for key in keys)


# ------------------------------------------------------------------------------------------- what changed, and on what


def read_changes(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a run that changed something: `batch`, `time` and `changes`, key → `before`, `now`, `rule`."""
    starts = read_metrics(folder / CHANGES) if (folder / CHANGES).exists() else []
    return [start for start in starts if isinstance(start, dict) and isinstance(start.get("changes"), dict)]


def record_changes(folder: Path, batch: int, changes: Sequence[Change]) -> None:
    """Add a line for a start that changed something.

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


def record_environment(folder: Path, batch: int, spent: float) -> None:
    """Add a line for this start, on all ranks at once; a file that cannot be written is no reason not to train.

    Args:
        batch: steps before this start.
        spent: seconds of training before it.
    """
    cuda = torch.cuda.is_available()
    facts = {
        "batch": batch,
        "spent": round(spent, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redacted_text(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "ranks": dist.get_world_size(),
        "devices": dict(Counter(dist.all_gather_object(torch.cuda.get_device_name() if cuda else "cpu"))),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,  # pyright: ignore[reportAttributeAccessIssue]
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "commit": commit() if dist.get_global_rank() == 0 else None,
    }
    if dist.get_global_rank() == 0:
        try:
            with (folder / ENVIRONMENT).open("a") as file:
                file.write(json.dumps(facts) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", folder / ENVIRONMENT, error)


def as_saved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as its YAML file gives it back, without `resume`, which is of one start and not of the run."""
    content = {key: value for key, value in dataclasses.asdict(recipe).items() if key != "resume"}
    return yaml.safe_load(yaml.safe_dump(content, sort_keys=False))


def save_recipe(recipe: Recipe, folder: Path) -> None:
    """Make the folder this run's, and note what its data are."""
    if (data := _identity(recipe.train_loader)) is not None:
        write_whole(folder / DATA_FILE, (json.dumps({"train_loader": data}, indent=1) + "\n").encode())
    write_whole(folder / CONFIG, yaml.safe_dump(as_saved(recipe), sort_keys=False, allow_unicode=True).encode())


def summarise(folder: Path) -> str:
    """Return one line: the score and the time, where images, metrics and checkpoints are, and what makes a page of it."""
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
    return " · ".join([f"{folder.name}: {', '.join(facts)}", *map(str, places), f"prx report {shlex.quote(str(folder))}"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics file, or of another of JSON lines; what a crash cut short, or is none, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
