"""MDS folders that exist already, of any columns. A work unit is some shards.

Pickle columns are never decoded: asking for one is refused, and the others are read around it.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prx_composer.data.convert.records import MAX_FILE_BYTES, Passed, Record, Unit, is_damage
from prx_composer.data.convert.settings import Settings
from prx_composer.data.convert.tables import IMAGE_NAMES
from prx_composer.data.mds import RawShard, encodings_of
from prx_composer.data.storage import fetch, join, list_files
from prx_composer.errors import UserError
from prx_composer.registry import nearest

__all__ = ["Shards"]

ENCODED = ("bytes", "jpeg", "png")  # encodings whose bytes are an image file
READ = ("str", "str_int", "str_float", "int", "json", "bytes")  # and numpy's numbers
INDEX = "index.json"


class Shards:
    """A folder with an index.json, or a folder of such folders, such as a split of ours."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.passed = Passed()
        self._indexes: dict[str, list[dict[str, Any]]] = {}

    def plan(self) -> list[Unit]:
        folders = [name.rpartition("/")[0] for name, _ in list_files(self._settings.input) if name.endswith(f"/{INDEX}")]
        if not folders:
            raise UserError(f"--input: no {INDEX} of MDS shards in {self._settings.input}.")
        units: list[Unit] = []
        for folder in folders:
            start, size, shards = 0, 0, self._index(folder)
            for number, shard in enumerate(shards, 1):
                size += shard["raw_data"]["bytes"]
                if size >= self._settings.unit_bytes or number == len(shards):
                    units.append(Unit(len(units), folder, start, number))
                    start, size = number, 0
        return units

    def _index(self, folder: str) -> list[dict[str, Any]]:
        if folder not in self._indexes:
            with tempfile.TemporaryDirectory(prefix="prx-convert.") as cache:
                try:
                    shards = json.loads(fetch(join(folder, INDEX), Path(cache)).read_text())["shards"]
                    for shard in shards:
                        _ = shard["raw_data"]["bytes"], shard["column_names"], shard["column_encodings"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"--input: {join(folder, INDEX)} is no index of MDS shards: {error}") from error
            self._indexes[folder] = shards
        return self._indexes[folder]

    def columns(self, units: list[Unit]) -> list[str]:
        shards = [shard for unit in units for shard in self._index(unit.path)[unit.start : unit.stop]]
        encodings = {name: kind for shard in shards for name, kind in encodings_of(shard).items()}
        image = _image_column(encodings, self._settings.image)
        if encodings[image] not in ENCODED:
            raise UserError(
                f"--image {image}: a column of type {encodings[image]!r}; encoded files ({', '.join(ENCODED)}) are read."
            )
        wanted = {*self._settings.captions.values(), *(column for column, _ in self._settings.metadata.values())}
        for column in sorted(wanted & encodings.keys()):
            if not _is_read(encodings[column]):
                raise UserError(f"column {column}: of type {encodings[column]!r}, which is not read, as it may execute code.")
        return [name for name, kind in encodings.items() if _is_read(kind)]

    def read(self, unit: Unit) -> Iterator[Record]:
        for number in range(unit.start, unit.stop):
            shard = self._index(unit.path)[number]
            label = f"{Path(unit.path).name}/{number:05d}"
            index = -1
            try:
                with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
                    for index, sample in enumerate(RawShard(unit.path, shard, Path(folder))):
                        yield self._record(f"{label}:{index}", sample, shard)
            except Exception as error:
                if not is_damage(error) and not isinstance(error, FileNotFoundError):
                    raise
                problem = "outside_input" if isinstance(error, PermissionError) else "damaged_input"
                yield Record(f"{label}:{index + 1}", None, {}, problem)

    def _record(self, key: str, sample: dict[str, bytes], shard: dict[str, Any]) -> Record:
        from streaming.base.format.mds.encodings import mds_decode

        encodings = encodings_of(shard)
        name = _image_column(encodings, self._settings.image)
        image = sample.pop(name)
        columns: dict[str, Any] = {}
        for column, content in sample.items():
            if encodings[column] == "str":
                columns[column] = content  # decoded, or found not to be UTF-8, with the captions
            elif _is_read(encodings[column]):
                columns[column] = mds_decode(encodings[column], content)
        own = columns.get("key")
        key = own.decode(errors="replace") if isinstance(own, bytes) else key
        return Record(key, image, columns, "file_too_large" if len(image) > MAX_FILE_BYTES else "")


def _is_read(encoding: str) -> bool:
    return encoding in READ or encoding.rstrip("0123456789") in ("int", "uint", "float")


def _image_column(encodings: dict[str, str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in encodings:
            raise UserError(f"--image {wanted}: there is no such column.{nearest(wanted, list(encodings))}")
        return wanted
    found = [name for name in IMAGE_NAMES if encodings.get(name) in ENCODED]
    found += [name for name, kind in encodings.items() if kind in ("jpeg", "png")]
    if not found:
        columns = ", ".join(f"{name} ({kind})" for name, kind in encodings.items())
        raise UserError(f"--image: say which column holds the images; there are {columns}.")
    return found[0]
