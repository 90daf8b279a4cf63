"""What the converter does with decoded pixels: whether a file is kept as it is, and how it is encoded anew."""

import math

import numpy as np
import simplejpeg
from PIL import Image

from prx_composer.data.buckets import Bucket
from prx_composer.data.decoding import JPEGS, is_plain
from prx_composer.data.transforms import resize

STORED = (*JPEGS, "PNG", "WEBP")  # kept as they are where they fit


def is_kept(image: Image.Image) -> bool:
    """Return whether a file can be stored as it is: in a usual format, and shown by any reader as we show it."""
    return image.format in STORED and is_plain(image)


def encode_jpeg(pixels: np.ndarray, quality: int, subsampling: int) -> bytes:
    """Encode uint8 (height, width, 3) as JPEG; subsampling 0 is full chroma, 2 a quarter of it."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality, colorspace="RGB", colorsubsampling={0: "444", 2: "420"}[subsampling], fastdct=False
    )


def is_one_colour(pixels: np.ndarray, tolerance: int = 2) -> bool:
    """Return whether every channel stays within `tolerance` of 255."""

    def spread(part: np.ndarray) -> int:
        return int(np.ptp(part.reshape(-1, 3), axis=0).max())

    return spread(pixels[::16, ::16]) <= tolerance and spread(pixels) <= tolerance  # a few pixels tell most images


def thumbnail(pixels: np.ndarray, side: int = 128) -> bytes:
    """Encode a JPEG whose longer side is `side`."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    small = Bucket(max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
    return encode_jpeg(resize(pixels, small), 80, 2)
