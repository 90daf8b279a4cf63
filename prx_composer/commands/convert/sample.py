"""One sample: a raw record → a row to store, or the reason why not. It is all that any engine runs on a sample."""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from prx_composer.commands.convert.records import Record, lookup
from prx_composer.commands.convert.settings import CHROMA, Settings, is_wanted
from prx_composer.common.files import encoding_of
from prx_composer.data.decoding import IMAGE_REASONS, JPEGS, BadImageError, decode, is_plain, open_image, oriented_size, resize
from prx_composer.data.format import Bucket, assign_bucket, make_buckets

STORED = (*JPEGS, "PNG", "WEBP")  # formats that are kept as they are where they fit
MAX_KEY = 1024
REASONS = {  # why a sample is left out: the names that are counted, stored and reported, and what they mean
    "damaged_input": "a file ends early or is broken: what was readable is kept (counted once per file, row group or shard)",
    "unreadable_record": "a line, JSON member, row or value that is not what it should be",
    "same_name_twice": "members of a tar with the same name: which image belongs to which text is not known",
    "several_images": "a sample with several images: --image says which is meant",
    "no_image": "no image with the record, or the file it names is not there",
    "url": "the image is an address, and nothing is downloaded: img2dataset does, and makes tars for --source webdataset",
    "outside_input": "the record names a file outside of the input folder: it is not opened",
    "file_too_large": "an encoded image or text above 256 MiB: it is not read",
    **IMAGE_REASONS,
    "no_caption": "none of the captions is there (missing, NaN, empty or only spaces)",
    "caption_not_utf8": "a caption that is not text in UTF-8",
    "metadata": "a metadata column that is missing or not of its type",
    "caption_length": "the shortest or longest caption is outside of --caption-chars",
    "min_side": "the shorter side is below --min-side",
    "max_aspect": "wider or taller than --max-aspect",
    "single_colour": "all pixels are the same colour, within 2 of 255",
    "where": "--where is false",
    "where_failed": "--where cannot be evaluated on this sample, such as a number compared with a missing value",
    "duplicate": "the same bytes as an earlier sample",
    "near_duplicate": "a perceptual hash within --distance bits of an earlier sample that is kept",
}


class Measured(NamedTuple):
    """What is known of a sample before its pixels are."""

    height: int = 0  # of the original, upright
    width: int = 0
    caption_length: int = 0  # of the longest, characters


class Kept(NamedTuple):
    """A sample to store, and what is counted of it."""

    bucket: Bucket
    row: dict[str, Any]
    measured: Measured
    original: bool  # the bytes are the input's
    filled: bool  # a missing caption was replaced by another


class Dropped(NamedTuple):
    """A sample that is left out, and why."""

    reason: str
    key: str
    measured: Measured
    pixels: np.ndarray | None = None  # for the report, where they were decoded anyway
    detail: str = ""  # what else is known, in words


class Checked(NamedTuple):
    """A record of which only the pixels are still to be looked at."""

    key: str
    encoded: bytes
    image: Image.Image  # header read, pixels not
    captions: dict[str, str]
    filled: bool
    metadata: dict[str, Any]
    measured: Measured


class _Drop(Exception):
    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


def check(record: Record, settings: Settings) -> Checked | Dropped:
    """Check all that can be checked without decoding the image."""
    key, measured = clean_key(record.key), Measured()
    try:
        if record.problem:
            raise _Drop(record.problem, record.detail)
        captions, filled = _captions(record.columns, settings)
        lengths = [len(text) for text in captions.values()]
        measured = Measured(caption_length=max(lengths))
        metadata = _metadata(record.columns, settings)
        if record.image is None:
            raise _Drop("no_image")
        image = open_image(record.image, settings.max_pixels)
        measured = Measured(*oriented_size(image), max(lengths))
        if problem := _unwanted(record.columns, measured, min(lengths), settings):
            raise _Drop(problem)
    except (_Drop, BadImageError) as drop:
        known = record.detail if str(drop) in ("no_image", "no_caption") else ""
        return Dropped(str(drop), key, measured, detail=getattr(drop, "detail", "") or known)
    return Checked(key, record.image, image, captions, filled, metadata, measured)


def convert(record: Record, settings: Settings, duplicate: str = "") -> Kept | Dropped:
    """Return one record as it will be stored, or why it won't be.

    Args:
        duplicate: the reason, if the record is a duplicate of another one.
    """
    checked = check(record, settings)
    if isinstance(checked, Dropped):
        return checked
    if duplicate:
        return Dropped(duplicate, checked.key, checked.measured)
    height, width, _ = checked.measured
    bucket = assign_bucket(height, width, _buckets(settings.image_size, settings.multiple, settings.bucket_aspect))
    try:
        fits = (height, width) == bucket and checked.image.format in STORED and is_plain(checked.image)
        twice = None if fits else (2 * bucket.height, 2 * bucket.width)  # enough for a sharp downscale
        decoded = decode(checked.encoded, checked.image, twice)
    except BadImageError as error:
        return Dropped(str(error), checked.key, checked.measured, detail=getattr(error, "detail", ""))
    if not settings.single_colour and is_one_colour(decoded):
        return Dropped("single_colour", checked.key, checked.measured, decoded)
    encoded = checked.encoded
    if not fits:
        encoded = encode_jpeg(resize(decoded, bucket), settings.quality, CHROMA[settings.chroma])
    row = {"image": encoded, "width": bucket.width, "height": bucket.height, "key": checked.key}
    return Kept(bucket, row | checked.captions | checked.metadata, checked.measured, fits, checked.filled)


