"""WebDataset tars: the members `KEY.jpg`, `KEY.txt`, `KEY.json` of one key are a sample. One tar is one work unit.

Nothing is extracted: names only tell what belongs together. The rules, which lose no member without a count:

- The key ends at the first dot of the file's name, as in the webdataset library. Where that would make one sample of several
  (`cat.jpg`, `cat.txt`, `cat.v2.jpg`, `cat.v2.txt`), which is where a longer name has both an image and something else, it ends
  at the last dot, unless an option names a suffix of several parts that is there (`--image left.jpg`).
- Members of one key that lie apart (all images first, then all texts) are brought together.
- A name that comes twice is two samples, if each time it is a whole one; else nobody knows what belongs to what.
"""

import bz2
import contextlib
import errno
import gzip
import itertools
import json
import lzma
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prx_composer.commands.convert.records import MAX_FILE_BYTES, PEEKED, Passed, Record, Seen, Source, Unit, damage, look
from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError
from prx_composer.data.storage import fetched

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
CHUNK = 1 << 16
MOST_ZEROS = 1 << 22  # bytes at a tar's end; what writes in blocks fills up the last one, and none is nearly as large
UNPACKED_TIMES = 64  # as much may a compressed tar unpack to: images hardly shrink, and what does is made to fill a disk …
UNPACKED_BYTES = 1 << 30  # … above this size
IMAGES = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "img", "image"])
DAMAGED = "\0"  # as a key, which no member can have


class Part(NamedTuple):
    """A member that belongs to a sample.

    Args:
        suffix: in lower case; of the key DAMAGED: what is wrong.
    """

    key: str
    suffix: str
    tar: Any
    info: Any

    @property
    def is_image(self) -> bool:
        return self.suffix.rpartition(".")[2] in IMAGES

    def read(self) -> bytes | None:
        """Return the content; None if it is too large. Raise tarfile.ReadError if the file ends before."""
        if self.info.size > MAX_FILE_BYTES:
            return None
        return self.tar.extractfile(self.info).read()


