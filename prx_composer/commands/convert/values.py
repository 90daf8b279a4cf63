"""What stands in an image column: an encoded file, as bytes or as text, or the name of one."""

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

from prx_composer.commands.convert.records import MAX_FILE_BYTES

Found = tuple[bytes | None, str, str]  # an encoded file, or the reason why there is none and what else is known of it

_HEAD = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|P[56]\s|....ftyp", re.DOTALL)
_SHORTEST = 40  # characters in base64: no image is smaller, and names of files mostly are
_OTHER = re.compile(rb"[^A-Za-z0-9+/_\s-]")  # than base64's characters
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


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
    """Whether a value of JSON can hold or name an image: see `image_of`. A number cannot."""
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
    """Base64 of either alphabet, perhaps in lines, perhaps without padding or cut; None if it is none."""
    try:
        content = text if isinstance(text, bytes) else text.encode("ascii")
        content = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        content = content[: len(content) - (len(content) % 4 == 1)]
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None
