"""What a data set is on disk: one MDS folder per aspect-ratio bucket, and a manifest that names them.

    <path>/<split>/manifest.json            {"version": 1, "image_size": 512, "captions": […], "buckets": {"512x512": 8000, …}}
    <path>/<split>/512x512/index.json …     MDS shards (mosaicml-streaming); bucket names are height x width at `image_size`

Columns: `image` (the encoded file), `width`, `height` (of that file), `key` (where it came from), one `str` per caption, and
perhaps features: arrays (h, w, channels) made of the image as it is cropped to its bucket. The manifest names them: `"features":
{"dinov3": 1024}`, column and channels. Further columns it names under `"metadata"`: `{"score": "float64"}`. Under `"attribution"`
it says whose work the images are, where their source knows: `{"openmoji": {"author": …, "licence": …}}`.
"""

import json
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import inside
from prx_composer.data.buckets import Bucket
from prx_composer.data.storage import fetch, is_remote, join

if TYPE_CHECKING:
    from streaming import LocalDataset, MDSWriter
    from streaming.base.format import Reader

MANIFEST = "manifest.json"
COLUMNS = {"image": "bytes", "width": "int", "height": "int", "key": "str"}
RESERVED = frozenset({*COLUMNS, "input_ids", "attention_mask", "sample_id"})  # of a sample or a batch


class RawSample(NamedTuple):
    """One image as it came, with its captions and features by column name."""

    image: bytes
    width: int
    height: int
    captions: dict[str, str]
    key: str
    features: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass(frozen=True)
