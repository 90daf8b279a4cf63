"""Two sources: JSON lines with a folder of images (`{"file": "cats/1.jpg", "caption": "…"}`), and MDS folders of any columns."""

import codecs
import contextlib
import json
import posixpath
import tempfile
from collections import defaultdict
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
    damage,
    damaged,
    image_inside,
    image_of,
    look,
    ranges,
    usable,
)
from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError
from prx_composer.common.files import encoding_of
from prx_composer.data.storage import INDEX, LinkError, RawShard, encodings_of, fetch, fetched, is_remote, join, relative_name

SUFFIXES = (".jsonl", ".ndjson")
LINE_BYTES = 500  # about what a line takes …
IMAGE_BYTES = 500_000  # … and its image, for the size of work units
MAX_LINE_BYTES = 1 << 24
HEAD = 64  # bytes that say how the text is encoded
END = 1 << 62  # as `stop`


class Lines(Source):
    """A .jsonl file, or a folder of them. Images are named relative to the folder of their .jsonl file.

    Files are cut into work units by byte ranges. A line belongs to the unit in whose range it begins.
    """

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
                for line in self._lines(unit, Path(folder)):
                    if not line.problem:
                        row = line.columns
                        found = _candidates(row) if wanted is None else [wanted] if usable(row.get(wanted)) else []
                        if len(found) > 1:
                            choose_image([], found, list(row), None)
                        named.update(found)
                        yield row

    def read(self, unit: Unit) -> Iterator[Record]:
        with _scratch(unit) as folder:
            for line in self._lines(unit, Path(folder)):
                yield line if line.problem else self._with_image(line, unit.path, Path(folder))

    def _lines(self, unit: Unit, folder: Path) -> Iterator[Record]:
        """Yield a record of every line, without its image."""
        label = Path(unit.path).name
        path, problem = fetch(unit.path, folder), None
        if unit.stop == END:
            path, problem = _as_utf8(path, folder, unit.path)
        with path.open("rb") as file:
            count = 0
            for offset, line in _split(file, unit.start, unit.stop):
                if line is None:
                    yield Record(f"{label}@{offset}", None, {}, "file_too_large")
                elif line.strip():
                    yield _parse(f"{label}@{offset}", line)
                    count += 1
        if problem is not None:
            yield damaged(label, problem, count, None)

    def _with_image(self, line: Record, path: str, folder: Path) -> Record:
        row = line.columns
        found = [self.settings.image] if self.settings.image else _candidates(row)
        if not found:
            return Record(line.key, None, row, "no_image", f"the line has {', '.join(row)}")

        def find(name: str) -> Found:
            if is_remote(path):
                return _remote_image(path, name, folder)
            return image_inside(Path(path).parent, name, self.settings.follow_links)

        value = row.get(found[0])
        image, problem, detail = image_of(value, find)
        named = value if isinstance(value, str) and len(value) < 256 else found[0]
        return Record(f"{line.key}/{named}", image, row, problem, detail, found[0])


def _scratch(unit: Unit) -> contextlib.AbstractContextManager[str]:
    """Make a temporary folder, if the unit needs one; there can be very many units that don't."""
    if is_remote(unit.path) or unit.stop == END:
        return tempfile.TemporaryDirectory(prefix="prx-convert.")
    return contextlib.nullcontext("")


def _candidates(row: dict[str, Any]) -> list[str]:
    return [name for name in IMAGE_NAMES if usable(row.get(name))]


