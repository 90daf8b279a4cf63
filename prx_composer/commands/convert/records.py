"""What an input gives: raw records, in numbered work units that can be read one by one, in any order, on any machine.

The second part reads what the columns of records hold: a value by its name, and the image that a value is or names.
"""

import base64
import binascii
import os
import pkgutil
import re
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from prx_composer.commands.convert.settings import SOURCES, Settings, check_one_split
from prx_composer.common.errors import UserError, first, nearest
from prx_composer.data.storage import list_files, relative_name

WORDS = 200  # characters of a reader's own message
MAX_FILE_BYTES = 1 << 28  # of one encoded image or text: what is larger is not read


class Record(NamedTuple):
    """One sample as it came.

    Args:
        key: where it came from; only ever a label.
        image: the encoded file; None if there is none.
        columns: everything else, by column name.
        problem: reason (see `outcome.REASONS`) for which the source itself could not give the sample.
        detail: what else is known of the problem, in words: the reader's own message, how many records a file promised.
        image_column: the column (of a tar: the suffix) that the image came from.
    """

    key: str
    image: bytes | None
    columns: dict[str, Any]
    problem: str = ""
    detail: str = ""
    image_column: str = ""


class Seen(NamedTuple):
    """What is known of an input's columns before work begins.

    Args:
        names: columns that a record can be asked for.
        missing: what the settings ask for and no record has that was looked at.
        whole: whether the whole input was looked at, or its schema says what there is.
        image: the one column that holds the images, where it is the same in all records.
        looked_at: number of records, where records were looked at.
    """

    names: list[str]
    missing: list[str]
    whole: bool = True
    image: str | None = None
    looked_at: int = 0


@dataclass(frozen=True)
class Unit:
    """A part of the input.

    Args:
        number: position among the units; the order of the output.
        path: file or folder, local or remote.
        start, stop: the part of it; of what (bytes, row groups, shards) is the source's business.
        take: at most so many records, if not all.
    """

    number: int
    path: str
    start: int
    stop: int
    take: int | None = None

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


class Passed(dict[str, list[Any]]):
    """Files or members that are passed over: kind → how many, and the name of the first."""

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count one more of a kind, or several."""
        entry = self.setdefault(kind, [0, example])
        entry[0] += count


class Source(ABC):
    """A kind of input: files that are cut into work units, of which each gives records.

    Attributes:
        looked_for: what the files are called, for the message that there is none.
        suffixes: by which they are known.
        of_nothing: what a file without records has, for the message that there is nothing to read.
        without: the same, as the summary says it of some of the files.
        passed: members that `read` has passed over.
        notes: what `plan` and `columns` have to say of the input: files that are passed over, and why.
    """

    looked_for: str
    suffixes: tuple[str, ...]
    of_nothing: str
    without = ""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.passed = Passed()
        self.notes: list[str] = []

    def plan(self) -> list[Unit]:
        """Return the work units, from names and headers alone. Raise UserError if there is nothing to read."""
        given = self.settings.input
        listed = list_files(given, self.settings.include, self.settings.follow_links)
        files = self.select(listed)
        if not files:
            pattern = f" of the pattern --include '{self.settings.include}'" if self.settings.include != "*" else ""
            raise UserError(f"--input: no {self.looked_for} in {given}{pattern}.{self.instead([name for name, _ in listed])}")
        check_one_split([name for name, _ in files], self.settings)
        cuts = {name: self.cut(name, size) for name, size in files}
        parts = [(self.path_of(name), *part) for name, found in cuts.items() for part in found]
        empty = [relative_name(name, given) for name, found in cuts.items() if not found]
        if not parts:
            raise UserError(f"--input: {first(empty)} in {given}: {self.of_nothing}. There is nothing to read.")
        if empty and self.without:
            self.notes.append(f"{self.without}: {first(empty)}.")
        return [Unit(number, *part) for number, part in enumerate(parts)]

    def select(self, listed: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        """Return those of all files, with their sizes, that are read."""
        return [file for file in listed if file[0].endswith(self.suffixes)]

    def instead(self, names: list[str]) -> str:
        """Say what is there, for the message that something is not."""
        return f" There are {first(name.rpartition('/')[2] for name in names)}." if names else ""

    def path_of(self, name: str) -> str:
        """Return the path of a file's units."""
        return name

    @abstractmethod
    def cut(self, name: str, size: int | None) -> list[tuple[int, int]]:
        """Return start and stop of a file's units; none if it has no records."""

    @abstractmethod
    def columns(self, units: list[Unit]) -> Seen:
        """Return the columns that a record can be asked for."""

    def missing(self, wanted: Iterable[str], parts: list[tuple[str, Any]], has: Callable[[Any, str], bool]) -> list[str]:
        """Return the columns that no part of the input has. Note those that only some parts have.

        Args:
            parts: name and schema of every file or shard.
            has: whether a schema has a column.
        """
        found = []
        for column in sorted(wanted):
            lacking = [name for name, schema in parts if not has(schema, column)]
            if len(lacking) == len(parts):
                found.append(column)
            elif lacking:
                self.notes.append(f"Without a column {column!r}: {first(lacking)}.")
        return found

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[Record]:
        """Yield the unit's records, in a fixed order. What cannot be read is a record with a problem."""


