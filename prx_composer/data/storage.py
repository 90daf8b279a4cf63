"""Files by name, local or remote (`s3://…`, and whatever else mosaicml-streaming downloads from and uploads to)."""

import fnmatch
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from prx_composer.errors import UserError

__all__ = ["download", "fetch", "is_included", "is_remote", "join", "list_files", "relative_name", "remote_keys", "upload"]

log = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 5


def is_remote(path: str) -> bool:
    return "://" in path


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names])


def patiently(action: Callable[[], T], what: str) -> T:
    """Again, after 1, 2, 4 … seconds, when a connection is lost."""
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
    """The local file itself, or a copy of the remote one in the folder `into`, downloaded once."""
    if not is_remote(path):
        return Path(path)
    local = into / urlparse(path).path.lstrip("/").replace("/", "\\")  # one flat name: nothing leaves the folder
    if not local.exists():
        download(path, local)
    return local


def download(source: str, target: Path) -> None:
    """One remote file; it appears under its name only when it is whole, so that nobody reads half of it."""
    from streaming.base.storage import CloudDownloader

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch.") as folder:
        partial = os.path.join(folder, "part")
        patiently(lambda: CloudDownloader.get(source).download(source, partial), f"Downloading {source}")
        os.replace(partial, target)


def upload(folder: Path, remote: str, names: list[str]) -> None:
    """Uploads files of a local folder to the same names below `remote`, in this order; they are gone from the folder then."""
    uploader = _uploader(remote)
    try:
        for name in names:
            target = os.path.join(uploader.local, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.move(folder / name, target)
            patiently(lambda name=name: uploader.upload_file(name), f"Uploading {join(remote, name)}")
    finally:
        shutil.rmtree(uploader.local, ignore_errors=True)


def is_included(path: str, include: str) -> bool:
    """Whether a pattern takes a file: one without `/` by its name, one with `/` by its path below the folder."""
    return fnmatch.fnmatch(path if "/" in include else path.rpartition("/")[2], include)


def relative_name(file: str, folder: str) -> str:
    """Path of a file below a folder, as `list_files` names both; its name, if the folder is the file itself."""
    return file.removeprefix(folder).lstrip("/") or file.rpartition("/")[2]


def list_files(folder: str, include: str = "*") -> list[tuple[str, int | None]]:
    """Every file below a folder, hidden ones aside, with its size in bytes where that is known; sorted. A file is itself.

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
        paths = [p for p in sorted(root.rglob("*")) if not any(part.startswith(".") for part in p.relative_to(root).parts)]
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
    """Keys of all objects whose name begins with the folder's."""
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