class WebDataset(Source):
    """A tar, or a folder of tars (perhaps compressed), as the webdataset library writes and img2dataset downloads them."""

    looked_for, suffixes = f"{', '.join(SUFFIXES)} file", SUFFIXES

    def __init__(self, settings: Settings):
        super().__init__(settings)
        named = settings.input_columns | ({settings.image} if settings.image else set())
        self._suffixes = {name.lower() for name in named if "." in name}

    def select(self, listed: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        return [file for file in listed if file[0].lower().endswith(SUFFIXES)]

    def cut(self, name: str, size: int | None) -> list[tuple[int, int]]:
        return [(0, 0)]

    def columns(self, units: list[Unit]) -> Seen:
        records = (record for unit in units for record in self.read(unit))
        begin = list(itertools.islice(records, PEEKED))
        if begin and all(record.problem == "several_images" for record in begin):
            raise UserError(f"--image: say which one is meant. In {begin[0].key} there are {begin[0].detail}.")
        return look((record.columns for record in itertools.chain(begin, records)), self.settings)

    def read(self, unit: Unit) -> Iterator[Record]:
        label = Path(unit.path).name
        with fetched(unit.path) as path, tempfile.TemporaryDirectory(prefix="prx-convert.") as aside:
            with open_tar(path, Path(aside)) as (file, problem):
                apart, samples = _apart(file), 0
                for key, run in itertools.groupby(_parts(file, label, self.passed), key=lambda part: part.key):
                    if key == DAMAGED:
                        problem = problem or next(run).suffix
                        continue
                    runs = apart[key] if key in apart else [list(run)]
                    if key in apart:
                        apart[key] = []  # it comes once, at its first place
                    if runs:
                        for record in self._records(label, key, runs):
                            samples += 1
                            yield record
            if problem:
                yield Record(label, None, {}, "damaged_input", f"{problem} ({samples} samples were read)")

    def _records(self, label: str, key: str, runs: list[list[Part]]) -> Iterator[Record]:
        """Yield the samples of one key up to the first dot, from all places where it stands."""
        for stem, some in _by_stem(key, runs, self._suffixes).items():
            names = Counter(part.suffix for run in some for part in run)
            twice = {name: count for name, count in names.items() if count > 1}
            if not twice:
                some = [list(itertools.chain.from_iterable(some))]
            elif not all(map(_is_sample, some)):
                detail = ", ".join(f"{stem}.{name} {count} times" for name, count in twice.items())
                for _ in range(max(twice.values())):
                    yield Record(f"{label}/{stem}", None, {}, "same_name_twice", detail)
                continue
            yield from filter(None, (self._record(f"{label}/{stem}", parts) for parts in some))

    def _record(self, key: str, parts: list[Part]) -> Record | None:
        """Return a sample; None if the tar ends within its first member."""
        images = _images(parts, self.settings.image)
        columns: dict[str, Any] = {}
        mapping: dict[str, Any] = {}
        problem = detail = ""
        image, whole = None, 0
        for part in parts:
            if part.is_image and part not in images[:1]:
                whole += 1
                if len(images) == 1:
                    self.passed.add("further images of samples", f"{key}: {part.suffix}")
                continue
            try:
                content = part.read()
            except tarfile.ReadError:
                continue  # its end comes as damage of the whole file
            whole += 1
            if content is None:
                problem, detail = "file_too_large", f"{part.info.name}, {part.info.size:,} bytes"
            elif part in images:
                image = content
            elif part.suffix == "json":
                try:
                    value = json.loads(content)
                except (ValueError, RecursionError) as error:
                    problem, detail = "unreadable_record", f"{part.info.name}: {error}"
                else:
                    mapping = value if isinstance(value, dict) else {"json": value}
            else:
                columns[part.suffix] = content
        if len(images) > 1 and not problem:
            image, problem = None, "several_images"
            detail = f"{', '.join(part.suffix for part in images)}; --image {images[0].suffix} takes that one"
        if not whole:
            return None
        detail = detail or f"its members are {', '.join(part.suffix for part in parts)}"
        return Record(key, image, mapping | columns, problem, detail, images[0].suffix if images else "")


def _images(parts: list[Part], wanted: str | None) -> list[Part]:
    """Return the members that may be a sample's image: one, if it is clear which."""
    if wanted is not None:
        wanted = wanted.lower()
        exactly = [part for part in parts if part.suffix == wanted]
        return exactly or [part for part in parts if part.is_image and part.suffix.endswith(f".{wanted}")]
    images = [part for part in parts if part.is_image]
    return [part for part in images if "." not in part.suffix] or images  # 1.jpg is it, and 1.mask.png is something about it


def _by_stem(key: str, runs: list[list[Part]], suffixes: set[str]) -> dict[str, list[list[Part]]]:
    """Return the runs by key: it ends at the first dot or, where that makes one sample of several, at the last.

    Args:
        runs: members of one key up to the first dot, by the place where they lie together.
        suffixes: those of several parts that options name.
    """
    kinds: dict[str, set[bool]] = {}
    for part in itertools.chain.from_iterable(runs):
        stem, dot, _ = part.suffix.rpartition(".")
        if part.suffix in suffixes:
            return {key: runs}
        if dot:
            kinds.setdefault(stem, set()).add(part.is_image)
    if {True, False} not in kinds.values():
        return {key: runs}
    found: dict[str, list[list[Part]]] = {}
    for run in runs:
        split: dict[str, list[Part]] = {}
        for part in run:
            stem, dot, suffix = part.suffix.rpartition(".")
            split.setdefault(f"{key}.{stem}" if dot else key, []).append(part._replace(suffix=suffix))
        for name, parts in split.items():
            found.setdefault(name, []).append(parts)
    return found


def _is_sample(run: list[Part]) -> bool:
    """Return whether members that lie together are one whole sample: an image and something else, no name twice."""
    return len({part.suffix for part in run}) == len(run) and {part.is_image for part in run} == {True, False}


def _parts(file: BinaryIO, label: str, passed: Passed) -> Iterator[Part]:
    """Yield every regular member that has a key and a suffix, at last the key DAMAGED if the tar does not end where it should."""
    try:
        for tar, member in members(file):
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if member.isdir():
                continue
            if not member.isreg():
                passed.add("links or devices in tars", f"{label}/{member.name}")  # which could lead out
            elif not stem:
                passed.add("hidden members of tars", f"{label}/{member.name}")
            elif not dot:
                passed.add("members of tars without a suffix", f"{label}/{member.name}")
            else:
                yield Part(folder + slash + stem, suffix.lower(), tar, member)
    except Exception as error:
        yield Part(DAMAGED, str(damage(error)), None, None)


def _apart(file: BinaryIO) -> dict[str, list[list[Part]]]:
    """Return the parts of every key whose members lie in several places, by place. Reads headers alone."""
    seen, again, last = set[int](), set[int](), DAMAGED
    for part in _parts(file, "", Passed()):
        if part.key != last:
            (again if hash(part.key) in seen else seen).add(hash(part.key))  # numbers, as a tar may have millions of names
            last = part.key
    found: dict[str, list[list[Part]]] = {}
    if again:
        for key, run in itertools.groupby(_parts(file, "", Passed()), key=lambda part: part.key):
            if hash(key) in again and key != DAMAGED:
                found.setdefault(key, []).append(list(run))
    return found


# A tar's members, whole or as far as they can be read: also of a compressed one, and of several written one after the other.
# A compressed tar is unpacked as one file, because members that belong together may lie far from each other.


def _open_zstd(path: Path, _: str) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"\x28\xb5\x2f\xfd": _open_zstd}


