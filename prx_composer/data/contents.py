"""Whether data are still what they were, for caches and for resumed runs: told by bytes, wherever they lie and whenever written.

Of single files, bytes are read again only where a file's size or one of its times differs from when they were read last.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError
from prx_composer.common.files import write_whole
from prx_composer.data.format import MANIFEST, Manifest, open_local
from prx_composer.data.storage import INDEX, download, join, shards_in

log = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds for a file of a few kilobytes
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
    files = [file for bucket in Manifest.read(split).buckets for file in sorted((split / str(bucket)).iterdir())]
    states = [(str(file), file.stat()) for file in files]
    return _column_contents(split, column, exact, tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in states))


@functools.lru_cache(maxsize=64)  # several stored columns are of one column of images
def _column_contents(split: Path, column: str, at_most: int, states: tuple[tuple[str, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    buckets = sorted(Manifest.read(split).buckets)
    rows = [open_local(split / str(bucket)) for bucket in buckets]
    exact = sum(size for _, size, *_ in states) <= at_most
    if not exact:
        digest.update(json.dumps([size for _, size, *_ in states]).encode())
    for bucket, stored in zip(buckets, rows, strict=True):
        count = len(stored)
        digest.update(f"{bucket} {count} ".encode())
        for place in range(count) if exact else sorted({number * (count - 1) // (_ROWS - 1) for number in range(_ROWS)}):
            value = stored[place][column]
            value = value.encode() if isinstance(value, str) else value
            digest.update(len(value).to_bytes(8, "little") + value)
    return digest.hexdigest()


# By what a checkpoint recognises its data again, wherever they lie: buckets, sizes of shards, and bytes of some of them.


def data_identity(splits: Mapping[str, Path] | None) -> dict[str, Any] | None:
    """Return what data sets hold, by name: `samples`, `layout` and `content`; None if it isn't known (yet).

    Args:
        splits: where they lie, as `split_folders` says of a loader.
    """
    found = {name: split_identity(folder) for name, folder in (splits or {}).items()}
    return None if splits is None or None in found.values() else found


def split_identity(folder: Path) -> dict[str, Any] | None:
    """Return what tells a split from others, or None if there is none or not all of it.

    `layout` is of captions, buckets, and the samples and bytes of every shard. `content` is of the first and last 64 KiB of up to
    64 shards; it is null where shards are still to be fetched or unpacked. A folder that was moved or copied keeps both.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = sorted(name for name, count in manifest["buckets"].items() if count)
        shards = [(name, shard) for name in names for shard in shards_in(folder / name)]
        sizes = [(name, shard["samples"], shard["raw_data"]["bytes"]) for name, shard in shards]
        files = [folder / name / shard["raw_data"]["basename"] for name, shard in shards]
        layout = [manifest["image_size"], list(manifest["captions"]), sizes]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    return {"samples": sum(count for _, count, _ in sizes), "layout": digest[:16], "content": _content(files)}


def _content(files: list[Path]) -> str | None:
    digest = hashlib.sha256()
    for file in files[:: max(-(-len(files) // _SHARDS), 1)]:
        try:
            with file.open("rb") as opened:
                digest.update(opened.read(_BYTES))
                opened.seek(max(file.stat().st_size - _BYTES, 0))
                digest.update(opened.read(_BYTES))
        except OSError:
            return None
    return digest.hexdigest()[:16]


def same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two identities of loaders are of the same data; what one of them doesn't know makes no difference."""
    return before.keys() == now.keys() and all(_same_split(before[name], now[name]) for name in now)


def _same_split(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    contents = {before.get("content"), now.get("content")} - {None}
    return before.get("layout") == now.get("layout") and len(contents) <= 1


def in_words(identity: Mapping[str, Any]) -> str:
    """Return an identity as people read it."""
    parts = []
    for name, part in identity.items():
        fingerprint = f"{part['layout'][:6]}-{(part['content'] or 'unread')[:6]}"
        parts.append(f"{name + ': ' if name else ''}{part['samples']:,} samples, fingerprint {fingerprint}")
    return "; ".join(parts)
