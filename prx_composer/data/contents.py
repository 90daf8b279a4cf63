"""By what a cache notices that what it was made of has changed: the bytes themselves, wherever they lie and whenever written.

Bytes are read again only where a file's size or one of its times differs from when they were read last.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from prx_composer.common.errors import UserError
from prx_composer.common.files import write_whole
from prx_composer.data.schema import MANIFEST, Manifest
from prx_composer.data.storage import join

log = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds for a file of a few kilobytes
_EXACT = 1 << 30  # bytes of a split that is compared row by row
_ROWS = 64  # of every bucket of a larger one


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
        """The SHA-256 of every file, read again where it may have changed."""
        return {name: entry[-1] for name, entry in self._read(files).items()}

    def different(self, files: Mapping[str, Path]) -> list[str]:
        """Names whose files hold something else than the record says, are new, or are gone."""
        now = self.contents(files)
        return [name for name in {**self._known, **now} if self._known.get(name, [None])[-1] != now.get(name)]

    def keep(self, files: Mapping[str, Path]) -> None:
        """Writes down what the files hold now, if that or their times are new."""
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


def check_copy(folder: Path, remote: str) -> None:
    """Whether manifest and indexes that were downloaded to a folder are still those of `remote`, which shards come from.

    Raises:
        UserError: other data lie there now.
    """
    names = [MANIFEST, *(f"{file.parent.name}/index.json" for file in sorted(folder.glob("*/index.json")))]
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
    """Tells by a column of a local split, such as `image` or a caption, what was made of it; the same for a copy of the split.

    Every row counts, up to `exact` bytes of data; beyond, 64 rows of every bucket and the size of each shard.
    """
    files = [file for bucket in Manifest.read(split).buckets for file in sorted((split / str(bucket)).iterdir())]
    states = [(str(file), file.stat()) for file in files]
    return _column_contents(split, column, exact, tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in states))


@functools.lru_cache(maxsize=64)  # several stored columns are of one column of images
def _column_contents(split: Path, column: str, at_most: int, states: tuple[tuple[str, int, int, int], ...]) -> str:
    from prx_composer.data.rows import BucketRows  # slow to import, and not needed for files

    digest = hashlib.sha256()
    buckets = sorted(Manifest.read(split).buckets)
    rows = BucketRows(split, buckets)
    exact = sum(size for _, size, *_ in states) <= at_most
    if not exact:
        digest.update(json.dumps([size for _, size, *_ in states]).encode())
    for index, (bucket, count) in enumerate(zip(buckets, rows.counts, strict=True)):
        digest.update(f"{bucket} {count} ".encode())
        for place in range(count) if exact else sorted({number * (count - 1) // (_ROWS - 1) for number in range(_ROWS)}):
            value = rows.row(index, place)[column]
            value = value.encode() if isinstance(value, str) else value
            digest.update(len(value).to_bytes(8, "little") + value)
    return digest.hexdigest()
