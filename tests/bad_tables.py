"""Rows of the table of bad input that are about parquet, arrow, JSON lines and MDS; see `bad_input.py`."""

import base64
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bad_archives import tar
from bad_input import GOOD, Case
from conversions import jpeg, sample
from streaming import MDSWriter
from streaming.base.compression import decompress
from streaming.base.util import merge_index


def lines(*rows: bytes | dict[str, Any]) -> Case:
    """Not a whole case yet: a maker of these lines after a good one, as case."""

    def make(folder: Path) -> None:
        (folder / "a.jpg").write_bytes(GOOD)
        good = {"file": "a.jpg", "txt": "good"}
        encoded = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in (good, *rows)]
        (folder / "all.jsonl").write_bytes(b"\n".join(encoded))

    return Case(make, ("good",), source="jsonl")


def outside(folder: Path) -> None:
    secret = folder.parent / "secret.jpg"
    secret.write_bytes(GOOD)
    os.symlink(secret, folder / "link.jpg")
    named = ({"file": name, "txt": "x"} for name in ("../secret.jpg", str(secret), "link.jpg"))
    lines(*named).make(folder)


def parquet(name: str, content: bytes | None = None) -> Case:
    """A good file, and one of this content."""

    def make(folder: Path) -> None:
        pq.write_table(pa.table({"image": [GOOD], "txt": ["good"]}), folder / "a.parquet")
        if content is not None:
            (folder / name).write_bytes(content)

    return Case(make, ("good",), {"damaged_input": 1}, source="parquet")


def shards(folder: Path, rows: int) -> None:
    """One row per shard."""
    with MDSWriter(out=str(folder), columns={"image": "bytes", "txt": "str"}, size_limit=2000) as writer:
        for number in range(rows):
            writer.write({"image": jpeg(100, 100, number), "txt": f"{number}"})


def without_first_shard(folder: Path) -> None:
    shards(folder, 2)
    (folder / "shard.00000.mds").unlink()


def with_pickle(folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"image": "bytes", "txt": "str", "evil": "pkl"}) as writer:
        writer.write({"image": GOOD, "txt": "good", "evil": {}})


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = base64.b64encode(GOOD).decode()


def table(columns: dict[str, Any], kept: tuple[str, ...] = (), dropped: str = "", refused: str = "") -> Case:
    """A parquet file of one row."""

    def make(folder: Path) -> None:
        pq.write_table(pa.table(columns | {"txt": ["0"]}), folder / "a.parquet")

    return Case(make, kept, {dropped: 1} if dropped else {}, refused, source="parquet")


def decomposed(folder: Path) -> None:
    (folder / unicodedata.normalize("NFD", "café.jpg")).write_bytes(GOOD)
    lines({"file": unicodedata.normalize("NFC", "café.jpg"), "txt": "a café"}).make(folder)


def other_columns(folder: Path) -> None:
    for number, names in enumerate((("image", "txt"), ("image", "text"), ("link", "txt"))):
        pq.write_table(pa.table({names[0]: [GOOD], names[1]: ["good"]}), folder / f"{number}.parquet")


def empty(folder: Path, alone: bool) -> None:
    full = pa.table({"image": [GOOD], "txt": ["good"]})
    pq.write_table(full.schema.empty_table(), folder / "a.parquet")
    if not alone:
        pq.write_table(full, folder / "b.parquet")


def splits(folder: Path) -> None:
    for split, name in (("train", "train-0.parquet"), ("test", "test/0.parquet")):
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [GOOD], "txt": [split]}), folder / name)


def in_encoding(folder: Path, encoding: str) -> None:
    (folder / "a.jpg").write_bytes(GOOD)
    line = json.dumps({"file": "a.jpg", "txt": "кошка на диване"}, ensure_ascii=False)
    (folder / "a.jsonl").write_bytes(f"{line}\r\n".encode(encoding))


def merged(folder: Path) -> None:
    for part in ("0", "1"):
        with MDSWriter(out=str(folder / part), columns={"image": "bytes", "txt": "str"}) as writer:
            writer.write({"image": GOOD, "txt": part})
    merge_index(str(folder), keep_local=True)


def decompressed(folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"image": "bytes", "txt": "str"}, compression="zstd:3") as writer:
        for number in range(2):
            writer.write({"image": GOOD, "txt": f"{number}"})
    for file in folder.glob("*.mds.zstd"):
        file.with_suffix("").write_bytes(decompress("zstd:3", file.read_bytes()))
        file.unlink()


def late(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(GOOD)
    rows = [{"file": "a.jpg", "txt": f"{i}"} | ({"score": 0.5} if i > 55 else {}) for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))


