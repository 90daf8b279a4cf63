"""Two sets that need no download: procedural scenes with captions, and scikit-learn's scans of handwritten digits.

The scenes are a coloured shape at a position on a background, some combinations kept out of training. They make the quickstart
possible, and its score exact: a drawn image is right if its nearest rendering among all combinations is the one asked for.
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prx_composer.data.buckets import Bucket
from prx_composer.data.format import RawSample

COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 70, 220), "yellow": (245, 210, 20),
    "purple": (140, 40, 170), "orange": (250, 130, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
NEW_COLOURS = {"pink": (250, 130, 190), "teal": (0, 150, 150)}  # of no image of the source: for fine-tuning
BACKGROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (10, 10, 10)}
POSITIONS = {"left": 0.27, "centre": 0.5, "right": 0.73}
SUPERSAMPLING = 4


class Scene(NamedTuple):
    """One combination of the four attributes."""

    colour: str
    shape: str
    background: str
    position: str

    @property
    def caption(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        where = "in the centre" if self.position == "centre" else f"on the {self.position}"
        return f"{article} {self.colour} {self.shape} {where} of a {self.background} background"

    @property
    def short_caption(self) -> str:
        return f"{self.colour} {self.shape}, {self.position}, {self.background}"


def all_scenes(colours: Iterable[str] = COLOURS) -> list[Scene]:
    """Return every combination: 6 colours × 5 shapes × 3 backgrounds × 3 positions = 270, or those of other colours."""
    return [Scene(*scene) for scene in itertools.product(colours, SHAPES, BACKGROUNDS, POSITIONS)]


def heldout_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return `count` combinations kept out of training; every single attribute, and nearly every pair, is still seen there."""
    scenes = all_scenes()
    order = np.random.default_rng(seed).permutation(len(scenes))
    return [scenes[index] for index in sorted(order[:count])]


def render(scene: Scene, height: int, width: int, *, shift: tuple[float, float] = (0, 0), scale: float = 1.0) -> Image.Image:
    """Draw a scene, antialiased.

    Args:
        shift: of the centre, in fractions of the shorter side, (x, y).
        scale: of the shape's size.
    """
    s = SUPERSAMPLING
    side = min(height, width)
    image = Image.new("RGB", (width * s, height * s), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    x = (POSITIONS[scene.position] * width + shift[0] * side) * s
    y = (0.5 * height + shift[1] * side) * s
    r = 0.22 * side * scale * s
    fill = (COLOURS | NEW_COLOURS)[scene.colour]
    if scene.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif scene.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(0.42 * r))
    elif scene.shape == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=fill)
    elif scene.shape == "triangle":
        draw.polygon([(x, y - r), (x - 1.1 * r, y + 0.9 * r), (x + 1.1 * r, y + 0.9 * r)], fill=fill)
    elif scene.shape == "cross":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    return image.resize((width, height), Image.Resampling.BOX)


class ShapesSource:
    """Scenes with small random shifts and sizes; the splits `train` and `heldout` share no combination.

    Args:
        image_size: side of the square whose area the images have.
        images_per_scene: renderings of every combination, aspect ratios taken in turn.
        heldout: number of combinations kept out of training.
        aspects: (height, width) parts of the aspect ratios, such as [[1, 1], [3, 4]].
        multiple: sides are multiples of this.
        seed: of shifts, sizes and the choice of held-out combinations.
    """

    captions = ("caption", "short_caption")
    identity: dict[str, Any] = {}

    def __init__(
        self,
        image_size: int = 32,
        images_per_scene: int = 32,
        heldout: int = 36,
        aspects: list[list[int]] | None = None,
        multiple: int = 4,
        seed: int = 0,
    ):
        total = len(all_scenes())
        if not 0 < heldout < total:
            raise ValueError(f"train_loader.source.heldout must lie between 1 and {total - 1}, not {heldout}.")
        self.image_size = image_size
        self._images_per_scene, self._heldout, self._seed = images_per_scene, heldout, seed
        self.train_samples = (total - heldout) * images_per_scene
        self.buckets = [
            Bucket(*(max(multiple, round(image_size * part / (h * w) ** 0.5 / multiple) * multiple) for part in (h, w)))
            for h, w in aspects or [[1, 1]]
        ]

    def samples(self) -> Iterator[tuple[str, RawSample]]:
        rng = np.random.default_rng(self._seed)
        heldout = set(heldout_scenes(self._heldout, self._seed))
        for scene in all_scenes():
            for index in range(self._images_per_scene):
                height, width = self.buckets[index % len(self.buckets)]
                shift = rng.uniform(-0.03, 0.03, 2)
                image = render(scene, height, width, shift=(shift[0], shift[1]), scale=rng.uniform(0.95, 1.05))
                encoded = io.BytesIO()
                image.save(encoded, format="PNG")
                captions = {"caption": scene.caption, "short_caption": scene.short_caption}
                key = "-".join(scene) + f"-{index}"
                yield "heldout" if scene in heldout else "train", RawSample(encoded.getvalue(), width, height, captions, key)


# The scans are UCI's: 1,797 real images of 8×8 pixels.


DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELDOUT = 600  # the last scans, of other writers than the first


def load_digit_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return uint8 (1797, 8, 8) and labels (1797,). Raise ImportError, with the remedy, without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: `uv pip install scikit-learn`.") from error
    digits: Any = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


class DigitsSource:
    """The scans as a data set: `train`, and the last 600 as `heldout`, on which the scoring classifier is fitted."""

    captions = ("caption",)
    identity: dict[str, Any] = {}

    def __init__(self) -> None:
        self.image_size = 8
        self.buckets = [Bucket(8, 8)]

    def samples(self) -> Iterator[tuple[str, RawSample]]:
        images, labels = load_digit_scans()
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="PNG")
            captions = {"caption": f"a handwritten {DIGIT_WORDS[label]}"}
            split = "heldout" if index >= len(images) - HELDOUT else "train"
            yield split, RawSample(encoded.getvalue(), 8, 8, captions, f"scan-{index}")
