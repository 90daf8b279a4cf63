"""Files by name, local or remote (`s3://…`, and whatever else mosaicml-streaming downloads from and uploads to), and MDS shards.

The samples of a shard are read column by column, as bytes, as mosaicml-streaming's MDSReader reads them. Nothing is decoded, so
nothing executes, and a column that isn't asked for isn't read.
"""

import contextlib
import fnmatch
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlparse

import numpy as np

from prx_composer.common.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 5
INDEX = "index.json"  # of a folder of MDS shards


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def patiently(action: Callable[[], T], what: str) -> T:
    """Do something, and again after 1, 2, 4 … seconds when a connection is lost."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (ImportError, NotImplementedError, PermissionError, UserError):
            raise
        except Exception as error:  # every SDK has its own
            if attempt + 1 == ATTEMPTS or "Not Found" in str(error) or "not found" in str(error):
                raise
            log.warning("%s failed, trying again: %s", what, error)
            time.sleep(2**attempt)
    raise AssertionError


def fetch(path: str, into: Path) -> Path:
    """Return the local file itself, or a copy of the remote one in the folder `into`, downloaded once."""
    if not is_remote(path):
        return Path(path)
    local = into / urlparse(path).path.lstrip("/").replace("/", "\\")  # one flat name: nothing leaves the folder
    if not local.exists():
        download(path, local)
    return local


@contextlib.contextmanager
def fetched(path: str) -> Iterator[Path]:
    """Give the local file itself, or a copy of the remote one that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="prx-fetch.") if is_remote(path) else contextlib.nullcontext("") as folder:
        yield fetch(path, Path(folder))


def download(source: str, target: Path) -> None:
    """Download one remote file; it appears under its name only when it is whole, so that nobody reads half of it."""
    from streaming.base.storage import CloudDownloader

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch.") as folder:
        partial = os.path.join(folder, "part")
        patiently(lambda: CloudDownloader.get(source).download(source, partial), f"Downloading {source}")
        os.replace(partial, target)


