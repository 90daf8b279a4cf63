"""Tables, JSON lines and MDS of people's own kinds: every record is the one that another reader sees, or left out by a reason."""

import base64
import codecs
import io
import json
import random
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import convert, encoded, jpeg, picture, rows, settings
from PIL import Image
from streaming import LocalDataset, MDSWriter
from streaming.base.compression import decompress
from streaming.base.util import merge_index

from prx_composer.data.convert.columns import look
from prx_composer.data.convert.job import as_text, check_columns
from prx_composer.data.convert.records import Record, lookup
from prx_composer.data.convert.sources import open_source
from prx_composer.data.convert.splits import split_of
from prx_composer.data.convert.values import image_of
from prx_composer.errors import UserError

GOOD = jpeg(64, 64)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
WORDS = [
    "",
    " ",
    "plain",
    "zażółć gęślą",
    "кошка на диване.",
    "a 猫 \u2028 and \u0085 and \f",
    "\U0001f63a",
    'quoted " \\ / \t',
    "e\u0301",
]


def read(source: str, path: Path, **changes: Any) -> list[Record]:
    """All records, after the checks that come before a conversion."""
    chosen = settings(source, path, **changes)
    opened = open_source(chosen)
    units = opened.plan()
    check_columns(chosen, opened, units)
    return [record for unit in units for record in opened.read(unit)]


def asked(*names: str) -> dict[str, Any]:
    """Settings that ask for these columns."""
    return {"captions": {f"c{number}": name for number, name in enumerate(names)}}


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


# --------------------------------------------------------------------------------------------------- images as text


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


# ------------------------------------------------------------------------------------------------ tables against pyarrow


def latin(values: list[bytes]) -> pa.Array:
    """Text as it was written by something that doesn't check."""
    return pa.array(values, pa.binary()).view(pa.string())


