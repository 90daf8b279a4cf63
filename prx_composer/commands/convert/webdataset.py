"""WebDataset tars: the members `KEY.jpg`, `KEY.txt`, `KEY.json` of one key are a sample. One tar is one work unit.

Nothing is extracted: names only tell what belongs together. The rules, which lose no member without a count:

- The key ends at the first dot of the file's name, as in the webdataset library. Where that would make one sample of several
  (`cat.jpg`, `cat.txt`, `cat.v2.jpg`, `cat.v2.txt`), which is where a longer name has both an image and something else, it ends
  at the last dot, unless an option names a suffix of several parts that is there (`--image left.jpg`).
- Members of one key that lie apart (all images first, then all texts) are brought together.
- A name that comes twice is two samples, if each time it is a whole one; else nobody knows what belongs to what.
"""

import itertools
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prx_composer.commands.convert.archives import SUFFIXES, members, open_tar
from prx_composer.commands.convert.expressions import input_columns
from prx_composer.commands.convert.records import MAX_FILE_BYTES, Passed, Record, Unit, is_damage
from prx_composer.commands.convert.settings import Settings
from prx_composer.commands.convert.source_columns import PEEKED, Seen, first, look
from prx_composer.commands.convert.splits import one_split
from prx_composer.common.errors import UserError
from prx_composer.data.storage import fetch, list_files

IMAGES = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "img", "image"])
DAMAGED = "\0"  # as a key, which no member can have


class Part(NamedTuple):
    """A member that belongs to a sample.

    Args:
        suffix: in lower case; of the key DAMAGED: what is wrong.
    """

    key: str
    suffix: str
    tar: Any
    info: Any

    @property
    def is_image(self) -> bool:
        return self.suffix.rpartition(".")[2] in IMAGES

    def read(self) -> bytes | None:
        """The content; None if it is too large. Raises tarfile.ReadError if the file ends before."""
        if self.info.size > MAX_FILE_BYTES:
            return None
        file = self.tar.extractfile(self.info)
        return b"" if file is None else file.read()


class WebDataset:
    """A tar, or a folder of tars (perhaps compressed), as the webdataset library writes and img2dataset downloads them."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.passed = Passed()
        named = input_columns(settings) | ({settings.image} if settings.image else set())
        self._suffixes = {name.lower() for name in named if "." in name}

    def plan(self) -> list[Unit]:
        listed = list_files(self._settings.input, self._settings.include, self._settings.follow_links)
        files = [name for name, _ in listed if name.lower().endswith(SUFFIXES)]
        if not files:
            there = [name.rpartition("/")[2] for name, _ in listed]
            instead = f" There are {first(there)}." if there else ""
            raise UserError(f"--input: no {', '.join(SUFFIXES)} file in {self._settings.input}.{instead}")
        one_split(files, self._settings)
        return [Unit(number, name, 0, 0) for number, name in enumerate(files)]

    def columns(self, units: list[Unit]) -> Seen:
        records = (record for unit in units for record in self.read(unit))
        begin = list(itertools.islice(records, PEEKED))
        if begin and all(record.problem == "several_images" for record in begin):
            raise UserError(f"--image: say which one is meant. In {begin[0].key} there are {begin[0].detail}.")
        return look((record.columns for record in itertools.chain(begin, records)), self._settings)

    def notes(self) -> list[str]:
        return []

    def read(self, unit: Unit) -> Iterator[Record]:
        label = Path(unit.path).name
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder, tempfile.TemporaryDirectory(dir=folder) as aside:
            path = fetch(unit.path, Path(folder))
            with open_tar(path, Path(aside)) as (file, problem):
                apart, samples = _apart(file), 0
                for key, run in itertools.groupby(_parts(file, label, self.passed), key=lambda part: part.key):
                    if key == DAMAGED:
                        problem = problem or next(run).suffix
                        continue
                    runs = apart[key] if key in apart else [list(run)]
                    if key in apart:
                        apart[key] = []  # it comes once, at its first place
                    for record in self._records(label, key, runs):
                        samples += 1
                        yield record
            if problem:
                yield Record(label, None, {}, "damaged_input", f"{problem} ({samples} samples were read)")

    def _records(self, label: str, key: str, runs: list[list[Part]]) -> Iterator[Record]:
        """The samples of one key up to the first dot, from all places where it stands."""
        if not runs:
            return
        for stem, some in _by_stem(key, runs, self._suffixes).items():
            samples = _samples(some)
            if samples is not None:
                yield from filter(None, (self._record(f"{label}/{stem}", parts) for parts in samples))
                continue
            names = [part.suffix for run in some for part in run]
            twice = {name: names.count(name) for name in names if names.count(name) > 1}
            detail = ", ".join(f"{stem}.{name} {count} times" for name, count in twice.items())
            for _ in range(max(twice.values())):
                yield Record(f"{label}/{stem}", None, {}, "same_name_twice", detail)

    def _record(self, key: str, parts: list[Part]) -> Record | None:
        """None if the tar ends within its first member."""
        images = _images(parts, self._settings.image)
        columns: dict[str, Any] = {}
        mapping: dict[str, Any] = {}
        problem = detail = ""
        image, whole = None, 0
        for part in parts:
            if part.is_image and part not in images[:1]:
                whole += 1
                if len(images) == 1:
                    self.passed.add("further images of samples", f"{key}: {part.suffix}")
                continue
            try:
                content = part.read()
            except tarfile.ReadError:
                continue  # its end comes as damage of the whole file
            whole += 1
            if content is None:
                problem, detail = "file_too_large", f"{part.info.name}, {part.info.size:,} bytes"
            elif part in images:
                image = content
            elif part.suffix == "json":
                try:
                    value = json.loads(content)
                except (ValueError, RecursionError) as error:
                    problem, detail = "unreadable_record", f"{part.info.name}: {error}"
                else:
                    mapping = value if isinstance(value, dict) else {"json": value}
            else:
                columns[part.suffix] = content
        if len(images) > 1 and not problem:
            image, problem = None, "several_images"
            detail = f"{', '.join(part.suffix for part in images)}; --image {images[0].suffix} takes that one"
        if not whole:
            return None
        detail = detail or f"its members are {', '.join(part.suffix for part in parts)}"
        return Record(key, image, mapping | columns, problem, detail, images[0].suffix if images else "")


def _images(parts: list[Part], wanted: str | None) -> list[Part]:
    """The members that may be a sample's image: one, if it is clear which."""
    if wanted is not None:
        wanted = wanted.lower()
        exactly = [part for part in parts if part.suffix == wanted]
        return exactly or [part for part in parts if part.is_image and part.suffix.endswith(f".{wanted}")]
    images = [part for part in parts if part.is_image]
    return [part for part in images if "." not in part.suffix] or images  # 1.jpg is it, and 1.mask.png is something about it


