"""Every picture is seen in one way: upright, whole, in sRGB, with 8 bits; or it is left out for a reason."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import convert, encoded, rows
from icc import P3, SRGB, profile
from PIL import Image, ImageCms

from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.decoding import IMAGE_REASONS, BadImageError, decode, decode_image, is_plain, open_image, oriented_size
from prx_composer.data.sampler import SampleRequest
from prx_composer.data.sources import FolderSource, prepare

T = Image.Transpose
UNTURNED = {
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}


def seen(content: bytes, least: tuple[int, int] | None = None) -> np.ndarray:
    return decode(content, open_image(content), least).astype(int)


def outcome(content: bytes) -> np.ndarray | str:
    """The pixels, or the reason for which there are none."""
    try:
        return seen(content)
    except BadImageError as error:
        return str(error)


def quarters(height: int = 64, width: int = 128) -> np.ndarray:
    image = np.full((height, width, 3), 250, np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = (220, 30, 30), (30, 200, 30)
    image[height // 2 :, : width // 2] = (30, 30, 220)
    return image


def photo(side: int = 256) -> Image.Image:
    """Waves with grain, so that an entropy coder has work on every line."""
    y, x = np.mgrid[:side, :side]
    waves = np.stack([128 + 80 * np.sin(x / 17), 128 + 80 * np.sin(y / 23), 128 + 80 * np.sin((x + y) / 31)], -1)
    return Image.fromarray((waves + np.random.default_rng(0).normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))


def halves(left: Any, right: Any, side: int = 64) -> Image.Image:
    colours = np.array([left] * (side // 2) + [right] * (side // 2), np.uint8)
    return Image.fromarray(np.repeat(colours[None], side, 0))


# ----------------------------------------------------------------------------------------------- turned


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG", "WEBP", "AVIF", "compressed TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_is_seen_upright(kind: str, orientation: int) -> None:
    upright, turn = quarters(), UNTURNED[orientation]
    stored = Image.fromarray(upright) if turn is None else Image.fromarray(upright).transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compressed TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(
        kind, {"quality": 100}
    )
    content = encoded(stored, kind.rpartition(" ")[2], exif=exif, **options)
    assert oriented_size(open_image(content)) == (64, 128)
    inner = (slice(8, None, 16), slice(8, None, 16))  # away from the edges, where JPEG rings
    assert np.abs(seen(content)[inner] - upright[inner]).max() < 12
    small = seen(content, (16, 32))
    assert small.shape[0] >= 16 and small.shape[1] == 2 * small.shape[0] and np.abs(small[2, 2] - upright[0, 0]).max() < 12
    assert is_plain(open_image(content)) == (orientation == 1)


# ----------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive", "turned", "CMYK", "PNG", "WEBP", "lossless", "GIF", "BMP", "TIFF", "PPM", "AVIF"]
)
def test_a_file_that_was_cut_is_left_out_or_whole(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, Any] = {
        "progressive": {"progressive": True},
        "turned": {"exif": exif},
        "lossless": {"lossless": True},
    }.get(kind, {})
    name = {"progressive": "JPEG", "turned": "JPEG", "CMYK": "JPEG", "lossless": "WEBP"}.get(kind, kind)
    image = photo(96).convert("CMYK") if kind == "CMYK" else photo(96)
    content = encoded(image, name, **options)
    whole = seen(content)
    for length in np.linspace(20, len(content) - 1, 25).astype(int):
        found = outcome(content[:length])
        assert isinstance(found, str) or np.array_equal(found, whole), f"{kind} cut to {length} of {len(content)} bytes"
        if length < 0.9 * len(content):
            assert found in ("truncated_image", "not_an_image")


@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
def test_a_png_with_a_wrong_byte_is_left_out_also_where_its_orientation_was_asked_for_first(place: float) -> None:
    content = bytearray(encoded(photo(), "PNG"))
    content[int(len(content) * place)] ^= 0xFF
    assert outcome(bytes(content)) == "truncated_image"
    for ask in (oriented_size, is_plain):
        with pytest.raises(BadImageError, match="truncated_image"):
            ask(open_image(bytes(content)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"subsampling": 0}, {"turned": 1}, {"CMYK": 1}])
def test_a_jpeg_with_foreign_bytes_in_its_middle_is_left_out_though_pillow_shows_it(options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    image = photo().convert("CMYK") if options.pop("CMYK", 0) else photo()
    content = bytearray(encoded(image, "JPEG", **({"exif": exif} if options.pop("turned", 0) else {}), **options))
    middle = len(content) // 2
    foreign = min(2000, middle // 2)
    content[middle : middle + foreign] = np.random.default_rng(1).integers(0, 255, foreign, np.uint8).tobytes()
    Image.open(io.BytesIO(bytes(content))).load()
    assert outcome(bytes(content)) == "truncated_image" and len(IMAGE_REASONS["truncated_image"]) > 20


def test_what_costs_no_pixels_leaves_no_jpeg_out() -> None:
    content = encoded(photo(), "JPEG")
    plain = seen(content)
    behind, inside = content + bytes(100), content[:20] + b"\x00\x01\x02" + content[20:]  # behind the first segment
    assert np.array_equal(seen(behind), plain) and np.array_equal(seen(inside), plain)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_file_that_was_allocated_but_not_written_to_its_end_is_left_out(kind: str) -> None:
    content = encoded(photo(), kind)
    half = len(content) // 2
    assert outcome(content[:half] + bytes(len(content) - half)) == "truncated_image"


@pytest.mark.parametrize("spread", [30, 60, 90])
def test_a_png_whose_zeros_pass_for_pixels_with_pillow_is_left_out(spread: int) -> None:
    noise = np.random.default_rng(0).normal(128, spread, (128, 128)).clip(0, 255).astype(np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    half = len(content) // 2
    broken = content[:half] + bytes(len(content) - half)
    assert outcome(broken) == "truncated_image"
    assert np.array_equal(seen(content + b"more")[..., 0], noise)


# ---------------------------------------------------------------------------------------------- colours


def srgb(linear: float) -> int:
    """IEC 61966-2-1."""
    return round(255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("name", ["GIMP built-in Linear sRGB", "sRGB-elle-V4-g10.icc", "linear Rec709 RGB", "sRGB", ""])
def test_linear_light_is_not_taken_for_srgb_whatever_the_profile_is_called(name: str) -> None:
    content = encoded(halves((55, 55, 55), (5, 100, 5)), "PNG", icc_profile=profile(name, 1, SRGB))
    found = seen(content)
    assert np.abs(found[0, 0] - srgb(55 / 255)).max() <= 1 and srgb(55 / 255) == 128
    assert np.abs(found[0, -1] - [srgb(5 / 255), srgb(100 / 255), srgb(5 / 255)]).max() <= 1
    assert not is_plain(open_image(content))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("gamma", [1, 1.8, 2.2, 2.6])
@pytest.mark.parametrize("clear", [False, True])
def test_grey_profiles_are_followed(kind: str, gamma: float, clear: bool) -> None:
    image = halves(55, 150)
    if clear:
        if kind == "JPEG":
            return
        image.putalpha(255)
    found = seen(encoded(image, kind, icc_profile=profile("Grey", gamma), **({"quality": 100} if kind == "JPEG" else {})))
    expected = [srgb((value / 255) ** (round(gamma * 256) / 256)) for value in (55, 150)]
    assert np.abs(found[0, 0] - expected[0]).max() <= 1 and np.abs(found[0, -1] - expected[1]).max() <= 1


@pytest.mark.parametrize("form", ["RGB", "P", "P TIFF", "RGBA", "P with transparency", "WEBP", "JPEG"])
def test_one_colour_profile_gives_one_colour_in_every_form(form: str) -> None:
    image, p3 = halves((200, 40, 40), (40, 200, 40)), profile("Display P3", 2.2, P3)
    mode = form.split()[0] if form.split()[0] in ("P", "RGBA") else "RGB"
    stored = image.quantize(16) if mode == "P" else image.convert(mode)
    kind = "TIFF" if "TIFF" in form else form if form in ("WEBP", "JPEG") else "PNG"
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    if "transparency" in form:
        options["transparency"] = 9  # an index that no pixel has
    oracle: Any = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(p3)), ImageCms.createProfile("sRGB"))
    found, expected = seen(encoded(stored, kind, icc_profile=p3, **options)), np.asarray(oracle).astype(int)
    assert np.abs(expected[0, 0] - [221, 0, 17]).max() <= 1, "littleCMS"
    assert np.abs(found - expected).max() <= (4 if kind in ("JPEG", "TIFF") else 1)


def test_profiles_that_are_srgb_or_fit_no_pixel_leave_the_bytes_alone() -> None:
    image = photo(64)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for foreign, mode in ((own, "RGB"), (profile("Grey", 1), "RGB"), (profile("P3", 2.2, P3), "L"), (b"rubbish", "RGB")):
        content = encoded(image.convert(mode), "PNG", icc_profile=foreign)
        assert is_plain(open_image(content)) and np.array_equal(seen(content), np.asarray(image.convert(mode).convert("RGB")))


def test_what_is_half_transparent_is_laid_over_white_in_srgb() -> None:
    image = halves((200, 40, 40), (200, 40, 40)).convert("RGBA")
    image.putalpha(128)
    found = seen(encoded(image, "PNG", icc_profile=profile("Display P3", 2.2, P3)))[0, 0]
    assert np.abs(found - (np.array([221, 0, 17]) * 128 + 255 * 127) / 255).max() <= 1


# ------------------------------------------------------------------------------------------------- depth


def png16(values: list[int], colour: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits a sample, all of one pixel; colour type 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = (b"\0" + struct.pack(f">{len(values)}H", *values) * 8) * 8
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0)) + b"".join(chunk(*part) for part in extra)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("value", [0, 128, 200, 300, 32896, 51400, 65535])
def test_16_bits_become_8_by_their_scale_in_every_form(value: int) -> None:
    expected = round(value / 257)
    tiffs = [encoded(Image.fromarray(np.full((8, 8), value, kind)), "TIFF") for kind in ("<u2", ">u2")]
    for content in [png16([value], 0), png16([value] * 3, 2), png16([value, 65535], 4), *tiffs]:
        assert np.abs(seen(content) - expected).max() <= 1
    assert np.abs(seen(png16([value], 0)) - expected).max() == 0 and seen(png16([value, 0], 4)).min() == 255
    assert seen(png16([value], 0, (b"tRNS", struct.pack(">H", value)))).min() == 255, "the one transparent grey"


def tiff(values: np.ndarray, sample_format: int, other: dict[int, int] | None = None) -> bytes:
    """An uncompressed grey TIFF; sample format 1 unsigned, 2 signed, 3 floating-point; with some tags of other values."""
    bits = 8 * values.itemsize
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: values.shape[0]}
    tags |= {279: values.nbytes, 339: sample_format, **(other or {})}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    return head + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("kind", "sample_format"), [("<u4", 1), ("<i4", 2), ("<i2", 2), ("<f4", 3)])
def test_pixels_without_an_agreed_range_are_left_out_by_that_name(kind: str, sample_format: int) -> None:
    values = np.full((8, 8), 100, kind)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(tiff(values, sample_format)))), values), "a sound TIFF"
    assert outcome(tiff(values, sample_format)) == "unsupported_pixels"
    assert np.abs(seen(tiff(np.full((8, 8), 51400, "<u2"), 1)) - 200).max() == 0


def test_grey_of_scanners_is_neither_dark_nor_negative() -> None:
    packed = np.tile(np.array([0x33, 0x33, 0x33], np.uint8), (8, 4))  # two pixels of 12 bits in three bytes
    assert np.abs(seen(tiff(packed, 1, {256: 8, 258: 12})) - 51).max() == 0
    for values in (np.full((8, 8), 51, "<u1"), np.full((8, 8), 51 * 257, "<u2")):
        assert np.abs(seen(tiff(values, 1, {262: 0})) - 204).max() == 0, "white is zero, as Pillow shows it in 8 bits"


# ------------------------------------------------------------------------------ one way to see, everywhere


def test_a_folder_of_ones_own_images_trains_on_what_the_converter_would_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    image, p3, exif = halves((200, 40, 40), (40, 200, 40)), profile("Display P3", 2.2, P3), Image.Exif()
    exif[0x0112] = 3
    deep = np.repeat(np.array([[32896] * 32 + [51400] * 32], np.uint16), 64, 0)
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.array([[0] * 32 + [255] * 32], np.uint8), 64, 0)))
    files = {
        "deep.png": (encoded(Image.fromarray(deep), "PNG"), (128, 128, 128), (200, 200, 200)),
        "deep.tif": (encoded(Image.fromarray(deep.astype(">u2")), "TIFF"), (128, 128, 128), (200, 200, 200)),
        "p3.png": (encoded(image, "PNG", icc_profile=p3), (221, 0, 17), (0, 205, 0)),
        "p3.jpg": (encoded(image, "JPEG", icc_profile=p3, quality=98), (221, 0, 17), (0, 205, 0)),
        "linear.png": (
            encoded(halves((55,) * 3, (5, 100, 5)), "PNG", icc_profile=profile("l", 1, SRGB)),
            (128,) * 3,
            (37, 168, 37),
        ),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", quality=98), (200, 40, 40), (40, 200, 40)),
        "clear.png": (encoded(clear, "PNG"), (255, 255, 255), (40, 200, 40)),
        "turned.tif": (encoded(image, "TIFF", exif=exif), (40, 200, 40), (200, 40, 40)),
        "turned.webp": (encoded(image, "WEBP", exif=exif, lossless=True), (40, 200, 40), (200, 40, 40)),
    }
    for name, (content, _, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "animated.gif").write_bytes(encoded(image, "GIF", save_all=True, append_images=[halves((0,) * 3, (9,) * 3)]))
    (folder / "empty.png").write_bytes(b"")
    lines = [json.dumps({"file": name, "txt": name}) for name in [*files, "animated.gif", "empty.png"]]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "made", FolderSource(str(folder), image_size=64, multiple=16), {})
    assert "2 of 11 images are left out: 1 animated (several frames), 1 not_an_image" in caplog.text
    dataset = ImageCaptionDataset(str(tmp_path / "made"), "train")
    trained = {s["caption"]: s["image"] for s in (dataset[SampleRequest(i, 64, 64, 0)] for i in range(len(dataset)))}
    statistics = convert("jsonl", folder, tmp_path / "out")
    stored = {row["caption"]: decode_image(row["image"], 64, 64) for row in rows(tmp_path / "out")}
    assert trained.keys() == stored.keys() == files.keys() and statistics["dropped"] == {"animated": 1, "empty_file": 1}
    for name, (_, left, right) in files.items():
        for image in (trained[name], stored[name]):
            assert np.abs(image[:, 32, 12].numpy().astype(int) - left).max() <= 8, name
            assert np.abs(image[:, 32, -12].numpy().astype(int) - right).max() <= 8, name


def test_more_pixels_than_pillow_opens_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match="--max-pixels must lie in 1 to"):
        Settings("jsonl", "in", {"caption": "txt"}, max_pixels=1 << 40)
