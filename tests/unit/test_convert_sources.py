"""The same samples come out of every kind of input."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import convert, jpeg, rows, sample, settings, write_tar, write_tars
from streaming import MDSWriter

from prx_composer.commands.convert.records import open_source
from prx_composer.commands.convert.settings import parse_captions, parse_metadata, split_of
from prx_composer.common.errors import UserError


def as_tar(folder: Path, data: list[dict[str, Any]]) -> dict[str, Any]:
    members = []
    for i, row in enumerate(data):
        members += [
            (f"{i:03d}.jpg", row["image"]),
            (f"{i:03d}.json", json.dumps({"txt": row["txt"], "score": row["score"]}).encode()),
        ]
    write_tar(folder / "a.tar", members)
    return {"source": "webdataset"}


def as_parquet(folder: Path, data: list[dict[str, Any]]) -> dict[str, Any]:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(data), folder / "a.parquet", row_group_size=3)
    return {"source": "parquet"}


def hugging_face() -> Any:
    """The library `datasets`, which brings pandas; it is an outside oracle here and no part of a default environment."""
    return pytest.importorskip("datasets", reason="`datasets` comes with the group foundry")


def as_datasets(folder: Path, data: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    datasets = hugging_face()
    features = datasets.Features({"image": datasets.Image(), "txt": datasets.Value("string"), "score": datasets.Value("float64")})
    rows = [row | {"image": {"bytes": row["image"], "path": None}} for row in data]
    made = datasets.Dataset.from_list(rows, features=features)
    if kind == "arrow":
        made.save_to_disk(str(folder))
    else:
        folder.mkdir()
        made.to_parquet(str(folder / "train-00000-of-00001.parquet"), batch_size=4)
    return {"source": "parquet"}


def as_lines(folder: Path, data: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, row in enumerate(data):
        (folder / "images" / f"{i}.jpg").write_bytes(row["image"])
        lines.append(json.dumps({"file": f"images/{i}.jpg", "txt": row["txt"], "score": row["score"]}))
    (folder / "all.jsonl").write_text("\n".join(lines))  # no newline at the end
    return {"source": "jsonl"}


def as_mds(folder: Path, data: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    columns = {"image": "bytes", "txt": "str", "score": "float64"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=6000, **options) as writer:
        for row in data:
            writer.write(row)
    return {"source": "mds"}


MAKERS = {
    "tar": as_tar,
    "parquet": as_parquet,
    "datasets on disk": lambda folder, data: as_datasets(folder, data, "arrow"),
    "datasets from the hub": lambda folder, data: as_datasets(folder, data, "parquet"),
    "lines": as_lines,
    "mds": as_mds,
    "mds, compressed": lambda folder, data: as_mds(folder, data, compression="zstd:3"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_samples_come_out_of_every_kind_of_input_however_it_is_cut(tmp_path: Path, kind: str) -> None:
    data = [{"image": jpeg(100, 100, i), "txt": f"Ünï {i}", "score": i / 4} for i in range(20)]
    source = MAKERS[kind](tmp_path / "in", data)["source"]
    expected = [row["image"] for row in rows_of_plain(tmp_path, data)]
    for unit_bytes in (1 << 28, 5000):
        output = tmp_path / f"{unit_bytes}"
        chosen = {"metadata": {"score": ("score", "float")}, "unit_bytes": unit_bytes}
        convert(source, tmp_path / "in", output, **chosen)
        found = rows(output)
        assert [(row["caption"], row["score"]) for row in found] == [(row["txt"], row["score"]) for row in data]
        assert [row["image"] for row in found] == expected
        assert len({row["key"] for row in found}) == 20


def rows_of_plain(tmp_path: Path, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    as_tar(tmp_path / "plain", data)
    convert("webdataset", tmp_path / "plain", tmp_path / "plain-out")
    return rows(tmp_path / "plain-out")


def test_cutting_lines_loses_and_repeats_none(tmp_path: Path) -> None:
    names = ["a" * (i * 37 % 90) for i in range(200)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"file": "no.jpg", "txt": name}) + "\n" for name in names))
    for part in (1, 7, 50, 1000, 10**6):
        source = open_source(settings("jsonl", tmp_path / "x.jsonl", unit_bytes=part * 1000))
        planned = source.plan()
        assert [record.columns["txt"] for unit in planned for record in source.read(unit)] == names
    assert len(planned) == 1


def test_nested_columns_and_renamed_captions(tmp_path: Path) -> None:
    members = sample("0", jpeg(64, 64), "plain", meta={"texts": ["first", "second"], "n": 7})
    members += sample("1", jpeg(64, 64, 1), "plain", meta={"texts": ["first", "second"], "n": 7, "who": "someone"})
    captions = parse_captions(["txt", "long=meta.texts.1"])
    convert(
        "webdataset",
        write_tar(tmp_path / "a.tar", members),
        tmp_path / "out",
        captions=captions,
        metadata=parse_metadata(["n=meta.n:int", "who=meta.who:str"]),
    )
    row, other = rows(tmp_path / "out")
    assert (row["txt"], row["long"], row["n"], row["who"]) == ("plain", "second", 7, "") and other["who"] == "someone"
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["captions"] == ["txt", "long"] and manifest["metadata"] == {"n": "int", "who": "str"}


def test_a_limit_takes_the_first_samples(tmp_path: Path) -> None:
    write_tars(tmp_path / "in")
    statistics = convert("webdataset", tmp_path / "in", tmp_path / "out", limit=11)
    assert {row["caption"] for row in rows(tmp_path / "out")} == {f"caption {i}" for i in range(11)}
    assert statistics["counts"]["read"] == 11


def test_a_suffix_or_key_that_comes_late_in_a_tar_is_taken(tmp_path: Path) -> None:
    members = []
    for i in range(60):
        members += sample(f"{i}", jpeg(64, 64, i), f"{i}", **({"score": i / 10} if i >= 55 else {"other": 1}))
    write_tar(tmp_path / "a.tar", members)
    statistics = convert("webdataset", tmp_path / "a.tar", tmp_path / "out", metadata={"score": ("score", "float")})
    assert [row["score"] for row in rows(tmp_path / "out")][55:] == [i / 10 for i in range(55, 60)]
    assert statistics["columns"] == {"txt": 60, "score": 5} and statistics["images"] == {"jpg": 60}


LAYOUTS = [
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    ("train.parquet", "validation.parquet", "test.parquet"),
    ("my_train_file.parquet", "my_dev_file.parquet"),
    ("train/0.parquet", "train/1.parquet", "validation/0.parquet"),
    ("data/training/0.parquet", "data/eval/0.parquet"),
    ("a/train_0.parquet", "b/val_0.parquet"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_splits_are_told_apart_as_datasets_does_and_each_is_taken_by_the_option_that_the_message_names(
    tmp_path: Path, layout: tuple[str, ...]
) -> None:
    for name in layout:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [b"x"], "txt": [name]}), tmp_path / name)
    datasets = hugging_face()
    patterns = datasets.data_files.get_data_patterns(str(tmp_path))
    theirs = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(tmp_path))
    expected = {split: {str(Path(file).relative_to(tmp_path)) for file in files} for split, files in theirs.items()}
    ours: dict[str, set[str]] = {}
    for name in layout:
        found = split_of(name)
        assert found is not None
        ours.setdefault(found.split, set()).add(name)
    assert ours == expected
    with pytest.raises(UserError, match="holds several splits") as refused:
        open_source(settings("parquet", tmp_path)).plan()
    options = re.findall("--include '([^']*)'", str(refused.value))
    taken = [{unit.path for unit in open_source(settings("parquet", tmp_path, include=option)).plan()} for option in options]
    assert taken[:-1] == [{str(tmp_path / name) for name in expected[split]} for split in sorted(expected)]
    assert taken[-1] == {str(tmp_path / name) for name in layout}
