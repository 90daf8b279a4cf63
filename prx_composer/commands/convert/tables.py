"""Parquet files and Hugging Face `datasets` folders (their parquet on the hub, or the arrow files that `save_to_disk` writes).

Parquet is cut into work units between row groups, an arrow file is one unit.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prx_composer.commands.convert.records import (
    IMAGE_NAMES,
    Record,
    Seen,
    Source,
    Unit,
    choose_image,
    damage,
    damaged,
    image_inside,
    image_of,
    ranges,
)
from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError, first
from prx_composer.data.storage import fetched, is_remote, join, relative_name

ROWS = 16  # decoded at a time
WHOLE = -1  # as `stop`
STATE = "state.json"  # beside arrow files that `save_to_disk` wrote
Row = dict[str, Any] | None  # None for one that cannot be decoded


class Tables(Source):
    """A .parquet or .arrow file, or a folder of them. Images are bytes, the struct of `datasets.Image`, or paths."""

    looked_for, suffixes = ".parquet and no .arrow file", (".parquet", ".arrow")
    of_nothing, without = "no rows, only columns", "Without rows"

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._schemas: dict[str, pa.Schema] = {}  # of local files that can be opened

    def select(self, listed: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        """Leave out what `datasets` left of later steps beside the arrow files of `save_to_disk`, with the same rows."""
        files = super().select(listed)
        names = [name for name, _ in files]
        caches: list[str] = []
        for folder in {name.rpartition("/")[0] for name in names if name.rpartition("/")[2].startswith("cache-")}:
            try:
                with fetched(join(folder, STATE)) as file:
                    state = json.loads(file.read_bytes())
                named = {join(folder, file["filename"]) for file in state["_data_files"]}
            except Exception:  # no such file, or another program's
                continue
            caches += [name for name in names if name.rpartition("/")[0] == folder and name not in named]
        if caches:
            shown = first(relative_name(name, self.settings.input) for name in caches)
            self.notes.append(f"Passed over, as {STATE} beside them does not name them: {shown}.")
        return [file for file in files if file[0] not in caches]

    def cut(self, name: str, size: int | None) -> list[tuple[int, int]]:
        """Cut parquet between row groups; an arrow file is one unit."""
        if name.endswith(".arrow") or is_remote(name):
            return [(0, WHOLE)]
        try:
            metadata = pq.read_metadata(name)
            self._schemas[name] = metadata.schema.to_arrow_schema()
        except Exception as error:
            damage(error)
            return [(0, WHOLE)]  # to be counted when it is read
        sizes = {group: metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)}
        return ranges(sizes, self.settings.unit_bytes) if metadata.num_rows else []

    def columns(self, units: list[Unit]) -> Seen:
        schemas = self._all_schemas(units)
        names = list(dict.fromkeys(name for schema in schemas.values() for name in schema.names))
        image = self._image(schemas, names)
        parts = [(relative_name(file, self.settings.input), schema) for file, schema in schemas.items()]
        missing = self.missing({*self.settings.input_columns, image}, parts, schema_has)
        return Seen(list(dict.fromkeys(n for schema in schemas.values() for n in names_of(schema))), missing, image=image)

    def _all_schemas(self, units: list[Unit]) -> dict[str, pa.Schema]:
        """Return the schemas of all local files, or of the first remote one that can be read: no other is downloaded for it."""
        schemas = {}
        for name in dict.fromkeys(unit.path for unit in units):
            if is_remote(name) and schemas:
                break
            if name not in self._schemas:
                with fetched(name) as path:
                    try:
                        self._schemas[name] = pq.read_schema(path) if path.suffix == ".parquet" else open_arrow(path)[0]
                    except Exception as error:
                        damage(error)
            if name in self._schemas:
                schemas[name] = self._schemas[name]
        if not schemas:
            raise UserError(f"--input: none of the {len(units)} parts of {self.settings.input} can be read.")
        return schemas

    def _image(self, schemas: dict[str, pa.Schema], names: list[str]) -> str:
        """Return the one column that holds the images in all files. A file without it is read, and its rows are counted."""
        chosen: dict[str, list[str]] = {}
        for file, schema in schemas.items():
            if column := self._image_in(schema):
                chosen.setdefault(column, []).append(relative_name(file, self.settings.input))
        if len(chosen) > 1:
            each = "; ".join(f"{column} in {first(files)}" for column, files in chosen.items())
            raise UserError(
                f"--image: the files hold their images in different columns: {each}. Convert them one after the other, each with "
                f"its --image and --include, or give them one name."
            )
        return next(iter(chosen), None) or choose_image([], [], names, self.settings.image)

    def _image_in(self, schema: pa.Schema) -> str | None:
        """Return the column of images of one file; None if it has none."""
        if self.settings.image is not None:
            return self.settings.image if self.settings.image in schema.names else None
        candidates = image_candidates(schema)
        return choose_image(*candidates, schema.names, None) if any(candidates) else None

    def read(self, unit: Unit) -> Iterator[Record]:
        with fetched(unit.path) as path:
            yield from self._read_arrow(path, unit) if path.suffix == ".arrow" else self._read_parquet(path, unit)

    def _read_parquet(self, path: Path, unit: Unit) -> Iterator[Record]:
        """Yield the unit's records. A row group that breaks does not cost those after it."""
        label = Path(unit.path).name
        try:
            file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
            metadata, image = file.metadata, self._image_in(file.schema_arrow)
        except Exception as error:
            yield damaged(label, damage(error), 0, None)
            return
        with file:
            wanted = self._wanted(file.schema_arrow, image)
            number = sum(metadata.row_group(group).num_rows for group in range(unit.start))
            for group in range(unit.start, file.num_row_groups if unit.stop == WHOLE else unit.stop):
                promised, read, problem = metadata.row_group(group).num_rows, 0, None
                try:
                    for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=wanted):
                        for row in rows_of(batch):
                            yield self._record(unit, number + read, row, image)
                            read += 1
                except Exception as error:
                    problem = damage(error)
                if read < promised:
                    part = f"{label}, row group {group + 1} of {metadata.num_row_groups}"
                    yield damaged(part, problem or "it ends early", read, promised)
                number += promised

    def _read_arrow(self, path: Path, unit: Unit) -> Iterator[Record]:
        number = 0
        try:
            schema, batches = open_arrow(path)
            image = self._image_in(schema)
            wanted = self._wanted(schema, image)
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS):
                    for row in rows_of(batch.select(wanted).slice(start, ROWS)):
                        yield self._record(unit, number, row, image)
                        number += 1
        except Exception as error:
            yield damaged(Path(unit.path).name, damage(error), number, None)

    def _wanted(self, schema: pa.Schema, image: str | None) -> list[str]:
        names = self.settings.input_columns
        names |= {name.partition(".")[0] for name in names} | {image or ""}
        return [name for name in schema.names if name in names] or schema.names[:1]

    def _record(self, unit: Unit, number: int, row: Row, image: str | None) -> Record:
        key = f"{Path(unit.path).name}:{number}"
        if row is None:
            return Record(key, None, {}, "unreadable_record")
        if image is None:
            return Record(key, None, row, "no_image", "the file has no column of images")
        folder, follow_links = Path(unit.path).parent, self.settings.follow_links
        content, problem, detail = image_of(row.get(image), lambda name: image_inside(folder, name, follow_links))
        return Record(key, content, row, problem, detail, image)


