"""Which files the input has, which of them are read and why others are not, and whether they are still what they were."""

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

from prx_composer.commands.convert.records import Passed, Source, Unit
from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError
from prx_composer.data.storage import Entry, is_included, survey

log = logging.getLogger(__name__)

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
NAMED = "images, except where a record names them"
LISTED = 10_000  # files whose names are kept; of more only how many there are, and a hash of the list


def account(settings: Settings, planned: list[Unit], units: list[Unit]) -> dict[str, Any]:
    """How many files the input has and how many are read, why others are not, and the state of those that matter.

    Args:
        planned: units of all that can be read.
        units: those that are converted, fewer with `--limit`.
    """
    entries = survey(settings.input, settings.follow_links)
    read, after = Passed(), _taken(settings, planned, entries) - (taken := _taken(settings, units, entries))
    passed = Passed()
    for entry in entries:
        name = _below(entry, settings)
        if entry.path in taken:
            read.add("", name)
        else:
            passed.add("after --limit" if entry.path in after else _why(entry, name, settings), name)
    state = {_below(entry, settings): [entry.size, entry.stamp] for entry in _matter(settings, planned, entries)}
    return {"found": len(entries), "read": read.get("", [0])[0], "passed": dict(passed)} | as_stored(state)


def as_stored(state: dict[str, list[Any]], most: int = LISTED) -> dict[str, Any]:
    """The state of files by name, or a hash of it if there are more than `most`."""
    if len(state) <= most:
        return {"files": state}
    return {"many": len(state), "sha256": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}


def _below(entry: Entry, settings: Settings) -> str:
    return entry.path.removeprefix(settings.input).lstrip("/") or entry.path.rpartition("/")[2]


def _taken(settings: Settings, units: list[Unit], entries: Iterable[Entry]) -> set[str]:
    """Files that units consist of; of an MDS folder, all that is in it."""
    paths = {unit.path for unit in units}
    if settings.source != "mds":
        return {entry.path for entry in entries if entry.path in paths}
    folders = tuple(f"{path.rstrip('/')}/" for path in paths)
    return {entry.path for entry in entries if entry.path.startswith(folders) and not _hidden(_below(entry, settings))}


def _matter(settings: Settings, planned: list[Unit], entries: list[Entry]) -> list[Entry]:
    """Files on which the result depends: those that are read, and images that records may name."""
    taken, beside = _taken(settings, planned, entries), settings.source in ("jsonl", "parquet")
    return [entry for entry in entries if entry.path in taken or (beside and entry.path.lower().endswith(IMAGES))]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _why(entry: Entry, name: str, settings: Settings) -> str:
    """The kind of a file that is not read."""
    if _hidden(name):
        return "hidden"
    if entry.size is None and entry.stamp is None:
        return "links to a folder, which --follow-links reads" if entry.path.endswith("/") else "links to nothing"
    if settings.source in ("jsonl", "parquet") and name.lower().endswith(IMAGES):
        return NAMED
    if not is_included(name, settings.include):
        return "not of --include"
    file = name.rpartition("/")[2]
    return f".{file.rpartition('.')[2].lower()}" if "." in file else "without a suffix"


def check_same(before: dict[str, Any], now: dict[str, Any], settings: Settings, made: str, way_on: str) -> None:
    """Check that the files that matter are what they were.

    Args:
        before, now: what `account` returned.
        made: what was made of them, for the message.
        way_on: what to do, for the message.

    Raises:
        UserError: they are not. Says what is new, gone and changed.
    """
    if found := differences(before, now):
        raise UserError(f"--input: {settings.input} has other files than {made}: {found}. {way_on}")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is new, gone or changed, in words; "" for nothing."""
    then, here = before.get("files"), now.get("files")
    if then is None or here is None:
        same = (before.get("many"), before.get("sha256")) == (now.get("many"), now.get("sha256"))
        many = [len(state["files"]) if "files" in state else state.get("many") for state in (before, now)]
        return "" if same else f"{many[0]} then and {many[1]} now, with other names, sizes or times"
    kinds = {
        "new": sorted(here.keys() - then.keys()),
        "gone": sorted(then.keys() - here.keys()),
        "changed in size or time": sorted(name for name in here.keys() & then.keys() if list(here[name]) != list(then[name])),
    }
    return ", ".join(f"{len(names)} {kind} (such as {names[0]})" for kind, names in kinds.items() if names)


def check_finished(before: dict[str, Any] | None, settings: Settings, source: Source, final: str) -> None:
    """Check that what a finished conversion was made of is what the same command would read now.

    Args:
        before: of the finished conversion; None if it was made before that was stored.
        final: where it lies.

    Raises:
        UserError: it is not.
    """
    if before is None:
        log.warning("%s was made by an earlier version, which didn't store what its input was: it may have changed.", final)
    elif not survey(settings.input, settings.follow_links):
        log.warning("%s is there and whole. Its input, %s, is not there any more.", final, settings.input)
    else:
        planned = source.plan()
        check_same(
            before,
            account(settings, planned, planned),
            settings,
            f"when {final} was made",
            f"Name a new --output, or delete {final} and give the command again: then all of it is converted.",
        )


def as_text(statistics: dict[str, Any]) -> list[str]:
    """What the summary says of files, and of what is in them and is no sample."""
    lines = []
    if files := statistics.get("input"):
        lines.append(
            f"{files['read']} of {files['found']} files of the input were read.{_listed(files['passed'], 'Passed over')}"
        )
    if passed := statistics.get("passed"):
        lines.append(_listed(passed, "Passed over in them").strip())
    return lines


def _listed(passed: dict[str, list[Any]], what: str) -> str:
    some = [f"{count} {kind} (such as {example})" for kind, (count, example) in sorted(passed.items())]
    return f" {what}: {'; '.join(some)}." if some else ""
