"""Rows of the table of bad input that are about parquet, arrow, JSON lines and MDS; see `bad_input.py`."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from bad_archives import tar
from bad_input import GOOD, Case
from conversions import jpeg, sample
from streaming import MDSWriter


def lines(*rows: bytes | dict[str, str]) -> Case:
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
    "record without an image, image file that is not there, a URL": [
        lines({"txt": "none"}, {"file": "none.jpg", "txt": "x"}, {"file": "https://example.com/a.jpg", "txt": "x"})._replace(
            dropped={"no_image": 3}
        )
    ],
    "path that leads out of the input folder (`../`, absolute, a symbolic link)": [
        Case(outside, ("good",), {"outside_input": 3}, source="jsonl")
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