class Manifest:
    """What a split holds."""

    image_size: int
    captions: tuple[str, ...]
    buckets: dict[Bucket, int]
    features: dict[str, int] = field(default_factory=dict)  # column → channels
    metadata: dict[str, str] = field(default_factory=dict)  # column → MDS encoding
    attribution: dict[str, dict[str, str]] = field(default_factory=dict)  # part of the data → author, licence …

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a split's manifest. Raise FileNotFoundError if there is none, ValueError if it is empty or newer than us."""
        raw = json.loads((folder / MANIFEST).read_text())
        if raw.get("version") != 1:
            raise ValueError(f"{folder / MANIFEST} has version {raw.get('version')}; this package reads version 1.")
        buckets = {Bucket.parse(name): int(count) for name, count in raw["buckets"].items() if count}
        if not buckets:
            raise ValueError(f"{folder} holds no samples.")
        known = {name: raw.get(name, {}) for name in ("features", "metadata", "attribution")}
        return cls(int(raw["image_size"]), tuple(raw["captions"]), buckets, **known)

    def to_json(self) -> str:
        names = {str(bucket): count for bucket, count in sorted(self.buckets.items())}
        content = {"version": 1, "image_size": self.image_size, "captions": self.captions, "buckets": names}
        if self.features:
            content["features"] = self.features
        if self.metadata:
            content["metadata"] = self.metadata
        if self.attribution:
            content["attribution"] = self.attribution
        return json.dumps(content, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(self.to_json())


class BucketWriter:
    """Write samples into one MDS folder per bucket; the split appears under its name only when it is complete.

    Args:
        folder: the split's folder; it must not exist yet.
        image_size: side of the square whose area every bucket has.
        captions: caption columns; every sample must have all of them.
        features: feature columns and their channels, likewise. Within a bucket they have one shape and dtype.
        attribution: whose work the images are; see `Manifest`.

    Raises:
        ValueError: a feature column whose name is taken; on writing, features of another shape.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int,
        captions: tuple[str, ...],
        features: dict[str, int] | None = None,
        attribution: dict[str, dict[str, str]] | None = None,
    ):
        if taken := (features or {}).keys() & {*RESERVED, *captions}:
            raise ValueError(f"features: {min(taken)!r} is the name of another column.")
        self._folder, self._partial = folder, folder.with_name(f".{folder.name}.partial")
        self._image_size, self._captions, self._features = image_size, captions, features or {}
        self._attribution = attribution or {}
        self._writers: dict[Bucket, MDSWriter] = {}
        self._counts: dict[Bucket, int] = {}

    def __enter__(self) -> "BucketWriter":
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self

    def write(self, bucket: Bucket, sample: RawSample) -> None:
        features = {name: sample.features[name] for name in self._features}
        for name, array in features.items():
            if array.ndim != 3 or array.shape[-1] != self._features[name]:
                raise ValueError(f"{sample.key}: {name} must be (h, w, {self._features[name]}), not {array.shape}.")
        if bucket not in self._writers:
            from streaming import MDSWriter  # slow to import, and not needed to read a manifest

            columns = COLUMNS | dict.fromkeys(self._captions, "str")
            for name, array in features.items():
                columns[name] = f"ndarray:{array.dtype}:{','.join(map(str, array.shape))}"
            self._writers[bucket] = MDSWriter(out=str(self._partial / str(bucket)), columns=columns)
        row = {"image": sample.image, "width": sample.width, "height": sample.height, "key": sample.key}
        self._writers[bucket].write(row | {name: sample.captions[name] for name in self._captions} | features)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.finish()
        if kind is None:
            manifest = Manifest(self._image_size, self._captions, self._counts, self._features, {}, self._attribution)
            manifest.write(self._partial)
            self._partial.rename(self._folder)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def iterate_captions(folder: Path, column: str) -> Iterator[str]:
    """Yield the captions of a local split, in order, without decoding an image."""
    for bucket in Manifest.read(folder).buckets:
        dataset = open_local(folder / str(bucket))
        for index in range(len(dataset)):
            yield dataset[index][column]


# MDS shards read column by column, as mosaicml-streaming's MDSReader reads them: nothing is decoded, so nothing executes, and a
# column that isn't asked for isn't read.


def open_local(folder: Path) -> "LocalDataset":
    """Return the rows of a local MDS folder. Reading them executes nothing, whatever its index says.

    Raises:
        UserError: as `check_shards`.
    """
    from streaming import LocalDataset  # slow to import

    dataset = LocalDataset(str(folder))
    check_shards(folder, dataset.shards)
    return dataset


def check_shards(folder: Path, shards: "Iterable[Reader]") -> None:
    """Raise UserError for a column of pickles, which would be executed, and for a file that lies outside of the folder."""
    for shard in shards:
        try:
            shard.validate(allow_unsafe_types=False)
        except ValueError as error:
            raise UserError(
                f"{folder} has a column of pickled objects, which could execute code and are not read. Convert the data anew, "
                f"with text, numbers and bytes only. ({str(error).partition('. ')[0]})"
            ) from error
        with at_path(str(folder)):
            for file in (file for pair in shard.file_pairs for file in pair if file is not None):
                inside(folder, file.basename)


def encodings_of(shard: dict[str, Any]) -> dict[str, str]:
    """Return column → MDS encoding, of a shard's entry in its index."""
    return dict(zip(shard["column_names"], shard["column_encodings"], strict=True))


class LinkError(ValueError):
    """A shard that lies elsewhere."""


def _is_whole(folder: str, raw: dict[str, Any]) -> bool:
    """Return whether a compressed shard's uncompressed file lies there: a `StreamingDataset` leaves only that in its cache."""
    if is_remote(folder):
        return False
    path = Path(folder) / raw["basename"]
    return path.is_file() and path.stat().st_size == raw["bytes"]


class RawShard:
    """The samples of one shard as bytes, by column.

    Args:
        folder: of the index, local or remote.
        shard: its entry in the index.
        cache: where a remote file is downloaded to.
        follow_links: open a symbolic link that leads out of the folder.

    Raises:
        ValueError: the file ends early, or its name leads out of the folder. On reading a sample, likewise.
        OSError: it is not there.
    """

    def __init__(self, folder: str, shard: dict[str, Any], cache: Path, follow_links: bool = False):
        self._names, self._fixed = shard["column_names"], shard["column_sizes"]
        raw, zipped = shard["raw_data"], shard.get("zip_data")
        if zipped and not _is_whole(folder, raw):
            from streaming.base.compression import decompress

            path = self._fetch(folder, zipped["basename"], cache, follow_links)
            self._content = np.frombuffer(decompress(shard["compression"], path.read_bytes()), np.uint8)
        else:
            self._content = np.asarray(np.memmap(self._fetch(folder, raw["basename"], cache, follow_links), mode="r"))
        self._count = int(shard["samples"])
        if len(self._content) < 4 * (self._count + 2):
            raise ValueError(f"{self._file} ends early")
        self._offsets = self._content[4 : 4 * (self._count + 2)].view(np.uint32)

    def _fetch(self, folder: str, name: str, cache: Path, follow_links: bool) -> Path:
        self._file = name
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name} leads out of {folder}")
        path = fetch(join(folder, name), cache)
        if not is_remote(folder) and not follow_links and not path.resolve().is_relative_to(Path(folder).resolve()):
            raise LinkError(f"{name} is or passes a symbolic link that leads out of {folder}")
        return path

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        return (self.read(index) for index in range(self._count))

    def read(self, index: int, columns: Container[str] | None = None) -> dict[str, bytes]:
        """Return the columns of a sample, all unless they are named."""
        return {
            name: self._content[begin:end].tobytes()
            for name, (begin, end) in self._spans(index).items()
            if columns is None or name in columns
        }

    def sizes(self, index: int) -> dict[str, int]:
        """Return the number of bytes of every column of a sample."""
        return {name: end - begin for name, (begin, end) in self._spans(index).items()}

    def _spans(self, index: int) -> dict[str, tuple[int, int]]:
        begin, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        if not begin <= stop <= len(self._content):
            raise ValueError(f"{self._file} ends early")
        stated = [size for size in self._fixed if not size]
        position = begin + 4 * len(stated)
        if position > stop:
            raise ValueError("a sample ends early")
        sizes = iter(np.frombuffer(self._content[begin:position].tobytes(), "<u4").tolist())
        spans = {}
        for name, size in zip(self._names, self._fixed, strict=True):
            end = position + int(size or next(sizes))
            spans[name] = position, end
            position = end
        if position > stop:
            raise ValueError("a sample ends early")
        return spans
