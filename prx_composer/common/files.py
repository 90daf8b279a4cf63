"""Local files that are whole on the disk, or not there."""

import os
from pathlib import Path


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that an index in the folder names, which others may have written.

    Raises:
        ValueError: the name leads out of the folder.
    """
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r}, named in an index of {folder}, leads out of that folder.")
    return folder / name


def sync(path: Path) -> None:
    """Writes a file or a folder's entries through to the disk, so that a later rename never names something half-written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """A local file that is there with all of its content, on the disk, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    sync(partial)
    partial.rename(path)
