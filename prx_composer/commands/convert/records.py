"""What a source gives: raw records, in numbered work units that can be read one by one, in any order, on any machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from prx_composer.commands.convert.settings import Settings

if TYPE_CHECKING:
    from prx_composer.commands.convert.source_columns import Seen


RESULT = "unit.json"  # beside the shards of a unit
WORDS = 200  # characters of a reader's own message
MAX_FILE_BYTES = 1 << 28  # of one encoded image or text: what is larger is not read


class Record(NamedTuple):
    """One sample as it came.

    Args:
        key: where it came from; only ever a label.
        image: the encoded file; None if there is none.
        columns: everything else, by column name.
        problem: reason (see `reasons.py`) for which the source itself could not give the sample.
        detail: what else is known of the problem, in words: the reader's own message, how many records a file promised.
        image_column: the column (of a tar: the suffix) that the image came from.
    """

    key: str
    image: bytes | None
    columns: dict[str, Any]
    problem: str = ""
    detail: str = ""
    image_column: str = ""


class Passed(dict[str, list[Any]]):
    """What was seen and is no record: kind → how many, and the name of the first."""

    def add(self, kind: str, example: str, count: int = 1) -> None:
        entry = self.setdefault(kind, [0, example])
        entry[0] += count


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


@dataclass(frozen=True)
class Job:
    """What all units have in common."""

    settings: Settings
    output: str


class Source(Protocol):
    """A kind of input.

    Attributes:
        passed: what `read` has come upon that is no record.
    """

    passed: Passed

    def plan(self) -> list[Unit]:
        """The work units, from names and headers alone."""
        ...

    def columns(self, units: list[Unit]) -> "Seen":
        """The columns that a record can be asked for."""
        ...

    def notes(self) -> list[str]:
        """What is to be said of the input when `plan` and `columns` were called: files that are passed over, and why."""
        ...

    def read(self, unit: Unit) -> Iterator[Record]:
        """The unit's records, in a fixed order. What cannot be read is a record with a problem."""
        ...


def lookup(columns: dict[str, Any], name: str) -> Any:
    """The value of a column; `meta.tags.0` looks inside of mappings and lists. None if there is none."""
    if name in columns:
        return columns[name]
    value: Any = columns
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def has(columns: dict[str, Any], name: str) -> bool:
    """Whether there is such a column, be it empty; see `lookup`. What is null may hold anything."""
    if name in columns:
        return True
    value: Any = columns
    for part in name.split("."):
        if value is None:
            return True
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False
    return True


def damaged(label: str, error: Exception | str, read: int, promised: int | None) -> Record:
    """The record that stands for all that could not be read of a file or of a part of it.

    Args:
        label: the file and the part.
        error: the reader's own words; a string of ours is kept whole.
        read: records that could be read.
        promised: how many there are by the file's own account; None if that is not known.
    """
    words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"[:WORDS]  # ours may hold a remedy: not cut
    words = " ".join(words.split()).rstrip(".")
    of = "records were read, how many it promised is not known" if promised is None else f"of the {promised} records it promised"
    return Record(label, None, {}, "damaged_input", f"{words}; {read} {of}" + (" were read" if promised is not None else ""))


def is_damage(error: Exception) -> bool:
    """Whether an error means that the file's content is broken, rather than that the disk or the network is."""
    return not isinstance(error, OSError) or error.errno is None