def _parse(key: str, line: bytes) -> Record:
    try:
        row = json.loads(line.decode("utf-8", "surrogatepass").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        return Record(key, None, {}, "caption_not_utf8", str(error))
    except (ValueError, RecursionError) as error:
        return Record(key, None, {}, "unreadable_record", f"{error}. A line is a whole object; `jq -c . OLD > NEW` makes it so")
    if isinstance(row, dict):
        return Record(key, None, row)
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


def _split(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
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


# MDS. Pickle columns are never decoded: asking for one is refused, and the others are read around it.

IMAGES = ("jpeg", "jpeg_array", "jpegarray", "png")  # encodings of images as files, perhaps with a quality, `jpeg:90`
READ = ("str", "str_int", "str_float", "int", "json", "bytes")  # and numpy's numbers


class Shards(Source):
    """A folder with an index.json, or a folder of such folders, such as a split of ours. Units lie in the index's folder."""

    looked_for, suffixes = f"{INDEX} of MDS shards", (f"/{INDEX}",)
    of_nothing = "no shards, and so no samples"

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._indexes: dict[str, list[dict[str, Any]]] = {}
        self._taken = set[str]()  # shards' files that an index has named

    def path_of(self, name: str) -> str:
        return name.rpartition("/")[0]

    def cut(self, name: str, size: int | None) -> list[tuple[int, int]]:
        """Return ranges of an index's shards, without those that another named already: `merge_index` leaves both."""
        folder = self.path_of(name)
        shards = self._index(folder)
        sizes: dict[int, int] = {}
        for number, shard in enumerate(shards):
            file = posixpath.normpath(join(folder, shard["raw_data"]["basename"]))
            if file not in self._taken:
                sizes[number] = shard["raw_data"]["bytes"]
            self._taken.add(file)
        if len(sizes) < len(shards):
            again = f"{len(shards) - len(sizes)} of its {len(shards)} shards are in other indexes, too; read once."
            self.notes.append(f"{relative_name(name, self.settings.input)}: {again}")
        return ranges(sizes, self.settings.unit_bytes)

    def _index(self, folder: str) -> list[dict[str, Any]]:
        if folder not in self._indexes:
            try:
                with fetched(join(folder, INDEX)) as file:
                    shards = json.loads(file.read_text())["shards"]
                for shard in shards:
                    _ = shard["raw_data"]["bytes"], shard["raw_data"]["basename"], shard["samples"], encodings_of(shard)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"--input: {join(folder, INDEX)} is no index of MDS shards: {error}") from error
            self._indexes[folder] = shards
        return self._indexes[folder]

    def columns(self, units: list[Unit]) -> Seen:
        shards = [(unit.path, shard) for unit in units for shard in self._index(unit.path)[unit.start : unit.stop]]
        kinds: dict[str, set[str]] = defaultdict(set)  # of every column, over all shards
        images: dict[str, str] = {}
        for folder, shard in shards:
            encodings = encodings_of(shard)
            images.setdefault(_image_column(encodings, self.settings.image), folder)
            for name, kind in encodings.items():
                kinds[name].add(kind)
        self._check(images, kinds)
        missing = self.missing(self.settings.input_columns, [(shard["raw_data"]["basename"], shard) for _, shard in shards], _has)
        return Seen([name for name, found in kinds.items() if all(map(_is_read, found))], missing, image=next(iter(images)))

    def _check(self, images: dict[str, str], kinds: dict[str, set[str]]) -> None:
        """Raise UserError if a column that is asked for cannot be read, or images stand in several columns."""
        if len(images) > 1:
            each = "; ".join(f"{column} in {folder}" for column, folder in images.items())
            raise UserError(
                f"--image: the shards hold their images in different columns: {each}. Convert them one after another."
            )
        for image in images:
            for kind in kinds[image]:
                if not _is_image(kind) and kind not in ("bytes", "str"):
                    encoded = ", ".join(("bytes", "str", *IMAGES))
                    raise UserError(f"--image {image}: a column of type {kind!r}; encoded files ({encoded}) are read.")
        wanted = {name if name in kinds else name.partition(".")[0] for name in self.settings.input_columns}
        for column in sorted(wanted & kinds.keys()):
            for kind in kinds[column]:
                if not _is_read(kind):
                    why = "as it may execute code" if kind == "pkl" else "as it is neither text nor a number"
                    raise UserError(f"column {column}: of type {kind!r}, which is not read, {why}.")

    def read(self, unit: Unit) -> Iterator[Record]:
        for number in range(unit.start, unit.stop):
            shard = self._index(unit.path)[number]
            label = f"{Path(unit.path).name}/{number:05d}"
            read, problem = 0, None
            try:
                with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
                    samples = RawShard(unit.path, shard, Path(folder), self.settings.follow_links)
                    for index in range(len(samples)):
                        try:
                            sample = samples.read(index)
                        except ValueError as error:  # this sample's bytes: the next ones have offsets of their own
                            problem = problem or error
                            continue
                        read += 1
                        yield self._record(f"{label}:{index}", sample, shard)
            except Exception as error:
                problem = error if isinstance(error, FileNotFoundError) else damage(error)
                if isinstance(error, LinkError):
                    problem = f"{error}; if that is yours to read, as in a hub's cache, give --follow-links"
            if problem is not None:
                yield damaged(f"{label}, {shard['raw_data']['basename']}", problem, read, shard["samples"])

    def _record(self, key: str, sample: dict[str, bytes], shard: dict[str, Any]) -> Record:
        from streaming.base.format.mds.encodings import mds_decode

        encodings = encodings_of(shard)
        name = _image_column(encodings, self.settings.image)
        columns: dict[str, Any] = {}
        for column, content in sample.items():
            if encodings[column] == "str":
                columns[column] = content  # decoded, or found not to be UTF-8, with the captions
            elif _is_read(encodings[column]) and column != name:
                try:
                    columns[column] = mds_decode(encodings[column], content)
                except Exception:  # such as a number that is none: its own sample's loss
                    return Record(key, None, columns, "unreadable_record")
        own = columns.get("key")
        key = own.decode(errors="replace") if isinstance(own, bytes) else key
        image, problem, detail = image_of(sample[name], lambda name: (None, "no_image", ""))
        return Record(key, image, columns, problem, detail, name)


def _has(shard: dict[str, Any], name: str) -> bool:
    """Return whether a sample may have a column; what JSON columns hold is not known before they are read."""
    encodings = encodings_of(shard)
    return name in encodings or encodings.get(name.partition(".")[0]) == "json"


def _is_read(encoding: str) -> bool:
    return encoding in READ or encoding.rstrip("0123456789") in ("int", "uint", "float")


def _is_image(encoding: str) -> bool:
    return encoding.partition(":")[0] in IMAGES


def _image_column(encodings: dict[str, str], wanted: str | None) -> str:
    sure = [name for name, kind in encodings.items() if _is_image(kind) or (kind == "bytes" and name in IMAGE_NAMES)]
    return choose_image(sure, [], list(encodings), wanted)
