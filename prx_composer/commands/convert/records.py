"""What an input gives: raw records, in numbered work units that can be read one by one, in any order, on any machine."""

import dataclasses
import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from prx_composer.commands.convert.input_files import Passed, first, one_split
from prx_composer.commands.convert.settings import SOURCES, Settings
from prx_composer.common.errors import UserError
from prx_composer.data.storage import list_files, relative_name

WORDS = 200  # characters of a reader's own message
MAX_FILE_BYTES = 1 << 28  # of one encoded image or text: what is larger is not read


class Record(NamedTuple):
    """One sample as it came.

    Args:
        key: where it came from; only ever a label.
        image: the encoded file; None if there is none.
        columns: everything else, by column name.
        problem: reason (see `sample.REASONS`) for which the source itself could not give the sample.
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


@dataclass(frozen=True)
class Job:
    """What all units have in common."""

    settings: Settings
    output: str


class Source(ABC):
    """A kind of input: files that are cut into work units, of which each gives records.

    Attributes:
        looked_for: what the files are called, for the message that there is none.
        suffixes: by which they are known.
        of_nothing: what a file without records has, for the message that there is nothing to read.
        without: the same, as the summary says it of some of the files.
        passed: what `read` has come upon that is no record.
        notes: what is to be said of the input after `plan` and `columns`: files that are passed over, and why.
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
        one_split([name for name, _ in files], self.settings)
        units: list[Unit] = []
        empty: list[str] = []
        for name, size in files:
            parts = self.cut(name, size)
            empty += [] if parts else [relative_name(name, given)]
            units += [Unit(len(units) + i, self.path_of(name), *part) for i, part in enumerate(parts)]
        if not units:
            raise UserError(f"--input: {first(empty)} in {given}: {self.of_nothing}. There is nothing to read.")
        if empty and self.without:
            self.notes.append(f"{self.without}: {first(empty)}.")
        return units

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

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[Record]:
        """Yield the unit's records, in a fixed order. What cannot be read is a record with a problem."""


def open_source(settings: Settings) -> Source:
    """Return the source that the settings name; only its own libraries are imported."""
    module, _, name = SOURCES[settings.source].partition(":")
    return getattr(importlib.import_module(f"prx_composer.commands.convert.{module}"), name)(settings)


def limited(source: Source, units: list[Unit], limit: int) -> list[Unit]:
    """Return the first units, as many as hold `limit` records, the last of them cut. Read that many records, and no more."""
    kept: list[Unit] = []
    for unit in units:
        count = sum(1 for _ in itertools.islice(source.read(unit), limit))
        kept.append(dataclasses.replace(unit, take=count))
        limit -= count
        if limit <= 0:
            break
    return kept


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
    of = "records were read, how many it promised is not known" if promised is None else f"of the {promised} records it promised"
    return Record(label, None, {}, "damaged_input", f"{words}; {read} {of}" + (" were read" if promised is not None else ""))


def damage(error: Exception) -> Exception:
    """Return an error that means that a file's content is broken; raise one of the disk, of the network or of the settings."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
        raise error
    return error
