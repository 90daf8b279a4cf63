"""What came of a conversion: counts, made per work unit and added up over all; the summary; the page with pictures."""

import base64
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prx_composer.commands.convert.input_files import Passed
from prx_composer.commands.convert.records import Record, has
from prx_composer.commands.convert.sample import REASONS, Dropped, Kept, Measured, clean_key, thumbnail
from prx_composer.common.pages import render
from prx_composer.data.decoding import PIXELS_OPENED, decode, open_image
from prx_composer.data.format import Bucket
from prx_composer.data.storage import RawShard, encodings_of, fetched, join

EXAMPLES = 5  # keys that are kept of every reason …
FILES = 100  # … and of the one that stands for a whole file
DETAIL = 600  # characters: messages of other libraries can be long
HISTOGRAMS = {"size": 64, "log2_aspect": 0.25, "caption_length": 50}  # widths of their bins
TITLES = {
    "size": "Size of the originals: √(height · width), pixels",
    "log2_aspect": "Aspect ratio of the originals: log₂(width / height)",
    "caption_length": "Longest caption, characters",
}
SAMPLES = 6  # pictures of every bucket
DAMAGED = 5  # files that are named in the summary; conversion.json names more


class Tally:
    """Counts as JSON stores them.

    Args:
        content: counts to go on from.
    """

    def __init__(self, content: dict[str, Any] | None = None):
        content = content or {}
        self.counts = Counter[str](content.get("counts", {}))
        self.dropped = Counter[str](content.get("dropped", {}))
        self.buckets = Counter[str](content.get("buckets", {}))
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
        self.counts["read"] += 1
        self._measure(outcome.measured)
        if isinstance(outcome, Dropped):
            self.dropped[outcome.reason] += 1
            self._example(outcome.reason, outcome.key, outcome.detail)
            return
        height, width, _ = outcome.measured
        self.counts["kept"] += 1
        self.counts["original_bytes"] += outcome.original
        self.counts["enlarged"] += height < outcome.bucket.height or width < outcome.bucket.width
        self.counts["captions_filled"] += outcome.filled
        self.buckets[str(outcome.bucket)] += 1

    def _measure(self, measured: Measured) -> None:
        height, width, length = measured
        values = {"caption_length": length} if length else {}
        if height and width:
            values |= {"size": math.sqrt(height * width), "log2_aspect": math.log2(width / height)}
        for name, value in values.items():
            self.histograms[name][str(math.floor(value / HISTOGRAMS[name]))] += 1

    def _example(self, reason: str, key: str, detail: str = "") -> None:
        keys = self.examples.setdefault(reason, [])
        if len(keys) < (FILES if reason == "damaged_input" else EXAMPLES):
            keys.append(f"{key}: {clean_key(detail)[:DETAIL]}" if detail else key)

    def include(self, other: "Tally") -> None:
        """Add what another unit counted."""
        self.counts += other.counts
        self.dropped += other.dropped
        self.buckets += other.buckets
        self.images += other.images
        self.columns += other.columns
        for kind, (count, example) in other.passed.items():
            self.passed.add(kind, example, count)
        for name, histogram in other.histograms.items():
            self.histograms[name] += histogram
        for reason, keys in other.examples.items():
            for key in keys:
                self._example(reason, key)

    def check(self) -> None:
        """Raise RuntimeError unless every record that was read is either kept, in one bucket, or left out for a reason."""
        read, kept, dropped = self.counts["read"], self.counts["kept"], self.dropped.total()
        if read != kept + dropped or kept != self.buckets.total():
            raise RuntimeError(
                f"{read} records were read, {kept} kept, {dropped} left out, and {self.buckets.total()} lie in buckets. "
                "These don't add up, which is a fault of prx data convert; nothing was put in place."
            )

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"counts": dict(self.counts), "dropped": dict(self.dropped), "buckets": dict(self.buckets)}
        content |= {"images": dict(self.images), "columns": dict(self.columns)}
        content["passed"] = dict(self.passed)
        return content | {"histograms": {n: dict(h) for n, h in self.histograms.items()}, "examples": self.examples}


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
    return "\n".join([*files, *lines, *left_out_text(statistics), *columns, *notes])


def files_text(statistics: dict[str, Any]) -> list[str]:
    """Say how many files were read, and what is in them and is no sample."""
    lines = []
    if files := statistics.get("input"):
        lines.append(
            f"{files['read']} of {files['found']} files of the input were read.{_listed(files['passed'], 'Passed over')}"
        )
    if passed := statistics.get("passed"):
        lines.append(_listed(passed, "Passed over in them").strip())
    return lines


def _listed(passed: dict[str, list[Any]], what: str) -> str:
    some = [f"{count} {kind} (such as {example})" for kind, (count, example) in sorted(passed.items())]
    return f" {what}: {'; '.join(some)}." if some else ""


def columns_text(statistics: dict[str, Any]) -> list[str]:
    """Say from which column images were taken, and how many records had the others."""
    images, columns = statistics.get("images", {}), statistics.get("columns", {})
    records = statistics["counts"].get("read", 0)
    taken = [f"{column} in {columns.get(column, 0)} of {records} records" for column in statistics.get("asked", [])]
    many = len(images) > 1
    taken[:0] = [f"images from {name}{f' ({count})' if many else ''}" for name, count in sorted(images.items())]
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
        statistics: what `job.convert` returned.
        output: folder of the data set, from which the pictures of its buckets are read.
        path: file to write.
    """
    split = statistics["settings"]["split"]
    counts, dropped = statistics["counts"], statistics["dropped"]
    buckets = []
    for name, count in sorted(statistics["buckets"].items(), key=lambda item: Bucket.parse(item[0])):
        bucket = Bucket.parse(name)
        share = 100 * count / counts["kept"]
        samples = _samples(join(output, split, name))
        buckets.append({"name": name, "aspect": bucket.width / bucket.height, "count": count, "share": share, "samples": samples})
    reasons = [
        {
            "name": reason,
            "count": count,
            "meaning": REASONS[reason],
            "examples": statistics["examples"].get(reason, []),
            "pictures": statistics["pictures"].get(reason, []),
        }
        for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    ]
    plots = [(TITLES[name], _histogram(statistics["histograms"][name], width)) for name, width in HISTOGRAMS.items()]
    settings = statistics["settings"]
    page = render(
        "prx_composer.commands.convert",
        "report.html",
        settings=settings,
        account=[*files_text(statistics), *columns_text(statistics), *statistics.get("notes", [])],
        counts=counts,
        buckets=buckets,
        reasons=reasons,
        plots=plots,
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
    """Return small pictures of a bucket's first samples, as base64, with their first caption."""
    found = []
    with tempfile.TemporaryDirectory(prefix="prx-convert.") as cache, fetched(join(folder, "index.json")) as index:
        shard = json.loads(index.read_text())["shards"][0]
        rows = RawShard(folder, shard, Path(cache), follow_links=True)
        captions = [name for name, kind in encodings_of(shard).items() if kind == "str" and name != "key"]
        for number in range(min(SAMPLES, len(rows))):
            row = rows.read(number)
            decoded = decode(row["image"], open_image(row["image"], PIXELS_OPENED))
            caption = row[captions[0]].decode() if captions else ""
            found.append((base64.b64encode(thumbnail(decoded)).decode(), caption))
    return found
