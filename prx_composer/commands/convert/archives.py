"""A tar's members, whole or as far as they can be read: also of a compressed one, and of several written one after the other.

Nothing is extracted under its own name; a compressed tar is unpacked as one file, because members that belong together may lie
far from each other.
"""

import bz2
import contextlib
import errno
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prx_composer.commands.convert.records import is_damage
from prx_composer.common.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
CHUNK = 1 << 16
MOST_ZEROS = 1 << 22  # bytes at a tar's end; what writes in blocks fills up the last one, and none is nearly as large
UNPACKED_TIMES = 64  # as much may a compressed tar unpack to: images hardly shrink, and what does is made to fill a disk …
UNPACKED_BYTES = 1 << 30  # … above this size


def _open_zstd(path: Path, _: str) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"\x28\xb5\x2f\xfd": _open_zstd}


@contextlib.contextmanager
def open_tar(path: Path, folder: Path, least: int = UNPACKED_BYTES) -> Iterator[tuple[BinaryIO, str]]:
    """The file of a plain tar, and what was wrong with its compression, "" for nothing.

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
        if not is_damage(error):
            raise
        return f"its compression is broken: {error}"
    return ""


def members(file: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member in order, with the archive that can extract it.

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
    """Where the next archive begins, or the file's size: tarfile takes anything that is no header for the end of the tar."""
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
