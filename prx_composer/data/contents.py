"""Whether data are still what they were, for caches and for resumed runs: told by bytes, wherever they lie and whenever written.

Of single files, bytes are read again only where a file's size or one of its times differs from when they were read last.
A skip list is part of what data are: which samples are left out, by their keys.
"""

import functools
import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prx_composer.common.errors import UserError
from prx_composer.common.files import read_lines, write_whole
from prx_composer.data.format import ENCODED, IMAGE, MANIFEST, Bucket, Manifest, open_local, read_row
from prx_composer.data.storage import INDEX, RawShard, download, join, shards_in

log = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds for a file of a few kilobytes
_MANY = 100_000  # keys that take seconds to read
_EXACT = 1 << 30  # bytes of a split that is compared row by row
_ROWS = 64  # of every bucket of a larger one
_SHARDS = 64  # that are looked into, evenly spaced
_BYTES = 1 << 16  # at the beginning and at the end of each


class FileRecord:
    """What files held when they were read last, kept in a JSON file: name → size, two times, SHA-256.

    Args:
        path: of the record, which need not be there.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, list] = {}
        self.exists = path.exists()
        if self.exists:
            try:
                self._known = dict(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read (%s); the files are read again.", path, error)
                self.exists = False

    def contents(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Return the SHA-256 of every file, read again where it may have changed."""
        return {name: entry[-1] for name, entry in self._read(files).items()}

    def different(self, files: Mapping[str, Path]) -> list[str]:
        """Return the names whose files hold something else than the record says, are new, or are gone."""
        now = self.contents(files)
        return [name for name in {**self._known, **now} if self._known.get(name, [None])[-1] != now.get(name)]

    def keep(self, files: Mapping[str, Path]) -> None:
        """Write down what the files hold now, if that or their times are new."""
        now = self._read(files)
        if now == self._known and self.exists:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, (json.dumps(now, indent=0) + "\n").encode())
        except OSError as error:
            log.warning("%s cannot be written (%s); the files will be read again next time.", self.path, error)
        self._known, self.exists = now, True

    def _read(self, files: Mapping[str, Path]) -> dict[str, list]:
        entries = {}
        for name, file in files.items():
            state = os.stat(file)  # before the bytes are read: what is written meanwhile is noticed next time
            stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
            known = self._known.get(name)
            entries[name] = known if known is not None and known[:-1] == stamp else [*stamp, _sha256(file)]
        return entries


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fetch_manifest(folder: Path, remote: str | None) -> None:
    """Download the manifest of `remote` into its local cache, or check that what lies there is still a copy.

    Raises:
        UserError: as `check_copy`.
    """
    if remote is not None and (folder / MANIFEST).exists():
        check_copy(folder, remote)
    elif remote is not None:
        download(f"{remote}/{MANIFEST}", folder / MANIFEST)


def fetch_if_there(source: str, target: Path) -> None:
    """Download a remote file that may not be there; it appears whole or not at all."""
    from streaming.base.storage import CloudDownloader

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch.") as fresh:
        try:
            CloudDownloader.get(source).download(source, f"{fresh}/part", timeout=_TIMEOUT)
            os.replace(f"{fresh}/part", target)
        except Exception as error:  # every SDK has its own
            log.info("%s is not fetched: %s", source, error)


def check_copy(folder: Path, remote: str) -> None:
    """Check that manifest and indexes that were downloaded to a folder are still those of `remote`, which shards come from.

    Raises:
        UserError: other data lie there now.
    """
    names = [MANIFEST, *(f"{file.parent.name}/{INDEX}" for file in sorted(folder.glob(f"*/{INDEX}")))]
    from streaming.base.storage import CloudDownloader

    with tempfile.TemporaryDirectory(prefix="prx-copy.") as fresh:
        for name in [name for name in names if (folder / name).exists()]:
            try:
                Path(fresh, name).parent.mkdir(exist_ok=True)
                source = join(remote, name)
                CloudDownloader.get(source).download(source, f"{fresh}/{name}", timeout=_TIMEOUT)
            except Exception as error:  # every SDK has its own
                log.warning("%s cannot be reached; whether %s still is a copy of it is not known: %s", remote, folder, error)
                return
            if Path(fresh, name).read_bytes() != (folder / name).read_bytes():
                raise UserError(
                    f"{folder} is a copy of what lay in {remote} before: {name} is another one there now. Delete that folder, "
                    "which is then downloaded again, or set `path` to a new one."
                )


def column_contents(split: Path, column: str, exact: int = _EXACT) -> str:
    """Return what tells a column of a local split, such as `image` or a caption, from others; the same for a copy of the split.

    Every row counts, up to `exact` bytes of data; beyond, 64 rows of every bucket and the size of each shard.
    """
    manifest, folder = Manifest.read(split), split
    if column in manifest.beside:
        folder, column = split / ENCODED / column / IMAGE, "values"
    buckets = tuple(sorted(manifest.buckets))
    files = [file for bucket in buckets for file in sorted((folder / str(bucket)).iterdir())]
    states = [(str(file), file.stat()) for file in files]
    stamps = tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in states)
    return _column_contents(folder, buckets, column, exact, stamps)


