"""Bad input: each kind has the outcome that recipes/data/README.md states, nothing executes, nothing escapes, the job goes on."""

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_pictures import POSTSCRIPT, animation, bomb
from conversions import convert, encoded, jpeg, picture, rows, sample, settings, write_tar
from PIL import Image, ImageCms
from streaming import MDSWriter

from prx_composer.commands.convert.outcome import REASONS, Dropped, Kept
from prx_composer.commands.convert.records import Record
from prx_composer.commands.convert.units import convert as convert_sample
from prx_composer.common.errors import UserError
from prx_composer.data.decoding import FORMATS

GOOD = jpeg(100, 100)


def outcome(
    image: bytes | None, caption: Any = "a caption", columns: dict[str, Any] | None = None, **changes: Any
) -> Kept | Dropped:
    record = Record("key", image, {"txt": caption} | (columns or {}))
    return convert_sample(record, settings("webdataset", Path("nowhere"), **changes))


def shown(kept: Kept | Dropped) -> np.ndarray:
    """The stored pixels."""
    assert isinstance(kept, Kept)
    return np.asarray(Image.open(io.BytesIO(kept.row["image"])).convert("RGB")).astype(int)


DROPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "zero bytes": (lambda: b"", "empty_file"),
    "text instead of an image": (lambda: b"<html>404 not found</html>", "not_an_image"),
    "PostScript, which an interpreter would run": (lambda: POSTSCRIPT, "not_an_image"),
    "a cut JPEG": (lambda: GOOD[: len(GOOD) // 2], "truncated_image"),
    "a cut PNG": (lambda: encoded(picture(100, 100), "PNG")[:-400], "truncated_image"),
    "a decompression bomb": (bomb, "too_many_pixels"),
    "an animation": (animation, "animated"),
    "floating-point pixels": (lambda: encoded(Image.new("F", (80, 80), 0.5), "TIFF"), "unsupported_pixels"),
    "one colour": (lambda: encoded(Image.new("RGB", (100, 100), "red")), "single_colour"),
    "no image": (lambda: None, "no_image"),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_an_image_that_cannot_be_trained_on_is_left_out_by_a_named_reason(kind: str) -> None:
    make, reason = DROPPED[kind]
    found = outcome(make())
    assert isinstance(found, Dropped) and found.reason == reason and reason in REASONS


def test_a_bomb_is_refused_by_its_header_without_its_pixels_being_made() -> None:
    import tracemalloc

    tracemalloc.start()
    outcome(bomb())
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no_caption"),
        (float("nan"), "no_caption"),
        ("  \n ", "no_caption"),
        (7, "no_caption"),
        (b"caf\xe9 on a table", "caption_not_utf8"),
        ("half a \ud83d pair", "caption_not_utf8"),
    ],
)
def test_a_caption_that_is_none_is_a_reason(caption: Any, reason: str) -> None:
    found = outcome(GOOD, caption)
    assert isinstance(found, Dropped) and found.reason == reason


def test_a_caption_may_begin_with_a_byte_order_mark_and_hold_zeros() -> None:
    found = outcome(GOOD, b"\xef\xbb\xbfa \x00cat\n")
    assert isinstance(found, Kept) and found.row["caption"] == "a cat"


def test_of_several_captions_a_missing_one_takes_the_first_that_is_there() -> None:
    captions = {"short": "short", "long": "long"}
    found = outcome(GOOD, columns={"long": "a long one"}, captions=captions)
    assert isinstance(found, Kept) and found.filled and found.row["short"] == found.row["long"] == "a long one"


