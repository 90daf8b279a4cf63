"""Encoded bytes → upright pixels in sRGB, at a bucket's size: the one place where an image that nobody vouches for is opened.

The converter, `source.folder`, training, `prx data view`, the encoders and the evaluation all see a picture through `decode`.
Pillow reads every header; libjpeg-turbo decodes JPEG, at a reduced size where that is enough, and says what Pillow does not:
that it went on past damage.
"""

import functools
import io
import math
import re
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from prx_composer.data.format import Bucket

if TYPE_CHECKING:
    from torch import Tensor  # slow to import, and not needed to read headers

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # none that runs an interpreter, such as EPS
JPEGS = ("JPEG", "MPO")  # MPO is how phones write a JPEG with a preview behind it
UNDECODABLE = (OSError, ValueError)  # what reading a sample raises whose bytes are no image (BadImageError), or no latent
MAX_PIXELS = 1 << 27
PIXELS_OPENED = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 62)  # above it Pillow takes any header for a decompression bomb
IMAGE_REASONS = {
    "empty_file": "an image of zero bytes",
    "not_an_image": "bytes that are no image of a format that is opened",
    "too_many_pixels": "more pixels than --max-pixels, by the header: it is not decoded",
    "truncated_image": "an image whose data ends early or is broken, also where a decoder only warns of it",
    "animated": "several frames",
    "unsupported_pixels": "floating-point, 32-bit integer, signed or Lab pixels, which have no agreed range",
}

_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC = 258, 262  # tags of a TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# libjpeg's warnings (jerror.h): those that cost no pixel, such as bytes too many between the header's segments, and the others.
_HARMLESS = re.compile(r".*bad ICC|.*before marker 0x(db|e.|fe|c[012])$|.*JFIF revision|Unknown Adobe|Invalid SOS parameters")
_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end|Inconsistent progression")
_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_SAME_COLOUR = 2  # of 255: what two ways to compute sRGB differ by
_ZERO_TAIL = 1024  # bytes: no entropy coder ends on so many zeros


class BadImageError(ValueError):
    """An image that is left out; the message is one of IMAGE_REASONS."""


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(encoded: bytes | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an image.

    Raises:
        BadImageError: it is not to be decoded.
    """
    if encoded == b"":
        raise BadImageError("empty_file")
    try:
        image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_formats())
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise BadImageError("too_many_pixels") from None
    except Exception:  # Pillow's parsers raise what they like on malformed input
        raise BadImageError("not_an_image") from None
    if image.width * image.height > max_pixels:
        raise BadImageError("too_many_pixels")
    if frames > 1:
        raise BadImageError("animated")
    if image.mode in ("F", "LAB", "HSV") or (image.mode == "I" and image.format == "TIFF"):  # 16 unsigned bits are "I;16"
        raise BadImageError("unsupported_pixels")
    return image


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width as the image is meant to be seen.

    Raises:
        BadImageError: a PNG, whose orientation may stand behind its pixels, is broken.
    """
    height, width = image.height, image.width
    if image.format == "TIFF":  # whether `size` is upright already depends on Pillow's version
        tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
        height, width = tags[257], tags[256]
    return (width, height) if _orientation(image) >= 5 else (height, width)


def is_plain(image: Image.Image) -> bool:
    """Return whether any reader shows the pixels as we do: 8-bit RGB or grey, upright, opaque, in sRGB."""
    opaque = image.mode in ("RGB", "L") and "transparency" not in image.info
    return opaque and _orientation(image) == 1 and _transform(image.info.get("icc_profile"), image.mode) is None


def decode(encoded: bytes, image: Image.Image, least: tuple[int, int] | None = None) -> np.ndarray:
    """Decode all of an image: upright, in sRGB, what is transparent over white.

    Args:
        image: as `open_image` returned it for `encoded`.
        least: height and width that are enough; a JPEG is then decoded at the smallest of libjpeg's sizes that covers them.

    Returns:
        uint8 (height, width, 3); a JPEG may be smaller than the file says, see `least`.

    Raises:
        BadImageError: the data ends early or is broken.
    """
    profile, pixels = image.info.get("icc_profile"), None
    if image.format in JPEGS:
        pixels = _decode_jpeg(encoded, image, least)
        turn = _TURNS.get(_orientation(image))
        if pixels is not None and turn is None and _transform(profile, image.mode) is None:
            return pixels
    if pixels is None:
        if image.format == "PNG" and not _checksums_hold(encoded):
            raise BadImageError("truncated_image")
        _load(image)
        if image.format in ("WEBP", "AVIF") and _ends_in_zeros(encoded, image.format):
            raise BadImageError("truncated_image")
    try:
        shown = image if pixels is None else Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels)
        shown = _to_srgb(shown, profile)
    except Exception:
        raise BadImageError("truncated_image") from None
    turn = _TURNS.get(_orientation(image))  # now: Pillow has turned a TIFF while it loaded it
    return np.asarray(shown if turn is None else shown.transpose(turn))


