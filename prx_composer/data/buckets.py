"""Aspect-ratio buckets: image sizes of (nearly) equal area, so that every batch costs the same."""

import math
from typing import NamedTuple


class Bucket(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """Inverse of str: "512x512" → Bucket(512, 512)."""
        height, width = name.split("x")
        return cls(int(height), int(width))

    def at(self, image_size: int, base_size: int, multiple: int) -> "Bucket":
        """The same aspect ratio at another image size, both sides rounded to multiples of `multiple`."""
        if image_size == base_size:
            return self
        scale = image_size / base_size
        sides = (max(multiple, round(side * scale / multiple) * multiple) for side in self)
        return Bucket(*sides)


def make_buckets(image_size: int, multiple: int, max_aspect: float = 2.0) -> list[Bucket]:
    """Buckets around `image_size`², sides multiples of `multiple`, aspect ratios from 1/max_aspect to max_aspect.

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
    """The bucket whose aspect ratio is nearest on a log scale: the one that crops least."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - math.log(width / height)))
