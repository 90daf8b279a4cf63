"""Where the images of tables and lines are: the column that holds them, and images as text or numbers in place of files."""

import base64
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import convert, encoded, jpeg, picture, read, rows
from PIL import Image

from prx_composer.commands.convert.outcome import as_text
from prx_composer.commands.convert.records import image_of
from prx_composer.common.errors import UserError

GOOD = jpeg(64, 64)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


# ------------------------------------------------------------------------------------------- the column of the images


def images(*colours: str) -> pa.Array:
    return pa.array([{"bytes": encoded(Image.new("RGB", (64, 64), colour)), "path": None} for colour in colours], IMAGE)


def test_of_two_columns_of_images_the_one_called_image_is_taken_and_said(tmp_path: Path) -> None:
    table = {"conditioning_image": images("black"), "txt": ["red"], "image": images("red")}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    statistics = convert("parquet", tmp_path / "a.parquet", tmp_path / "out", single_colour=True)
    stored = Image.open(io.BytesIO(rows(tmp_path / "out")[0]["image"])).getpixel((9, 9))
    assert stored == (254, 0, 0) and "images from image; txt in 1 of 1 records" in as_text(statistics)


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"photo": images("red")}, "photo"),
        ({"jpg": pa.array([GOOD])}, "jpg"),
        ({"file_name": pa.array(["a.jpg"])}, "file_name"),
        ({"image": pa.array([391895]), "file_name": pa.array(["a.jpg"])}, "file_name"),
        ({"image": pa.array([None]), "png": pa.array([GOOD], pa.large_binary())}, "png"),
        ({"path": pa.array(["elsewhere/a.jpg"]), "jpg": pa.array([GOOD])}, "jpg"),
        ({"img": pa.array([GOOD]), "image": pa.array(["a.jpg"])}, "image"),
        ({"image": pa.array(["a.jpg"]).dictionary_encode(), "mask": images("red")}, "image"),
        ({"edges": images("red"), "photo": images("blue")}, ["edges", "photo"]),
        ({"jpg": pa.array([GOOD]), "png": pa.array([GOOD])}, ["jpg", "png"]),
        ({"path": pa.array(["a.jpg"]), "file_name": pa.array(["a.jpg"])}, ["path", "file_name"]),
        ({"picture": pa.array([GOOD])}, []),
        ({"image": pa.array([1])}, []),
    ],
)
def test_the_column_of_the_images_is_the_only_one_or_is_asked_for(
    tmp_path: Path, columns: dict[str, pa.Array], taken: str | list[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD)
    pq.write_table(pa.table(columns | {"txt": ["x"]}), tmp_path / "a.parquet")
    if isinstance(taken, str):
        (record,) = read("parquet", tmp_path)
        assert record.image_column == taken and record.image is not None and not record.problem
        return
    with pytest.raises(UserError, match="--image") as refused:
        read("parquet", tmp_path)
    assert re.findall(r"--image (\w+)", str(refused.value)) == taken
    for name in taken:
        assert read("parquet", tmp_path, image=name)[0].image_column == name


def test_files_that_hold_their_images_in_different_columns_are_refused_and_one_without_is_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photo": images("red"), "txt": ["a"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"url": ["http://x/1.jpg"] * 2, "txt": ["b", "c"]}), tmp_path / "1.parquet")
    statistics = convert("parquet", tmp_path, tmp_path / "out", single_colour=True)
    assert statistics["counts"]["kept"] == 1 and statistics["dropped"] == {"no_image": 2}
    assert "Without a column 'photo': 1.parquet." in as_text(statistics)
    pq.write_table(pa.table({"picture": images("red"), "txt": ["a"]}), tmp_path / "2.parquet")
    with pytest.raises(UserError, match="different columns: photo in 0.parquet; picture in 2.parquet"):
        read("parquet", tmp_path)
    assert len(read("parquet", tmp_path, image="photo", include="0*")) == 1


def test_shards_of_a_table_that_call_the_caption_otherwise_are_counted_and_said(tmp_path: Path) -> None:
    for name in ("txt", "caption"):
        pq.write_table(pa.table({"image": images("red"), name: ["a"]}), tmp_path / f"{name}.parquet")
    statistics = convert("parquet", tmp_path, tmp_path / "out", single_colour=True)
    assert statistics["dropped"] == {"no_caption": 1}
    assert "Without a column 'txt': caption.parquet." in as_text(statistics)


def test_a_key_that_is_no_text_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(GOOD)
    lines = [
        {"image": 391895, "file_name": "1.jpg", "txt": "by id"},
        {"image": None, "file_name": "1.jpg", "txt": "null"},
        {"image": "1.jpg", "file_name": "2.jpg", "txt": "by name"},
        {"image": 391895, "txt": "none"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read("jsonl", tmp_path)
    assert [record.image_column for record in found] == ["file_name", "file_name", "image", ""]
    assert [record.problem for record in found] == ["", "", "", "no_image"]
    statistics = convert("jsonl", tmp_path, tmp_path / "out", metadata={"id": ("image", "str")})
    assert "images from file_name (2); images from image (1)" in as_text(statistics)


def test_a_line_without_the_key_that_was_asked_for_has_no_image(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(GOOD)
    lines = [{"photo": "1.jpg", "txt": "a"}, {"txt": "b"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [record.problem for record in read("jsonl", tmp_path, image="photo")] == ["", "no_image"]


def test_base64_that_ends_in_half_a_surrogate_pair_is_decoded_as_far_as_it_goes(tmp_path: Path) -> None:
    text = base64.b64encode(GOOD).decode() + "\ud800"
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": text, "txt": "a"}))
    assert read("jsonl", tmp_path)[0].image == GOOD


def test_lines_with_several_keys_of_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"file": "1.jpg", "path": "x/1.jpg", "txt": "a"}))
    with pytest.raises(UserError, match=r"--image: file, path could .*: --image file or --image path\."):
        read("jsonl", tmp_path)
    assert read("jsonl", tmp_path, image="file")[0].problem == "no_image"
    with pytest.raises(UserError, match="--image fil: there is no such column. Did you mean 'file'"):
        read("jsonl", tmp_path, image="fil")


@pytest.mark.parametrize("source", ["parquet", "jsonl"])
def test_addresses_alone_are_refused_with_what_downloads_them(tmp_path: Path, source: str) -> None:
    row = {"URL": "https://example.com/1.jpg", "txt": "a"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="--image: say which.* there are URL, txt. If URL holds addresses.*img2dataset"):
        read(source, tmp_path)
    assert read(source, tmp_path, image="URL")[0].problem == "url"


# ----------------------------------------------------------------------------------------------------- images as text


TEXT = base64.b64encode(GOOD).decode()
BROKEN = TEXT[:-200] + "!" + TEXT[-199:]


@pytest.mark.parametrize(
    ("value", "content", "problem"),
    [
        (TEXT, GOOD, ""),
        (TEXT.rstrip("="), GOOD, ""),
        (TEXT.replace("+", "-").replace("/", "_"), GOOD, ""),
        (base64.encodebytes(GOOD).decode(), GOOD, ""),
        (TEXT.encode(), GOOD, ""),
        (f"data:image/jpeg;base64,{TEXT}", GOOD, ""),
        ({"bytes": TEXT, "path": "1.jpg"}, GOOD, ""),
        ({"bytes": None, "path": "here.jpg"}, GOOD, ""),
        ([{"bytes": GOOD, "path": None}], GOOD, ""),
        (list(GOOD), GOOD, ""),
        ("here.jpg", GOOD, ""),
        ("https://example.com/1.jpg", None, "url"),
        ("s3://bucket/1.jpg", None, "url"),
        ("nowhere.jpg", None, "no_image"),
        ("nowhere/with/a/long/name/of/more/than/forty/characters", None, "no_image"),
        (None, None, "no_image"),
        (5, None, "no_image"),
        ("", None, "no_image"),
        ([{"bytes": GOOD}, {"bytes": GOOD}], None, "several_images"),
        ([[[0, 0, 0]]], None, "unreadable_record"),
        ([256], None, "unreadable_record"),
    ],
)
def test_an_image_as_text_or_numbers_is_decoded_and_what_is_none_has_a_reason(
    value: Any, content: bytes | None, problem: str
) -> None:
    found = image_of(value, lambda name: (GOOD, "", "") if name == "here.jpg" else (None, "no_image", ""))
    assert found[:2] == (content, problem)


def test_every_format_is_known_by_its_first_bytes_in_base64_and_broken_base64_is_a_broken_image(tmp_path: Path) -> None:
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"):
        if kind == "AVIF" and ".avif" not in Image.registered_extensions():
            continue
        content = encoded(picture(64, 64), kind)
        assert image_of(base64.b64encode(content).decode(), lambda _: (None, "no_image", "")) == (content, "", ""), kind
    lines = [{"image": BROKEN, "txt": "broken"}, {"image": TEXT, "txt": "whole"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert convert("jsonl", tmp_path, tmp_path / "out")["dropped"] == {"truncated_image": 1}


def test_base64_addresses_and_numbers_in_a_table(tmp_path: Path) -> None:
    columns = {
        "base64": pa.array([TEXT]),
        "address": pa.array(["https://example.com/1.jpg"]),
        "uint8": pa.array([list(GOOD)], pa.list_(pa.uint8())),
    }
    for name, column in columns.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"image": column, "txt": ["a"]}), tmp_path / name / "a.parquet")
        (record,) = read("parquet", tmp_path / name)
        assert (record.image, record.problem) == ((None, "url") if name == "address" else (GOOD, ""))


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_a_name_is_found_however_its_letters_are_composed(tmp_path: Path, stored: Any, written: Any) -> None:
    (tmp_path / unicodedata.normalize(stored, "é")).mkdir()
    (tmp_path / unicodedata.normalize(stored, "é") / unicodedata.normalize(stored, "café.jpg")).write_bytes(GOOD)
    name = unicodedata.normalize(written, "é/café.jpg")
    (tmp_path / "c.jsonl").write_text(json.dumps({"file": name, "txt": "a"}))
    pq.write_table(pa.table({"image": [name], "txt": ["a"]}), tmp_path / "c.parquet")
    assert read("jsonl", tmp_path)[0].image == GOOD == read("parquet", tmp_path)[0].image