# Arrow's types and values as plain Python, one bad value at a time: what cannot be decoded costs its own row only.


def open_arrow(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Open an arrow file, be it a stream or a file in arrow's terms."""
    file = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    return stream.schema, iter(stream)


def image_candidates(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """Return the columns whose type is that of images, and those of text that are called as one of paths might be."""
    named = [field for field in schema if field.name in IMAGE_NAMES]
    sure = [field.name for field in schema if _is_image_struct(field.type) or (field in named and _is_bytes(field.type))]
    return sure, [field.name for field in named if _is_text(field.type)]


def schema_has(schema: pa.Schema, name: str) -> bool:
    """Return whether rows may have a column; `meta.tags.0` looks inside of structs and lists, as `lookup` does."""
    if name in schema.names:
        return True
    head, *parts = name.split(".")
    if head not in schema.names:
        return False
    kind = schema.field(head).type
    for part in parts:
        if pa.types.is_struct(kind) and part in [field.name for field in kind]:
            kind = kind.field(part).type
        elif _is_list(kind) and part.isdecimal():
            kind = kind.value_type
        else:
            return pa.types.is_null(kind)
    return True


def names_of(schema: pa.Schema) -> list[str]:
    """Return the names of columns, and of those inside of structs."""

    def inside(prefix: str, field: pa.Field) -> Iterator[str]:
        yield prefix + field.name
        if pa.types.is_struct(field.type) and not _is_image_struct(field.type):
            for child in field.type:
                yield from inside(f"{prefix}{field.name}.", child)

    return [name for field in schema for name in inside("", field)]


def rows_of(batch: pa.RecordBatch) -> list[Row]:
    """Return the rows of a batch; text that isn't UTF-8 as bytes, for whoever wants it as text to say so."""
    try:
        return batch.to_pylist()
    except Exception:  # one value is enough: text that isn't UTF-8, a time with nanoseconds, a date beyond Python's
        return [_row(batch, number) for number in range(batch.num_rows)]


def _row(batch: pa.RecordBatch, number: int) -> Row:
    try:
        return {name: _plain(column[number]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except Exception:
        return None


def _plain(scalar: pa.Scalar) -> Any:
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if pa.types.is_struct(kind):
        return {field.name: _plain(scalar[field.name]) for field in kind}
    if pa.types.is_map(kind):
        return [(_plain(pair["key"]), _plain(pair["value"])) for pair in scalar.values]
    if _is_list(kind):
        return [_plain(value) for value in scalar.values]
    if pa.types.is_dictionary(kind):
        return _plain(scalar.value)
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
    except Exception:
        return scalar.cast(pa.string()).as_py()


def _is_image_struct(kind: pa.DataType) -> bool:
    """Return whether it is that of `datasets.Image`."""
    return pa.types.is_struct(kind) and {"bytes"} <= {field.name for field in kind} <= {"bytes", "path"}


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    """Return whether values can be encoded files: bytes, lists of them as numbers, or lists of one image."""
    if pa.types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    if _is_list(kind):
        return pa.types.is_integer(kind.value_type) or _is_image_struct(kind.value_type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