def upload(folder: Path, remote: str, names: list[str], keep: bool = False) -> None:
    """Upload files of a local folder to the same names below `remote`, in this order; unless `keep`, they are gone here then."""
    uploader = _uploader(remote)
    try:
        for name in names:
            target = os.path.join(uploader.local, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink((folder / name).absolute(), target) if keep else shutil.move(folder / name, target)
            patiently(lambda name=name: uploader.upload_file(name), f"Uploading {join(remote, name)}")
    finally:
        shutil.rmtree(uploader.local, ignore_errors=True)


def delete(paths: list[str]) -> None:
    """Delete remote files, in this order, where the store is S3's; others keep theirs."""
    if paths and paths[0].startswith("s3://"):
        uploader = _uploader(paths[0].rpartition("/")[0])
        try:
            for path in paths:
                place = {"Bucket": urlparse(path).netloc, "Key": urlparse(path).path.lstrip("/")}
                patiently(lambda place=place: uploader.s3.delete_object(**place), f"Deleting {path}")
        finally:
            shutil.rmtree(uploader.local, ignore_errors=True)


class Entry(NamedTuple):
    """A file.

    Args:
        path: a link to a folder that is not followed ends with "/".
        size: bytes; None where that is not known.
        stamp: changes when the content does: nanoseconds, or an object store's tag.
    """

    path: str
    size: int | None
    stamp: int | str | None


def survey(folder: str, follow_links: bool = False) -> list[Entry]:
    """Return every file below a folder with its state, sorted; hidden ones and links, too. Hidden folders are not entered."""
    if is_remote(folder):
        path = urlparse(folder).path.strip("/")
        base = f"{urlparse(folder).scheme}://{urlparse(folder).netloc}"
        return sorted(
            Entry(f"{base}/{key}", size, tag)
            for key, size, tag in _objects(folder)
            if key == path or key.startswith(f"{path}/") or not path
        )
    if os.path.isfile(folder):
        return [_entry(folder)]
    return sorted(_entry(path) for path in _walk(str(Path(folder)), follow_links, set()))


def _walk(folder: str, follow_links: bool, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yield paths of files, and with a "/" at the end those of folders that aren't entered: hidden ones, and unfollowed links."""
    try:
        state = os.stat(folder)
        entries = list(os.scandir(folder)) if (state.st_dev, state.st_ino) not in seen else []
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise UserError(f"--input: {folder} may not be read: {error.strerror}.") from error
    seen.add((state.st_dev, state.st_ino))  # a link may lead back
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
        elif entry.name.startswith(".") or (entry.is_symlink() and not follow_links):
            yield f"{entry.path}/"
        else:
            yield from _walk(entry.path, follow_links, seen)


def _entry(path: str) -> Entry:
    try:
        state = os.stat(path)
    except OSError:  # a link to nothing
        return Entry(path, None, None)
    return Entry(path, None, None) if path.endswith("/") else Entry(path, state.st_size, state.st_mtime_ns)


def _objects(folder: str) -> list[tuple[str, int | None, str | None]]:
    """Return key, size and tag of all objects whose name begins with the folder's; if the SDK is not S3's, keys alone."""
    if not folder.startswith("s3://"):
        return [(key, None, None) for key in remote_keys(folder)]
    uploader = _uploader(folder)
    try:
        pages = uploader.s3.get_paginator("list_objects_v2")
        asked = {"Bucket": urlparse(folder).netloc, "Prefix": urlparse(folder).path.strip("/")}
        found = patiently(
            lambda: [entry for page in pages.paginate(**asked) for entry in page.get("Contents", [])], f"Listing {folder}"
        )
        return [(entry["Key"], entry["Size"], entry["ETag"].strip('"')) for entry in found]
    finally:
        shutil.rmtree(uploader.local, ignore_errors=True)


def is_included(path: str, include: str) -> bool:
    """Return whether a pattern takes a file: one without `/` by its name, one with `/` by its path below the folder."""
    return fnmatch.fnmatch(path if "/" in include else path.rpartition("/")[2], include)


def relative_name(file: str, folder: str) -> str:
    """Return the path of a file below a folder, as `list_files` names both; its name, if the folder is the file."""
    return file.removeprefix(folder).lstrip("/") or file.rpartition("/")[2]


def list_files(folder: str, include: str = "*", follow_links: bool = False) -> list[tuple[str, int | None]]:
    """Return every file below a folder, hidden ones aside, with its size in bytes where it is known; sorted. A file is itself.

    Args:
        include: pattern of those that are wanted; see `is_included`.

    Raises:
        UserError: there is no such folder, or the remote store cannot be listed.
    """
    if not is_remote(folder):
        root = Path(folder)
        if root.is_file():
            return [(str(root), root.stat().st_size)]
        if not root.is_dir():
            raise UserError(f"--input: there is no {folder}.")
        walked = sorted(map(Path, _walk(str(root), follow_links, set())))
        paths = [p for p in walked if not any(part.startswith(".") for part in p.relative_to(root).parts)]
        wanted = (p for p in paths if p.is_file() and is_included(p.relative_to(root).as_posix(), include))
        return [(str(p), p.stat().st_size) for p in wanted]
    base, path = urlparse(folder), urlparse(folder).path.strip("/")
    names = []
    for key in remote_keys(folder):
        below = key[len(path) :].lstrip("/")
        visible = not any(part.startswith(".") for part in below.split("/"))
        if (key == path or key.startswith(f"{path}/") or not path) and visible and is_included(below or Path(key).name, include):
            names.append((f"{base.scheme}://{base.netloc}/{key}", None))
    return sorted(names)


def remote_keys(folder: str) -> list[str]:
    """Return the keys of all objects whose name begins with the folder's."""
    uploader = _uploader(folder)
    try:
        return sorted(patiently(uploader.list_objects, f"Listing {folder}") or [])
    except NotImplementedError as error:
        kind = urlparse(folder).scheme
        raise UserError(
            f"{folder}: mosaicml-streaming cannot list {kind}:// storage; copy it to s3://, gs:// or disk."
        ) from error
    finally:
        shutil.rmtree(uploader.local, ignore_errors=True)


def _uploader(remote: str) -> Any:
    from streaming.base.storage import CloudUploader

    try:
        return patiently(lambda: CloudUploader.get(remote.rstrip("/")), f"Reaching {remote}")
    except (ValueError, ImportError) as error:
        raise UserError(f"{remote}: {error}") from error


def shards_in(folder: Path) -> list[dict[str, Any]]:
    """Return the shards of a local folder, as its index lists them. Raise OSError, ValueError or LookupError without one."""
    return json.loads((folder / INDEX).read_text())["shards"]


def encodings_of(shard: dict[str, Any]) -> dict[str, str]:
    """Return column → MDS encoding, of a shard's entry in its index."""
    return dict(zip(shard["column_names"], shard["column_encodings"], strict=True))


class LinkError(ValueError):
    """A shard that lies elsewhere."""


class RawShard:
    """The samples of one shard as bytes, by column.

    Args:
        folder: of the index, local or remote.
        shard: its entry in the index.
        cache: where a remote file is downloaded to.
        follow_links: open a symbolic link that leads out of the folder.

    Raises:
        ValueError: the file ends early, or its name leads out of the folder. On reading a sample, likewise.
        OSError: it is not there.
    """

    def __init__(self, folder: str, shard: dict[str, Any], cache: Path, follow_links: bool = False):
        self._names, self._fixed = shard["column_names"], shard["column_sizes"]
        raw, zipped = shard["raw_data"], shard.get("zip_data")
        path = Path(folder, raw["basename"])  # of a compressed shard, a `StreamingDataset` leaves only this in its cache
        if zipped and (is_remote(folder) or not path.is_file() or path.stat().st_size != raw["bytes"]):
            from streaming.base.compression import decompress

            path = self._fetch(folder, zipped["basename"], cache, follow_links)
            self._content = np.frombuffer(decompress(shard["compression"], path.read_bytes()), np.uint8)
        else:
            self._content = np.asarray(np.memmap(self._fetch(folder, raw["basename"], cache, follow_links), mode="r"))
        self._count = int(shard["samples"])
        if len(self._content) < 4 * (self._count + 2):
            raise ValueError(f"{self._file} ends early")
        self._offsets = self._content[4 : 4 * (self._count + 2)].view(np.uint32)

    def _fetch(self, folder: str, name: str, cache: Path, follow_links: bool) -> Path:
        self._file = name
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name} leads out of {folder}")
        path = fetch(join(folder, name), cache)
        if not is_remote(folder) and not follow_links and not path.resolve().is_relative_to(Path(folder).resolve()):
            raise LinkError(f"{name} is or passes a symbolic link that leads out of {folder}")
        return path

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        return (self.read(index) for index in range(self._count))

    def read(self, index: int, columns: Container[str] | None = None) -> dict[str, bytes]:
        """Return the columns of a sample, all unless they are named."""
        return {
            name: self._content[begin:end].tobytes()
            for name, (begin, end) in self._spans(index).items()
            if columns is None or name in columns
        }

    def sizes(self, index: int) -> dict[str, int]:
        """Return the number of bytes of every column of a sample."""
        return {name: end - begin for name, (begin, end) in self._spans(index).items()}

    def _spans(self, index: int) -> dict[str, tuple[int, int]]:
        begin, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        if not begin <= stop <= len(self._content):
            raise ValueError(f"{self._file} ends early")
        values = begin + 4 * sum(not size for size in self._fixed)  # after the sizes of the columns that have none in the index
        if values <= stop:
            stated = iter(np.frombuffer(self._content[begin:values].tobytes(), "<u4").tolist())
            ends = list(itertools.accumulate((int(size or next(stated)) for size in self._fixed), initial=values))
            if ends[-1] <= stop:
                return dict(zip(self._names, itertools.pairwise(ends), strict=True))
        raise ValueError("a sample ends early")


def sizes_in(folder: Path, below: set[str]) -> dict[str, int]:
    """Return the bytes of every file in some folders below one, by the name that an index gives them."""
    sizes: dict[str, int] = {}
    for part in below:
        if (folder / part).is_dir():
            sizes |= {str(Path(part, entry.name)): entry.stat().st_size for entry in os.scandir(folder / part)}
    return sizes