def open_source(settings: Settings) -> Source:
    """Return the source that the settings name; only its own libraries are imported."""
    return pkgutil.resolve_name(f"prx_composer.commands.convert.{SOURCES[settings.source]}")(settings)


def ranges(sizes: dict[int, int], least: int) -> list[tuple[int, int]]:
    """Cut parts of a file into work units: return start and stop of each, all of neighbours.

    Args:
        sizes: number of a part → bytes, in order.
        least: bytes at which a unit is full.
    """
    found, start, gathered = [], None, 0
    for number, size in sizes.items():
        start = number if start is None else start
        gathered += size
        if gathered >= least or number + 1 not in sizes:
            found.append((start, number + 1))
            start, gathered = None, 0
    return found


def damaged(label: str, error: Exception | str, read: int, promised: int | None) -> Record:
    """Return the record that stands for all that could not be read of a file or of a part of it.

    Args:
        label: the file and the part.
        error: the reader's own words; a string of ours is kept whole.
        read: records that could be read.
        promised: how many there are by the file's own account; None if that is not known.
    """
    words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"[:WORDS]  # ours may hold a remedy: not cut
    words = " ".join(words.split()).rstrip(".")
    known = f"{read} of the {promised} records it promised were read"
    if promised is None:
        known = f"{read} records were read, how many it promised is not known"
    return Record(label, None, {}, "damaged_input", f"{words}; {known}")


def damage(error: Exception) -> Exception:
    """Return an error that means that a file's content is broken; raise one of the disk, of the network or of the settings."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
        raise error
    return error


IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "jpeg", "image_path", "file_name", "file", "path")
PEEKED = 50  # records that are looked at in any case, to say which columns there are
ADVICE = "nothing is downloaded. img2dataset does, and makes tars for --source webdataset"
SECONDS = 30.0  # to look for a column that these do not have
Found = tuple[bytes | None, str, str]  # an encoded file, or the reason why there is none and what else is known of it

_ABSENT = object()
_HEAD = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|P[56]\s|....ftyp", re.DOTALL)
_SHORTEST = 40  # characters in base64: no image is smaller, and names of files mostly are
_OTHER = re.compile(rb"[^A-Za-z0-9+/_\s-]")  # than base64's characters
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def lookup(columns: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return the value of a column, or `default` if there is none. `meta.tags.0` looks inside of mappings and lists."""
    if name in columns:
        return columns[name]
    value: Any = columns
    for part in name.split("."):
        if value is None:
            return None  # what is null may hold anything
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return default
    return value


def has(columns: dict[str, Any], name: str) -> bool:
    """Return whether there is such a column, be it empty."""
    return lookup(columns, name, _ABSENT) is not _ABSENT


def look(
    rows: Iterable[dict[str, Any]], settings: Settings, seconds: float = SECONDS, enough: Callable[[], bool] = lambda: True
) -> Seen:
    """Look at records until every column that the settings name was seen, for inputs that have no schema.

    JSON lines and tars leave out what is empty, so a column may come late.

    Args:
        seconds: after which it ends in any case.
        enough: whether nothing else is looked for in the rows.
    """
    names, missing, number = set[str](), set(settings.input_columns), 0
    end, whole = time.monotonic() + seconds, True
    for number, row in enumerate(rows, 1):
        names.update(map(str, row))
        missing = {name for name in missing if not has(row, name)}
        if number >= PEEKED and ((not missing and enough()) or time.monotonic() > end):
            whole = False
            break
    return Seen(sorted(names), sorted(missing), whole, looked_at=number)


