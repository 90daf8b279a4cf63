"""Counts over a split: buckets from its indexes, columns from its samples one by one. No image is decoded or even read."""

import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prx_composer.commands.data.split import Split
from prx_composer.common.errors import UserError
from prx_composer.data.contents import LeftOut, SkipList, digests_of, key_hashes, said_of_skipped
from prx_composer.data.format import ENCODED, IMAGE, Bucket, open_local
from prx_composer.data.storage import RawShard, encodings_of, is_remote, join
from prx_composer.models.caption_format import format_of, formatted
from prx_composer.models.prompts import unknown_id

SHARES = {"5%": 0.05, "median": 0.5, "95%": 0.95}
TOGETHER = 256  # captions that are tokenised at a time


def statistics(
    split: Split,
    samples: int | None = None,
    batch_sizes: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = 0,
    skip: str | None = None,
) -> dict[str, Any]:
    """Return what a split holds, as JSON stores it.

    Args:
        samples: look at no more than about so many, evenly spaced; of an object store, whole shards, evenly spaced.
        batch_sizes: global batches that every bucket should fill.
        tokenizer, max_tokens: with which captions are counted in tokens and cut.
        skip: file of a skip list, of which is counted what it leaves out.

    Raises:
        UserError: an index or a shard that is missing or broken, or a skip list that is.
    """
    skips = None if skip is None else SkipList.read(skip)
    total = sum(split.manifest.buckets.values())
    buckets = [_bucket(split, bucket, total) for bucket in sorted(split.manifest.buckets)]
    columns, keys = _Columns(split, tokenizer, max_tokens), {bucket: array("Q") for bucket in sorted(split.manifest.buckets)}
    columns.read |= set() if skips is None else {"key"}
    shards = [(bucket, shard) for bucket, listed in split.shards.items() for shard in listed]
    looked_at, wanted = shards, total if samples is None else min(samples, total)
    if wanted < total and is_remote(split.path):
        number = math.ceil(wanted * len(shards) / total)
        looked_at = [shards[index * len(shards) // number] for index in range(number)]
    seen = first = 0
    for bucket, shard in tqdm(looked_at, desc="Reading", unit="shard", leave=False, disable=None):
        chosen: Sequence[int] = range(int(shard["samples"]))
        first += len(chosen)
        if wanted < total and not is_remote(split.path):
            chosen = _evenly_spaced(first - len(chosen), len(chosen), total, wanted)
        seen += len(chosen)
        for row, sizes in _rows(split, bucket, shard, chosen, columns.read):
            columns.add(bucket, row, sizes, encodings_of(shard))
            if skips is not None:
                keys[bucket].extend(digests_of([row.get("key", b"").decode(errors="surrogatepass")]).tolist())
    left_out = None if skips is None else _left_out(split, skips, [np.array(some) for some in keys.values()], seen == total)
    _count_left(buckets, left_out, batch_sizes)
    stored = list(split.stored())
    for name in {column["name"] for column in stored if column.get("of_this_data")} & {*split.manifest.beside}:
        columns.add_written(name, _written(split, name, total, wanted))
    return {
        "path": split.path,
        "split": split.name,
        "samples": total,
        "skip": None if skips is None else {"path": skips.path, "listed": len(skips.keys)} | _counted(left_out),
        "image_size": split.manifest.image_size,
        "bytes": sum(bucket["bytes"] for bucket in buckets),
        "looked_at": {"samples": seen, "shards": len(looked_at), "of_shards": len(shards)},
        "batch_sizes": sorted(set(batch_sizes)),
        "buckets": buckets,
        **columns.to_json(),
        "features": _features(split),
        "stored": stored,
        "conversion": split.conversion(),
    }


def _left_out(split: Split, skip: SkipList, read: list[NDArray[np.uint64]], whole: bool) -> LeftOut | None:
    """Return what a skip list leaves out; None if that is not known.

    Args:
        read: digests of the keys that were read. whole: whether they are all.
    """
    if whole:
        return skip.find(read)
    return None if is_remote(split.path) else skip.find(key_hashes(Path(split.folder)))


def _count_left(buckets: list[dict[str, Any]], left_out: LeftOut | None, batch_sizes: Sequence[int]) -> None:
    """Note in every bucket how many samples are left, and which batches these do not fill."""
    for number, bucket in enumerate(buckets):
        bucket["left"] = bucket["samples"] - (0 if left_out is None else len(left_out.places[number]))
        bucket["smaller_than"] = sorted({size for size in batch_sizes if 0 < bucket["left"] < size})


def _counted(left_out: LeftOut | None) -> dict[str, Any]:
    if left_out is None:
        return {"found": None, "unknown": None, "samples": None, "left": None, "said": None}
    unknown = len(left_out.skip.keys) - len(left_out.matched)
    ((said, _),) = said_of_skipped([left_out])
    counts = {"found": len(left_out.matched), "unknown": unknown, "samples": left_out.samples}
    return counts | {"left": left_out.of - left_out.samples, "said": said}


def _bucket(split: Split, bucket: Bucket, total: int) -> dict[str, Any]:
    shards, count = split.shards[bucket], split.manifest.buckets[bucket]
    listed = sum(int(shard["samples"]) for shard in shards)
    if listed != count:
        raise UserError(
            f"{split.folder}: the index of bucket {bucket} lists {listed:,} samples, the manifest {count:,}; copy or convert the "
            "data again."
        )
    return {
        "name": str(bucket),
        "aspect": round(bucket.width / bucket.height, 4),
        "samples": count,
        "share": count / total,
        "shards": len(shards),
        "bytes": sum(int(shard["raw_data"]["bytes"]) for shard in shards),
    }


def _evenly_spaced(first: int, count: int, total: int, samples: int) -> list[int]:
    """Return which of the samples `first` … `first + count` are among the `samples` evenly spaced ones of `total`; from 0 on."""
    start, stop = -(-first * samples // total), -(-(first + count) * samples // total)
    return [index * total // samples - first for index in range(start, stop)]


def _rows(
    split: Split, bucket: Bucket, shard: dict[str, Any], chosen: Sequence[int], columns: set[str]
) -> Iterator[tuple[dict[str, bytes], dict[str, int]]]:
    """Yield the chosen samples of a shard by column, and the sizes of all their columns."""
    if not chosen:
        return
    folder = join(split.folder, str(bucket))
    with tempfile.TemporaryDirectory(prefix="prx-look.") as cache:
        try:
            content = RawShard(folder, shard, Path(cache))
            for index in chosen:
                yield content.read(index, columns), content.sizes(index)
        except (OSError, ValueError) as error:
            name = join(folder, shard["raw_data"]["basename"])
            raise UserError(
                f"{name} cannot be read ({error}); copy or convert it again. `prx check` names every such file."
            ) from error


def _written(split: Split, column: str, total: int, wanted: int) -> Iterator[str]:
    """Yield the evenly spaced captions of a column that lies beside the shards."""
    first = 0
    for bucket in sorted(split.manifest.buckets):
        rows = open_local(Path(split.folder, ENCODED, column, IMAGE, str(bucket)))
        yield from (rows[index]["values"].decode() for index in _evenly_spaced(first, len(rows), total, wanted))
        first += len(rows)


def _features(split: Split) -> list[dict[str, Any]]:
    encodings = {bucket: encodings_of(shards[0]) for bucket, shards in split.shards.items() if shards}
    return [
        {"name": name, "channels": channels, "arrays": {str(b): kinds.get(name, "") for b, kinds in encodings.items()}}
        for name, channels in split.manifest.features.items()
    ]


class _Captions:
    """What is counted of a caption column; without a tokenizer, no tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._characters, self._tokens = Spread(), Spread()
        self._empty, self._cut, self._unknown = 0, 0, 0
        self._waiting: list[str] = []

    def add(self, text: str) -> None:
        self._characters.add(len(text))
        self._empty += not text.strip()
        if self._tokenizer is not None:
            self._waiting.append(text)
            if len(self._waiting) == TOGETHER:
                self._count_tokens(self._tokenizer)

    def _count_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens: Any = tokenizer(formatted(tokenizer, self._waiting), verbose=False) if self._waiting else {"input_ids": []}
        self._waiting = []
        for ids in tokens["input_ids"]:
            self._tokens.add(len(ids))
            self._cut += len(ids) > self._max_tokens + format_of(tokenizer).skipped
            self._unknown += ids.count(unknown_id(tokenizer))

    def to_json(self) -> dict[str, Any]:
        found = {"characters": self._characters.to_json(), "empty": self._empty}
        if self._tokenizer is None:
            return found
        self._count_tokens(self._tokenizer)
        found |= {"tokens": self._tokens.to_json(), "max_tokens": self._max_tokens, "cut": self._cut}
        return found | {"unknown": self._unknown, "tokens_together": int(self._tokens.total)}


class _Columns:
    """What is counted of the samples, column by column."""

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int):
        self._image, self._smaller = Spread(), 0
        self.captions = {name: _Captions(tokenizer, max_tokens) for name in split.manifest.captions}
        self._in_shards = [name for name in self.captions if name not in split.manifest.beside]
        self._metadata: dict[str, Spread | Distinct] = {
            name: Distinct() if kind == "str" else Spread() for name, kind in split.manifest.metadata.items()
        }
        self.read = {"width", "height", *self._in_shards, *self._metadata}

    def add(self, bucket: Bucket, row: dict[str, bytes], sizes: dict[str, int], encodings: dict[str, str]) -> None:
        self._image.add(sizes["image"])
        if "width" in row and "height" in row:
            height, width = (_number(row[side], encodings[side]) for side in ("height", "width"))
            self._smaller += height < bucket.height or width < bucket.width
        for name in self._in_shards:
            self.captions[name].add(row[name].decode(errors="replace"))
        for name, summary in self._metadata.items():
            if isinstance(summary, Distinct):
                summary.add(row[name].decode(errors="replace"))
            else:
                summary.add(_number(row[name], encodings[name]))

    def add_written(self, name: str, texts: Iterable[str]) -> None:
        """Add captions of a column that lies beside the shards."""
        for text in texts:
            self.captions[name].add(text)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": {"bytes": self._image.to_json(), "smaller_than_bucket": self._smaller},
            "captions": {name: captions.to_json() for name, captions in self.captions.items()},
            "metadata": {name: summary.to_json() for name, summary in self._metadata.items()},
        }


def _number(content: bytes, encoding: str) -> float:
    from streaming.base.format.mds.encodings import mds_decode

    if encoding.rstrip("0123456789") not in ("int", "uint", "float") and encoding not in ("str_int", "str_float"):
        return math.nan
    return float(mds_decode(encoding, content))


# ------------------------------------------- summaries of columns in bounded memory, however many values go by


class Spread:
    """Smallest, largest and mean of numbers, exactly, and their quantiles to three digits: exact for integers below 1,000."""

    def __init__(self) -> None:
        self.count, self.missing, self.total = 0, 0, 0.0
        self._low, self._high = math.inf, -math.inf
        self._rounded: Counter[float] = Counter()

    def add(self, value: float) -> None:
        """Add a value; NaN counts as missing."""
        if math.isnan(value):
            self.missing += 1
            return
        self.count += 1
        self.total += value
        self._low, self._high = min(self._low, value), max(self._high, value)
        self._rounded[float(f"{value:.3g}")] += 1

    def quantile(self, share: float) -> float:
        """Return the value that this share of the values, or more, doesn't exceed."""
        rank, below = math.ceil(share * self.count), 0
        for value in sorted(self._rounded):
            below += self._rounded[value]
            if below >= rank:
                return min(max(value, self._low), self._high)
        return math.nan

    def to_json(self) -> dict[str, Any]:
        if not self.count:
            return {"count": 0, "missing": self.missing}
        return {
            "count": self.count,
            "missing": self.missing,
            "min": _plain(self._low),
            "max": _plain(self._high),
            "mean": round(self.total / self.count, 6),
            **{name: _plain(self.quantile(share)) for name, share in SHARES.items()},
        }


class Distinct:
    """How many different texts there are, up to a limit, and which are the most frequent of those."""

    LIMIT, LETTERS, NAMED = 1000, 80, 5

    def __init__(self) -> None:
        self.missing = 0
        self._counts: Counter[str] = Counter()
        self._more = False

    def add(self, text: str) -> None:
        """Add a text; the empty one counts as missing."""
        if not text:
            self.missing += 1
            return
        text = text[: self.LETTERS]
        if text in self._counts or len(self._counts) < self.LIMIT:
            self._counts[text] += 1
        else:
            self._more = True

    def to_json(self) -> dict[str, Any]:
        most = sorted(self._counts.items(), key=lambda entry: (-entry[1], entry[0]))[: self.NAMED]
        return {"distinct": len(self._counts), "or_more": self._more, "missing": self.missing, "most": dict(most)}


def _plain(value: float) -> float | int:
    """Return 3 rather than 3.0."""
    return int(value) if math.isfinite(value) and value == int(value) else value
