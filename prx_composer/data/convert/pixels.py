"""Encoded bytes → pixels of exactly a bucket's size, and back: everything that touches an image file that nobody vouches for.

JPEG is decoded at a reduced size, where that is still twice the target. Pillow reads every header and all that is not plain JPEG.
"""

import functools
import io
import math
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from prx_composer.data.buckets import Bucket
from prx_composer.data.transforms import decode_jpeg, resize

__all__ = ["BadImageError", "decode", "encode_jpeg", "is_plain", "open_image", "oriented_size"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # none that runs an interpreter, such as EPS
STORED = ("JPEG", "MPO", "PNG", "WEBP")  # kept as they are where they fit; MPO is how phones write a JPEG with a preview
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(Exception):
    """An image that is left out; the message is one of reasons.REASONS."""


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(encoded: bytes, max_pixels: int) -> Image.Image:
    """Reads the header. Raises BadImageError for what is not to be decoded."""
    if not encoded:
        raise BadImageError("empty_file")
    try:
        image = Image.open(io.BytesIO(encoded), formats=_formats())
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise BadImageError("too_many_pixels") from None
    except Exception:  # Pillow's parsers raise what they like on malformed input
        raise BadImageError("not_an_image") from None
    if image.width * image.height > max_pixels:
        raise BadImageError("too_many_pixels")
    if frames > 1:
        raise BadImageError("animated")
    if image.mode in ("F", "LAB", "HSV"):
        raise BadImageError("unsupported_pixels")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # malformed EXIF says nothing
        return 1
    return value if value in TURNS else 1


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as the image is meant to be seen."""
    return (image.width, image.height) if _orientation(image) >= 5 else (image.height, image.width)


def is_plain(image: Image.Image) -> bool:
    """Whether any reader shows the file as we do: 8-bit RGB or grey, upright, opaque, in sRGB, of a usual format."""
    opaque = image.mode in ("RGB", "L") and "transparency" not in image.info
    return image.format in STORED and opaque and _orientation(image) == 1 and not _is_foreign(image.info.get("icc_profile"))


def decode(encoded: bytes, image: Image.Image, target: Bucket | None) -> np.ndarray:
    """All pixels, upright, in sRGB; transparent ones over white. JPEG not larger than needed for `target`, if one is given.

    Returns:
        uint8 (height, width, 3).

    Raises:
        BadImageError: the data ends early or is broken.
    """
    turn, profile = TURNS.get(_orientation(image)), image.info.get("icc_profile")
    height, width = (image.height, image.width) if target is None else (2 * target.height, 2 * target.width)
    if turn is None and (pixels := decode_jpeg(encoded, image, height, width)) is not None:
        return np.asarray(_to_srgb(Image.fromarray(pixels), profile)) if image.mode == "RGB" and _is_foreign(profile) else pixels
    try:
        if target is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L", "YCbCr"):
            height, width = target if turn is None or _orientation(image) < 5 else (target.width, target.height)
            image.draft(None, (2 * width, 2 * height))  # pyright: ignore[reportArgumentType] -- None keeps the mode
        image.load()
        image = _to_rgb(image, profile)
        if turn is not None:
            image = image.transpose(turn)
    except BadImageError:
        raise
    except Exception:
        raise BadImageError("truncated_image") from None
    return np.asarray(image)


def _to_rgb(image: Image.Image, profile: Any) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return _to_srgb(image, profile)
    if image.mode.startswith("I"):  # 16 bits, whatever the header calls them
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255 or image.mode != "I":
            values = values // 257
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return _to_srgb(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), profile)
    if image.mode == "CMYK" and (transform := _transform(profile, "CMYK")):
        return ImageCms.applyTransform(image, transform) or image.convert("RGB")
    return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    transform = _transform(profile, "RGB") if _is_foreign(profile) else None
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=64)
def _is_foreign(profile: bytes | None) -> bool:
    """Whether colours are not in sRGB. A profile that cannot be read says nothing."""
    if not profile:
        return False
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return opened.profile.xcolor_space.strip() != "GRAY" and "srgb" not in ImageCms.getProfileDescription(opened).lower()
    except Exception:
        return False


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    if not profile:
        return None
    try:
        return ImageCms.buildTransform(io.BytesIO(profile), _srgb(), mode, "RGB")
    except Exception:
        return None


@functools.cache
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


def encode_jpeg(pixels: np.ndarray, quality: int, subsampling: int) -> bytes:
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality, colorspace="RGB", colorsubsampling={0: "444", 2: "420"}[subsampling], fastdct=False
    )


def is_one_colour(pixels: np.ndarray, tolerance: int = 2) -> bool:
    """Whether every channel stays within `tolerance` of 255."""

    def spread(part: np.ndarray) -> int:
        return int(np.ptp(part.reshape(-1, 3), axis=0).max())

    return spread(pixels[::16, ::16]) <= tolerance and spread(pixels) <= tolerance  # a few pixels tell most images


def thumbnail(pixels: np.ndarray, side: int = 128) -> bytes:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    small = Bucket(max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
    return encode_jpeg(resize(pixels, small), 80, 2)
