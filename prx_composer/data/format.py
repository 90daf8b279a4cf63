"""What a data set is on disk: one MDS folder per aspect-ratio bucket, and a manifest that names them.

Images of a bucket have one size, and those of all buckets (nearly) equal area, so that every batch costs the same.

    <path>/<split>/manifest.json            {"version": 1, "image_size": 512, "captions": […], "buckets": {"512x512": 8000, …}}
    <path>/<split>/keys.npz                 once a skip list was used: digests of all keys, see contents.py
    <path>/<split>/512x512/index.json …     MDS shards (mosaicml-streaming); bucket names are height x width at `image_size`
    <path>/<split>/encoded/<name>/…         what was computed of them: see stored.py; among it, captions

Columns: `image` (the encoded file), `width`, `height` (of that file), `key` (where it came from), one `str` per caption, and
perhaps features: arrays (h, w, channels) made of the image as it is cropped to its bucket. The manifest names them: `"features":
{"dinov3": 1024}`, column and channels. Further columns it names under `"metadata"`: `{"score": "float64"}`. Under `"attribution"`
it says whose work the images are, where their source knows: `{"openmoji": {"author": …, "licence": …}}`.
"""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prx_composer.common.errors import UserError, at_path, first
from prx_composer.common.files import inside

if TYPE_CHECKING:
    from streaming import LocalDataset, MDSWriter
    from streaming.base.format import Reader

MANIFEST = "manifest.json"
HELDOUT = "heldout"  # the split that is kept out of training
ENCODED, IMAGE, CAPTIONS = "encoded", "image", "captions"  # folder of what is computed, what it is made of, and one kind of it
COLUMNS = {"image": "bytes", "width": "int", "height": "int", "key": "str"}
RESERVED = frozenset({*COLUMNS, "input_ids", "attention_mask", "sample_id"})  # of a sample or a batch
NOTICED = 0.15  # share of an image's area that is more than the rounding of a bucket's sides
_LOOKED_AT = 500  # shapes of images with which other settings are tried
Shapes = Mapping[tuple[int, int], int]  # height and width → images