NESTED: dict[str, tuple[Callable[[pa.Array], pa.Array], str]] = {
    "flat": (lambda text: text, "txt"),
    "large": (lambda text: text.view(pa.binary()).cast(pa.large_binary()).view(pa.large_string()), "txt"),
    "dictionary": (lambda text: pa.DictionaryArray.from_arrays(pa.array(range(len(text)), pa.int32()), text), "txt"),
    "struct": (lambda text: pa.StructArray.from_arrays([text], ["a"]), "txt.a"),
    "struct in a struct": (
        lambda text: pa.StructArray.from_arrays([pa.StructArray.from_arrays([text], ["b"])], ["a"]),
        "txt.a.b",
    ),
    "list": (lambda text: pa.ListArray.from_arrays(pa.array(range(len(text) + 1), pa.int32()), text), "txt.0"),
    "list of structs": (
        lambda text: pa.ListArray.from_arrays(
            pa.array(range(len(text) + 1), pa.int32()), pa.StructArray.from_arrays([text], ["a"])
        ),
        "txt.0.a",
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_text_that_is_not_utf8_costs_its_own_row_wherever_it_stands(tmp_path: Path, kind: str) -> None:
    count, bad = 50, {3, 20, 21, 49}
    wrap, column = NESTED[kind]
    text = wrap(latin([b"caf\xe9" if i in bad else b"row %d" % i for i in range(count)]))
    image = pa.array([jpeg(64, 64, i) for i in range(count)])
    pq.write_table(pa.table({"image": image, "txt": text}), tmp_path / "a.parquet", row_group_size=30)
    table = pq.read_table(tmp_path / "a.parquet")
    readable = []
    for number in range(count):
        try:
            readable.append(lookup(table.slice(number, 1).to_pylist()[0], column))
        except UnicodeDecodeError:
            assert number in bad
    statistics = convert("parquet", tmp_path, tmp_path / "out", captions={"caption": column})
    assert [row["caption"] for row in rows(tmp_path / "out")] == readable and len(readable) == count - len(bad)
    assert statistics["dropped"] == {"caption_not_utf8": len(bad)}


def test_metadata_that_is_not_utf8_is_a_reason_and_never_other_letters(tmp_path: Path) -> None:
    table = {"image": [jpeg(64, 64, 0), jpeg(64, 64, 1)], "txt": ["a", "b"], "by": latin([b"caf\xe9", "café".encode()])}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    statistics = convert("parquet", tmp_path, tmp_path / "out", metadata={"by": ("by", "str")})
    assert [row["by"] for row in rows(tmp_path / "out")] == ["café"] and statistics["dropped"] == {"metadata": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_as_bytes_is_read_by_its_mark(tmp_path: Path, encoding: str) -> None:
    text = pa.array(["кошка на диване".encode(encoding)])
    pq.write_table(pa.table({"image": [GOOD], "txt": text, "list": pa.array([text.to_pylist()])}), tmp_path / "a.parquet")
    options: dict[str, Any] = {"captions": {"caption": "txt", "other": "list"}, "metadata": {"meta": ("txt", "str")}}
    convert("parquet", tmp_path, tmp_path / "out", **options)
    (row,) = rows(tmp_path / "out")
    assert {row["caption"], row["other"], row["meta"]} == {"кошка на диване"}


def test_a_file_name_that_is_not_utf8_costs_nothing_beside_the_bytes(tmp_path: Path) -> None:
    struct = pa.StructArray.from_arrays([pa.array([GOOD] * 3), latin([b"a", b"caf\xe9", b"b"])], ["bytes", "path"])
    pq.write_table(pa.table({"image": struct, "txt": ["0", "1", "2"]}), tmp_path / "a.parquet")
    assert [record.columns["txt"] for record in read("parquet", tmp_path) if record.image == GOOD] == ["0", "1", "2"]


def test_a_value_that_python_has_no_type_for_costs_nothing(tmp_path: Path) -> None:
    struct = pa.StructArray.from_arrays(
        [pa.array(["a", "b"]), pa.array([1, 2_000_000_000], pa.timestamp("ns"))], ["text", "when"]
    )
    pq.write_table(pa.table({"image": [GOOD] * 2, "meta": struct}), tmp_path / "a.parquet")
    found = read("parquet", tmp_path, **asked("meta.text"))
    assert [record.columns["meta"]["text"] for record in found] == ["a", "b"] and not any(r.problem for r in found)


def anything(draw: random.Random, kind: pa.DataType) -> Any:
    """A value of an arrow type, or none."""
    if draw.random() < 0.15:
        return None
    if pa.types.is_struct(kind):
        return {field.name: anything(draw, field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [anything(draw, kind.value_type) for _ in range(draw.randrange(4))]
    if pa.types.is_integer(kind):
        return draw.randrange(-100, 100)
    if pa.types.is_floating(kind):
        return draw.choice([0.5, -3.25, float("inf"), 1e300])
    return draw.choice(WORDS)


TYPES = {
    "text": pa.string(),
    "large": pa.large_string(),
    "coded": pa.dictionary(pa.int32(), pa.string()),
    "number": pa.float64(),
    "count": pa.int64(),
    "tags": pa.list_(pa.string()),
    "many": pa.large_list(pa.struct([("a", pa.string()), ("b", pa.list_(pa.int64()))])),
    "meta": pa.struct([("text", pa.string()), ("inner", pa.struct([("n", pa.float64())])), ("tags", pa.list_(pa.string()))]),
    "dotted.name": pa.string(),
}
NAMES = [
    "text",
    "large",
    "coded",
    "number",
    "count",
    "tags.1",
    "many.0.a",
    "many.1.b.0",
    "meta.text",
    "meta.inner.n",
    "dotted.name",
]


def random_table(draw: random.Random, count: int) -> tuple[pa.Table, list[bytes]]:
    content = [b"image %d" % draw.randrange(10**6) for _ in range(count)]
    forms: list[Callable[[], pa.Array]] = [
        lambda: pa.array(content),
        lambda: pa.array(content, pa.large_binary()),
        lambda: pa.array(content).dictionary_encode(),
        lambda: pa.array([{"bytes": c, "path": draw.choice([None, "x.jpg"])} for c in content], IMAGE),
        lambda: pa.array([list(c) for c in content], pa.list_(pa.uint8())),
        lambda: pa.array([[{"bytes": c, "path": None}] for c in content], pa.list_(IMAGE)),
    ]
    form = draw.randrange(len(forms))
    columns = {name: pa.array([anything(draw, kind) for _ in range(count)], kind) for name, kind in TYPES.items()}
    items = [("images" if form == 5 else "image", forms[form]()), *columns.items()]
    draw.shuffle(items)
    return pa.table(dict(items)), content


@pytest.mark.parametrize("seed", range(12))
def test_records_of_a_table_are_the_rows_that_pyarrow_reads(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    expected: list[tuple[bytes, list[Any]]] = []
    for number in range(2):
        count = draw.randrange(1, 70)
        table, content = random_table(draw, count)
        table = table.rename_columns(["image" if name == "images" else name for name in table.column_names])
        path = tmp_path / f"{number}.{draw.choice(['parquet', 'arrow'])}"
        if path.suffix == ".parquet":
            options = {"use_dictionary": draw.random() < 0.5, "compression": draw.choice(["none", "snappy", "zstd"])}
            pq.write_table(table, path, row_group_size=draw.randrange(1, 30), **options)
            oracle = pq.read_table(path)
        else:
            opened = draw.choice([pa.ipc.new_file, pa.ipc.new_stream])
            with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=draw.randrange(1, 30))
            with pa.memory_map(str(path)) as file:
                oracle = (pa.ipc.open_file if opened is pa.ipc.new_file else pa.ipc.open_stream)(file).read_all()
        expected += [(c, [lookup(row, name) for name in NAMES]) for c, row in zip(content, oracle.to_pylist(), strict=True)]
    found = read("parquet", tmp_path, unit_bytes=draw.choice([1, 5000, 1 << 28]), **asked(*NAMES))
    assert [record.problem for record in found] == [""] * len(expected)
    assert [(record.image, [lookup(record.columns, name) for name in NAMES]) for record in found] == expected


def test_a_row_group_that_breaks_costs_only_itself_and_says_how_much_was_promised(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [jpeg(64, 64, i) for i in range(40)], "txt": [f"{i}" for i in range(40)]})
    pq.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 64] = b"\xff" * 64
    path.write_bytes(content)
    found = read("parquet", path)
    assert [record.columns["txt"] for record in found if not record.problem] == [f"{i}" for i in (*range(10), *range(20, 40))]
    (broken,) = [record for record in found if record.problem]
    assert broken.problem == "damaged_input" and broken.key == "a.parquet, row group 2 of 4"
    with pytest.raises(OSError, match="hrift|page|header") as theirs:
        pq.read_table(path)
    assert str(theirs.value)[:20] in broken.detail and "0 of the 10 records it promised were read" in broken.detail
    statistics = convert("parquet", path, tmp_path / "out")
    assert "0 of the 10 records it promised were read" in as_text(statistics)


def test_tables_without_rows_are_said(tmp_path: Path) -> None:
    schema = pa.schema([("image", IMAGE), ("txt", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "0.parquet")
    with pytest.raises(UserError, match=r"0\.parquet in .*: no rows"):
        read("parquet", tmp_path)
    pq.write_table(pa.table({"image": [jpeg(64, 64)], "txt": ["a"]}), tmp_path / "1.parquet")
    assert "Without rows: 0.parquet." in as_text(convert("parquet", tmp_path, tmp_path / "out"))


def test_what_datasets_keeps_of_later_steps_beside_its_arrow_files_is_passed_over(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.binary()), ("txt", pa.string())])
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.table({"image": [GOOD], "txt": [name]}, schema))
    assert len(read("parquet", tmp_path)) == 2
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert [record.columns["txt"] for record in read("parquet", tmp_path)] == ["data-00000-of-00001.arrow"]


# ---------------------------------------------------------------------------------------------------------- JSON lines


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16 little": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_the_objects_that_json_reads_in_every_encoding_with_a_mark_however_they_are_cut(
    tmp_path: Path, encoding: str, end: str
) -> None:
    draw = random.Random(f"{encoding}{end}")
    objects = [
        {"file": f"{i}.jpg", "txt": draw.choice(WORDS), "more": [draw.choice(WORDS), {"n": draw.random()}], "none": None}
        for i in range(60)
    ]
    texts = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in objects]
    blank = [text if draw.random() < 0.9 else f"{text}{end} " for text in texts]
    (tmp_path / "c.jsonl").write_bytes(ENCODINGS[encoding](end.join(blank) + draw.choice(["", end])))
    for part in (7, 300, 10**6):
        found = read("jsonl", tmp_path, unit_bytes=part * 1000, **asked("txt", "more.0", "more.1.n", "none"))
        assert [record.columns for record in found] == objects, part
        assert len({record.key for record in found}) == len(objects)