def decode_image(encoded: bytes, height: int, width: int) -> "Tensor":
    """Decode, scale to cover (height, width) without distortion (antialiased), crop the centre.

    Returns:
        uint8 (3, height, width), whose channels are innermost in memory: the order that decoders write.

    Raises:
        BadImageError: the bytes are no image, or not one to open.
    """
    import torch

    pixels = decode(encoded, open_image(encoded), (height, width))
    resized = resize(pixels, Bucket(height, width))
    return torch.from_numpy(np.require(resized, requirements=["C", "W"])).permute(2, 0, 1)  # Pillow's pixels are read-only


def resize(pixels: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Return the largest centred part of the bucket's aspect ratio, resized to it, antialiased (bicubic).

    torch's kernel is within 1/255 of Pillow's at 2.5 to 4.6 times the speed (benchmarks/data_speed.py).

    Args:
        pixels: uint8 (height, width, 3).

    Returns:
        uint8 (bucket.height, bucket.width, 3).
    """
    height, width = pixels.shape[:2]
    scale = max(bucket.height / height, bucket.width / width)
    rows, columns = min(height, round(bucket.height / scale)), min(width, round(bucket.width / scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    part = pixels[top : top + rows, left : left + columns]
    if (rows, columns) == tuple(bucket):
        return part
    import torch

    image = torch.tensor(part).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(image, tuple(bucket), mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).contiguous().numpy()


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        _load(image)  # getexif would, and what goes wrong then must not pass for malformed EXIF
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # malformed EXIF says nothing
        return 1
    return value if value in _TURNS else 1


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception:
        raise BadImageError("truncated_image") from None


def _decode_jpeg(encoded: bytes, image: Image.Image, least: tuple[int, int] | None) -> np.ndarray | None:
    """Decode a JPEG as it lies in the file, at the smallest of libjpeg's sizes that covers `least`.

    libjpeg-turbo's own interface is 1.1 to 1.4 times as fast as Pillow's (benchmarks/data_speed.py), and reports damage.

    Returns:
        uint8 (height, width, 3); None for something that Pillow has to decode.

    Raises:
        BadImageError: damaged.
    """
    height, width = image.height, image.width
    if least is not None:
        wanted = least if _orientation(image) < 5 else least[::-1]
        scale = min(max(wanted[0] / height, wanted[1] / width), 1.0)
        height, width = math.ceil(height * scale), math.ceil(width * scale)
    space = "RGB" if image.mode in ("RGB", "L") else "CMYK"
    for strict in (True, False):
        try:
            pixels = simplejpeg.decode_jpeg(encoded, space, min_height=height, min_width=width, min_factor=1, strict=strict)
            break
        except ValueError as error:
            if strict and not _HARMLESS.match(str(error)):
                if _DAMAGE.match(str(error)):
                    raise BadImageError("truncated_image") from None
                return None
    else:
        return None
    return pixels if space == "RGB" else None  # Pillow knows how the writers of CMYK meant it


def _checksums_hold(png: bytes) -> bool:
    """Return whether a PNG's pixels are those that were written: Pillow doesn't look at the checksums of these chunks.

    Without that, zeros or foreign bytes in data that are stored rather than compressed would pass for pixels.
    """
    place = 8
    while place + 12 <= len(png):
        size, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        end = place + 8 + size
        if kind == b"IDAT" and zlib.crc32(memoryview(png)[place + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
            return False
        place = end + 4
    return True


def _ends_in_zeros(encoded: bytes, kind: str) -> bool:
    """Return whether a file was allocated but not written to its end, which the decoders of WebP and AVIF do not notice."""
    payload = encoded[: 8 + int.from_bytes(encoded[4:8], "little")] if kind == "WEBP" else encoded
    return len(payload) > _ZERO_TAIL and not any(payload[-_ZERO_TAIL:])


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    image, alpha = _split_alpha(_to_8_bits(image))
    if image.mode not in _PROFILE_SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _transform(profile, image.mode)
    image = image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform) or image.convert("RGB")
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 12 or 16 bits, which Pillow's own conversion would cut off at 255; other images have 8 bits already."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
        if tags.get(_BITS) == (12,):
            values = values * 65535 // 4095
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds in 8 bits only
            values = 65535 - values
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an image into its colours and its transparency, if it has any."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image, None
    kind = "LA" if image.mode in ("L", "1", "LA", "La") else "RGBA"
    image = image.convert(kind)
    return image.convert(kind[:-1]), image.getchannel("A")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a mode's colours to sRGB.

    None: there is no profile, it cannot be read, it is of another kind of colours than the image, or it is sRGB in all but
    name. What a profile is called decides nothing: "Linear sRGB" and "sRGB" have the same letters.
    """
    if not profile or mode not in _PROFILE_SPACES:
        return None
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != _PROFILE_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(opened, _srgb(), mode, "RGB")
        if mode == "CMYK":
            return transform
        probe = _probe(mode)
        shown: Any = ImageCms.applyTransform(probe, transform)
        same = np.abs(np.asarray(shown).astype(int) - np.asarray(probe.convert("RGB"))).max() <= _SAME_COLOUR
    except Exception:
        return None
    return None if same else transform


@functools.cache
def _probe(mode: str) -> Image.Image:
    """Return colours all over the space, to see what a transform does."""
    levels = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(levels[None])
    some = levels[::15]
    return Image.fromarray(np.stack(np.meshgrid(some, some, some), -1).reshape(len(some), -1, 3))


@functools.cache
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")