def choose_image(sure: list[str], likely: list[str], names: list[str], wanted: str | None) -> str:
    """Return the column that holds the images.

    Args:
        sure: columns whose type is that of images.
        likely: columns that are called as one of paths might be.
        names: all columns.
        wanted: `--image`.

    Raises:
        UserError: there is none, or several of which none is called `image`.
    """
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"--image {wanted}: there is no such column.{nearest(wanted, names)}")
        return wanted
    if "image" in sure or "image" in likely:
        return "image"
    found = list(dict.fromkeys(sure or likely))
    if len(found) == 1:
        return found[0]
    if found:
        options = " or ".join(f"--image {name}" for name in found)
        raise UserError(f"--image: {', '.join(found)} could each hold the images. Say which one is trained on: {options}.")
    advice = next((f" If {name} holds addresses: {ADVICE}." for name in names if name.lower().endswith("url")), "")
    raise UserError(f"--image: say which column holds the images; there are {', '.join(names) or 'none'}.{advice}")


def image_of(value: Any, find: Callable[[str], Found]) -> Found:
    """Return the encoded file that a value of an image column holds or names, or the reason why there is none.

    Args:
        value: bytes, a list of numbers that are bytes, base64 text, a `data:` URI, the name of a file, or a mapping of `bytes`
            and `path`, as `datasets.Image` stores it; alone in a list, too.
        find: reads the file of a name.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, list):
        if value and all(isinstance(one, dict | str | bytes) for one in value):
            return image_of(value[0], find) if len(value) == 1 else (None, "several_images", f"a list of {len(value)}")
        try:
            value = bytes(value)
        except (TypeError, ValueError) as error:
            return None, "unreadable_record", f"a list that is no bytes: {error}"
    if isinstance(value, bytes | str) and len(value) > 2 * MAX_FILE_BYTES:
        return None, "file_too_large", f"{len(value):,} bytes"
    if isinstance(value, bytes):
        value = from_base64(value) or value
        return (None, "file_too_large", f"{len(value):,} bytes") if len(value) > MAX_FILE_BYTES else (value, "", "")
    if not isinstance(value, str) or not value:
        return None, "no_image", "" if value is None or value == "" else f"in its place stands {value!r}"[:100]
    return _of_text(value, find)


def _of_text(value: str, find: Callable[[str], Found]) -> Found:
    if value[:5].lower() == "data:":
        head, _, content = value.partition(",")
        decoded = _decoded(content.encode(errors="replace")) if head.endswith(";base64") else unquote_to_bytes(content)
        return decoded or b"", "", ""
    if (content := from_base64(value)) is not None:
        return content, "", ""
    if _URL.match(value):
        return None, "url", value[:200]
    names = dict.fromkeys([value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value)])
    found = [find(name) for name in names]
    return next((one for one in found if one[1] != "no_image"), found[0])


def usable(value: Any) -> bool:
    """Return whether a value of JSON can hold or name an image: see `image_of`. A number cannot."""
    if isinstance(value, list) and value:
        return all(isinstance(one, int) for one in value) or all(usable(one) for one in value)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return isinstance(value, str) and bool(value)


def from_base64(text: str | bytes) -> bytes | None:
    """Return the image that a text is in base64, as far as it goes; None if it clearly isn't one, by its first bytes."""
    content = text if isinstance(text, bytes) else text.encode(errors="replace")
    head = _decoded(content[:_SHORTEST])
    if len(content) < _SHORTEST or head is None or not _HEAD.match(head):
        return None
    return _decoded(content) or _decoded(_OTHER.split(content, maxsplit=1)[0])


def _decoded(text: bytes) -> bytes | None:
    """Decode base64 of either alphabet, perhaps in lines, perhaps without padding or cut; None if it is none."""
    text = b"".join(text.split()).rstrip(b"=")
    text = text[: len(text) - (len(text) % 4 == 1)]
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return None


def image_inside(folder: Path, name: str, follow_links: bool) -> Found:
    """Return an encoded file below a local folder, or why there is none. No name opens anything outside of the folder.

    Args:
        follow_links: open links that lead out of it.
    """
    try:
        path = folder / os.path.normpath(name)
        if not path.resolve().is_relative_to(folder.resolve()):
            if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
                return None, "outside_input", f"{name} is not below {folder}"
            if not follow_links:
                advice = "if that is yours to read, as in a hub's cache, give --follow-links"
                return None, "outside_input", f"{name} is or passes a symbolic link to {path.resolve()}; {advice}"
        if not path.is_file():
            return None, "no_image", f"there is no {path}"
        if path.stat().st_size > MAX_FILE_BYTES:
            return None, "file_too_large", ""
        return path.read_bytes(), "", ""
    except (OSError, ValueError) as error:  # a name that no file can have, or one that may not be read
        return None, "no_image", str(error)