def test_utf16_without_a_mark_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    text = json.dumps({"file": "1.jpg", "txt": "кошка на диване."}, ensure_ascii=False) + "\r\n"
    for encoding in ("UTF-16LE", "UTF-16BE"):
        path = tmp_path / encoding / "c.jsonl"
        path.parent.mkdir()
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match="zero bytes") as refused:
            read("jsonl", path)
        command = re.findall("`(.*)`", str(refused.value))[0]
        if shutil.which("iconv"):
            subprocess.run(
                command.replace("OLD", str(path)).replace("NEW", str(path.with_name("n.jsonl"))), shell=True, check=True
            )
            assert read("jsonl", path.with_name("n.jsonl"))[0].columns["txt"] == "кошка на диване."


def test_utf16_that_breaks_off_keeps_what_came_before_and_half_a_pair_is_a_reason(tmp_path: Path) -> None:
    lines = [json.dumps({"file": "no.jpg", "txt": text}, ensure_ascii=False) for text in ("кошка", "half a \ud83d pair", "end")]
    content = "\n".join(lines).encode("utf-16-le", "surrogatepass")
    (tmp_path / "c.jsonl").write_bytes(codecs.BOM_UTF16_LE + content[:-1])
    found = read("jsonl", tmp_path)
    assert [record.columns.get("txt") for record in found[:2]] == ["кошка", "half a \ud83d pair"]
    assert [record.problem for record in found[2:]] == ["unreadable_record", "damaged_input"]
    assert "3 records were read" in found[-1].detail


