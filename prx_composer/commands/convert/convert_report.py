"""The HTML page of a conversion: counts, histograms, buckets, and pictures of what was kept and what was not. One file."""

import base64
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from prx_composer.commands.convert import inputs
from prx_composer.commands.convert import source_columns as columns
from prx_composer.commands.convert.reasons import REASONS
from prx_composer.commands.convert.tally import HISTOGRAMS
from prx_composer.common.pages import render
from prx_composer.data.buckets import Bucket
from prx_composer.data.decoding import PIXELS_OPENED, decode, open_image
from prx_composer.data.storage import fetch, is_remote, join

TITLES = {
    "size": "Size of the originals: √(height · width), pixels",
    "log2_aspect": "Aspect ratio of the originals: log₂(width / height)",
    "caption_length": "Longest caption, characters",
}
SAMPLES = 6  # pictures of every bucket


def write_report(statistics: dict[str, Any], output: str, path: str) -> None:
    """Writes the page of a finished conversion.

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
        account=[*inputs.as_text(statistics), *columns.as_text(statistics), *statistics.get("notes", [])],
        counts=counts,
        buckets=buckets,
        reasons=reasons,
        plots=plots,
    )
    Path(path).write_text(page, encoding="utf-8")


def _histogram(bins: dict[str, int], width: float) -> str:
    """A PNG as base64."""
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
    """Small pictures of a bucket's first samples, as base64, with their first caption."""
    from streaming.base.format import reader_from_json

    from prx_composer.commands.convert import pixels

    found = []
    with tempfile.TemporaryDirectory(prefix="prx-convert.") as cache:
        index = json.loads(fetch(join(folder, "index.json"), Path(cache)).read_text())
        shard = index["shards"][0]
        path = fetch(join(folder, shard["raw_data"]["basename"]), Path(cache))
        if is_remote(folder):
            shard["raw_data"]["basename"] = path.name
        reader = reader_from_json(cache if is_remote(folder) else folder, None, shard)
        captions = [name for name, kind in zip(shard["column_names"], shard["column_encodings"], strict=True) if kind == "str"]
        for number in range(min(SAMPLES, shard["samples"])):
            row = reader[number]
            decoded = decode(row["image"], open_image(row["image"], PIXELS_OPENED))
            caption = next((row[name] for name in captions if name != "key"), "")
            found.append((base64.b64encode(pixels.thumbnail(decoded)).decode(), caption))
    return found
