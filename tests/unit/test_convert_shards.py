"""MDS: every record is the sample that mosaicml-streaming reads, or left out by a reason; and splits of any input."""

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from conversions import WORDS, asked, convert, jpeg, picture, read, rows
from streaming import LocalDataset, MDSWriter
from streaming.base.compression import decompress
from streaming.base.util import merge_index

from prx_composer.commands.convert.outcome import as_text
from prx_composer.commands.convert.records import lookup
from prx_composer.commands.convert.settings import split_of
from prx_composer.common.errors import UserError

GOOD = jpeg(64, 64)
TEXT = base64.b64encode(GOOD).decode()


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


# ------------------------------------------------------------------------------------------------------------- splits


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


@pytest.mark.parametrize("other", ["cats_test.jsonl", "val/cats.jsonl", "heldout.jsonl"])
def test_a_file_of_no_split_is_not_mixed_with_those_to_test_on(tmp_path: Path, other: str) -> None:
    for name in ("cats.jsonl", "dogs.jsonl", other):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"file": "no.jpg", "txt": name}))
    with pytest.raises(UserError, match=r"the others: cats.jsonl, dogs.jsonl.*Give the files of the others a folder") as refused:
        read("jsonl", tmp_path)
    one, mixed = re.findall("--include '([^']*)'", str(refused.value))
    assert [record.columns["txt"] for record in read("jsonl", tmp_path, include=one)] == [other]
    assert len(read("jsonl", tmp_path, include=mixed)) == 3