@functools.lru_cache(maxsize=64)  # several stored columns are of one column of images
def _column_contents(
    folder: Path, buckets: tuple[Bucket, ...], column: str, at_most: int, states: tuple[tuple[str, int, int, int], ...]
) -> str:
    digest = hashlib.sha256()
    rows = [open_local(folder / str(bucket)) for bucket in buckets]
    exact = sum(size for _, size, *_ in states) <= at_most
    if not exact:
        digest.update(json.dumps([size for _, size, *_ in states]).encode())
    for bucket, stored in zip(buckets, rows, strict=True):
        count = len(stored)
        digest.update(f"{bucket} {count} ".encode())
        for place in range(count) if exact else sorted({number * (count - 1) // (_ROWS - 1) for number in range(_ROWS)}):
            value = read_row(stored, place)[column]
            value = value.encode() if isinstance(value, str) else value
            digest.update(len(value).to_bytes(8, "little") + value)
    return digest.hexdigest()


# By what a checkpoint recognises its data again, wherever they lie: buckets, sizes of shards, and bytes of some of them.


def data_identity(splits: Mapping[str, Path] | None, skips: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Return what data sets hold, by name: `samples`, `layout` and `content`; None if it isn't known (yet).

    With a skip list, `skip` is its keys' number and digest.

    Args:
        splits: where they lie, as `split_folders` says of a loader.
        skips: files of their skip lists, as `skip_files` says.
    """
    found = {name: split_identity(folder) for name, folder in (splits or {}).items()}
    if splits is None or None in found.values():
        return None
    try:
        left_out = {name: {"skip": SkipList.read(file).digest} for name, file in (skips or {}).items()}
    except UserError:
        return None
    return {name: (identity or {}) | left_out.get(name, {}) for name, identity in found.items()}


def split_identity(folder: Path) -> dict[str, Any] | None:
    """Return what tells a split from others, or None if there is none or not all of it.

    `layout` is of captions, buckets, and the samples and bytes of every shard. `content` is of the first and last 64 KiB of up to
    64 shards; it is null where one of them is lost or cut short, or still to be fetched or unpacked. A folder that was moved or
    copied keeps both.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = sorted(name for name, count in manifest["buckets"].items() if count)
        shards = [(name, shard) for name in names for shard in shards_in(folder / name)]
        sizes = [(name, shard["samples"], shard["raw_data"]["bytes"]) for name, shard in shards]
        files = {folder / name / shard["raw_data"]["basename"]: int(shard["raw_data"]["bytes"]) for name, shard in shards}
        layout = [manifest["image_size"], list(manifest["captions"]), sizes]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    return {"samples": sum(count for _, count, _ in sizes), "layout": digest[:16], "content": _content(files)}


def _content(files: Mapping[Path, int]) -> str | None:
    digest = hashlib.sha256()
    for file in [*files][:: max(-(-len(files) // _SHARDS), 1)]:
        try:
            if file.stat().st_size != files[file]:
                return None
            with file.open("rb") as opened:
                digest.update(opened.read(_BYTES))
                opened.seek(max(files[file] - _BYTES, 0))
                digest.update(opened.read(_BYTES))
        except OSError:
            return None
    return digest.hexdigest()[:16]


def same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two identities of loaders are of the same data; what one of them doesn't know makes no difference."""
    return before.keys() == now.keys() and all(_same_split(before[name], now[name]) for name in now)


def _same_split(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    contents = {before.get("content"), now.get("content")} - {None}
    return len(contents) <= 1 and all(before.get(key) == now.get(key) for key in ("layout", "skip"))


def in_words(identity: Mapping[str, Any]) -> str:
    """Return an identity as people read it."""
    parts = []
    for name, part in identity.items():
        fingerprint = f"{part['layout'][:6]}-{(part['content'] or 'unread')[:6]}"
        skip = f", without those of a skip list ({part['skip']})" if part.get("skip") else ""
        parts.append(f"{name + ': ' if name else ''}{part['samples']:,} samples, fingerprint {fingerprint}{skip}")
    return "; ".join(parts)


# Which samples are left out. Their keys lie in the rows, between images: they are read once, and what is kept of them is small.

KEYS = "keys.npz"  # in a split's folder: 8 bytes of a digest of every key, bucket by bucket, and of which shards they are


@dataclass(frozen=True)
class SkipList:
    """Keys of samples that are left out: a text file with one on each line. Lines that begin with `#`, and empty ones, are none.

    Args:
        path: of the file.
    """

    path: str
    keys: frozenset[str]

    @classmethod
    def read(cls, path: str) -> "SkipList":
        """Read a list. Raise UserError if it cannot be read."""
        try:
            lines = [line.strip() for line in read_lines(path)]
        except OSError as error:
            raise UserError(
                f"skip: {path} cannot be read ({error.strerror}); it is a text file with one key of a sample on each line."
            ) from error
        return cls(str(path), frozenset(line for line in lines if line and not line.startswith("#")))

    @property
    def digest(self) -> str:
        """The number of keys and what tells them from others, whatever their order in the file."""
        lines = "\n".join(sorted(self.keys)).encode(errors="surrogatepass")
        return f"{len(self.keys):,} keys, {hashlib.sha256(lines).hexdigest()[:12]}"

    def find(self, hashes: Sequence[NDArray[np.uint64]]) -> "LeftOut":
        """Return which rows of every bucket have one of the keys.

        Args:
            hashes: of the keys of every bucket's rows; see `key_hashes`.
        """
        keys = sorted(self.keys)
        own = digests_of(keys)
        order = np.argsort(own)
        places, matched, total = list[NDArray[np.int64]](), set[str](), sum(map(len, hashes))
        for rows in hashes:
            at = np.minimum(np.searchsorted(own[order], rows), max(len(keys) - 1, 0))
            places.append(np.flatnonzero(own[order][at] == rows) if keys else np.empty(0, np.int64))
            matched.update(keys[order[index]] for index in np.unique(at[places[-1]]))
        return LeftOut(self, places, frozenset(matched), total)


@dataclass(frozen=True)
class LeftOut:
    """What a skip list leaves out of a data set.

    Args:
        places: of the rows, bucket by bucket.
        matched: keys of the list that the data set has.
        of: samples that the data set has with them.
    """

    skip: SkipList
    places: list[NDArray[np.int64]]
    matched: frozenset[str]
    of: int

    @property
    def samples(self) -> int:
        return sum(map(len, self.places))


def said_of_skipped(parts: Iterable[LeftOut]) -> list[tuple[str, bool]]:
    """Return what the skip lists of a loader's data sets leave out, list by list, and whether some of its lines match nothing."""
    by_list: dict[SkipList, list[LeftOut]] = {}
    for part in parts:
        by_list.setdefault(part.skip, []).append(part)
    said = []
    for skip, left_out in by_list.items():
        lacking = sorted(skip.keys.difference(*(part.matched for part in left_out)))
        found, samples = len(skip.keys) - len(lacking), sum(part.samples for part in left_out)
        total = sum(part.of for part in left_out)
        left = f"{samples:,} samples left out, {total - samples:,} of {total:,} are left"
        nothing = f"; {len(lacking):,} match no sample, such as {lacking[0]!r}" if lacking else ""
        twice = f"; some keys are of several samples: {samples:,} samples have these {found:,}" if samples > found else ""
        told = f"{skip.path}: {found:,} of {len(skip.keys):,} keys are in the data, {left}{nothing}{twice}"
        said.append((told, bool(lacking or twice)))
    return said


def digests_of(keys: Iterable[str]) -> NDArray[np.uint64]:
    """Return 64 bits that tell keys apart, for `SkipList.find`."""
    digests = b"".join(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<u8")


def key_hashes(split: Path, rows: Iterable[Iterator[str]] | None = None) -> list[NDArray[np.uint64]]:
    """Return a digest of the key of every row, for each bucket of a split, in order: from `keys.npz`, or read and kept there.

    Args:
        split: a folder; local, or the local cache of a remote one, with its indexes.
        rows: keys by bucket, where the shards are still to be fetched.

    Raises:
        UserError: rows without keys, or a shard that cannot be read.
    """
    identity = split_identity(split) or {}
    if identity and (known := _known_hashes(split / KEYS, identity)) is not None:
        return known
    buckets = sorted(Manifest.read(split).buckets)
    level = logging.INFO if rows is None and identity.get("samples", _MANY) < _MANY else logging.WARNING
    log.log(level, "skip: all keys of %s are read once%s.", split, "" if rows is None else ", for which all shards are fetched")
    hashes = [digests_of(keys) for keys in (rows or (_keys(split, bucket) for bucket in buckets))]
    content = io.BytesIO()
    np.savez(
        content, identity=np.array(json.dumps(identity)), counts=[len(part) for part in hashes], hashes=np.concatenate(hashes)
    )
    try:
        write_whole(split / KEYS, content.getvalue())
    except OSError as error:
        log.warning("%s cannot be written (%s); the keys will be read again next time.", split / KEYS, error)
    return hashes


def _known_hashes(file: Path, identity: Mapping[str, Any]) -> list[NDArray[np.uint64]] | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            if not _same_split(json.loads(str(stored["identity"])), identity):
                return None
            return np.split(stored["hashes"].astype(np.uint64), np.cumsum(stored["counts"])[:-1])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _keys(split: Path, bucket: Bucket) -> Iterator[str]:
    folder = split / str(bucket)
    try:
        for entry in shards_in(folder):
            shard = RawShard(str(folder), entry, folder)
            for index in range(len(shard)):
                yield shard.read(index, {"key"})["key"].decode(errors="surrogatepass")
    except KeyError as error:
        raise UserError(f"skip: the rows in {folder} have no column {error}, by which samples could be left out.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"skip: the keys of {folder} cannot be read ({error}); copy or convert the data again.") from error