def _by_stem(key: str, runs: list[list[Part]], suffixes: set[str]) -> dict[str, list[list[Part]]]:
    """The runs by key, which ends at the first dot or, where that makes one sample of several, at the last."""
    kinds: dict[str, set[bool]] = {}
    for part in itertools.chain.from_iterable(runs):
        stem, dot, _ = part.suffix.rpartition(".")
        if part.suffix in suffixes:
            return {key: runs}
        if dot:
            kinds.setdefault(stem, set()).add(part.is_image)
    if {True, False} not in kinds.values():
        return {key: runs}
    found: dict[str, list[list[Part]]] = {}
    for run in runs:
        split: dict[str, list[Part]] = {}
        for part in run:
            stem, dot, suffix = part.suffix.rpartition(".")
            split.setdefault(f"{key}.{stem}" if dot else key, []).append(part._replace(suffix=suffix))
        for name, parts in split.items():
            found.setdefault(name, []).append(parts)
    return found


def _samples(runs: list[list[Part]]) -> list[list[Part]] | None:
    """The samples of one key: one, or one for each place where it stands; None if nobody can tell what belongs together."""
    every = [part for run in runs for part in run]
    if len({part.suffix for part in every}) == len(every):
        return [every]
    for run in runs:
        if len({part.suffix for part in run}) < len(run) or {part.is_image for part in run} != {True, False}:
            return None
    return runs


def _parts(file: BinaryIO, label: str, passed: Passed) -> Iterator[Part]:
    """Every regular member that has a key and a suffix, at last the key DAMAGED if the tar does not end where it should."""
    try:
        for tar, member in members(file):
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if member.isdir():
                continue
            if not member.isreg():
                passed.add("links or devices in tars", f"{label}/{member.name}")  # which could lead out
            elif not stem:
                passed.add("hidden members of tars", f"{label}/{member.name}")
            elif not dot:
                passed.add("members of tars without a suffix", f"{label}/{member.name}")
            else:
                yield Part(folder + slash + stem, suffix.lower(), tar, member)
    except Exception as error:
        if not is_damage(error):
            raise
        yield Part(DAMAGED, str(error), None, None)


def _apart(file: BinaryIO) -> dict[str, list[list[Part]]]:
    """The parts of every key whose members lie in several places, by place. Reads headers alone."""
    seen, again, last = set[int](), set[int](), DAMAGED
    for part in _parts(file, "", Passed()):
        if part.key != last:
            (again if hash(part.key) in seen else seen).add(hash(part.key))  # numbers, as a tar may have millions of names
            last = part.key
    found: dict[str, list[list[Part]]] = {}
    if again:
        for key, run in itertools.groupby(_parts(file, "", Passed()), key=lambda part: part.key):
            if hash(key) in again and key != DAMAGED:
                found.setdefault(key, []).append(list(run))
    return found
