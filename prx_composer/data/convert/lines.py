"""JSON lines and a folder of images: `{"file": "cats/1.jpg", "caption": "…"}`. Files are cut into work units by byte ranges.

A line belongs to the unit in whose range it begins.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from prx_composer.data.convert.records import Passed, Record, Unit
from prx_composer.data.convert.settings import Settings
from prx_composer.data.convert.tables import IMAGE_NAMES, image_inside
from prx_composer.data.convert.webdataset import peek
from prx_composer.data.storage import fetch, is_remote, join, list_files
from prx_composer.errors import UserError

__all__ = ["Lines"]

LINE_BYTES = 500  # about what a line takes …
IMAGE_BYTES = 500_000  # … and its image, for the size of work units
MAX_LINE_BYTES = 1 << 24


class Lines:
    """A .jsonl file, or a folder of them. Images are named relative to the folder of their .jsonl file."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.passed = Passed()

    def plan(self) -> list[Unit]:
        files = [f for f in list_files(self._settings.input, self._settings.include) if f[0].endswith((".jsonl", ".ndjson"))]
        if not files:
            raise UserError(f"--input: no .jsonl file in {self._settings.input}.")
        units: list[Unit] = []
        part = max(1, self._settings.unit_bytes * LINE_BYTES // IMAGE_BYTES)
        for name, size in files:
            for start in range(0, size or 1, part if size else 1):
                units.append(Unit(len(units), name, start, min(start + part, size) if size else 1 << 62))
        return units

    def columns(self, units: list[Unit]) -> list[str]:
        return peek(self, units)

    def read(self, unit: Unit) -> Iterator[Record]:
        label = Path(unit.path).name
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
            with fetch(unit.path, Path(folder)).open("rb") as file:
                for offset, line in _lines(file, unit.start, unit.stop):
                    key = f"{label}@{offset}"
                    if line is None:
                        yield Record(key, None, {}, "file_too_large")
                    elif line.strip():
                        yield self._record(key, line, unit.path, Path(folder))

    def _record(self, key: str, line: bytes, path: str, folder: Path) -> Record:
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            return Record(key, None, {}, "caption_not_utf8")
        except (ValueError, RecursionError):
            return Record(key, None, {}, "unreadable_record")
        if not isinstance(row, dict):
            return Record(key, None, {}, "unreadable_record")
        names = (self._settings.image,) if self._settings.image else IMAGE_NAMES
        name: Any = next((row.pop(name) for name in names if name in row), None)
        if not isinstance(name, str) or not name:
            return Record(key, None, row, "no_image")
        if not is_remote(path):
            return Record(f"{key}/{name}", *image_inside(Path(path).parent, name, row))
        return Record(f"{key}/{name}", *_remote_image(path, name, folder, row))


def _remote_image(path: str, name: str, folder: Path, row: dict[str, Any]) -> tuple[bytes | None, dict[str, Any], str]:
    if name.startswith("/") or "://" in name or ".." in name.split("/") or urlparse(name).scheme:
        return None, row, "outside_input"
    try:
        copy = fetch(join(path.rpartition("/")[0], name), folder)
    except Exception as error:
        if "not found" in str(error).lower():
            return None, row, "no_image"
        raise
    content = copy.read_bytes()
    copy.unlink()
    return content, row, ""


def _lines(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of every line that begins in [start, stop); None for one that is too long to be one."""
    if start:
        file.seek(start - 1)
        while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass  # the rest of a line that began before
    while (offset := file.tell()) < stop and (line := file.readline(MAX_LINE_BYTES)):
        rest, whole = line, True
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            whole = False
        yield offset, line if whole else None