class Bucket(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """Return the bucket of a name, such as "512x512" → Bucket(512, 512)."""
        height, width = name.split("x")
        return cls(int(height), int(width))

    def at(self, image_size: int, base_size: int, multiple: int) -> "Bucket":
        """Return the same aspect ratio at another image size, both sides rounded to multiples of `multiple`."""
        if image_size == base_size:
            return self
        scale = image_size / base_size
        sides = (max(multiple, round(side * scale / multiple) * multiple) for side in self)
        return Bucket(*sides)


def make_buckets(image_size: int, multiple: int, max_aspect: float = 2.0) -> list[Bucket]:
    """Return buckets around `image_size`², sides multiples of `multiple`, aspect ratios from 1/max_aspect to max_aspect.

    Raises:
        ValueError: `image_size` is not a multiple of `multiple`, both from 1 on, or `max_aspect` is below 1.
    """
    if min(image_size, multiple, max_aspect) < 1 or image_size % multiple:
        raise ValueError(f"image_size {image_size} must be a multiple of {multiple}, and max_aspect {max_aspect:g} at least 1.")
    buckets = set()
    for height in range(multiple, int(image_size * math.sqrt(max_aspect)) + multiple, multiple):
        width = round(image_size**2 / height / multiple) * multiple
        if width > 0 and 1 / max_aspect <= width / height <= max_aspect:
            buckets.add(Bucket(height, width))
    return sorted(buckets)


def assign_bucket(height: int, width: int, buckets: list[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest on a log scale: the one that crops least."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - math.log(width / height)))


def is_held_out(encoded: bytes, share: float) -> bool:
    """Return whether an image belongs to a held-out share: the first 64 bits of its file's SHA-256 lie in the lowest `share`.

    The bytes alone decide, not the pixels: they say the same with any version of any decoder, can be looked up with `sha256sum`,
    and files with the same bytes are never on both sides. What a smaller share holds out, a larger one does, too.

    Args:
        encoded: the whole file, as it came.
        share: in (0, 1).
    """
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8]) < share * 2**64


@dataclass(frozen=True)
class BucketSettings:
    """The settings that decide the buckets, as the arguments of `FolderSource`."""

    image_size: int
    multiple: int
    max_aspect: float
    min_bucket: int

    def buckets(self, shapes: Shapes) -> list[Bucket]:
        """Return those that enough images go to, of as many as there may be."""
        candidates = make_buckets(self.image_size, self.multiple, self.max_aspect)
        sizes: Counter[Bucket] = Counter()
        for (height, width), count in shapes.items():
            sizes[assign_bucket(height, width, candidates)] += count
        fewest = min(self.min_bucket, max(sizes.values()))
        return sorted(bucket for bucket, count in sizes.items() if count >= fewest)

    def cropped(self, shapes: Shapes) -> Counter[float]:
        """Return share of the area that is lost → images, of those that lose much."""
        buckets, lost = self.buckets(shapes), Counter[float]()
        for (height, width), count in shapes.items():
            share = share_cropped(height, width, assign_bucket(height, width, buckets))
            if share > NOTICED:
                lost[share] += count
        return lost


def share_cropped(height: int, width: int, bucket: Bucket) -> float:
    """Return the share of an image's area that lies outside when it is scaled to cover a bucket."""
    ratio = (width / height) / (bucket.width / bucket.height)
    return 1 - min(ratio, 1 / ratio)


def cropping_note(shapes: Shapes, settings: BucketSettings) -> str | None:
    """Say how many images lose how much of their area, why, and what to set; None if hardly any is lost."""
    buckets, lost = settings.buckets(shapes), settings.cropped(shapes)
    if not lost:
        return None
    total, images = sum(shapes.values()), lost.total()
    mean, most = sum(share * count for share, count in lost.items()) / images, max(lost)
    remedy = _advice(list(_remedies(dict(Counter(shapes).most_common(_LOOKED_AT)), settings)))
    return (
        f"{images:,} of {total:,} images are cropped by more than {NOTICED:.0%} of their area, by {mean:.0%} on average and "
        f"{most:.0%} at most: with multiple: {settings.multiple} at image_size {settings.image_size} there is "
        f"{first(buckets, 4)}. {remedy}"
    )


def _remedies(shapes: Shapes, settings: BucketSettings) -> Iterator[str]:
    """Yield the smallest change of each kind that leaves at most half of the images cropped."""
    much = settings.cropped(shapes).total()
    longest = math.ceil(10 * max(max(height / width, width / height) for height, width in shapes)) / 10
    kinds = [
        [{"multiple": settings.multiple // factor} for factor in (2, 4, 8) if settings.multiple % factor == 0],
        [{"image_size": settings.image_size * factor} for factor in (2, 4)],
        [{"max_aspect": longest}] if longest > settings.max_aspect else [],
    ]

    def keeps(change: dict[str, Any]) -> bool:
        return 2 * replace(settings, **change).cropped(shapes).total() <= much

    rare = settings.min_bucket > 1 and keeps({"min_bucket": 1})
    if rare:
        yield "min_bucket: 1"
    both = [{}] if rare or settings.min_bucket == 1 else [{}, {"min_bucket": 1}]
    for kind in kinds:
        change = next((change | more for more in both for change in kind if keeps(change | more)), None)
        if change is not None:
            yield " with ".join(f"{name}: {value:g}" for name, value in change.items())


def _advice(remedies: list[str]) -> str:
    if not remedies:
        return "See multiple, image_size, max_aspect and min_bucket."
    of = (
        " (multiple must stay one of model.backbone.patch_size × autoencoder downsampling)" if "multiple" in str(remedies) else ""
    )
    return f"This would keep more of them: {'; or '.join(remedies)}{of}."


# ----------------------------------------------------------------------------------------------------------- a split


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
    """What a split holds.

    Args:
        captions: columns, those in the shards first. beside: which of them `prx data caption` has written beside the shards.
    """

    image_size: int
    captions: tuple[str, ...]
    buckets: dict[Bucket, int]
    features: dict[str, int] = field(default_factory=dict)  # column → channels
    metadata: dict[str, str] = field(default_factory=dict)  # column → MDS encoding
    attribution: dict[str, dict[str, str]] = field(default_factory=dict)  # part of the data → author, licence …
    beside: tuple[str, ...] = ()

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
        beside = tuple(name for name in _captions_beside(folder) if name not in raw["captions"])
        return cls(int(raw["image_size"]), (*raw["captions"], *beside), buckets, **known, beside=beside)

    def to_json(self) -> str:
        names = {str(bucket): count for bucket, count in sorted(self.buckets.items())}
        captions = [name for name in self.captions if name not in self.beside]
        content = {"version": 1, "image_size": self.image_size, "captions": captions, "buckets": names}
        if self.features:
            content["features"] = self.features
        if self.metadata:
            content["metadata"] = self.metadata
        if self.attribution:
            content["attribution"] = self.attribution
        return json.dumps(content, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(self.to_json())


def _captions_beside(split: Path) -> list[str]:
    """Return the caption columns that lie beside a split's shards, the finished ones."""
    manifests = sorted(split.glob(f"{ENCODED}/*/{IMAGE}/{MANIFEST}"))
    return [file.parents[1].name for file in manifests if json.loads(file.read_text()).get("kind") == CAPTIONS]


class BucketWriter:
    """Write samples into one MDS folder per bucket; the split appears under its name only when it is complete.

    Args:
        folder: the split's folder; it must not exist yet.
        image_size: side of the square whose area every bucket has.
        captions: caption columns; every sample must have all of them.
        features: feature columns and their channels, likewise. Within a bucket they have one shape and dtype.
        attribution: whose work the images are; see `Manifest`.

    Raises:
        ValueError: a column whose name is taken; on writing, features of another shape.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int,
        captions: tuple[str, ...],
        features: dict[str, int] | None = None,
        attribution: dict[str, dict[str, str]] | None = None,
    ):
        named = {"captions": RESERVED & {*captions}, "features": (features or {}).keys() & {*RESERVED, *captions}}
        if taken := [(kind, name) for kind, names in named.items() for name in names]:
            raise ValueError(f"{taken[0][0]}: {taken[0][1]!r} is the name of another column; rename it.")
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
    """Yield the captions of a local split, in order, without decoding an image. Raise UserError if they cannot be read."""
    manifest = Manifest.read(folder)
    for bucket in manifest.buckets:
        rows = open_rows(folder, bucket, manifest)
        for index in range(len(rows)):
            try:
                yield read_row(rows, index)[column]
            except BrokenShardError as error:
                raise UserError(f"{error}, so captions are missing; copy or convert the data again.") from error


class BrokenShardError(ValueError):
    """A shard that is not there (any more), or whose bytes are not what its index says.

    Args:
        file: of the shard.
        cause: what reading it raised.
    """

    def __init__(self, file: Path, cause: Exception):
        super().__init__(f"the shard {file} cannot be read ({type(cause).__name__}: {cause})")
        self.file = file


class CaptionedRows:
    """The rows of a bucket with the captions that lie `beside` its shards, "" where an image could not be decoded."""

    def __init__(self, rows: "LocalDataset", beside: Mapping[str, "LocalDataset"]):
        self._rows, self._beside = rows, beside

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        written = {name: read_row(rows, index)["values"].decode() for name, rows in self._beside.items()}
        return read_row(self._rows, index) | written


def open_rows(split: Path, bucket: Bucket, manifest: Manifest) -> "LocalDataset | CaptionedRows":
    """Return the rows of a bucket of a local split, with all of its captions. Raise UserError as `check_shards`."""
    rows = open_local(split / str(bucket))
    if not manifest.beside:
        return rows
    return CaptionedRows(rows, {name: open_local(split / ENCODED / name / IMAGE / str(bucket)) for name in manifest.beside})


def read_row(rows: "LocalDataset | CaptionedRows", index: int) -> dict[str, Any]:
    """Return a row of `open_local` or `open_rows`. Raise BrokenShardError if it cannot be read."""
    if isinstance(rows, CaptionedRows):
        return rows[index]
    try:
        return rows[index]
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:  # whatever wrong bytes lead to
        shard = rows.shards[rows.spanner[index][0]]
        raise BrokenShardError(Path(shard.dirname, shard.split, shard.file_pairs[0][0].basename), error) from error


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
