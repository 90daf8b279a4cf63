"""scikit-learn's bundled scans of handwritten digits (UCI, 1,797 real images of 8×8 pixels), captioned."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prx_composer.data.buckets import Bucket
from prx_composer.data.format import RawSample

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELDOUT = 600  # the last scans, of other writers than the first


def load_digit_scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 (1797, 8, 8) and labels (1797,). Raises ImportError, with the remedy, without scikit-learn."""
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
