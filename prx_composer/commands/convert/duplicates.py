"""Which samples are duplicates: a first pass hashes them, one place decides, in the order of the input.

Only samples that pass every other check compete, so that a duplicate is never left out in favour of one that is left out itself.
"""

import hashlib
import io
from collections.abc import Iterable

import imagehash
import numpy as np
from PIL import Image

from prx_composer.commands.convert.records import Record
from prx_composer.commands.convert.sample import Dropped, check, is_one_colour
from prx_composer.commands.convert.settings import Settings
from prx_composer.data.decoding import BadImageError, decode

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
