"""What an engine runs on one work unit, whole or not at all: convert it, or hash it, so that duplicates are found.

A unit becomes shards, one folder for each bucket, and a result that says what is in them: a function of its input alone.
"""

import base64
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming import MDSWriter

from prx_composer.commands.convert.engine import progress
from prx_composer.commands.convert.input_files import Passed
from prx_composer.commands.convert.outcome import Tally
from prx_composer.commands.convert.output import RESULT, open_output
from prx_composer.commands.convert.records import Job, Record, Unit, open_source
from prx_composer.commands.convert.sample import Dropped, Kept, check, convert, is_one_colour, thumbnail
from prx_composer.commands.convert.settings import METADATA_TYPES, Settings
from prx_composer.common.files import sync
from prx_composer.data.decoding import BadImageError, decode, open_image
from prx_composer.data.format import COLUMNS

SHARD_BYTES = 1 << 26
BUFFERED_BYTES = 1 << 28  # over all buckets of a unit: memory does not depend on how many there are
PICTURES = 2  # of every reason for dropping, kept for the report
PICTURED_UNITS = 50  # first units, which keep them


def convert_unit(job: Job, unit: Unit, duplicates: Mapping[int, str]) -> int:
    """Write a unit's shards and make it count as done. Return the number of records read."""
    output = open_output(job.output, job.settings.split)
    with output.scratch() as folder:
        records, passed = _records(job, unit)
        result = write_unit(records, job.settings, folder, unit.number < PICTURED_UNITS, duplicates, passed)
        output.commit(unit, folder, result)
    return int(result["counts"].get("read", 0))


def hash_unit(job: Job, unit: Unit) -> int:
    """Store the hashes of a unit's records. Return their number."""
    hashes = hash_records(_records(job, unit)[0], job.settings)
    open_output(job.output, job.settings.split).put(f"hashes/{unit.name}", to_bytes(hashes))
    return len(hashes)


def _records(job: Job, unit: Unit) -> tuple[Iterator[Record], Passed]:
    """Return the unit's records, and what was seen beside them, once they are read."""
    source = open_source(job.settings)
    return _counted(itertools.islice(source.read(unit), unit.take)), source.passed


def _counted(records: Iterator[Record]) -> Iterator[Record]:
    for record in records:
        yield record
        progress.step()


class BoundedWriter(MDSWriter):
    """An MDSWriter that can be told to write what it has buffered."""

    def flush(self) -> None:
        self.flush_shard()
        self._reset_cache()


def columns_of(settings: Settings) -> dict[str, str]:
    """Return the MDS encodings of the columns that a conversion writes."""
    metadata = {name: METADATA_TYPES[kind] for name, (_, kind) in settings.metadata.items()}
    return COLUMNS | dict.fromkeys(settings.captions, "str") | metadata


def write_unit(
    records: Iterable[Record],
    settings: Settings,
    folder: Path,
    pictured: bool,
    duplicates: Mapping[int, str],
    passed: Passed,
) -> dict[str, Any]:
    """Write a unit's shards below an empty folder, bucket by bucket, and beside them RESULT, which is returned.

    Args:
        pictured: whether to keep small pictures of what was dropped.
        duplicates: number of a record in the unit → reason, of those that are duplicates.
        passed: what the source has seen beside the records, when they are read.
    """
    tally, pictures = Tally(), dict[str, list[str]]()
    writers: dict[str, BoundedWriter] = {}
    asked = settings.input_columns
    for number, record in enumerate(records):
        tally.see(record, asked)
        outcome = convert(record, settings, duplicates.get(number, ""))
        tally.add(outcome)
        if isinstance(outcome, Dropped):
            if pictured:
                _picture(pictures.setdefault(outcome.reason, []), outcome, record, settings)
            continue
        _write(writers, outcome, settings, folder)
    tally.passed, shards = passed, {}
    for bucket, writer in sorted(writers.items()):
        writer.finish()
        index = folder / bucket / "index.json"
        shards[bucket] = json.loads(index.read_text())["shards"]
        index.unlink()
        for file in sorted((folder / bucket).iterdir()):
            sync(file)
        sync(folder / bucket)
    result = tally.to_json() | {"shards": shards, "pictures": {reason: some for reason, some in pictures.items() if some}}
    path = folder / RESULT
    path.write_text(json.dumps(result))
    sync(path)
    sync(folder)
    return result


def _write(writers: dict[str, BoundedWriter], kept: Kept, settings: Settings, folder: Path) -> None:
    name = str(kept.bucket)
    if name not in writers:
        writers[name] = BoundedWriter(out=str(folder / name), columns=columns_of(settings), size_limit=SHARD_BYTES)
    writers[name].write(kept.row)
    sizes = Counter({bucket: writer.new_shard_size for bucket, writer in writers.items()})
    if sizes.total() > BUFFERED_BYTES:
        writers[sizes.most_common(1)[0][0]].flush()