def test_a_column_that_comes_late_is_taken_and_one_that_never_comes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(GOOD)
    lines = [{"file": "0.jpg", "txt": f"{i}"} | ({"score": i / 10} if i >= 55 else {}) for i in range(70)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    statistics = convert("jsonl", tmp_path, tmp_path / "out", metadata={"score": ("score", "float")})
    assert [row["score"] for row in rows(tmp_path / "out")][55:] == [i / 10 for i in range(55, 70)]
    assert "txt in 70 of 70 records; score in 15 of 70 records" in as_text(statistics)
    with pytest.raises(UserError, match="--metadata: there is no column 'scor' .*Did you mean 'score'"):
        convert("jsonl", tmp_path, tmp_path / "b", metadata={"score": ("scor", "float")})


def test_a_look_ends_where_everything_was_seen_and_says_when_it_was_not_whole(tmp_path: Path) -> None:
    endless = ({"txt": "a", "n": i} for i in range(10**9))
    assert look(endless, settings("jsonl", tmp_path)) == (["n", "txt"], [], False, None, 50)
    found = look(({"n": i} for i in range(10**9)), settings("jsonl", tmp_path), seconds=0.05)
    assert (found.missing, found.whole) == (["txt"], False)
    assert look([{"n": 1}] * 3, settings("jsonl", tmp_path)) == (["n"], ["txt"], True, None, 3)


def test_a_column_inside_that_no_record_has_is_refused_at_the_end_with_a_count(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [GOOD] * 3, "txt": ["a"] * 3, "tags": [["x"], [], ["y", "z"]]}), tmp_path / "a.parquet")
    for name in ("tags.0", "tags.1"):
        convert("parquet", tmp_path, tmp_path / name, metadata={"tag": (name, "str")})
    with pytest.raises(UserError, match=r"--metadata: none of the 3 records .* has a column 'tags.2'"):
        convert("parquet", tmp_path / "a.parquet", tmp_path / "out", metadata={"tag": ("tags.2", "str")})
    assert not (tmp_path / "out" / "train").exists()
    convert("parquet", tmp_path / "a.parquet", tmp_path / "out", metadata={"tag": ("tags.1", "str")})


