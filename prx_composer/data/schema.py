"""What a data set is on disk: one MDS folder per aspect-ratio bucket, and a manifest that names them.

    <path>/<split>/manifest.json            {"version": 1, "image_size": 512, "captions": […], "buckets": {"512x512": 8000, …}}
    <path>/<split>/512x512/index.json …     MDS shards (mosaicml-streaming); bucket names are height x width at `image_size`

Columns: `image` (the encoded file), `width`, `height` (of that file), `key` (where it came from), one `str` per caption, and
perhaps features: arrays (h, w, channels) made of the image as it is cropped to its bucket. The manifest names them: `"features":
{"dinov3": 1024}`, column and channels. Further columns it names under `"metadata"`: `{"score": "float64"}`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prx_composer.data.buckets import Bucket

if TYPE_CHECKING:
    from streaming import MDSWriter


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

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises FileNotFoundError if the folder holds no data set, ValueError if the data set is empty or newer than us."""
        raw = json.loads((folder / MANIFEST).read_text())
        if raw.get("version") != 1:
            raise ValueError(f"{folder / MANIFEST} has version {raw.get('version')}; this package reads version 1.")
        buckets = {Bucket.parse(name): int(count) for name, count in raw["buckets"].items() if count}
        if not buckets:
            raise ValueError(f"{folder} holds no samples.")
        return cls(int(raw["image_size"]), tuple(raw["captions"]), buckets, raw.get("features", {}), raw.get("metadata", {}))

    def to_json(self) -> str:
        names = {str(bucket): count for bucket, count in sorted(self.buckets.items())}
        content = {"version": 1, "image_size": self.image_size, "captions": self.captions, "buckets": names}
        if self.features:
            content["features"] = self.features
        if self.metadata:
            content["metadata"] = self.metadata
        return json.dumps(content, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(self.to_json())


class BucketWriter:
    """Writes samples into one MDS folder per bucket; the split appears under its name only when it is complete.

    Args:
        folder: the split's folder; it must not exist yet.
        image_size: side of the square whose area every bucket has.
        captions: caption columns; every sample must have all of them.
        features: feature columns and their channels, likewise. Within a bucket they have one shape and dtype.

    Raises:
        ValueError: a feature column whose name is taken; on writing, features of another shape.
    """

    def __init__(self, folder: Path, image_size: int, captions: tuple[str, ...], features: dict[str, int] | None = None):
        if taken := (features or {}).keys() & {*RESERVED, *captions}:
            raise ValueError(f"features: {min(taken)!r} is the name of another column.")
        self._folder, self._partial = folder, folder.with_name(f".{folder.name}.partial")
        self._image_size, self._captions, self._features = image_size, captions, features or {}
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
            Manifest(self._image_size, self._captions, self._counts, self._features).write(self._partial)
            self._partial.rename(self._folder)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def iterate_captions(folder: Path, column: str) -> Iterator[str]:
    """The captions of a local split, in order, read without decoding an image."""
    from prx_composer.data.mds import open_local

    for bucket in Manifest.read(folder).buckets:
        dataset = open_local(folder / str(bucket))
        for index in range(len(dataset)):
            yield dataset[index][column]