@pytest.mark.parametrize(
    ("value", "kind", "stored"),
    [
        (float("nan"), "float", "nan"),
        (None, "float", "nan"),
        ("5.5", "float", 5.5),
        ("much", "float", None),
        (float("nan"), "int", None),
        (None, "int", None),
        (2**70, "int", None),
        (3.0, "int", 3),
        (None, "str", ""),
        ("\ud800", "str", None),
    ],
)
def test_metadata_of_another_type_is_a_reason_and_a_missing_number_is_nan(value: Any, kind: str, stored: Any) -> None:
    found = outcome(GOOD, columns={"score": value}, metadata={"score": ("score", kind)})
    if stored is None:
        assert isinstance(found, Dropped) and found.reason == "metadata"
    else:
        assert isinstance(found, Kept) and str(found.row["score"]) == str(stored)


# -------------------------------------------------------------------------------- odd, but an image


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90°
    image = Image.new("RGB", (192, 96), "red")
    image.paste((0, 0, 255), (0, 0, 96, 96))  # the left half, which becomes the upper one
    found = outcome(encoded(image, exif=exif, quality=98))
    assert isinstance(found, Kept) and found.bucket.height > found.bucket.width and found.measured[:2] == (192, 96)
    pixels = shown(found)
    assert pixels[2, :, 2].min() > 200 and pixels[-3, :, 0].min() > 200
    assert 0x0112 not in Image.open(io.BytesIO(found.row["image"])).getexif()