@contextlib.contextmanager
def open_tar(path: Path, folder: Path, least: int = UNPACKED_BYTES) -> Iterator[tuple[BinaryIO, str]]:
    """Open the file of a plain tar, and what was wrong with its compression, "" for nothing.

    Args:
        folder: an empty one, to unpack in.
        least: bytes that any compressed tar may unpack to; above it, UNPACKED_TIMES its own.
    """
    with path.open("rb") as file:
        start = file.read(6)
        opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)
        if opener is None:
            yield file, ""
            return
    unpacked = folder / "unpacked.tar"
    problem = _unpack(path, opener, unpacked, max(least, UNPACKED_TIMES * path.stat().st_size))
    with unpacked.open("rb") as file:
        yield file, problem


def _unpack(path: Path, opener: Callable[[Path, str], Any], target: Path, most: int) -> str:
    """Write as much of a compressed file as can be read. Return what was wrong with the rest."""
    try:
        with target.open("wb") as file, opener(path, "rb") as stream:
            while content := stream.read1(CHUNK):  # not `read`, which throws away what it has when it comes upon damage
                file.write(content)
                if file.tell() > most:
                    return f"it unpacks to more than {UNPACKED_TIMES} times its size; what comes after that is not read"
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(
                f"--input: {target.parent} has no room to unpack {path}. Name a folder that has, TMPDIR=/that/folder, "
                "or unpack the tars beforehand."
            ) from error
        return f"its compression is broken: {damage(error)}"
    return ""


def members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield every member in order, with the archive that can extract it.

    Raises:
        tarfile.ReadError: the tar is broken there, or does not end as a tar does; says what and where.
    """
    size, start, count = file.seek(0, 2), 0, 0
    while True:
        file.seek(start)
        tar: Any = tarfile.TarFile(fileobj=file)
        while (member := tar.next()) is not None:
            tar.members.clear()  # or it would keep them all
            if tar.offset <= member.offset:
                raise tarfile.ReadError(f"member {count + 1} has an impossible size")  # which would lead back to itself, for ever
            count += 1
            yield tar, member
        start = _after_end(file, tar.offset, size, count)
        if start == size:
            return


def _after_end(file: BinaryIO, offset: int, size: int, count: int) -> int:
    """Return where the next archive begins, or the file's size: tarfile takes anything that is no header for the tar's end."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError(
            f"it stops after member {count}, without the zeros that end a tar: it was cut there, or its writer leaves them out"
        )
    if block.strip(b"\0"):
        try:
            tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
            words = "unreadable header"
        except tarfile.HeaderError as error:
            words = str(error)
        raise tarfile.ReadError(f"{words} after member {count}, at byte {offset:,} of {size:,}: what follows is not read")
    end = offset
    while not block.strip(b"\0"):
        offset += len(block)
        block = file.read(CHUNK)
        if not block and offset - end > MOST_ZEROS:
            raise tarfile.ReadError(
                f"after member {count} it is zeros, {offset - end:,} bytes of them: it was allocated and not written to its end"
            )
        if not block:
            return size
    return offset + (len(block) - len(block.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
