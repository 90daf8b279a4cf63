"""What an engine runs on one work unit, whole or not at all: convert it, or hash it, so that duplicates are found.

A unit becomes shards, one folder for each bucket, and a result that says what is in them: a function of its input alone.
"""

import functools
import hashlib
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from streaming import MDSWriter

from prx_composer.commands.convert.backends import RESULT, open_output, progress
from prx_composer.commands.convert.outcome import HASHES, Dropped, Kept, Measured, Tally, clean_key, encode_jpeg, thumbnail
from prx_composer.commands.convert.records import Record, Source, Unit, lookup, open_source
from prx_composer.commands.convert.settings import Settings, is_wanted
from prx_composer.common.files import encoding_of, sync
from prx_composer.data.decoding import JPEGS, BadImageError, decode, is_plain, open_image, oriented_size, resize
from prx_composer.data.format import COLUMNS, HELDOUT, assign_bucket, is_held_out, make_buckets
from prx_composer.data.storage import INDEX, shards_in

SHARD_BYTES = 1 << 26
BUFFERED_BYTES = 1 << 28  # over all buckets of a unit: memory does not depend on how many there are
PICTURES = 2  # of every reason for dropping, kept for the report
PICTURED_UNITS = 50  # first units, which keep them
STORED = (*JPEGS, "PNG", "WEBP")  # formats that are kept as they are where they fit
HASHED_SIDE = 64  # images are decoded at about this size, where JPEG allows it

_buckets = functools.cache(make_buckets)


def convert_unit(settings: Settings, output: str, unit: Unit, duplicates: Mapping[int, str]) -> int:
    """Write a unit's shards and make it count as done. Return the number of records read.

    Args:
        duplicates: number of a record in the unit → reason, of those that are duplicates.
    """
    store, source = open_output(output, settings.split), open_source(settings)
    asked = sorted(settings.input_columns)  # statistics are the same bytes, whatever order this process has for sets
    tally, pictures = Tally(), dict[str, list[str]]()
    writers: dict[str, BoundedWriter] = {}
    with store.scratch() as folder:
        for number, record in enumerate(_records(source, unit)):
            tally.see(record, asked)
            outcome = convert(record, settings, duplicates.get(number, ""))
            tally.add(outcome)
            if isinstance(outcome, Kept):
                _write(writers, outcome, settings, folder)
            elif unit.number < PICTURED_UNITS:
                _picture(pictures, outcome, record, settings)
        tally.passed = source.passed
        result = tally.to_json() | {"shards": _finish(writers, folder), "pictures": pictures}
        (folder / RESULT).write_text(json.dumps(result))
        sync(folder / RESULT)
        sync(folder)
        store.commit(unit, folder, result)
    return tally.counts["read"]


def hash_unit(settings: Settings, output: str, unit: Unit) -> int:
    """Store one of HASHES for every record of a unit. Return their number."""
    hashes = np.array([_hash(record, settings) for record in _records(open_source(settings), unit)], HASHES)
    file = io.BytesIO()
    np.save(file, hashes, allow_pickle=False)
    open_output(output, settings.split).put(f"hashes/{unit.name}", file.getvalue())
    return len(hashes)


def _records(source: Source, unit: Unit) -> Iterator[Record]:
    for record in itertools.islice(source.read(unit), unit.take):
        yield record
        progress.step()


class BoundedWriter(MDSWriter):
    """An MDSWriter that can be told to write what it has buffered."""

    def flush(self) -> None:
        self.flush_shard()
        self._reset_cache()


def _write(writers: dict[str, BoundedWriter], kept: Kept, settings: Settings, folder: Path) -> None:
    name = kept.place
    if name not in writers:
        columns = COLUMNS | dict.fromkeys(settings.captions, "str") | settings.metadata_encodings
        writers[name] = BoundedWriter(out=str(folder / name), columns=columns, size_limit=SHARD_BYTES)
    writers[name].write(kept.row)
    sizes = Counter({bucket: writer.new_shard_size for bucket, writer in writers.items()})
    if sizes.total() > BUFFERED_BYTES:
        writers[sizes.most_common(1)[0][0]].flush()


