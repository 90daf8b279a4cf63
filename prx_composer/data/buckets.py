"""Aspect-ratio buckets: image sizes of (nearly) equal area, so that every batch costs the same."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
        ValueError: `image_size` is not a multiple of `multiple`.
    """
    if image_size % multiple:
        raise ValueError(f"image_size {image_size} is not a multiple of {multiple}.")
    buckets = set()
    for height in range(multiple, int(image_size * math.sqrt(max_aspect)) + multiple, multiple):
        width = round(image_size**2 / height / multiple) * multiple
        if width > 0 and 1 / max_aspect <= width / height <= max_aspect:
            buckets.add(Bucket(height, width))
    return sorted(buckets)


def assign_bucket(height: int, width: int, buckets: list[Bucket]) -> Bucket:
    """Return the bucket whose aspect ratio is nearest on a log scale: the one that crops least."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - math.log(width / height)))


# What is lost of images that are cropped to the shapes of buckets, and which setting would keep it.


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


def share_cropped(height: int, width: int, bucket: Bucket) -> float:
    """Return the share of an image's area that lies outside when it is scaled to cover a bucket."""
    ratio = (width / height) / (bucket.width / bucket.height)
    return 1 - min(ratio, 1 / ratio)


def cropping_note(shapes: Shapes, settings: BucketSettings, path: str) -> str | None:
    """Say how many images lose how much of their area, why, and what to set; None if hardly any is lost.

    Args:
        path: of the settings in the recipe.
    """
    buckets = settings.buckets(shapes)
    lost = _cropped(shapes, buckets)
    if not lost:
        return None
    total, images = sum(shapes.values()), sum(lost.values())
    mean, most = sum(share * count for share, count in lost.items()) / images, max(lost)
    into = ", ".join(map(str, buckets[:4])) + (f" and {len(buckets) - 4} more" if len(buckets) > 4 else "")
    remedy = _advice(list(_remedies(dict(Counter(shapes).most_common(_LOOKED_AT)), settings)), path)
    return (
        f"{images:,} of {total:,} images are cropped by more than {NOTICED:.0%} of their area, by {mean:.0%} on average and "
        f"{most:.0%} at most: with multiple: {settings.multiple} at image_size {settings.image_size} there is {into}. {remedy}"
    )


def _cropped(shapes: Shapes, buckets: list[Bucket]) -> Counter[float]:
    """Return share that is lost → images, of those that lose much."""
    lost: Counter[float] = Counter()
    for (height, width), count in shapes.items():
        share = share_cropped(height, width, assign_bucket(height, width, buckets))
        if share > NOTICED:
            lost[share] += count
    return lost


def _remedies(shapes: Shapes, settings: BucketSettings) -> Iterator[str]:
    """Yield the smallest change of each kind that leaves at most half of the images cropped."""
    much = sum(_cropped(shapes, settings.buckets(shapes)).values())
    smaller = [settings.multiple // factor for factor in (2, 4, 8) if settings.multiple % factor == 0]
    larger = [settings.image_size * factor for factor in (2, 4)]
    longest = math.ceil(10 * max(max(height / width, width / height) for height, width in shapes)) / 10
    kinds = [
        [{"multiple": size} for size in smaller],
        [{"image_size": size} for size in larger],
        [{"max_aspect": longest}] if longest > settings.max_aspect else [],
    ]

    def keeps(change: dict[str, Any]) -> bool:
        return 2 * sum(_cropped(shapes, replace(settings, **change).buckets(shapes)).values()) <= much

    rare = settings.min_bucket > 1 and keeps({"min_bucket": 1})
    if rare:
        yield "min_bucket: 1"
    both = [{}] if rare or settings.min_bucket == 1 else [{}, {"min_bucket": 1}]
    for kind in kinds:
        change = next((change | more for more in both for change in kind if keeps(change | more)), None)
        if change is not None:
            yield " with ".join(f"{name}: {value:g}" for name, value in change.items())


def _advice(remedies: list[str], path: str) -> str:
    if not remedies:
        return f"See {path}.multiple, image_size, max_aspect and min_bucket."
    of = (
        " (multiple must stay one of model.backbone.patch_size × autoencoder downsampling)" if "multiple" in str(remedies) else ""
    )
    return f"In {path}, this would keep more of them: {'; or '.join(remedies)}{of}."
