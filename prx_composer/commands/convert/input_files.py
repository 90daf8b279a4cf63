"""Which files the input has, which of them are read and why others are not, and whether they are still what they were."""

import glob
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError
from prx_composer.data.storage import Entry, is_included, relative_name, survey

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
NAMED = "images, except where a record names them"
LISTED = 10_000  # files whose names are kept; of more only how many there are, and a hash of the list
ALL = "**"  # --include that mixes splits all the same
WORDS = {  # the words by which Hugging Face's `datasets` tells splits apart, and our own
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "heldout": ("heldout",),
}
_SPLITS = {word: split for split, words in WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


class Passed(dict[str, list[Any]]):
    """What was seen and is not read, or is no record: kind → how many, and the name of the first."""

    def add(self, kind: str, example: str, count: int = 1) -> None:
        entry = self.setdefault(kind, [0, example])
        entry[0] += count


def first(names: Iterable[str], count: int = 3) -> str:
    """Return `a, b, c and 5 more`, for messages."""
    names = list(names)
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def account(settings: Settings, planned: set[str], converted: set[str]) -> dict[str, Any]:
    """Return how many files the input has and how many are read, why others are not, and the state of those that matter.

    Args:
        planned: paths of all units that can be read.
        converted: paths of those that are converted, fewer with `--limit`.
    """
    entries = survey(settings.input, settings.follow_links)
    taken = _taken(settings, converted, entries)
    after = _taken(settings, planned, entries) - taken
    read, passed = Passed(), Passed()
    for entry in entries:
        name = relative_name(entry.path, settings.input)
        if entry.path in taken:
            read.add("", name)
        else:
            passed.add("after --limit" if entry.path in after else _why(entry, name, settings), name)
    state = {
        relative_name(entry.path, settings.input): [entry.size, entry.stamp] for entry in _matter(settings, planned, entries)
    }
    return {"found": len(entries), "read": read.get("", [0])[0], "passed": dict(passed)} | as_stored(state)


def as_stored(state: dict[str, list[Any]], most: int = LISTED) -> dict[str, Any]:
    """Return the state of files by name, or a hash of it if there are more than `most`."""
    if len(state) <= most:
        return {"files": state}
    return {"many": len(state), "sha256": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}


def _taken(settings: Settings, paths: set[str], entries: Iterable[Entry]) -> set[str]:
    """Return the files at these paths of units; of an MDS folder, all that is in it."""
    if settings.source != "mds":
        return {entry.path for entry in entries if entry.path in paths}
    folders = tuple(f"{path.rstrip('/')}/" for path in paths)
    return {
        entry.path
        for entry in entries
        if entry.path.startswith(folders) and not _hidden(relative_name(entry.path, settings.input))
    }


def _matter(settings: Settings, planned: set[str], entries: list[Entry]) -> list[Entry]:
    """Return the files on which the result depends: those that are read, and images that records may name."""
    taken, beside = _taken(settings, planned, entries), settings.source in ("jsonl", "parquet")
    return [entry for entry in entries if entry.path in taken or (beside and entry.path.lower().endswith(IMAGES))]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _why(entry: Entry, name: str, settings: Settings) -> str:
    """Return the kind of a file that is not read."""
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


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say what is new, gone or changed; "" for nothing."""
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


class SplitName(NamedTuple):
    """Where a path says which split it belongs to."""

    split: str
    patterns: tuple[str, ...]  # for --include, the plainest first


def split_of(path: str) -> SplitName | None:
    """Return the split that a file's name says, else one of its folders, the outermost first; None if nothing does.

    Args:
        path: below the input, with `/`.
    """
    *folders, name = path.split("/")
    if match := _WORD.search(name):
        word, after = match[1], name[match.end() : match.end() + 1]
        start = "" if match.start() == 0 else "*"
        patterns = (f"{start}{word}{glob.escape(after)}*", f"{start}{word}*")
        return SplitName(_SPLITS[word.lower()], patterns)
    for depth, folder in enumerate(folders, 1):
        if match := _WORD.search(folder):
            above = "/".join(folders[:depth])
            return SplitName(_SPLITS[match[1].lower()], (f"{glob.escape(above)}/*", f"*{glob.escape(folder)}/*"))
    return None


def one_split(files: list[str], settings: Settings) -> None:
    """Check that the input's files are not of several splits.

    Args:
        files: those that are to be read, as `list_files` names them.

    Raises:
        UserError: they are, and `--include` doesn't say that they should be mixed. Names the patterns that take one of them.
    """
    if settings.include == ALL:
        return
    paths = [relative_name(file, settings.input) for file in files]
    found = {path: split_of(path) for path in paths}
    splits: dict[str, list[str]] = {}
    for path, one in found.items():
        if one is not None:
            splits.setdefault(one.split, []).append(path)
    others = [path for path, one in found.items() if one is None]
    if splits and others and "train" not in splits:  # cats.parquet beside cats_test.parquet
        splits["the others"] = others
    if len(splits) < 2:
        return
    counted = "; ".join(f"{split}: {first(members, 2)}" for split, members in sorted(splits.items()))
    ways = []
    for _, members in sorted(splits.items()):
        candidates = [pattern for member in members for pattern in (found[member] or SplitName("", ())).patterns]
        exact = (p for p in dict.fromkeys(candidates) if {path for path in paths if is_included(path, p)} == set(members))
        ways.append(next((f"--include '{pattern}'" for pattern in exact), ""))
    known = ", or ".join(filter(None, ways))
    advice = [f"Take one of them: {known}."] if known else []
    advice += [] if all(ways) else [f"Give the files of {'the others' if known else 'one of them'} a folder of their own."]
    raise UserError(
        f"--input: {settings.input} holds several splits, and one data set would mix them ({counted}). {' '.join(advice)} "
        f"To mix them all the same: --include '{ALL}'."
    )
