"""Rows of the table of bad input that are about one image, its caption and its metadata; see `bad_input.py`."""

import struct
import zlib

import numpy as np
from bad_input import GOOD, Case, picture
from conversions import encoded, jpeg
from conversions import picture as drawn
from icc import P3, SRGB, profile
from PIL import Image, ImageCms

from prx_composer.commands.convert.records import Record

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(/tmp/owned) (w) file closefile showpage\n"


def bomb() -> bytes:
    """A valid PNG of 40,000 x 40,000 pixels in a few kilobytes: 4.8 GB when decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def animation(kind: str = "GIF") -> bytes:
    return encoded(drawn(64, 64), kind, save_all=True, append_images=[drawn(64, 64, 1)])


def _clear() -> bytes:
    image = drawn(100, 100)
    image.putalpha(100)
    return encoded(image, "PNG")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(drawn(100, 100), exif=exif)


def _ramp() -> bytes:
    return encoded(Image.fromarray(np.tile(np.linspace(0, 65535, 128).astype(np.uint16), (128, 1))), "PNG")


def _ramp_tiff(order: str) -> bytes:
    return encoded(Image.fromarray(np.tile(np.linspace(0, 65535, 128).astype(f"{order}u2"), (128, 1))), "TIFF")


def _grain() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)))


def _foreign_bytes() -> bytes:
    content = bytearray(_grain())
    content[len(content) // 2 : len(content) // 2 + 600] = np.random.default_rng(1).bytes(600)
    return bytes(content)


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()

CASES: dict[str, list[Case]] = {
    "zero-byte image": [picture(lambda: b"", "empty_file")],
    "wrong suffix": [picture(lambda: encoded(drawn(100, 100), "WEBP"))],
    "HTML, PostScript, PSD and other formats": [
        picture(lambda: b"<html>404 not found</html>", "not_an_image"),
        picture(lambda: POSTSCRIPT, "not_an_image"),
        picture(lambda: b"8BPS\0\1" + bytes(200), "not_an_image"),
    ],
    "decompression bomb: pixels by the header above `--max-pixels` (134 million)": [picture(bomb, "too_many_pixels")],
    "truncated or broken image, also one whose decoder only warns of damage, "
    "or that ends in zeros as an unfinished download does": [
        picture(lambda: GOOD[: len(GOOD) // 2], "truncated_image"),
        picture(lambda: encoded(drawn(100, 100), "PNG")[:-400], "truncated_image"),
        picture(_foreign_bytes, "truncated_image"),
        picture(lambda: _grain()[: len(_grain()) // 2].ljust(len(_grain()), b"\0"), "truncated_image"),
    ],
    "animated GIF, WebP or PNG, TIFF of several pages": [
        *(picture(lambda kind=kind: animation(kind), "animated") for kind in ("GIF", "WEBP", "PNG", "TIFF"))
    ],
    "EXIF rotation or mirroring, in every format": [
        picture(_turned),
        picture(lambda: encoded(drawn(100, 100), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")),
    ],
    "CMYK": [picture(lambda: encoded(drawn(100, 100).convert("CMYK")))],
    "palette, grey, two-level": [
        *(picture(lambda mode=mode: encoded(drawn(100, 100).convert(mode), "PNG")) for mode in ("P", "L", "1"))
    ],
    "transparency": [picture(_clear)],
    "16 bits, also of TIFF in either byte order": [picture(_ramp), *(picture(lambda o=o: _ramp_tiff(o)) for o in "<>")],
    "floating-point, 32-bit integer, signed, Lab and HSV pixels": [
        *(picture(lambda m=m: encoded(Image.new(m, (80, 80)), "TIFF"), "unsupported_pixels") for m in ("F", "I", "LAB"))
    ],
    "colour profile other than sRGB, on RGB, grey, palette or CMYK": [
        *(picture(lambda icc=icc: encoded(drawn(100, 100), icc_profile=icc)) for icc in (LAB, b"not a profile")),
        picture(lambda: encoded(drawn(100, 100), icc_profile=profile("Linear sRGB", 1, SRGB))),
        picture(lambda: encoded(drawn(100, 100).convert("L"), icc_profile=profile("grey", 1.8))),
        picture(lambda: encoded(drawn(100, 100).quantize(99), "PNG", icc_profile=profile("Display P3", 2.2, P3))),
    ],
    "image smaller than its bucket": [picture(lambda: jpeg(20, 20))],
    "image of one colour": [
        picture(lambda: encoded(Image.new("RGB", (100, 100), "red")), "single_colour"),
        picture(lambda: encoded(Image.new("RGB", (100, 100), "red")), single_colour=True),
    ],
    "caption missing, NaN, empty, a number, several in a list or mapping": [
        *(picture(lambda: GOOD, "no_caption", caption) for caption in (None, float("nan"), " \n", 7, ["a", "b"], {"a": "b"})),
        Case(
            lambda _: [Record("key", GOOD, {"long": "a long one"})],
            ("a long one",),
            options={"captions": {"short": "short", "long": "long"}},
        ),
    ],
    "caption not UTF-8 (nor with a mark of UTF-16), or half a surrogate pair, nested or not": [
        picture(lambda: GOOD, "caption_not_utf8", caption="кот на диване".encode("utf-16-le")),
        *(picture(lambda: GOOD, "caption_not_utf8", caption) for caption in (b"caf\xe9 on a table", "half a \ud83d pair")),
    ],
    "metadata NaN or missing": [
        *(picture(lambda: GOOD, metadata={"score": ("score", kind)}) for kind in ("float", "str")),
        picture(lambda: GOOD, "metadata", metadata={"score": ("score", "int")}),
        picture(lambda: GOOD, "metadata", columns={"score": float("nan")}, metadata={"score": ("score", "int")}),
    ],
    "metadata of another type, text that is not UTF-8 among it": [
        picture(lambda: GOOD, "metadata", columns={"score": b"caf\xe9"}, metadata={"score": ("score", "str")}),
        picture(lambda: GOOD, "metadata", columns={"score": "much"}, metadata={"score": ("score", "float")}),
        picture(lambda: GOOD, "metadata", columns={"score": 2**70}, metadata={"score": ("score", "int")}),
        picture(lambda: GOOD, "metadata", columns={"score": "\ud800"}, metadata={"score": ("score", "str")}),
    ],
}
