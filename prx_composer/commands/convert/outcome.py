"""What came of a sample and of a whole conversion: reasons, counts of every work unit added up, the summary, and the page."""

import base64
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from prx_composer.commands.convert.records import Passed, Record, has
from prx_composer.commands.convert.settings import Settings
from prx_composer.data.decoding import IMAGE_REASONS, PIXELS_OPENED, decode, open_image, resize
from prx_composer.data.format import HELDOUT, Bucket
from prx_composer.data.storage import INDEX, RawShard, encodings_of, fetched, join

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
MAX_KEY = 1024  # characters
EXAMPLES = 5  # keys that are kept of every reason …
FILES = 100  # … and of the one that stands for a whole file
DETAIL = 600  # characters: messages of other libraries can be long
HISTOGRAMS = {  # name → width of the bins, and title
    "size": (64, "Size of the originals: √(height · width), pixels"),
    "log2_aspect": (0.25, "Aspect ratio of the originals: log₂(width / height)"),
    "caption_length": (50, "Longest caption, characters"),
}
SAMPLES = 6  # pictures of every bucket
DAMAGED = 5  # files that are named in the summary; conversion.json names more
HASHES = np.dtype([("competes", "?"), ("exact", "S16"), ("perceptual", "<u8")])  # of a record, to find duplicates
PAIRS = 1 << 22  # of hashes, compared at a time


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
    held_out: bool = False

    @property
    def place(self) -> str:
        """The folder of its shards, below that of a unit."""
        return f"{HELDOUT}/{self.bucket}" if self.held_out else str(self.bucket)


class Dropped(NamedTuple):
    """A sample that is left out, and why."""

    reason: str
    key: str
    measured: Measured
    pixels: np.ndarray | None = None  # for the report, where they were decoded anyway
    detail: str = ""  # what else is known, in words


def clean_key(key: str) -> str:
    """Return a label that every encoding can store and every terminal can show."""
    printable = "".join(character if character.isprintable() else "\ufffd" for character in key)
    return printable.encode(errors="replace").decode()[:MAX_KEY]


def encode_jpeg(pixels: np.ndarray, quality: int, chroma: str) -> bytes:
    """Encode uint8 (height, width, 3) as JPEG; `chroma` is its subsampling, such as 4:2:0."""
    pixels, subsampling = np.ascontiguousarray(pixels), chroma.replace(":", "")
    return simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling=subsampling, fastdct=False)


