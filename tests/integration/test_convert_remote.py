"""Conversions that are killed, and conversions from and to an object store: S3 as moto serves it on loopback."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import contents, convert, fetch_all, jpeg, rows, sample, settings, write_tar

from prx_composer.commands.convert import make_plan, run_conversion, units
from prx_composer.commands.convert.backends import open_output
from prx_composer.commands.convert.records import open_source
from prx_composer.commands.data.split import open_split
from prx_composer.commands.data.statistics import statistics
from prx_composer.commands.data.view import Subject, look
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.sampler import SampleRequest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_killed_conversion_writes_the_bytes_of_an_undisturbed_one(tmp_path: Path, engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    kills = ("--engine", engine, "--kills", 2, "--tars", 8, "--samples", 8)  # of processes that it looks up in /proc: real ones
    result = tmp_path / "result.json"
    question = importlib.import_module("kills").convert  # a benchmark, in this process, which has imported what it needs
    asked = ["kills.py", *map(str, kills), "--output", str(result)]
    assert importlib.import_module("common").main(None, question, argv=asked) == 0
    found = json.loads(result.read_text())
    assert found["kills"] == 2 and found["equal"] and found["left_behind"] == [".heldout.work.lock", ".train.work.lock"]


def put_tars(s3: Any, folder: Path) -> Path:
    for number in range(3):
        members = [p for i in range(5) for p in sample(f"{number}{i}", jpeg(100, 80 + 20 * i, 5 * number + i), f"{number} {i}")]
        write_tar(folder / f"{number}.tar", members)
        s3.upload_file(str(folder / f"{number}.tar"), "data", f"in/{number}.tar")
    return folder


def without_paths(files: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in files.items() if name != "conversion.json"}  # which names input and settings


def test_from_and_to_an_object_store_are_the_bytes_of_a_local_conversion(tmp_path: Path, s3: Any) -> None:
    convert("webdataset", put_tars(s3, tmp_path / "in"), tmp_path / "local", duplicates="exact", heldout=0.3)
    chosen = settings("webdataset", Path("in"), duplicates="exact", input="s3://data/in", heldout=0.3)
    statistics = run_conversion(chosen, "s3://data/out", workers=2)
    assert statistics["counts"]["kept"] == 15
    for split in ("train", "heldout"):
        remote = fetch_all(s3, f"out/{split}", tmp_path / "remote" / split)
        assert without_paths(contents(remote)) == without_paths(contents(tmp_path / "local" / split)) != {}
    near = sorted(row["caption"] for row in rows(tmp_path / "local"))
    dataset = ImageCaptionDataset(str(tmp_path / "cache"), remote="s3://data/out")
    assert sorted(dataset[SampleRequest(i, 64, 64, 0)]["caption"] for i in range(len(dataset))) == near
    assert run_conversion(chosen, "s3://data/out")["counts"]["kept"] == 15, "it is not done again"
    s3.put_object(Bucket="data", Key="in/README.md", Body=b"not read")
    assert run_conversion(chosen, "s3://data/out")["input"]["read"] == 3
    s3.upload_file(str(tmp_path / "in" / "0.tar"), "data", "in/2.tar")
    s3.upload_file(str(tmp_path / "in" / "0.tar"), "data", "in/3.tar")
    with pytest.raises(UserError, match=r"1 new \(such as 3.tar\), 1 changed in size or time \(such as 2.tar\)"):
        run_conversion(chosen, "s3://data/out")


def test_a_conversion_in_an_object_store_goes_on_and_nobody_reads_it_before_it_is_whole(tmp_path: Path, s3: Any) -> None:
    convert("webdataset", put_tars(s3, tmp_path / "in"), tmp_path / "local")
    chosen = settings("webdataset", Path("in"), input="s3://data/in")
    source, store = open_source(chosen), open_output("s3://data/half", "train")
    planned = source.plan()
    make_plan(store, None, chosen, source, planned)
    units.convert_unit(chosen, "s3://data/half", planned[1], {})
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket="data", Prefix="half")["Contents"]]
    assert "half/train/manifest.json" not in keys and "half/.train.work/units/000001" in keys
    with pytest.raises(UserError, match="other settings"):
        run_conversion(settings("webdataset", Path("in"), input="s3://data/in", quality=50), "s3://data/half")
    run_conversion(chosen, "s3://data/half")
    remote = fetch_all(s3, "half/train", tmp_path / "remote" / "train")
    assert without_paths(contents(remote)) == without_paths(contents(tmp_path / "local" / "train"))


def test_lines_parquet_and_shards_are_read_from_an_object_store(tmp_path: Path, s3: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from streaming import MDSWriter

    images = [jpeg(100, 100, i) for i in range(4)]
    pq.write_table(pa.table({"image": images, "txt": [str(i) for i in range(4)]}), tmp_path / "a.parquet")
    s3.upload_file(str(tmp_path / "a.parquet"), "data", "parquet/a.parquet")
    for i, image in enumerate(images):
        s3.put_object(Bucket="data", Key=f"jsonl/images/{i}.jpg", Body=image)
    lines = [json.dumps({"file": f"images/{i}.jpg", "txt": str(i)}) for i in range(4)]
    lines += [json.dumps({"file": name, "txt": "x"}) for name in ("../parquet/a.parquet", "s3://data/x.jpg", "images/none.jpg")]
    s3.put_object(Bucket="data", Key="jsonl/a.jsonl", Body="\n".join(lines).encode())
    with MDSWriter(out=str(tmp_path / "mds"), columns={"image": "bytes", "txt": "str"}) as writer:
        for i, image in enumerate(images):
            writer.write({"image": image, "txt": str(i)})
    for path in (tmp_path / "mds").iterdir():
        s3.upload_file(str(path), "data", f"mds/{path.name}")
    for source in ("parquet", "jsonl", "mds"):
        statistics = run_conversion(settings(source, Path("x"), input=f"s3://data/{source}"), str(tmp_path / f"out-{source}"))
        assert [row["caption"] for row in rows(tmp_path / f"out-{source}")] == ["0", "1", "2", "3"]
    assert contents(tmp_path / "out-parquet")
    dropped = json.loads((tmp_path / "out-jsonl" / "train" / "conversion.json").read_text())["dropped"]
    assert dropped == {"outside_input": 1, "url": 1, "no_image": 1} and not statistics["dropped"]


def test_data_in_an_object_store_are_looked_at_where_they_lie(tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    convert("webdataset", put_tars(s3, tmp_path / "in"), tmp_path / "local")
    run_conversion(settings("webdataset", Path("in"), input="s3://data/in"), "s3://data/out")
    near, far = (open_split(path, "train") for path in (str(tmp_path / "local"), "s3://data/out"))
    counted = [
        {key: value for key, value in statistics(split).items() if key not in ("path", "conversion")} for split in (near, far)
    ]
    assert counted[0] == counted[1]
    some = statistics(far, samples=4)
    assert 4 <= some["looked_at"]["samples"] < 15 and some["looked_at"]["shards"] < some["looked_at"]["of_shards"]
    monkeypatch.chdir(tmp_path)
    views = [look(Subject(split.path, "train"), split, 15) for split in (near, far)]
    for one, other in zip(*(view.samples for view in views), strict=True):
        assert one.image is not None and torch.equal(one.image, other.image) and one.caption == other.caption
    assert not (tmp_path / "s3:").exists()
    with pytest.raises(UserError, match=r"s3://data/none/train/manifest.json cannot be fetched"):
        open_split("s3://data/none", "train")