def _finish(writers: dict[str, BoundedWriter], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Write what is buffered through to the disk. Return the shards of every bucket, as an index names them."""
    shards = {}
    for bucket, writer in sorted(writers.items()):
        writer.finish()
        shards[bucket] = shards_in(folder / bucket)
        (folder / bucket / INDEX).unlink()
        for file in (folder / bucket).iterdir():
            sync(file)
        sync(folder / bucket)
    if (folder / HELDOUT).is_dir():
        sync(folder / HELDOUT)
    return shards


def _picture(pictures: dict[str, list[str]], dropped: Dropped, record: Record, settings: Settings) -> None:
    """Keep a small picture of a sample that is left out, if there aren't enough of its reason."""
    if len(pictures.get(dropped.reason, [])) >= PICTURES or record.image is None:
        return
    decoded = dropped.pixels
    if decoded is None:
        try:
            decoded = decode(record.image, open_image(record.image, settings.max_pixels))
        except BadImageError:
            return
    pictures.setdefault(dropped.reason, []).append(thumbnail(decoded))


# One sample: a record → a row to store, or the reason why not.


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
    """Its arguments are a reason and, perhaps, a detail."""


def check(record: Record, settings: Settings) -> Checked | Dropped:
    """Check all that can be checked without decoding the image."""
    key, measured = clean_key(record.key), Measured()
    try:
        if record.problem:
            raise _Drop(record.problem, record.detail)
        captions, filled = _captions(record.columns, settings)
        lengths = [len(text) for text in captions.values()] or [0]
        measured = Measured(caption_length=max(lengths))
        metadata = {name: _typed(lookup(record.columns, column), kind) for name, (column, kind) in settings.metadata.items()}
        if record.image is None:
            raise _Drop("no_image")
        image = open_image(record.image, settings.max_pixels)
        measured = Measured(*oriented_size(image), max(lengths))
        if problem := _unwanted(record.columns, measured, min(lengths), settings):
            raise _Drop(problem)
    except (_Drop, BadImageError) as drop:
        reason, detail, *_ = *drop.args, ""
        known = record.detail if reason in ("no_image", "no_caption") else ""
        return Dropped(reason, key, measured, detail=detail or known)
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
    fits = (height, width) == bucket and checked.image.format in STORED and is_plain(checked.image)
    twice = None if fits else (2 * bucket.height, 2 * bucket.width)  # enough for a sharp downscale
    pixels = _decode(checked, twice, settings)
    if isinstance(pixels, Dropped):
        return pixels
    encoded = checked.encoded if fits else encode_jpeg(resize(pixels, bucket), settings.quality, settings.chroma)
    row = {"image": encoded, "width": bucket.width, "height": bucket.height, "key": checked.key}
    held_out = settings.heldout is not None and is_held_out(checked.encoded, settings.heldout)
    return Kept(bucket, row | checked.captions | checked.metadata, checked.measured, fits, checked.filled, held_out)


def _decode(checked: Checked, least: tuple[int, int] | None, settings: Settings) -> np.ndarray | Dropped:
    """Return the pixels as `decode` does, or why the sample is left out for them."""
    try:
        pixels = decode(checked.encoded, checked.image, least)
    except BadImageError as error:
        return Dropped(str(error), checked.key, checked.measured)
    if not settings.single_colour and is_one_colour(pixels):
        return Dropped("single_colour", checked.key, checked.measured, pixels)
    return pixels


def _captions(columns: dict[str, Any], settings: Settings) -> tuple[dict[str, str], bool]:
    """Return every caption, and whether one was missing: it takes the first that is not."""
    found = {name: _text(lookup(columns, column), column) for name, column in settings.captions.items()}
    there = [text for text in found.values() if text]
    if found and not there:
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
    if settings.captions and (shortest < low or (high is not None and longest > high)):
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


def is_one_colour(pixels: np.ndarray, tolerance: int = 2) -> bool:
    """Return whether every channel stays within `tolerance` of 255."""

    def spread(part: np.ndarray) -> int:
        return int(np.ptp(part.reshape(-1, 3), axis=0).max())

    return spread(pixels[::16, ::16]) <= tolerance and spread(pixels) <= tolerance  # a few pixels tell most images


# Which samples are duplicates: a first pass hashes them, and `outcome.decide` decides. Only samples that pass every other check
# compete, so that a duplicate is never left out in favour of one that is left out itself.


def _hash(record: Record, settings: Settings) -> tuple[bool, bytes, int]:
    """Return 128 bits of the bytes' SHA-256, and imagehash's phash of the pixels, if it is asked for."""
    checked = check(record, settings)
    if isinstance(checked, Dropped):
        return False, b"", 0
    pixels = _decode(checked, (2 * HASHED_SIDE, 2 * HASHED_SIDE), settings)
    if isinstance(pixels, Dropped):
        return False, b"", 0
    perceptual = 0
    if settings.duplicates == "perceptual":
        import imagehash  # slow to import

        bits = imagehash.phash(Image.fromarray(pixels)).hash.ravel()
        perceptual = int(np.packbits(bits).view(">u8")[0])
    return True, hashlib.sha256(checked.encoded).digest()[:16], perceptual
