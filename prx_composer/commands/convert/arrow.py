"""Arrow's types and values as plain Python, one bad value at a time: what cannot be decoded costs its own row only."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from prx_composer.commands.convert.source_columns import IMAGE_NAMES

Row = dict[str, Any] | None  # None for one that cannot be decoded


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
    """Whether rows may have a column; `meta.tags.0` looks inside of structs and lists, as `records.lookup` does."""
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
    """Names of columns, and of those inside of structs."""

    def inside(prefix: str, field: pa.Field) -> Iterator[str]:
        yield prefix + field.name
        if pa.types.is_struct(field.type) and not _is_image_struct(field.type):
            for child in field.type:
                yield from inside(f"{prefix}{field.name}.", child)

    return [name for field in schema for name in inside("", field)]


def rows_of(batch: pa.RecordBatch) -> list[Row]:
    """The rows of a batch; text that isn't UTF-8 as bytes, for whoever wants it as text to say so."""
    try:
        return batch.to_pylist()
    except Exception:  # one value is enough: text that isn't UTF-8, a time with nanoseconds, a date beyond Python's
        return [_row(batch, number) for number in range(batch.num_rows)]


def _row(batch: pa.RecordBatch, number: int) -> Row:
    with contextlib.suppress(Exception):
        return batch.slice(number, 1).to_pylist()[0]
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
    """Of `datasets.Image`."""
    return pa.types.is_struct(kind) and {"bytes"} <= {field.name for field in kind} <= {"bytes", "path"}


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    """Whether values can be encoded files: bytes, lists of them as numbers, or lists of one image."""
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