def test_a_list_or_a_compressed_file_in_place_of_lines_is_said_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps([{"file": "1.jpg", "txt": "a"}]))
    with pytest.raises(UserError, match=r"no .jsonl file in .*c\.json is there: .*jq -c '\.\[\]' OLD\.json > NEW\.jsonl"):
        read("jsonl", tmp_path)
    (tmp_path / "c.json").rename(tmp_path / "c.jsonl.gz")
    with pytest.raises(UserError, match="gunzip"):
        read("jsonl", tmp_path)
    (tmp_path / "c.jsonl.gz").unlink()
    (tmp_path / "c.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.jsonl .*zero bytes"):
        read("jsonl", tmp_path)


# ------------------------------------------------------------------------------------------------------------------ MDS


def write_shards(folder: Path, data: list[dict[str, Any]], columns: dict[str, str], **options: Any) -> None:
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for row in data:
            writer.write(row)


MDS = {"image": "bytes", "txt": "str", "n": "int", "f": "float32", "u": "uint16", "d": "str_float", "j": "json"}


@pytest.mark.parametrize("seed", range(8))
def test_records_of_shards_are_the_samples_that_streaming_reads_whole_compressed_cached_or_merged(
    tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    folder, parts = tmp_path / "in", draw.choice([1, 3])
    compression = draw.choice([None, "zstd:3", "gz:1"]) if parts == 1 else None
    for part in range(parts):
        data = [
            {
                "image": b"image %d" % draw.randrange(10**6),
                "txt": draw.choice(WORDS),
                "n": draw.randrange(-(2**40), 2**40),
                "f": draw.random(),
                "u": draw.randrange(2**16),
                "d": draw.random(),
                "j": {"tags": [draw.choice(WORDS)], "n": draw.randrange(9)},
            }
            for _ in range(draw.randrange(1, 40))
        ]
        where, size_limit = f"{part}" if parts > 1 else "", draw.choice([500, 2000, 1 << 26])
        write_shards(tmp_path / "plain" / where, data, MDS, size_limit=size_limit)
        write_shards(folder / where, data, MDS, size_limit=size_limit, compression=compression)
    if parts > 1:
        merge_index(str(folder), keep_local=True)
        merge_index(str(tmp_path / "plain"), keep_local=True)
    oracle = LocalDataset(str(tmp_path / "plain"))
    expected = [oracle[i] for i in range(len(oracle))]
    if compression and draw.random() < 0.7:  # as a StreamingDataset leaves its cache: decompressed files alone
        for file in folder.glob("*.mds.*"):
            file.with_suffix("").write_bytes(decompress(compression, file.read_bytes()))
            file.unlink()
    names = ["txt", "n", "f", "u", "d", "j.tags.0", "j.n"]
    found = read("mds", folder, unit_bytes=draw.choice([1, 5000, 1 << 28]), **asked(*names))
    assert [record.image for record in found] == [row["image"] for row in expected]
    for record, row in zip(found, expected, strict=True):
        columns = record.columns | {"txt": record.columns["txt"].decode()}
        assert not record.problem and [lookup(columns, name) for name in names] == [lookup(row, name) for name in names]


def test_a_merged_index_beside_its_parts_is_read_once_and_said(tmp_path: Path) -> None:
    for part in ("0", "1"):
        write_shards(tmp_path / "in" / part, [{"image": jpeg(64, 64, int(part)), "txt": part}], {"image": "bytes", "txt": "str"})
    merge_index(str(tmp_path / "in"), keep_local=True)
    statistics = convert("mds", tmp_path / "in", tmp_path / "out")
    assert [row["caption"] for row in rows(tmp_path / "out")] == ["0", "1"]
    assert "index.json: 2 of its 2 shards are in other indexes, too; read once." in as_text(statistics)


def test_shards_by_links_are_opened_when_links_are_followed(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", [{"image": GOOD, "txt": "a"}], {"image": "bytes", "txt": "str"})
    (tmp_path / "in" / "shard.00000.mds").rename(tmp_path / "blob")
    (tmp_path / "in" / "shard.00000.mds").symlink_to(tmp_path / "blob")
    (record,) = read("mds", tmp_path / "in")
    assert record.problem == "damaged_input" and "symbolic link" in record.detail and "--follow-links" in record.detail
    assert read("mds", tmp_path / "in", follow_links=True)[0].image == GOOD


def test_shards_of_splits_are_told_apart_and_include_takes_one(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shards(tmp_path / split, [{"image": GOOD, "txt": split}], {"image": "bytes", "txt": "str"})
    with pytest.raises(UserError, match=r"holds several splits.*--include 'train/\*', or --include 'val/\*'"):
        read("mds", tmp_path)
    assert [record.columns["txt"] for record in read("mds", tmp_path, include="val/*")] == [b"val"]
    assert len(read("mds", tmp_path, include="**")) == 2
    with pytest.raises(UserError, match=r"no index.json of MDS shards in .* of the pattern --include 'test/\*'"):
        read("mds", tmp_path, include="test/*")


def test_a_broken_sample_or_value_of_a_shard_costs_only_itself_and_the_promise_is_said(tmp_path: Path) -> None:
    columns = {"image": "bytes", "txt": "str", "d": "str_float"}
    write_shards(tmp_path, [{"image": GOOD, "txt": f"{i}", "d": i / 2} for i in range(5)], columns)
    shard = tmp_path / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    begins = memoryview(content)[4 : 4 * 7].cast("I").tolist()
    content[begins[1] : begins[1] + 4] = b"\xff" * 4  # a size that leads out of the sample
    number = content.index(b"1.5")
    content[number : number + 3] = b"x.y"
    shard.write_bytes(content)
    found = read("mds", tmp_path, metadata={"d": ("d", "float")})
    assert [record.columns["txt"] for record in found if not record.problem] == [b"0", b"2", b"4"]
    assert [record.problem for record in found if record.problem] == ["unreadable_record", "damaged_input"]
    assert "a sample ends early; 4 of the 5 records it promised were read" in found[-1].detail


def test_images_of_every_encoding_are_known_and_what_is_none_is_refused_by_name(tmp_path: Path) -> None:
    write_shards(tmp_path / "jpeg", [{"photo": picture(64, 64), "txt": "a"}], {"photo": "jpeg", "txt": "str"})
    index = tmp_path / "jpeg" / "index.json"
    index.write_text(index.read_text().replace('"jpeg"', '"jpeg:90"'))  # as a later streaming writes
    assert read("mds", tmp_path / "jpeg")[0].image_column == "photo"
    write_shards(tmp_path / "text", [{"image": TEXT, "txt": "a"}], {"image": "str", "txt": "str"})
    assert read("mds", tmp_path / "text", image="image")[0].image == GOOD
    write_shards(tmp_path / "pil", [{"image": picture(64, 64), "txt": "a"}], {"image": "pil", "txt": "str"})
    with pytest.raises(UserError, match="--image image: a column of type 'pil'; encoded files"):
        read("mds", tmp_path / "pil", image="image")
    two = {"a": "png", "b": "png", "txt": "str"}
    write_shards(tmp_path / "two", [{"a": picture(64, 64), "b": picture(64, 64), "txt": "a"}], two)
    with pytest.raises(UserError, match="--image: a, b could each hold the images"):
        read("mds", tmp_path / "two")


# --------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("Training Data.jsonl", "train"),
        ("data/val2017_000.tar", "validation"),
        ("validation/0.parquet", "validation"),
        ("valid.parquet", "validation"),
        ("dev/0.parquet", "validation"),
        ("test/train-things.parquet", "train"),
        ("test/0.parquet", "test"),
        ("train/64x64/index.json", "train"),
        ("heldout/64x64/index.json", "heldout"),
        ("trainer.parquet", None),
        ("contest.parquet", None),
        ("00000.tar", None),
        ("value/developers/latest.parquet", None),
    ],
)
def test_a_path_says_its_split_in_a_whole_word(path: str, split: str | None) -> None:
    found = split_of(path)
    assert (found and found.split) == split


def test_files_that_name_one_split_or_none_are_read_together(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "more.jsonl"):
        (tmp_path / name).write_text(json.dumps({"file": "no.jpg", "txt": name}))
    assert len(read("jsonl", tmp_path)) == 3
    (tmp_path / "val[1].jsonl").write_text(json.dumps({"file": "no.jpg", "txt": "x"}))
    with pytest.raises(UserError, match=r"--include 'train-\*', or --include 'val\[\[\]\*'"):
        read("jsonl", tmp_path)
    assert [record.columns["txt"] for record in read("jsonl", tmp_path, include="val[[]*")] == ["x"]
