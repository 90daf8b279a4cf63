"""Parquet files and Hugging Face `datasets` folders (their parquet on the hub, or the arrow files that `save_to_disk` writes).

Parquet is cut into work units between row groups, an arrow file is one unit.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prx_composer.data.convert.expressions import input_columns
from prx_composer.data.convert.records import MAX_FILE_BYTES, Passed, Record, Unit, is_damage
from prx_composer.data.convert.settings import Settings
from prx_composer.data.storage import fetch, is_remote, list_files
from prx_composer.errors import UserError
from prx_composer.registry import nearest

__all__ = ["Tables", "image_inside"]

IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "jpeg", "image_path", "file_name", "file", "path")
ROWS = 16  # decoded at a time
WHOLE = -1  # as `stop`


class Tables:
    """A .parquet or .arrow file, or a folder of them. Images are bytes, the struct of `datasets.Image`, or paths."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.passed = Passed()
        self._image: str | None = settings.image

    def plan(self) -> list[Unit]:
        units: list[Unit] = []
        for name, _ in list_files(self._settings.input, self._settings.include):
            if name.endswith(".arrow") or (name.endswith(".parquet") and is_remote(name)):
                units.append(Unit(len(units), name, 0, WHOLE))
            elif name.endswith(".parquet"):
                units.extend([Unit(len(units) + i, name, *part) for i, part in enumerate(self._row_groups(name))])
        if not units:
            raise UserError(f"--input: no .parquet and no .arrow file in {self._settings.input}.")
        return units

    def _row_groups(self, name: str) -> list[tuple[int, int]]:
        try:
            metadata = pq.read_metadata(name)
        except Exception as error:
            if not is_damage(error):
                raise
            return [(0, WHOLE)]  # to be counted when it is read
        parts, start, size = [], 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= self._settings.unit_bytes or group + 1 == metadata.num_row_groups:
                parts.append((start, group + 1))
                start, size = group + 1, 0
        return parts

    def columns(self, units: list[Unit]) -> list[str]:
        for unit in units:
            with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
                path = fetch(unit.path, Path(folder))
                try:
                    schema = pq.read_schema(path) if path.suffix == ".parquet" else _open_arrow(path)[0]
                except Exception as error:
                    if not is_damage(error):
                        raise
                    continue
                _image_column(schema, self._settings.image)
                return schema.names
        raise UserError(f"--input: none of the {len(units)} parts of {self._settings.input} can be read.")

    def read(self, unit: Unit) -> Iterator[Record]:
        label = Path(unit.path).name
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
            path = fetch(unit.path, Path(folder))
            number = 0
            try:
                for start, batch in self._batches(path, unit):
                    image = _image_column(batch.schema, self._settings.image)
                    for number, row in enumerate(_rows(batch), start):
                        yield self._record(f"{label}:{number}", row.pop(image, None), row, Path(unit.path).parent)
            except Exception as error:
                if not is_damage(error) or isinstance(error, UserError):
                    raise
                yield Record(f"{label}:{number}", None, {}, "damaged_input")

    def _batches(self, path: Path, unit: Unit) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Record batches of the columns that are asked for, with the number of their first row in the file."""
        row = 0
        if path.suffix == ".arrow":
            schema, batches = _open_arrow(path)
            for batch in batches:
                yield row, batch.select(self._wanted(schema))
                row += batch.num_rows
            return
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            stop = file.num_row_groups if unit.stop == WHOLE else unit.stop
            row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
            groups, wanted = list(range(unit.start, stop)), self._wanted(file.schema_arrow)
            for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=wanted):
                yield row, batch
                row += batch.num_rows

    def _wanted(self, schema: pa.Schema) -> list[str]:
        names = input_columns(self._settings)
        names |= {name.partition(".")[0] for name in names} | {_image_column(schema, self._settings.image)}
        return [name for name in schema.names if name in names]

    def _record(self, key: str, value: Any, row: dict[str, Any], folder: Path) -> Record:
        if isinstance(value, dict):  # datasets.Image
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return Record(key, *image_inside(folder, value, row))
        if isinstance(value, bytes) and len(value) > MAX_FILE_BYTES:
            return Record(key, None, row, "file_too_large")
        return Record(key, value if isinstance(value, bytes) else None, row)


def image_inside(folder: Path, name: str, columns: dict[str, Any]) -> tuple[bytes | None, dict[str, Any], str]:
    """What follows the key in a record whose image is a file below a local folder. Nothing outside of it is opened."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return None, columns, "outside_input"
        if not path.is_file():
            return None, columns, "no_image"
        if path.stat().st_size > MAX_FILE_BYTES:
            return None, columns, "file_too_large"
        return path.read_bytes(), columns, ""
    except (OSError, ValueError):  # a name that no file can have, or one that may not be read
        return None, columns, "no_image"


def _image_column(schema: pa.Schema, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in schema.names:
            raise UserError(f"--image {wanted}: there is no such column.{nearest(wanted, schema.names)}")
        return wanted
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and {c.name for c in f.type} == {"bytes", "path"}]
    named = [name for name in IMAGE_NAMES if name in schema.names]
    if not structs + named:
        raise UserError(f"--image: say which column holds the images; there are {', '.join(schema.names)}.")
    return (structs + named)[0]


def _open_arrow(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    file = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    return stream.schema, iter(stream)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for start in range(0, batch.num_rows, ROWS):
        yield from _decoded(batch.slice(start, ROWS))


def _decoded(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # text that isn't UTF-8: as bytes, for the sample to say so
        strings = [i for i, f in enumerate(batch.schema) if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        for index in strings:
            batch = batch.set_column(index, batch.schema.field(index).name, batch.column(index).cast(pa.large_binary()))
        return batch.to_pylist()