CASES: dict[str, list[Case]] = {
    "truncated or broken parquet, arrow file or shard; a missing shard": [
        parquet("b.parquet", b"PAR1 but not really PAR1"),
        parquet("b.arrow", b"ARROW1 but not really"),
        Case(without_first_shard, ("1",), {"damaged_input": 1}, source="mds"),
    ],
    "line or JSON member that is not JSON, not an object, or nested without end": [
        lines(b"{nonsense", b"[1, 2]", b"[" * 100_000)._replace(dropped={"unreadable_record": 3}),
        Case(tar([*sample("b", GOOD), ("b.json", b"{broken")]), ("first", "last"), {"unreadable_record": 1}),
    ],
    "record without an image, image file that is not there": [
        lines({"txt": "none"}, {"file": "none.jpg", "txt": "x"})._replace(dropped={"no_image": 2})
    ],
    "URL in place of an image": [
        lines({"file": "https://example.com/a.jpg", "txt": "x"})._replace(dropped={"url": 1}),
        table({"image": ["https://example.com/a.jpg"]}, dropped="url"),
    ],
    "image as base64, as a `data:` URI, or as a list of bytes": [
        lines({"file": TEXT, "txt": "x"}, {"file": f"data:image/jpeg;base64,{TEXT}", "txt": "y"})._replace(
            kept=("good", "x", "y")
        ),
        table({"image": [TEXT]}, ("0",)),
        table({"image": pa.array([list(GOOD)], pa.list_(pa.uint8()))}, ("0",)),
    ],
    "name of a file in another Unicode form (`é` as one character or as two)": [
        Case(decomposed, ("good", "a café"), source="jsonl"),
    ],
    "several columns that could hold the images": [
        table({"mask": pa.array([{"bytes": b"", "path": None}], STRUCT), "image": [GOOD]}, ("0",)),
        table({"edges": pa.array([None], STRUCT), "photo": pa.array([None], STRUCT)}, refused="--image edges or --image photo"),
    ],
    "image column that holds a number or nothing, beside one that holds a name": [
        lines({"image": 391895, "file_name": "a.jpg", "txt": "x"}, {"image": None, "file_name": "a.jpg", "txt": "y"})._replace(
            kept=("good", "x", "y")
        )
    ],
    "file of a table without the image or caption column that others have": [
        Case(other_columns, ("good",), {"no_image": 1, "no_caption": 1}, source="parquet")
    ],
    "table, lines or shards that hold nothing": [
        Case(lambda folder: empty(folder, alone=False), ("good",), source="parquet"),
        Case(lambda folder: empty(folder, alone=True), refused="a.parquet .*no rows", source="parquet"),
        Case(lambda folder: (folder / "a.jsonl").touch(), refused="a.jsonl .*zero bytes", source="jsonl"),
        Case(lambda folder: shards(folder, 0), refused="no shards", source="mds"),
    ],
    "training, validation and test files (`train-…`, `test/…`) beside each other, or beside files of no such name": [
        Case(splits, refused="--include 'test/\\*', or --include 'train-\\*'", source="parquet"),
        Case(splits, ("test", "train"), source="parquet", options={"include": "**"}),
    ],
    "text in UTF-16 or UTF-32 with a byte-order mark, UTF-8 with one": [
        Case(lambda folder, e=e: in_encoding(folder, e), ("кошка на диване",), source="jsonl")
        for e in ("utf-16", "utf-32", "utf-8-sig")
    ]
    + [
        Case(tar([("b.jpg", GOOD), ("b.txt", "кошка на диване".encode(e))]), ("first", "кошка на диване", "last"))
        for e in ("utf-16", "utf-32", "utf-8-sig")
    ],
    "UTF-16 without a mark": [
        Case(lambda folder: in_encoding(folder, "utf-16-be"), refused="`iconv -f UTF-16BE -t UTF-8 OLD > NEW`", source="jsonl")
    ],
    "MDS index beside those that it was merged from": [Case(merged, ("0", "1"), source="mds")],
    "shards of a compressed MDS set of which only the decompressed files are there": [
        Case(decompressed, ("0", "1"), source="mds")
    ],
    "column that only later records have": [
        Case(late, tuple(f"{i}" for i in range(60)), source="jsonl", options={"metadata": {"score": ("score", "float")}})
    ],
    "path that leads out of the input folder (`../`, absolute, a symbolic link)": [
        Case(outside, ("good",), {"outside_input": 3}, source="jsonl"),
        Case(outside, ("good", "x"), {"outside_input": 2}, source="jsonl", options={"follow_links": True}),
    ],
    "encoded image or member above 256 MiB, line above 16 MiB": [
        lines(b'{"txt": "' + b"x" * (1 << 24) + b'"}')._replace(dropped={"file_too_large": 1})
    ],
    "pickle column in MDS": [
        Case(with_pickle, ("good",), source="mds"),
        Case(
            with_pickle, refused="of type 'pkl', which is not read", source="mds", options={"metadata": {"evil": ("evil", "str")}}
        ),
    ],
}