@functools.lru_cache
def _buckets(image_size: int, multiple: int, max_aspect: float) -> list[Bucket]:
    return make_buckets(image_size, multiple, max_aspect)


def clean_key(key: str) -> str:
    """Return a label that every encoding can store and every terminal can show."""
    printable = "".join(character if character.isprintable() else "\ufffd" for character in key)
    return printable.encode(errors="replace").decode()[:MAX_KEY]


def _captions(columns: dict[str, Any], settings: Settings) -> tuple[dict[str, str], bool]:
    """Return every caption; one that is missing takes the first that is not. And whether one was."""
    found = {name: _text(lookup(columns, column), column) for name, column in settings.captions.items()}
    there = [text for text in found.values() if text]
    if not there:
        raise _Drop("no_caption")
    return {name: text or there[0] for name, text in found.items()}, len(there) < len(found)


def _instead_of_text(value: Any, column: str) -> str:
    """Say what stands where a caption should, and what to type to have it."""
    if isinstance(value, dict):
        return f"{column} holds {', '.join(map(str, value))}: --caption {column}.NAME takes one of them" if value else ""
    if isinstance(value, list):
        return f"{column} is a list of {len(value)}: --caption {column}.0 takes the first" if value else ""
    return f"{column} is {value!r}, which is no text"


def _text(value: Any, column: str) -> str:
    """Return text without surrounding space; "" for none."""
    try:
        if isinstance(value, list) and len(value) == 1:
            value, column = value[0], f"{column}.0"
        if isinstance(value, bytes):
            encoding = encoding_of(value)
            value = value.decode(encoding)
            # UTF-16 of any script, without its mark, is often valid UTF-8, but with zeros.
            if encoding == "utf-8" and "\0" in value.rstrip("\0"):
                raise _Drop("caption_not_utf8", "zero bytes, as in UTF-16 without a byte-order mark")
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if not isinstance(value, str):
            raise _Drop("no_caption", _instead_of_text(value, column))
        value.encode()  # half a surrogate pair, as JSON can spell it, is no text
    except UnicodeError:
        raise _Drop("caption_not_utf8") from None
    return value.replace("\0", "").strip()


def _metadata(columns: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return {name: _typed(lookup(columns, column), kind) for name, (column, kind) in settings.metadata.items()}


def _typed(value: Any, kind: str) -> Any:
    """Convert a value: a missing number is NaN where there is one, missing text is empty."""
    try:
        if isinstance(value, bytes):
            value = value.decode(encoding_of(value))
        if kind == "float":
            return float("nan") if value is None else float(value)
        if kind == "int":
            number = int(value)
            if not -(2**63) <= number < 2**63 or (not isinstance(value, str) and number != value):
                raise ValueError
            return number
        text = "" if value is None else str(value)
        text.encode()
    except (TypeError, ValueError, OverflowError):
        raise _Drop("metadata") from None
    return text


def _unwanted(columns: dict[str, Any], measured: Measured, shortest: int, settings: Settings) -> str:
    height, width, longest = measured
    low, high = settings.caption_chars
    aspect = max(height, width) / min(height, width)
    if shortest < low or (high is not None and longest > high):
        return "caption_length"
    if min(height, width) < settings.min_side:
        return "min_side"
    if settings.max_aspect is not None and aspect > settings.max_aspect:
        return "max_aspect"
    if settings.where:
        own = {"width": width, "height": height, "aspect": width / height, "caption_length": longest}
        wanted = is_wanted(settings.where, columns | own)
        if not wanted:
            return "where_failed" if wanted is None else "where"
    return ""


def encode_jpeg(pixels: np.ndarray, quality: int, subsampling: int) -> bytes:
    """Encode uint8 (height, width, 3) as JPEG; subsampling 0 is full chroma, 2 a quarter of it."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality, colorspace="RGB", colorsubsampling={0: "444", 2: "420"}[subsampling], fastdct=False
    )


def is_one_colour(pixels: np.ndarray, tolerance: int = 2) -> bool:
    """Return whether every channel stays within `tolerance` of 255."""

    def spread(part: np.ndarray) -> int:
        return int(np.ptp(part.reshape(-1, 3), axis=0).max())

    return spread(pixels[::16, ::16]) <= tolerance and spread(pixels) <= tolerance  # a few pixels tell most images


def thumbnail(pixels: np.ndarray, side: int = 128) -> bytes:
    """Encode a JPEG whose longer side is `side`."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    small = Bucket(max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
    return encode_jpeg(resize(pixels, small), 80, 2)
