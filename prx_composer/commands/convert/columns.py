"""The columns of records: which of them there are, which holds the images, and what a value stands for."""

import base64
import binascii
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from prx_composer.commands.convert.records import MAX_FILE_BYTES, Seen
from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError, nearest

IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "jpeg", "image_path", "file_name", "file", "path")
PEEKED = 50  # records that are looked at in any case, to say which columns there are
ADVICE = "nothing is downloaded. img2dataset does, and makes tars for --source webdataset"
SECONDS = 30.0  # to look for a column that these do not have
Found = tuple[bytes | None, str, str]  # an encoded file, or the reason why there is none and what else is known of it

_ABSENT = object()
_HEAD = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|P[56]\s|....ftyp", re.DOTALL)
_SHORTEST = 40  # characters in base64: no image is smaller, and names of files mostly are
_OTHER = re.compile(rb"[^A-Za-z0-9+/_\s-]")  # than base64's characters
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def lookup(columns: dict[str, Any], name: str) -> Any:
    """Return the value of a column; `meta.tags.0` looks inside of mappings and lists. None if there is none."""
    value = _walk(columns, name)
    return None if value is _ABSENT else value


def has(columns: dict[str, Any], name: str) -> bool:
    """Return whether there is such a column, be it empty; see `lookup`. What is null may hold anything."""
    return _walk(columns, name) is not _ABSENT


def _walk(columns: dict[str, Any], name: str) -> Any:
    if name in columns:
        return columns[name]
    value: Any = columns
    for part in name.split("."):
        if value is None:
            return None
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def look(
    rows: Iterable[dict[str, Any]],
    settings: Settings,
    seconds: float = SECONDS,
    enough: Callable[[], bool] = lambda: True,
) -> Seen:
    """Look at records until every column that the settings name was seen, for inputs that have no schema.

    JSON lines and tars leave out what is empty, so a column may come late.

    Args:
        seconds: after which it ends in any case.
        enough: whether nothing else is looked for in the rows.
    """
    names, missing, number = set[str](), set(settings.input_columns), 0
    end, whole = time.monotonic() + seconds, True
    for number, row in enumerate(rows, 1):
        names.update(map(str, row))
        missing = {name for name in missing if not has(row, name)}
        if number >= PEEKED and ((not missing and enough()) or time.monotonic() > end):
            whole = False
            break
    return Seen(sorted(names), sorted(missing), whole, looked_at=number)


def choose_image(sure: list[str], likely: list[str], names: list[str], wanted: str | None) -> str:
    """Return the column that holds the images.

    Args:
        sure: columns whose type is that of images.
        likely: columns that are called as one of paths might be.
        names: all columns.
        wanted: `--image`.

    Raises:
        UserError: there is none, or several of which none is called `image`.
    """
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"--image {wanted}: there is no such column.{nearest(wanted, names)}")
        return wanted
    if "image" in sure or "image" in likely:
        return "image"
    found = list(dict.fromkeys(sure or likely))
    if len(found) > 1:
        options = " or ".join(f"--image {name}" for name in found)
        raise UserError(f"--image: {', '.join(found)} could each hold the images. Say which one is trained on: {options}.")
    if not found:
        advice = next((f" If {name} holds addresses: {ADVICE}." for name in names if name.lower().endswith("url")), "")
        raise UserError(f"--image: say which column holds the images; there are {', '.join(names) or 'none'}.{advice}")
    return found[0]


def image_of(value: Any, find: Callable[[str], Found]) -> Found:
    """Return the encoded file that a value of an image column holds or names, or the reason why there is none.

    Args:
        value: bytes, a list of numbers that are bytes, base64 text, a `data:` URI, the name of a file, or a mapping of `bytes`
            and `path`, as `datasets.Image` stores it; alone in a list, too.
        find: reads the file of a name.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, list):
        if value and all(isinstance(one, dict | str | bytes) for one in value):
            return image_of(value[0], find) if len(value) == 1 else (None, "several_images", f"a list of {len(value)}")
        try:
            value = bytes(value)
        except (TypeError, ValueError) as error:
            return None, "unreadable_record", f"a list that is no bytes: {error}"
    if isinstance(value, bytes | str) and len(value) > 2 * MAX_FILE_BYTES:
        return None, "file_too_large", f"{len(value):,} bytes"
    if isinstance(value, bytes):
        value = from_base64(value) or value
        return (None, "file_too_large", f"{len(value):,} bytes") if len(value) > MAX_FILE_BYTES else (value, "", "")
    if not isinstance(value, str) or not value:
        return None, "no_image", "" if value is None or value == "" else f"in its place stands {value!r}"[:100]
    return _of_text(value, find)


def _of_text(value: str, find: Callable[[str], Found]) -> Found:
    if value[:5].lower() == "data:":
        head, _, content = value.partition(",")
        return (_decoded(content) if head.endswith(";base64") else unquote_to_bytes(content)) or b"", "", ""
    if (content := from_base64(value)) is not None:
        return content, "", ""
    if _URL.match(value):
        return None, "url", value[:200]
    names = dict.fromkeys([value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value)])
    found = [find(name) for name in names]
    return next((one for one in found if one[1] != "no_image"), found[0])


def usable(value: Any) -> bool:
    """Return whether a value of JSON can hold or name an image: see `image_of`. A number cannot."""
    if isinstance(value, list) and value:
        return all(isinstance(one, int) for one in value) or all(usable(one) for one in value)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return isinstance(value, str) and bool(value)


def from_base64(text: str | bytes) -> bytes | None:
    """Return the image that a text is in base64, as far as it goes; None if it clearly isn't one, by its first bytes."""
    if len(text) < _SHORTEST:
        return None
    head = _decoded(text[:_SHORTEST])
    if head is None or not _HEAD.match(head):
        return None
    return _decoded(text) or _decoded(_OTHER.split(text if isinstance(text, bytes) else text.encode(), maxsplit=1)[0])


def _decoded(text: str | bytes) -> bytes | None:
    """Decode base64 of either alphabet, perhaps in lines, perhaps without padding or cut; None if it is none."""
    try:
        content = text if isinstance(text, bytes) else text.encode("ascii")
        content = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        content = content[: len(content) - (len(content) % 4 == 1)]
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None


def image_inside(folder: Path, name: str, follow_links: bool) -> Found:
    """Return an encoded file below a local folder, or why there is none. No name opens anything outside of the folder.

    Args:
        follow_links: open links that lead out of it.
    """
    try:
        path = folder / os.path.normpath(name)
        if not path.resolve().is_relative_to(folder.resolve()):
            if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
                return None, "outside_input", f"{name} is not below {folder}"
            if not follow_links:
                advice = "if that is yours to read, as in a hub's cache, give --follow-links"
                return None, "outside_input", f"{name} is or passes a symbolic link to {path.resolve()}; {advice}"
        if not path.is_file():
            return None, "no_image", f"there is no {path}"
        if path.stat().st_size > MAX_FILE_BYTES:
            return None, "file_too_large", ""
        return path.read_bytes(), "", ""
    except (OSError, ValueError) as error:  # a name that no file can have, or one that may not be read
        return None, "no_image", str(error)
