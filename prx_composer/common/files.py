"""Local files: written so that they are whole or not there, and people's texts read in whatever Unicode they were saved."""

import codecs
import os
import zlib
from pathlib import Path

from prx_composer.common.errors import UserError

_CHUNK = 1 << 24  # bytes


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that an index in the folder names, which others may have written.

    Raises:
        ValueError: the name leads out of the folder.
    """
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r}, named in an index of {folder}, leads out of that folder.")
    return folder / name


def sync(path: Path) -> None:
    """Write a file or a folder's entries through to the disk, so that a later rename never names something half-written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """Return what a file is recognised by: one bit that is changed in it makes it another."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def write_whole(path: Path, content: bytes) -> None:
    """Write a local file that is there with all of its content, on the disk, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    sync(partial)
    partial.rename(path)


_MARKS = (  # the longer ones first: UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(head: bytes) -> str:
    """Return the encoding that a file's first bytes name by a byte-order mark; `utf-8` when they name none.

    Windows' Notepad writes UTF-8 with a mark, PowerShell 5's `>` and `Out-File` write UTF-16 with one.
    """
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def decode_text(content: bytes, name: str | Path) -> str:
    """Decode a whole text file, with or without a byte-order mark, which is not part of the text.

    Raises:
        UserError: not UTF-8, and no byte-order mark that says otherwise. Names the file and the first bad byte.
    """
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        said = "is not UTF-8" if encoding.startswith("utf-8") else f"begins as {encoding.upper()} and does not go on as such"
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{name} {said}: byte 0x{content[error.start]:02x} in line {line} (offset {error.start}). Save it as UTF-8; "
            f"if it came from an older Windows program, `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW` makes it so."
        ) from error
    if "\0" in text:  # UTF-16 of plain English, without its mark, is valid UTF-8 with a zero in every second place
        raise UserError(
            f"{name} has zero bytes and is no text in UTF-8. If it is UTF-16: `iconv -f UTF-16LE -t UTF-8 OLD > NEW`."
        )
    return text


def read_text(path: str | Path) -> str:
    """Read a whole text file; see `decode_text`.

    Raises:
        OSError: the file cannot be opened.
        UserError: it is no text in a known encoding.
    """
    return decode_text(Path(path).expanduser().read_bytes(), path)


def split_lines(text: str) -> list[str]:
    r"""Split at "\n", "\r\n" and "\r" alone.

    `str.splitlines` also cuts at U+2028, U+0085, form feeds and five others, which stand inside of captions.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if not lines[-1] else lines


def read_lines(path: str | Path) -> list[str]:
    """Read a text file's lines, without their ends; see `read_text` and `split_lines`."""
    return split_lines(read_text(path))
