"""Training, validation and test files beside each other, as data sets lie on the hub: they are not mixed without a word."""

import glob
import re
from typing import NamedTuple

from prx_composer.commands.convert.settings import Settings
from prx_composer.commands.convert.source_columns import first
from prx_composer.common.errors import UserError
from prx_composer.data.storage import is_included, relative_name

ALL = "**"  # --include that mixes splits all the same
WORDS = {  # the words by which Hugging Face's `datasets` tells splits apart, and our own
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "heldout": ("heldout",),
}
_SPLITS = {word: split for split, words in WORDS.items() for word in words}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


class Found(NamedTuple):
    """Where a path says which split it belongs to."""

    split: str
    patterns: tuple[str, ...]  # for --include, the plainest first


def split_of(path: str) -> Found | None:
    """Return the split that a file's name says, else one of its folders, the outermost first; None if nothing does.

    Args:
        path: below the input, with `/`.
    """
    *folders, name = path.split("/")
    if match := _WORD.search(name):
        word, after = match[1], name[match.end() : match.end() + 1]
        start = "" if match.start() == 0 else "*"
        patterns = (f"{start}{word}{glob.escape(after)}*", f"{start}{word}*")
        return Found(_SPLITS[word.lower()], patterns)
    for depth, folder in enumerate(folders, 1):
        if match := _WORD.search(folder):
            above = "/".join(folders[:depth])
            return Found(_SPLITS[match[1].lower()], (f"{glob.escape(above)}/*", f"*{glob.escape(folder)}/*"))
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
        candidates = [pattern for member in members for pattern in (found[member] or Found("", ())).patterns]
        exact = (p for p in dict.fromkeys(candidates) if {path for path in paths if is_included(path, p)} == set(members))
        ways.append(next((f"--include '{pattern}'" for pattern in exact), ""))
    known = ", or ".join(filter(None, ways))
    advice = [f"Take one of them: {known}."] if known else []
    advice += [] if all(ways) else [f"Give the files of {'the others' if known else 'one of them'} a folder of their own."]
    raise UserError(
        f"--input: {settings.input} holds several splits, and one data set would mix them ({counted}). {' '.join(advice)} "
        f"To mix them all the same: --include '{ALL}'."
    )