def _picture(pictures: list[str], dropped: Dropped, record: Record, settings: Settings) -> None:
    if len(pictures) >= PICTURES or record.image is None:
        return
    decoded = dropped.pixels
    if decoded is None:
        try:
            decoded = decode(record.image, open_image(record.image, settings.max_pixels))
        except BadImageError:
            return
    pictures.append(base64.b64encode(thumbnail(decoded)).decode())


# Which samples are duplicates: a first pass hashes them, one place decides, in the order of the input. Only samples that pass
# every other check compete, so that a duplicate is never left out in favour of one that is left out itself.


HASHES = np.dtype([("competes", "?"), ("exact", "S16"), ("perceptual", "<u8")])
HASHED_SIDE = 64  # images are decoded at about this size, where JPEG allows it
PAIRS = 1 << 22  # compared at a time


def hash_records(records: Iterable[Record], settings: Settings) -> np.ndarray:
    """Return one HASHES per record: 128 bits of the bytes' SHA-256, and imagehash's phash of the pixels, if it is asked for."""
    return np.array([_hash(record, settings) for record in records], dtype=HASHES)


def _hash(record: Record, settings: Settings) -> tuple[bool, bytes, int]:
    checked = check(record, settings)
    if isinstance(checked, Dropped):
        return False, b"", 0
    try:
        decoded = decode(checked.encoded, checked.image, (2 * HASHED_SIDE, 2 * HASHED_SIDE))
    except BadImageError:
        return False, b"", 0
    if not settings.single_colour and is_one_colour(decoded):
        return False, b"", 0
    perceptual = 0
    if settings.duplicates == "perceptual":
        import imagehash  # slow to import

        bits = imagehash.phash(Image.fromarray(decoded)).hash.ravel()
        perceptual = int(np.packbits(bits).view(">u8")[0])
    return True, hashlib.sha256(checked.encoded).digest()[:16], perceptual


def to_bytes(hashes: np.ndarray) -> bytes:
    """Return hashes as they are stored."""
    file = io.BytesIO()
    np.save(file, hashes, allow_pickle=False)
    return file.getvalue()


def decide(stored: list[bytes], settings: Settings) -> list[dict[int, str]]:
    """Return per unit: number of a record → reason, of those that are left out. The first of any group stays.

    Args:
        stored: hashes of every unit, as `to_bytes` returned them.
    """
    hashes = [np.load(io.BytesIO(content), allow_pickle=False) for content in stored]
    joined = np.concatenate(hashes) if hashes else np.empty(0, HASHES)
    rows = np.flatnonzero(joined["competes"])
    reasons: dict[int, str] = {}
    _, first, group = np.unique(joined["exact"][rows], return_index=True, return_inverse=True)
    originals = first[group] == np.arange(len(rows))
    reasons |= dict.fromkeys(rows[~originals].tolist(), "duplicate")
    if settings.duplicates == "perceptual":
        rows = rows[originals]
        dropped = near_duplicates(joined["perceptual"][rows], settings.distance)
        reasons |= dict.fromkeys(rows[dropped].tolist(), "near_duplicate")
    ends = np.cumsum([len(part) for part in hashes])
    found: list[dict[int, str]] = [{} for _ in hashes]
    for row, reason in reasons.items():
        unit = int(np.searchsorted(ends, row, side="right"))
        found[unit][row - int(ends[unit]) + len(hashes[unit])] = reason
    return found


def near_duplicates(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Return which hashes lie within `distance` bits of an earlier one that is kept, going through them in order.

    Two hashes that differ in at most d bits agree in one of d + 1 bands of bits, so only those that share a band are compared.

    Args:
        hashes: uint64 (n,).

    Returns:
        bool (n,).
    """
    unique, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # unique hashes in the order of their first appearance
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    neighbours: dict[int, list[int]] = {}
    if distance:
        for earlier, later in _close_pairs(unique[order], distance):
            for a, b in zip(earlier.tolist(), later.tolist(), strict=True):
                neighbours.setdefault(b, []).append(a)
    dropped = np.zeros(len(unique), bool)
    for later in sorted(neighbours):
        dropped[later] = any(not dropped[earlier] for earlier in neighbours[later])
    return dropped[rank[group]] | (first[group] != np.arange(len(hashes)))


def _close_pairs(hashes: np.ndarray, distance: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs (earlier, later) of distinct hashes within the distance; a pair may come more than once."""
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = hashes >> np.uint64(low) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        ends = np.r_[starts[1:], len(ordered)]
        remaining = np.repeat(ends, ends - starts) - np.arange(len(ordered)) - 1  # partners that come later in the band
        begin = 0
        while begin < len(ordered):
            stop = max(begin + 1, begin + int(np.searchsorted(np.cumsum(remaining[begin:]), PAIRS, side="right")))
            counts = remaining[begin:stop]
            left = np.repeat(np.arange(begin, stop), counts)
            right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
            a, b = order[left], order[right]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            yield np.minimum(a, b)[close], np.maximum(a, b)[close]
            begin = stop
