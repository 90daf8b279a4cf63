"""Encoded bytes → a uint8 image of exactly the bucket's size."""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["UNDECODABLE", "decode_image"]

UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # what `decode_image` raises for bytes that are no image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(encoded: bytes, height: int, width: int) -> Tensor:
    """Decodes, scales to cover (height, width) without distortion (antialiased), crops the centre.

    JPEGs are decoded at a reduced size where that still covers the target.

    Returns:
        uint8 (3, height, width).

    Raises:
        UNDECODABLE: the bytes are no image, or not one to open.
    """
    image = Image.open(io.BytesIO(encoded))
    if image.format == "JPEG":
        scale = max(height / min(image.size), width / min(image.size))  # covers in either orientation
        image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    image = _to_rgb(ImageOps.exif_transpose(image))
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
