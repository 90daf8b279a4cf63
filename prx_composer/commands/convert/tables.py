"""Parquet files and Hugging Face `datasets` folders (their parquet on the hub, or the arrow files that `save_to_disk` writes).

Parquet is cut into work units between row groups, an arrow file is one unit.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prx_composer.commands.convert.arrow import Row, image_candidates, names_of, open_arrow, rows_of, schema_has
from prx_composer.commands.convert.expressions import input_columns
from prx_composer.commands.convert.records import MAX_FILE_BYTES, Passed, Record, Unit, damaged, is_damage
from prx_composer.commands.convert.settings import Settings
from prx_composer.commands.convert.source_columns import Seen, choose_image, first
from prx_composer.commands.convert.splits import one_split
from prx_composer.commands.convert.values import Found, image_of
from prx_composer.common.errors import UserError
from prx_composer.data.storage import fetch, is_remote, join, list_files, relative_name

ROWS = 16  # decoded at a time
WHOLE = -1  # as `stop`
STATE = "state.json"  # beside arrow files that `save_to_disk` wrote


class Tables:
    """A .parquet or .arrow file, or a folder of them. Images are bytes, the struct of `datasets.Image`, or paths."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.passed = Passed()
        self._schemas: dict[str, pa.Schema] = {}  # of local files that can be opened
        self._notes: list[str] = []

    def plan(self) -> list[Unit]:
        everything = list_files(self._settings.input, self._settings.include, self._settings.follow_links)
        files = self._without_caches([name for name, _ in everything if name.endswith((".parquet", ".arrow"))])
        if not files:
            raise UserError(f"--input: no .parquet and no .arrow file in {self._settings.input}.{_instead(everything)}")
        one_split(files, self._settings)
        units: list[Unit] = []
        empty = []
        for name in files:
            parts = [(0, WHOLE)] if name.endswith(".arrow") or is_remote(name) else self._row_groups(name)
            empty += [] if parts else [relative_name(name, self._settings.input)]
            units.extend([Unit(len(units) + i, name, *part) for i, part in enumerate(parts)])
        if not units:
            raise UserError(
                f"--input: {first(empty)} in {self._settings.input}: no rows, only columns. There is nothing to read."
            )
        if empty:
            self._notes.append(f"Without rows: {first(empty)}.")
        return units

    def _without_caches(self, files: list[str]) -> list[str]:
        """The files without what `datasets` left of later steps beside the arrow files of `save_to_disk`, with the same rows."""
        self._caches: list[str] = []
        for folder in {name.rpartition("/")[0] for name in files if name.rpartition("/")[2].startswith("cache-")}:
            try:
                with tempfile.TemporaryDirectory(prefix="prx-convert.") as cache:
                    state = json.loads(fetch(join(folder, STATE), Path(cache)).read_bytes())
                    named = {join(folder, file["filename"]) for file in state["_data_files"]}
            except Exception:  # no such file, or another program's
                continue
            self._caches += [name for name in files if name.rpartition("/")[0] == folder and name not in named]
        if self._caches:
            shown = first([relative_name(name, self._settings.input) for name in self._caches])
            self._notes.append(f"Passed over, as {STATE} beside them does not name them: {shown}.")
        return [name for name in files if name not in self._caches]

    def _row_groups(self, name: str) -> list[tuple[int, int]]:
        try:
            metadata = pq.read_metadata(name)
            self._schemas[name] = metadata.schema.to_arrow_schema()
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
        return parts if metadata.num_rows else []

    def columns(self, units: list[Unit]) -> Seen:
        schemas = self._all_schemas(units)
        names = list(dict.fromkeys(name for schema in schemas.values() for name in schema.names))
        image = self._image(schemas, names)
        missing = []
        for column in sorted({*input_columns(self._settings), image}):
            lacking = [relative_name(f, self._settings.input) for f, schema in schemas.items() if not schema_has(schema, column)]
            if len(lacking) == len(schemas):
                missing.append(column)
            elif lacking:
                self._notes.append(f"Without a column {column!r}: {first(lacking)}.")
        return Seen(list(dict.fromkeys(n for schema in schemas.values() for n in names_of(schema))), missing, image=image)

    def _all_schemas(self, units: list[Unit]) -> dict[str, pa.Schema]:
        """Of every local file, or of the first remote one that can be read: none is downloaded only to be looked at."""
        schemas = {}
        for name in dict.fromkeys(unit.path for unit in units):
            if is_remote(name) and schemas:
                break
            if name not in self._schemas and (is_remote(name) or name.endswith(".arrow")):
                with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
                    path = fetch(name, Path(folder))
                    try:
                        self._schemas[name] = pq.read_schema(path) if path.suffix == ".parquet" else open_arrow(path)[0]
                    except Exception as error:
                        if not is_damage(error):
                            raise
            if name in self._schemas:
                schemas[name] = self._schemas[name]
        if not schemas:
            raise UserError(f"--input: none of the {len(units)} parts of {self._settings.input} can be read.")
        return schemas

    def _image(self, schemas: dict[str, pa.Schema], names: list[str]) -> str:
        """The one column that holds the images in all files. A file without it is read, and its rows are counted."""
        if self._settings.image is not None:
            return choose_image([], [], names, self._settings.image)
        chosen: dict[str, list[str]] = {}
        for file, schema in schemas.items():
            candidates = image_candidates(schema)
            if any(candidates):
                column = choose_image(*candidates, schema.names, None)
                chosen.setdefault(column, []).append(relative_name(file, self._settings.input))
        if len(chosen) > 1:
            each = "; ".join(f"{column} in {first(files)}" for column, files in chosen.items())
            raise UserError(
                f"--image: the files hold their images in different columns: {each}. Convert them one after the other, each with "
                f"its --image and --include, or give them one name."
            )
        return next(iter(chosen), None) or choose_image([], [], names, None)

    def notes(self) -> list[str]:
        return self._notes

    def read(self, unit: Unit) -> Iterator[Record]:
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
            path = fetch(unit.path, Path(folder))
            yield from self._read_arrow(path, unit) if path.suffix == ".arrow" else self._read_parquet(path, unit)

    def _read_parquet(self, path: Path, unit: Unit) -> Iterator[Record]:
        """The unit's records. A row group that breaks does not cost those after it."""
        label = Path(unit.path).name
        try:
            file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
            metadata, image = file.metadata, self._image_in(file.schema_arrow)
        except Exception as error:
            if not is_damage(error) or isinstance(error, UserError):
                raise
            yield damaged(label, error, 0, None)
            return
        with file:
            number = sum(metadata.row_group(group).num_rows for group in range(unit.start))
            for group in range(unit.start, file.num_row_groups if unit.stop == WHOLE else unit.stop):
                promised, read, problem = metadata.row_group(group).num_rows, 0, None
                wanted = self._wanted(file.schema_arrow, image)
                try:
                    for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=wanted):
                        for row in rows_of(batch):
                            yield self._record(unit, number + read, row, image)
                            read += 1
                except Exception as error:
                    if not is_damage(error):
                        raise
                    problem = error
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
            if not is_damage(error) or isinstance(error, UserError):
                raise
            yield damaged(Path(unit.path).name, error, number, None)

    def _image_in(self, schema: pa.Schema) -> str | None:
        """The column of one file, None if it has none: its rows are counted."""
        if self._settings.image is not None:
            return self._settings.image if self._settings.image in schema.names else None
        candidates = image_candidates(schema)
        return choose_image(*candidates, schema.names, None) if any(candidates) else None

    def _wanted(self, schema: pa.Schema, image: str | None) -> list[str]:
        names = input_columns(self._settings)
        names |= {name.partition(".")[0] for name in names} | {image or ""}
        return [name for name in schema.names if name in names] or schema.names[:1]

    def _record(self, unit: Unit, number: int, row: Row, image: str | None) -> Record:
        key = f"{Path(unit.path).name}:{number}"
        if row is None:
            return Record(key, None, {}, "unreadable_record")
        if image is None:
            return Record(key, None, row, "no_image", "the file has no column of images")
        folder, follow_links = Path(unit.path).parent, self._settings.follow_links
        content, problem, detail = image_of(row.get(image), lambda name: image_inside(folder, name, follow_links))
        return Record(key, content, row, problem, detail, image)


def _instead(files: list[tuple[str, int | None]]) -> str:
    """What is there, for a message that something is not."""
    return f" There are {first([name.rpartition('/')[2] for name, _ in files])}." if files else ""


def image_inside(folder: Path, name: str, follow_links: bool) -> Found:
    """An encoded file below a local folder, or why there is none. No name opens anything outside of the folder.

    Args:
        follow_links: open links that lead out of it.
    """
    try:
        path = folder / os.path.normpath(name)
        if not path.resolve().is_relative_to(folder.resolve()):
            if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
                return None, "outside_input", f"{name} is not below {folder}"
            if not follow_links:
                advice = "if that is yours to read, as in a hub's cache, give --follow-links"
                return None, "outside_input", f"{name} is or passes a symbolic link to {path.resolve()}; {advice}"
        if not path.is_file():
            return None, "no_image", f"there is no {path}"
        if path.stat().st_size > MAX_FILE_BYTES:
            return None, "file_too_large", ""
        return path.read_bytes(), "", ""
    except (OSError, ValueError) as error:  # a name that no file can have, or one that may not be read
        return None, "no_image", str(error)