def thumbnail(pixels: np.ndarray, side: int = 128) -> str:
    """Return a JPEG in base64 whose longer side is `side`."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    small = Bucket(max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
    return base64.b64encode(encode_jpeg(resize(pixels, small), 80, "4:2:0")).decode()


class Tally:
    """Counts of one work unit or of several, as JSON stores them.

    Args:
        content: counts to go on from.
    """

    def __init__(self, content: dict[str, Any] | None = None):
        content = content or {}
        self.counts = Counter[str](content.get("counts", {}))
        self.dropped = Counter[str](content.get("dropped", {}))
        self.buckets = Counter[str](content.get("buckets", {}))
        self.heldout = Counter[str](content.get("heldout", {}))  # buckets of what is held out, which is not in the others
        self.images = Counter[str](content.get("images", {}))  # records by the column that their image came from
        self.columns = Counter[str](content.get("columns", {}))  # records that have a column, be it empty
        self.passed = Passed(content.get("passed", {}))
        self.histograms = {name: Counter[str](content.get("histograms", {}).get(name, {})) for name in HISTOGRAMS}
        self.examples: dict[str, list[str]] = {reason: list(keys) for reason, keys in content.get("examples", {}).items()}

    def see(self, record: Record, asked: Iterable[str]) -> None:
        """Count the columns of a record, those that the settings name; a record of none is not counted."""
        if record.columns:
            self.counts["with_columns"] += 1
            self.columns.update(name for name in asked if has(record.columns, name))
        if record.image is not None and record.image_column:
            self.images[record.image_column] += 1

    def add(self, outcome: Kept | Dropped) -> None:
        """Count what came of a record."""
        height, width, length = outcome.measured
        self.counts["read"] += 1
        values = {"caption_length": length} if length else {}
        if height and width:
            values |= {"size": math.sqrt(height * width), "log2_aspect": math.log2(width / height)}
        for name, value in values.items():
            self.histograms[name][str(math.floor(value / HISTOGRAMS[name][0]))] += 1
        if isinstance(outcome, Dropped):
            self.dropped[outcome.reason] += 1
            detail = f": {clean_key(outcome.detail)[:DETAIL]}" if outcome.detail else ""
            self._example(outcome.reason, outcome.key + detail)
            return
        self.counts["kept"] += 1
        self.counts["original_bytes"] += outcome.original
        self.counts["enlarged"] += height < outcome.bucket.height or width < outcome.bucket.width
        self.counts["captions_filled"] += outcome.filled
        (self.heldout if outcome.held_out else self.buckets)[str(outcome.bucket)] += 1

    def _example(self, reason: str, said: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < (FILES if reason == "damaged_input" else EXAMPLES):
            examples.append(said)

    def include(self, other: "Tally") -> None:
        """Add what another unit counted."""
        self.counts += other.counts
        self.dropped += other.dropped
        self.buckets += other.buckets
        self.heldout += other.heldout
        self.images += other.images
        self.columns += other.columns
        for kind, (count, example) in other.passed.items():
            self.passed.add(kind, example, count)
        for name, histogram in other.histograms.items():
            self.histograms[name] += histogram
        for reason, examples in other.examples.items():
            for said in examples:
                self._example(reason, said)

    def check(self) -> None:
        """Raise RuntimeError unless every record that was read is either kept, in one bucket, or left out for a reason."""
        read, kept, dropped = self.counts["read"], self.counts["kept"], self.dropped.total()
        stored = self.buckets.total() + self.heldout.total()
        if read != kept + dropped or kept != stored:
            raise RuntimeError(
                f"{read} records were read, {kept} kept, {dropped} left out, and {stored} lie in buckets. "
                "These don't add up, which is a fault of prx data convert; nothing was put in place."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the counts as `Tally(content)` takes them."""
        return vars(self)


def as_text(statistics: dict[str, Any]) -> str:
    """Return what came of it, a line each: what is kept, and every reason for which something is not."""
    counts = statistics["counts"]
    kept, original = counts["kept"], counts.get("original_bytes", 0)
    lines = [f"{kept} of {counts['read']} samples in {len(statistics['buckets'])} buckets, {original} with their original bytes."]
    if counts.get("enlarged"):
        lines.append(f"{counts['enlarged']} smaller than their bucket")
    if counts.get("captions_filled"):
        lines.append(f"{counts['captions_filled']} with a caption in place of a missing one")
    files, columns, notes = files_text(statistics), columns_text(statistics), statistics.get("notes", [])
    return "\n".join([*files, *lines, *heldout_text(statistics), *left_out_text(statistics), *columns, *notes])


def heldout_text(statistics: dict[str, Any]) -> list[str]:
    """Say how many samples are held out, or that none is; nothing if none was asked for."""
    share, kept = statistics["settings"].get("heldout"), statistics["counts"].get("kept", 0)
    if share is None:
        return []
    held, expected = sum(statistics["heldout"].values()), f"--heldout {share:g} of {kept} is {share * kept:.3g} on average"
    if not held:
        return [f"None is held out, and there is no split {HELDOUT}: {expected}. Give a larger share, or more images."]
    return [f"{held} of them ({held / kept:.2%}) are held out in the split {HELDOUT}: {expected}, the bytes of an image decide."]


def files_text(statistics: dict[str, Any]) -> list[str]:
    """Say how many files were read, and what is in them and is no sample."""
    lines = []
    if files := statistics.get("input"):
        read = f"{files['read']} of {files['found']} files of the input were read."
        lines.append(" ".join([read, *_listed(files["passed"], "Passed over")]))
    return lines + _listed(statistics.get("passed", {}), "Passed over in them")


