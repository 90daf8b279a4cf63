"""MDS folders that exist already, of any columns. A work unit is some shards.

Pickle columns are never decoded: asking for one is refused, and the others are read around it.
"""

import json
import posixpath
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prx_composer.commands.convert.input_files import first
from prx_composer.commands.convert.records import IMAGE_NAMES, Record, Seen, Source, Unit, choose_image, damage, damaged, image_of
from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError
from prx_composer.data.storage import LinkError, RawShard, encodings_of, fetched, join, relative_name

IMAGES = ("jpeg", "jpeg_array", "jpegarray", "png")  # encodings of images as files, perhaps with a quality, `jpeg:90`
READ = ("str", "str_int", "str_float", "int", "json", "bytes")  # and numpy's numbers
INDEX = "index.json"


class Shards(Source):
    """A folder with an index.json, or a folder of such folders, such as a split of ours. Units lie in the index's folder."""

    looked_for, suffixes = f"{INDEX} of MDS shards", (f"/{INDEX}",)
    of_nothing = "no shards, and so no samples"

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._indexes: dict[str, list[dict[str, Any]]] = {}
        self._taken = set[str]()  # shards' files that an index has named

    def select(self, listed: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        self._taken.clear()
        return super().select(listed)

    def path_of(self, name: str) -> str:
        return name.rpartition("/")[0]

    def cut(self, name: str, size: int | None) -> list[tuple[int, int]]:
        """Return ranges of an index's shards, without those that another named already: `merge_index` leaves both."""
        folder = self.path_of(name)
        shards = self._index(folder)
        new = []
        for number, shard in enumerate(shards):
            file = posixpath.normpath(join(folder, shard["raw_data"]["basename"]))
            if file not in self._taken:
                new.append(number)
            self._taken.add(file)
        if len(new) < len(shards):
            self.notes.append(
                f"{relative_name(name, self.settings.input)}: {len(shards) - len(new)} of its {len(shards)} shards are in other "
                "indexes, too; read once."
            )
        ranges, start, gathered = [], 0, 0
        for position, number in enumerate(new):
            gathered += shards[number]["raw_data"]["bytes"]
            last = position + 1 == len(new) or new[position + 1] != number + 1
            if gathered >= self.settings.unit_bytes or last:
                ranges.append((new[start], number + 1))
                start, gathered = position + 1, 0
        return ranges

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
        kinds: dict[str, set[str]] = {}  # of every column, over all shards
        images: dict[str, str] = {}
        names: list[str] = []
        wanted = self.settings.input_columns
        lacking: dict[str, list[str]] = {name: [] for name in wanted}
        for unit in units:
            for shard in self._index(unit.path)[unit.start : unit.stop]:
                encodings = encodings_of(shard)
                images.setdefault(_image_column(encodings, self.settings.image), unit.path)
                for name, kind in encodings.items():
                    kinds.setdefault(name, set()).add(kind)
                for name in wanted:
                    if not _has(encodings, name):
                        lacking[name].append(shard["raw_data"]["basename"])
        total = sum(unit.stop - unit.start for unit in units)
        self._check(images, kinds, wanted)
        for name, shards in lacking.items():
            if 0 < len(shards) < total:
                self.notes.append(f"Without a column {name!r}: {first(shards)}.")
        names = [name for name, found in kinds.items() if all(map(_is_read, found))]
        missing = sorted(name for name, shards in lacking.items() if len(shards) == total)
        return Seen(names, missing, image=next(iter(images)))

    def _check(self, images: dict[str, str], kinds: dict[str, set[str]], wanted: set[str]) -> None:
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
        for column in sorted({name if name in kinds else name.partition(".")[0] for name in wanted} & kinds.keys()):
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


def _has(encodings: dict[str, str], name: str) -> bool:
    """Return whether a sample may have a column; what JSON columns hold is not known before they are read."""
    return name in encodings or encodings.get(name.partition(".")[0]) == "json"


def _is_read(encoding: str) -> bool:
    return encoding in READ or encoding.rstrip("0123456789") in ("int", "uint", "float")


def _is_image(encoding: str) -> bool:
    return encoding.partition(":")[0] in IMAGES


def _image_column(encodings: dict[str, str], wanted: str | None) -> str:
    sure = [name for name, kind in encodings.items() if _is_image(kind) or (kind == "bytes" and name in IMAGE_NAMES)]
    return choose_image(sure, [], [f"{name}" for name in encodings], wanted)