def test_malformed_exif_says_nothing() -> None:
    assert isinstance(outcome(encoded(picture(100, 100), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")), Kept)


def test_cmyk_is_shown_as_it_prints() -> None:
    image = picture(100, 100)
    difference = shown(outcome(encoded(image.convert("CMYK"), quality=98))) - shown(outcome(encoded(image, quality=98)))
    assert np.abs(difference).mean() < 6


def test_palette_and_transparency_are_laid_over_white() -> None:
    image = picture(100, 100)
    assert np.abs(shown(outcome(encoded(image.quantize(255), "PNG"))) - shown(outcome(encoded(image, "PNG")))).mean() < 8
    image.putalpha(Image.linear_gradient("L").resize((100, 100)))  # clear above, opaque below
    found = shown(outcome(encoded(image, "PNG")))
    assert found[0].min() > 245 and found[-1].min() < 245
    clear = Image.new("P", (100, 100))
    clear.putpalette([255, 0, 0, 0, 0, 255])
    clear.paste(1, (0, 50, 100, 100))
    assert shown(outcome(encoded(clear, "GIF", transparency=0)))[:20].min() > 245


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 128).astype(np.uint16), (128, 1))
    found = shown(outcome(encoded(Image.fromarray(ramp), kind)))
    assert found[:, 0].max() < 12 and found[:, -1].min() > 243 and np.abs(found[:, 32].mean() - 128) < 4


def test_grey_and_two_level_images_become_rgb() -> None:
    for mode in ("L", "1", "LA"):
        assert shown(outcome(encoded(picture(100, 100).convert(mode), "PNG"))).shape == (64, 64, 3)


def test_the_suffix_is_not_believed() -> None:
    assert isinstance(outcome(encoded(picture(100, 100), "WEBP")), Kept), "named .jpg in every tar of this file"


def test_another_colour_space_becomes_srgb_and_a_broken_profile_says_nothing() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = shown(outcome(encoded(picture(100, 100), quality=98)))
    for profile in (b"not a profile", lab, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert np.array_equal(shown(outcome(encoded(picture(100, 100), quality=98, icc_profile=profile))), plain)


def test_the_smallest_and_the_longest_image_are_images() -> None:
    assert isinstance(outcome(encoded(picture(1, 1)), single_colour=True), Kept)
    assert shown(outcome(encoded(picture(5, 3000)))).shape[1] > 64
    found = outcome(encoded(picture(5, 3000)), max_aspect=3.0)
    assert isinstance(found, Dropped) and found.reason == "max_aspect"


# ------------------------------------------------------------------------------------------ tars


def around(bad: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [*sample("a", jpeg(100, 100, 1), "first"), *bad, *sample("z", jpeg(100, 100, 2), "last")]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([("b.txt", b"alone")], "no_image"),
        ([("b.jpg", GOOD)], "no_caption"),
        ([("b.jpg", GOOD), ("b.txt", b"x"), ("b.json", b"{broken")], "unreadable_record"),
        ([("b.jpg", GOOD), ("b.txt", b"x"), ("b.json", b"[" * 200_000)], "unreadable_record"),
        ([("b.jpg", b""), ("b.txt", b"x")], "empty_file"),
    ],
)
def test_a_bad_sample_of_a_tar_costs_only_itself(tmp_path: Path, bad: list[tuple[str, bytes]], reason: str) -> None:
    tar = write_tar(tmp_path / "in.tar", around(bad))
    statistics = convert("webdataset", tar, tmp_path / "out")
    assert [row["caption"] for row in rows(tmp_path / "out")] == ["first", "last"]
    assert statistics["dropped"] == {reason: 1} and statistics["counts"] == {"read": 3, "kept": 2} | {
        name: count for name, count in statistics["counts"].items() if name not in ("read", "kept")
    }


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "broken header", "cut gzip", "no tar at all"])
def test_a_damaged_tar_gives_what_was_readable_and_is_counted(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "in"
    for number in range(2):
        members = [part for i in range(4) for part in sample(f"{number}{i}", jpeg(100, 100, 4 * number + i), f"{number} {i}")]
        write_tar(folder / f"{number}.tar", members)
    path = folder / "0.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    if damage == "cut in a member":
        content = content[: headers[4] + 700]
    elif damage == "cut in a header":
        content = content[: headers[4] + 100]
    elif damage == "broken header":
        content[headers[4] + 20 : headers[4] + 200] = b"\xff" * 180
    elif damage == "cut gzip":
        content = gzip.compress(bytes(content))
        content = content[: len(content) // 2]
    else:
        content = b"what is this" * 1000
    path.write_bytes(content)
    statistics = convert("webdataset", folder, tmp_path / "out")
    captions = [row["caption"] for row in rows(tmp_path / "out")]
    assert captions[-4:] == ["1 0", "1 1", "1 2", "1 3"] and statistics["dropped"]["damaged_input"] == 1
    assert captions[:-4] == [f"0 {i}" for i in range(len(captions) - 4)]
    assert len(captions) == {"cut gzip": len(captions), "no tar at all": 4}.get(damage, 6)


def test_nothing_in_a_tar_leads_out_of_the_output(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(100, 100, 9))
    path = tmp_path / "in" / "0.tar"
    write_tar(path, around([*sample("../../../escaped", GOOD, "up"), *sample(f"{tmp_path}/absolute", GOOD, "root")]))
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.jpg"), (tarfile.LNKTYPE, "hard.jpg"), (tarfile.CHRTYPE, "device.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    before = set(tmp_path.rglob("*"))
    convert("webdataset", path.parent, tmp_path / "out")
    new = set(tmp_path.rglob("*")) - before
    assert all(p.is_relative_to(tmp_path / "out") for p in new) and not Path("/escaped.jpg").exists()
    found = rows(tmp_path / "out")
    assert [row["caption"] for row in found] == ["first", "up", "root", "last"], "names are only labels"


def test_a_huge_member_is_skipped_unread(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    header = tarfile.TarInfo("b.jpg")
    header.size = 300 << 20
    with path.open("wb") as file:  # sparse on disk
        file.write(header.tobuf())
        file.seek(512 + header.size)
        rest = io.BytesIO()
        with tarfile.open(fileobj=rest, mode="w") as tar:
            for name, content in sample("c", GOOD):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        file.write(rest.getvalue())
    statistics = convert("webdataset", path, tmp_path / "out")
    assert statistics["dropped"] == {"file_too_large": 1} and len(rows(tmp_path / "out")) == 1


# ------------------------------------------------------------------------------- parquet, lines, MDS


def test_a_line_can_name_no_file_outside_and_a_bad_line_costs_only_itself(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(GOOD)
    (tmp_path / "secret.jpg").write_bytes(GOOD)
    os.symlink(tmp_path / "secret.jpg", folder / "images" / "link.jpg")
    lines: list[bytes] = [
        json.dumps({"file": name, "txt": name}).encode()
        for name in ("images/a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "images/link.jpg", "images/none.jpg", "a\0b")
    ]
    lines += [b"{nonsense", b"[1, 2]", b'{"file": "images/a.jpg", "txt": "\xff"}', b'{"txt": "no file"}', b"", b"[" * 100_000]
    (folder / "all.jsonl").write_bytes(b"\n".join(lines))
    statistics = convert("jsonl", folder, tmp_path / "out")
    assert [row["caption"] for row in rows(tmp_path / "out")] == ["images/a.jpg"]
    assert statistics["dropped"] == {"outside_input": 3, "no_image": 3, "unreadable_record": 3, "caption_not_utf8": 1}


def test_bad_rows_of_parquet_cost_only_themselves(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    images = [{"bytes": b, "path": p} for b, p in ((GOOD, None), (None, None), (None, "../x.jpg"), (b"", "a.jpg"), (GOOD, "a"))]
    captions = pa.array([b"good", b"none", b"out", b"empty", b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": images, "txt": captions}), tmp_path / "in" / "a.parquet")
    for name, content in (("b", b""), ("c", b"PAR1 but not really PAR1")):
        (tmp_path / "in" / f"{name}.parquet").write_bytes(content)
    statistics = convert("parquet", tmp_path / "in", tmp_path / "out")
    assert [row["caption"] for row in rows(tmp_path / "out")] == ["good"]
    assert statistics["dropped"] == {"no_image": 2, "outside_input": 1, "caption_not_utf8": 1, "damaged_input": 2}


class Owned:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["OWNED"],)


def test_a_pickle_column_is_read_around_and_refused_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWNED", str(tmp_path / "owned"))
    with MDSWriter(out=str(tmp_path / "in"), columns={"image": "bytes", "txt": "str", "evil": "pkl"}) as writer:
        writer.write({"image": GOOD, "txt": "good", "evil": Owned()})
    convert("mds", tmp_path / "in", tmp_path / "out")
    assert [row["caption"] for row in rows(tmp_path / "out")] == ["good"] and not (tmp_path / "owned").exists()
    with pytest.raises(UserError, match="evil: of type 'pkl', which is not read"):
        convert("mds", tmp_path / "in", tmp_path / "b", metadata={"evil": ("evil", "str")})
    monkeypatch.setenv("OWNED", "/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pickle.loads(pickle.dumps(Owned()))  # it would have run
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["cut", "offsets", "name", "missing"])
def test_a_damaged_shard_costs_only_itself(tmp_path: Path, damage: str) -> None:
    with MDSWriter(out=str(tmp_path / "in"), columns={"image": "bytes", "txt": "str"}, size_limit=4000) as writer:
        for number in range(6):
            writer.write({"image": jpeg(100, 100, number), "txt": f"{number}"})
    shard, index = tmp_path / "in" / "shard.00000.mds", tmp_path / "in" / "index.json"
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(content[:200])
    elif damage == "offsets":
        content[4:12] = b"\xff" * 8
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    else:
        secret = tmp_path / "secret.mds"
        shard.rename(secret)
        parsed = json.loads(index.read_text())
        parsed["shards"][0]["raw_data"]["basename"] = "../secret.mds"
        index.write_text(json.dumps(parsed))
    statistics = convert("mds", tmp_path / "in", tmp_path / "out")
    assert statistics["dropped"] == {"damaged_input": 1} and 0 < len(rows(tmp_path / "out")) < 6


def test_keys_are_printable_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", sample("bad\x1b[31mname\n", GOOD))
    convert("webdataset", tmp_path / "in.tar", tmp_path / "out")
    assert rows(tmp_path / "out")[0]["key"].isprintable()


def test_every_reason_is_documented() -> None:
    text = (Path(__file__).parents[2] / "recipes" / "data" / "README.md").read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in text] == []
    assert [name for name in FORMATS if name not in text] == []
