"""What was measured of a trick at one image size, so that `prx check` can say which trick suits which resolution."""

from collections.abc import Sequence
from dataclasses import dataclass

PRX_PART_2 = "PRX Part 2, https://huggingface.co/blog/Photoroom/prx-part2"
_FURTHEST = 2  # times larger or smaller: further away a measurement says nothing


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A comparison of two runs, without and with a trick.

    Args:
        image_size: side in pixels of the square whose area the images have.
        measure: what was measured, and of what: "FID in latents".
        without, having: its value without and with the trick.
        source: where that is said, and by whom.
        higher_is_better: whether it is a score; an FID is none.
        speed: of training, as a multiple of that without the trick; None: not said.
    """

    image_size: int
    measure: str
    without: float
    having: float
    source: str
    higher_is_better: bool = False
    speed: float | None = None

    @property
    def hurts(self) -> bool:
        return self.having < self.without if self.higher_is_better else self.having > self.without

    def __str__(self) -> str:
        return (
            f"{self.measure} at {self.image_size} px was {self.without:g} without it and {self.having:g} with it ({self.source})"
        )


def hurting(evidence: Sequence[Evidence], image_size: int) -> list[Evidence]:
    """Return what speaks against a trick at an image size.

    What was measured at the nearest size counts, by ratio, and of two as near at the larger one. What was measured at less
    than half or more than twice the size doesn't.
    """

    def distance(size: int) -> float:
        return max(size / image_size, image_size / size)

    nearest = min((one.image_size for one in evidence), key=lambda size: (distance(size), -size), default=None)
    if nearest is None or distance(nearest) > _FURTHEST:
        return []
    return [one for one in evidence if one.image_size == nearest and one.hurts]
