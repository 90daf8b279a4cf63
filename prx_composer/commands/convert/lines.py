"""JSON lines and a folder of images: `{"file": "cats/1.jpg", "caption": "…"}`. Files are cut into work units by byte ranges.

A line belongs to the unit in whose range it begins.
"""

import codecs
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from prx_composer.commands.convert.records import (
    IMAGE_NAMES,
    Found,
    Record,
    Seen,
    Source,
    Unit,
    choose_image,
    damaged,
    image_inside,
    image_of,
    look,
    usable,
)
from prx_composer.common.errors import UserError
from prx_composer.common.files import encoding_of
from prx_composer.data.storage import fetch, is_remote, join

SUFFIXES = (".jsonl", ".ndjson")
LINE_BYTES = 500  # about what a line takes …
IMAGE_BYTES = 500_000  # … and its image, for the size of work units
MAX_LINE_BYTES = 1 << 24
HEAD = 64  # bytes that say how the text is encoded
END = 1 << 62  # as `stop`


class Lines(Source):
    """A .jsonl file, or a folder of them. Images are named relative to the folder of their .jsonl file."""

    looked_for, suffixes = ".jsonl file", SUFFIXES
    of_nothing, without = "zero bytes", "Of zero bytes"

    def cut(self, name: str, size: int | None) -> list[tuple[int, int]]:
        if size is None or (size and not _encoding(Path(name), name).startswith("utf-8")):
            return [(0, END)]  # text that is not UTF-8 is made so first, as a whole
        part = max(1, self.settings.unit_bytes * LINE_BYTES // IMAGE_BYTES)
        return [(start, min(start + part, size)) for start in range(0, size, part)]

    def instead(self, names: list[str]) -> str:
        """Say what to type for what is there instead."""
        files = [name.rpartition("/")[2] for name in names]
        if one := next((name for name in files if name.endswith(".json")), None):
            return (
                f" {one} is there: if it holds a list, `jq -c '.[]' OLD.json > NEW.jsonl` makes lines of it; if lines, rename it."
            )
        if one := next((name for name in files if name.endswith(tuple(f"{suffix}.gz" for suffix in SUFFIXES))), None):
            return f" {one} is there: gunzip it."
        return super().instead(names)

    def columns(self, units: list[Unit]) -> Seen:
        wanted, named = self.settings.image, set[str]()
        seen = look(self._looked_at(units, named), self.settings, enough=lambda: bool(named))
        if seen.whole and seen.names and not named and wanted not in seen.names:
            choose_image([], [], seen.names, wanted)
        return seen

    def _looked_at(self, units: list[Unit], named: set[str]) -> Iterator[dict[str, Any]]:
        """Yield the lines without their images.

        Args:
            named: gets the keys that hold or name images.

        Raises:
            UserError: a line names several images.
        """
        wanted = self.settings.image
        for unit in units:
            with _scratch(unit) as folder:
                for _, row in self._rows(unit, Path(folder)):
                    if isinstance(row, dict):
                        found = _candidates(row) if wanted is None else [wanted] if usable(row.get(wanted)) else []
                        if len(found) > 1:
                            choose_image([], found, list(row), None)
                        named.update(found)
                        yield row

    def read(self, unit: Unit) -> Iterator[Record]:
        with _scratch(unit) as folder:
            for key, row in self._rows(unit, Path(folder)):
                if isinstance(row, Record):
                    yield row
                elif isinstance(row, str):
                    yield Record(key, None, {}, row)
                else:
                    yield self._record(key, row, unit.path, Path(folder))

    def _rows(self, unit: Unit, folder: Path) -> Iterator[tuple[str, dict[str, Any] | str | Record]]:
        """Yield a label with the object of every line, or with the reason why it has none."""
        label = Path(unit.path).name
        path, problem = fetch(unit.path, folder), None
        if unit.stop == END:
            path, problem = _as_utf8(path, folder, unit.path)
        with path.open("rb") as file:
            count = 0
            for offset, line in _lines(file, unit.start, unit.stop):
                if line is None:
                    yield f"{label}@{offset}", "file_too_large"
                elif line.strip():
                    yield f"{label}@{offset}", _parse(f"{label}@{offset}", line)
                    count += 1
        if problem is not None:
            yield label, damaged(label, problem, count, None)

    def _record(self, key: str, row: dict[str, Any], path: str, folder: Path) -> Record:
        found = [self.settings.image] if self.settings.image else _candidates(row)
        if not found:
            return Record(key, None, row, "no_image", f"the line has {', '.join(row)}")

        def find(name: str) -> Found:
            if is_remote(path):
                return _remote_image(path, name, folder)
            return image_inside(Path(path).parent, name, self.settings.follow_links)

        value = row[found[0]]
        image, problem, detail = image_of(value, find)
        named = value if isinstance(value, str) and len(value) < 256 else found[0]
        return Record(f"{key}/{named}", image, row, problem, detail, found[0])


def _scratch(unit: Unit) -> contextlib.AbstractContextManager[str]:
    """Make a temporary folder, if the unit needs one; there can be very many units that don't."""
    if is_remote(unit.path) or unit.stop == END:
        return tempfile.TemporaryDirectory(prefix="prx-convert.")
    return contextlib.nullcontext("")


def _candidates(row: dict[str, Any]) -> list[str]:
    return [name for name in IMAGE_NAMES if usable(row.get(name))]


def _parse(key: str, line: bytes) -> dict[str, Any] | Record:
    try:
        row = json.loads(line.decode("utf-8", "surrogatepass").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return Record(key, None, {}, "caption_not_utf8", str(error))
    except (ValueError, RecursionError) as error:
        return Record(key, None, {}, "unreadable_record", f"{error}. A line is a whole object; `jq -c . OLD > NEW` makes it so")
    if isinstance(row, dict):
        return row
    more = "; `jq -c '.[]' OLD > NEW` makes lines of what is in it" if isinstance(row, list) else ""
    return Record(key, None, {}, "unreadable_record", f"a {type(row).__name__} in place of an object{more}")


def _encoding(path: Path, name: str) -> str:
    """Return the encoding of a file by its first bytes.

    Raises:
        UserError: UTF-16 without a byte-order mark: JSON never has a zero byte.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    found = encoding_of(head)
    if found.startswith("utf-8") and b"\0" in head[:4]:
        kind = "UTF-16LE" if head[:1] != b"\0" else "UTF-16BE"
        raise UserError(
            f"--input: {name} has zero bytes and is no text in UTF-8. It looks like {kind} without its byte-order mark: "
            f"`iconv -f {kind} -t UTF-8 OLD > NEW` makes it UTF-8."
        )
    return found


def _as_utf8(path: Path, folder: Path, name: str) -> tuple[Path, Exception | None]:
    """Return the file, or what can be read of it in UTF-8, if it begins as UTF-16 or UTF-32; and what broke it off."""
    encoding = _encoding(path, name)
    if encoding.startswith("utf-8"):
        return path, None
    copy, decoder = folder / "utf-8", codecs.getincrementaldecoder(encoding)("surrogatepass")
    with path.open("rb") as source, copy.open("wb") as target:
        try:
            while chunk := source.read(1 << 20):
                target.write(decoder.decode(chunk).encode("utf-8", "surrogatepass"))
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            return copy, error
    return copy, None


def _remote_image(path: str, name: str, folder: Path) -> Found:
    if name.startswith("/") or ".." in name.split("/") or urlparse(name).scheme:
        return None, "outside_input", ""
    try:
        copy = fetch(join(path.rpartition("/")[0], name), folder)
    except Exception as error:
        if "not found" in str(error).lower():
            return None, "no_image", str(error)
        raise
    content = copy.read_bytes()
    copy.unlink()
    return content, "", ""


def _lines(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    r"""Yield offset and bytes of every line that begins in [start, stop); None for one that is too long to be one.

    A lone "\r" ends a line, too, as old Macs wrote it: inside of JSON text it can only stand as an escape.
    """
    if start:
        file.seek(start - 1)
        while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass  # the rest of a line that began before
    while (offset := file.tell()) < stop and (line := file.readline(MAX_LINE_BYTES)):
        rest, whole = line, True
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            whole = False
        if not whole:
            yield offset, None
            continue
        for piece in line.removesuffix(b"\n").split(b"\r"):
            yield offset, piece
            offset += len(piece) + 1
