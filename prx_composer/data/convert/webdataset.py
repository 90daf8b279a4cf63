"""WebDataset tars: the members `KEY.jpg`, `KEY.txt`, `KEY.json` of one key are a sample. One tar is one work unit.

Nothing is extracted: members are read in order as a stream, their names only tell what belongs together.
"""

import bz2
import contextlib
import gzip
import itertools
import json
import lzma
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prx_composer.data.convert.records import MAX_FILE_BYTES, Record, Unit, is_damage
from prx_composer.data.convert.settings import Settings
from prx_composer.data.storage import fetch, list_files
from prx_composer.errors import UserError

__all__ = ["WebDataset"]

IMAGES = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "img", "image"])
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DAMAGED = "\0"  # as a key, which no member can have
PEEKED = 50  # records that say which columns there are


class WebDataset:
    """A tar, or a folder of tars (perhaps compressed), as the webdataset library writes and img2dataset downloads them."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def plan(self) -> list[Unit]:
        files = [name for name, _ in list_files(self._settings.input, self._settings.include) if name.endswith(SUFFIXES)]
        if not files:
            raise UserError(f"--input: no {', '.join(SUFFIXES)} file in {self._settings.input}.")
        return [Unit(number, name, 0, 0) for number, name in enumerate(files)]

    def columns(self, units: list[Unit]) -> list[str]:
        return peek(self, units)

    def read(self, unit: Unit) -> Iterator[Record]:
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
            path = fetch(unit.path, Path(folder))
            label = Path(unit.path).name
            for key, parts in itertools.groupby(_members(path), key=lambda part: part[0]):
                if key == DAMAGED:
                    yield Record(label, None, {}, "damaged_input")
                else:
                    yield self._record(f"{label}/{key}", [part[1:] for part in parts])

    def _record(self, key: str, parts: list[tuple[str, bytes | None]]) -> Record:
        image, columns, problem = None, dict[str, Any](), ""
        for suffix, content in parts:
            wanted = self._settings.image in (None, suffix)
            if content is None:
                problem = "file_too_large"
            elif suffix in IMAGES and wanted and image is None:
                image = content
            elif suffix == "json":
                try:
                    value = json.loads(content)
                except (ValueError, RecursionError):
                    problem = "unreadable_record"
                else:
                    columns |= value if isinstance(value, dict) else {"json": value}
            else:
                columns[suffix] = content
        return Record(key, image, columns, problem)


def peek(source: Any, units: list[Unit]) -> list[str]:
    """The columns of the first records, for inputs that don't name them elsewhere."""
    first = itertools.islice(itertools.chain.from_iterable(map(source.read, units)), PEEKED)
    return sorted({str(column) for record in first for column in record.columns})


def _members(path: Path) -> Iterator[tuple[str, str, bytes | None]]:
    """Key, lower-case suffix and content of every regular file; the content of one that is too large is None.

    Ends with the key DAMAGED if the archive does not end where it should.
    """
    compressed = _opener(path)
    try:
        with contextlib.ExitStack() as stack:
            if compressed is None:
                tar: Any = stack.enter_context(tarfile.open(path, "r:"))
            else:
                stream = stack.enter_context(compressed(path, "rb"))
                tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
            while (member := tar.next()) is not None:
                tar.members.clear()  # or it would keep them all
                if not member.isreg():
                    continue  # folders, and links or devices, which could lead out
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not stem or not dot:
                    continue
                content = None
                if member.size <= MAX_FILE_BYTES:
                    file = tar.extractfile(member)
                    content = b"" if file is None else file.read()
                yield folder + slash + stem, suffix.lower(), content
            if compressed is not None:
                while stream.read(1 << 20):  # pyright: ignore[reportPossiblyUnboundVariable]
                    pass  # to its checksum
            elif not _ends(path, tar.offset):
                yield DAMAGED, "", None
    except Exception as error:
        if not is_damage(error):
            raise
        yield DAMAGED, "", None


def _opener(path: Path) -> Callable[[Path, str], Any] | None:
    """What decompresses the file; None for a plain one."""
    with path.open("rb") as file:
        start = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    return next((opener for magic, opener in openers.items() if start.startswith(magic)), None)


def _ends(path: Path, offset: int) -> bool:
    """Whether a plain archive ends there. tarfile takes a broken header for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(tarfile.BLOCKSIZE)
    return not rest.strip(b"\0") and path.stat().st_size % tarfile.BLOCKSIZE == 0
