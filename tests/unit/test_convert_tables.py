"""Tables: every record is the row that pyarrow reads, or left out by a reason."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import WORDS, asked, convert, jpeg, read, rows, sample, write_tar

from prx_composer.commands.convert.outcome import as_text
from prx_composer.commands.convert.records import lookup
from prx_composer.common.errors import UserError

GOOD = jpeg(64, 64)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


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


@pytest.mark.parametrize("text", ["a cat", "кошка сидит", "猫 in a box"])
def test_text_in_utf16_without_a_mark_is_never_other_letters(tmp_path: Path, text: str) -> None:
    members = [*sample("0", GOOD), ("1.jpg", GOOD), ("1.txt", text.encode("utf-16-le"))]
    statistics = convert("webdataset", write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert statistics["dropped"] == {"caption_not_utf8": 1} and statistics["counts"]["kept"] == 1


def test_whole_numbers_of_64_bits_are_kept_to_the_last_digit(tmp_path: Path) -> None:
    numbers = [2**60 + 1, -(2**63), 2**53 + 1, 0]
    table = {"image": [GOOD] * 5, "txt": ["a"] * 5, "id": [*numbers, None], "text": [*map(str, numbers), "1.5"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    statistics = convert("parquet", tmp_path, tmp_path / "out", metadata={"id": ("id", "int"), "text": ("text", "int")})
    assert [row["id"] for row in rows(tmp_path / "out")] == [row["text"] for row in rows(tmp_path / "out")] == numbers
    assert statistics["dropped"] == {"metadata": 1}
    floats = {"image": [GOOD] * 2, "txt": ["a"] * 2, "id": [2.0, 2.5]}
    pq.write_table(pa.table(floats), tmp_path / "a.parquet")
    convert("parquet", tmp_path, tmp_path / "floats", metadata={"id": ("id", "int")})
    assert [row["id"] for row in rows(tmp_path / "floats")] == [2]


@pytest.mark.parametrize("value", [["one", "two"], {"en": "one"}, [{"role": "one"}], [{"from": "one"}, {"from": "two"}]])
def test_a_caption_that_is_several_says_what_to_type_until_it_is_text(tmp_path: Path, value: Any) -> None:
    pq.write_table(pa.table({"image": [GOOD], "txt": [value]}), tmp_path / "a.parquet")
    column = "txt"
    for _ in range(3):
        try:
            convert("parquet", tmp_path, tmp_path / "out", captions={"caption": column})
            break
        except UserError as error:
            option = re.search("--caption (\\S+) takes", str(error))
            inside = re.search(" holds (\\w+)", str(error))
            assert option is not None
            column = option[1].replace("NAME", inside[1] if inside else "")
    assert [row["caption"] for row in rows(tmp_path / "out")] == ["one"] and column != "txt"


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