def _listed(passed: dict[str, list[Any]], what: str) -> list[str]:
    some = [f"{count} {kind} (such as {example})" for kind, (count, example) in sorted(passed.items())]
    return [f"{what}: {'; '.join(some)}."] if some else []


def columns_text(statistics: dict[str, Any]) -> list[str]:
    """Say from which column images were taken, and how many records had the others."""
    images, columns = statistics.get("images", {}), statistics.get("columns", {})
    records = statistics["counts"].get("read", 0)
    taken = [f"images from {name}{f' ({count})' if len(images) > 1 else ''}" for name, count in sorted(images.items())]
    taken += [f"{column} in {columns.get(column, 0)} of {records} records" for column in statistics.get("asked", [])]
    return [f"Columns taken: {'; '.join(taken)}."] if taken else []


def left_out_text(statistics: dict[str, Any]) -> list[str]:
    """Say every reason with its count, what it means, and an example; of damaged files, several."""
    lines = []
    for reason, count in sorted(statistics["dropped"].items(), key=lambda item: -item[1]):
        shown = statistics["examples"][reason][: DAMAGED if reason == "damaged_input" else 1]
        lines.append(f"{count} left out: {reason} ({REASONS[reason]}), such as {'; '.join(shown)}")
    return lines


def write_report(statistics: dict[str, Any], output: str, path: str) -> None:
    """Write the page of a finished conversion.

    Args:
        statistics: what `run_conversion` returned.
        output: folder of the data set, from which the pictures of its buckets are read.
        path: file to write.
    """
    from prx_composer.common.pages import render  # imports torch, which `prx --help` must not

    buckets = []
    for bucket, count in sorted((Bucket.parse(name), count) for name, count in statistics["buckets"].items()):
        aspect, share = bucket.width / bucket.height, 100 * count / sum(statistics["buckets"].values())
        samples = _samples(join(output, statistics["settings"]["split"], str(bucket)))
        buckets.append({"name": str(bucket), "aspect": aspect, "count": count, "share": share, "samples": samples})
    page = render(
        "prx_composer.commands.convert",
        "report.html",
        **statistics,
        account=[*heldout_text(statistics), *files_text(statistics), *columns_text(statistics), *statistics.get("notes", [])],
        sizes=buckets,
        reasons=sorted(statistics["dropped"].items(), key=lambda item: (-item[1], item[0])),
        meanings=REASONS,
        plots=[(title, _histogram(statistics["histograms"][name], width)) for name, (width, title) in HISTOGRAMS.items()],
    )
    Path(path).write_text(page, encoding="utf-8")


def _histogram(bins: dict[str, int], width: float) -> str:
    """Draw a histogram: a PNG as base64."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 2.4), layout="constrained")
    axes = figure.subplots()
    edges = [int(number) * width for number in bins]
    axes.bar(edges, list(bins.values()), width=width, align="edge", color="#4878a8", edgecolor="white", linewidth=0.3)
    axes.set_ylabel("samples")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def _samples(folder: str) -> list[tuple[str, str]]:
    """Return small pictures of a bucket's first samples, with their first caption."""
    found = []
    with tempfile.TemporaryDirectory(prefix="prx-convert.") as cache, fetched(join(folder, INDEX)) as index:
        shard = json.loads(index.read_text())["shards"][0]
        rows = RawShard(folder, shard, Path(cache), follow_links=True)
        captions = [name for name, kind in encodings_of(shard).items() if kind == "str" and name != "key"]
        for number in range(min(SAMPLES, len(rows))):
            row = rows.read(number)
            decoded = decode(row["image"], open_image(row["image"], PIXELS_OPENED))
            found.append((thumbnail(decoded), row[captions[0]].decode() if captions else ""))
    return found


# Which samples are duplicates is decided in one place, in the order of the input: here, since the process that leads does it, and
# imports nothing heavy.


def decide(stored: list[bytes], settings: Settings) -> list[dict[int, str]]:
    """Return per unit: number of a record → reason, of those that are left out. The first of any group stays.

    Args:
        stored: hashes of every unit, as `hash_unit` stored them.
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
