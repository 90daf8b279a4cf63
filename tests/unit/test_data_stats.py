"""`prx data stats`: what it counts is what mosaicml-streaming reads, and a wrong folder is named with what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import convert, jpeg, rows, sample, write_tar
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.data import as_text
from prx_composer.commands.data.split import open_split
from prx_composer.commands.data.statistics import Distinct, Spread, statistics
from prx_composer.commands.encode.encoding import Encoded, encode_split
from prx_composer.common.errors import UserError
from prx_composer.data.format import Bucket, BucketWriter, RawSample
from prx_composer.data.stored import StoredColumn, encoded_folder

SIZES = [(100, 100), (90, 160), (160, 90), (40, 40), (300, 200)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 samples in several buckets, with metadata and captions of many lengths; one was left out."""
    folder = tmp_path_factory.mktemp("stats")
    members = []
    for i in range(29):
        columns = {"score": float("nan") if i == 3 else i / 10, "tag": ["", "cat", "dog"][i % 3], "year": 1990 + i}
        members += sample(f"{i:03d}", jpeg(*SIZES[i % len(SIZES)], seed=i), "word " * (i + 1), **columns)
    write_tar(folder / "in" / "0.tar", [*members, *sample("900", b"no image", score=1.0, tag="", year=1)])
    metadata = {"score": ("score", "float"), "tag": ("tag", "str"), "year": ("year", "int")}
    convert("webdataset", folder / "in", folder / "data", metadata=metadata)
    return folder / "data"


def plain_quantile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share, method="inverted_cdf"))


def test_counts_are_those_of_an_independent_reader(converted: Path) -> None:
    found = statistics(open_split(str(converted), "train"), batch_sizes=[7])
    stored = rows(converted)
    assert found["samples"] == len(stored) == 29 and found["looked_at"]["samples"] == 29
    by_bucket: dict[str, int] = {}
    for row in stored:
        by_bucket[str(row["bucket"])] = by_bucket.get(str(row["bucket"]), 0) + 1
    assert {bucket["name"]: bucket["samples"] for bucket in found["buckets"]} == by_bucket
    for bucket in found["buckets"]:
        files = list((converted / "train" / bucket["name"]).rglob("*.mds"))
        assert (bucket["shards"], bucket["bytes"]) == (len(files), sum(path.stat().st_size for path in files))
        assert bucket["smaller_than"] == ([7] if by_bucket[bucket["name"]] < 7 else [])
        assert bucket["share"] == pytest.approx(by_bucket[bucket["name"]] / 29)
    lengths = [len(row["caption"]) for row in stored]
    characters = found["captions"]["caption"]["characters"]
    assert (characters["min"], characters["max"]) == (min(lengths), max(lengths))
    assert characters["median"] == plain_quantile(lengths, 0.5) and characters["95%"] == plain_quantile(lengths, 0.95)
    sizes = [len(row["image"]) for row in stored]
    assert (found["images"]["bytes"]["min"], found["images"]["bytes"]["max"]) == (min(sizes), max(sizes))
    assert found["images"]["bytes"]["mean"] == pytest.approx(np.mean(sizes))
    assert found["images"]["bytes"]["median"] == pytest.approx(plain_quantile(sizes, 0.5), rel=0.005)


def test_metadata_and_what_conversion_left_out_are_told(converted: Path) -> None:
    found = statistics(open_split(str(converted), "train"))
    stored = rows(converted)
    years, scores = [row["year"] for row in stored], [row["score"] for row in stored if row["score"] == row["score"]]
    year, score, tag = (found["metadata"][name] for name in ("year", "score", "tag"))
    assert (year["min"], year["max"], year["missing"]) == (min(years), max(years), 0)
    assert (score["count"], score["missing"], score["median"]) == (28, 1, plain_quantile(scores, 0.5))
    counts = {text: sum(row["tag"] == text for row in stored) for text in ("", "cat", "dog")}
    assert tag == {"distinct": 2, "or_more": False, "missing": counts.pop(""), "most": counts}
    assert found["conversion"]["dropped"] == {"not_an_image": 1} and found["conversion"]["counts"]["read"] == 30
    told = as_text(found)
    assert "left out: not_an_image 1" in told and "'cat' 10" in told and "missing: 1" in told


def test_a_subset_is_evenly_spaced_and_said(converted: Path) -> None:
    found = statistics(open_split(str(converted), "train"), samples=7)
    stored = rows(converted)
    expected = [len(stored[i * 29 // 7]["caption"]) for i in range(7)]
    characters = found["captions"]["caption"]["characters"]
    assert (characters["count"], characters["mean"]) == (7, pytest.approx(np.mean(expected), abs=1e-5))
    assert (characters["min"], characters["max"]) == (min(expected), max(expected))
    assert "from 7 samples, evenly spaced" in as_text(found)
    assert "Every sample was read" in as_text(statistics(open_split(str(converted), "train"), samples=1000))


def test_tokens_and_cut_captions_are_those_of_the_tokenizer(converted: Path, tokenizer: Any) -> None:
    found = statistics(open_split(str(converted), "train"), tokenizer=tokenizer, max_tokens=14)
    lengths = [len(tokenizer(row["caption"])["input_ids"]) for row in rows(converted)]
    caption = found["captions"]["caption"]
    assert (caption["tokens"]["min"], caption["tokens"]["max"]) == (min(lengths), max(lengths))
    assert caption["cut"] == sum(length > 14 for length in lengths) > 0
    assert f"longer than 14 tokens, and cut: {caption['cut']}" in as_text(found)


def test_captions_that_are_empty_and_images_that_are_none_are_counted_without_decoding(tmp_path: Path) -> None:
    with BucketWriter(tmp_path / "train", 32, ("caption",)) as writer:
        for i in range(5):
            caption = {"caption": "" if i == 0 else " " if i == 1 else "ä" * i}
            writer.write(Bucket(32, 32), RawSample(b"x" * (i + 1), 31 if i == 4 else 32, 32, caption, str(i)))
    found = statistics(open_split(str(tmp_path), "train"))
    assert found["captions"]["caption"]["empty"] == 2 and found["captions"]["caption"]["characters"]["max"] == 4
    assert (found["images"]["bytes"]["min"], found["images"]["bytes"]["max"]) == (1, 5)
    assert found["images"]["smaller_than_bucket"] == 1
    assert found["conversion"] is None and found["stored"] == []


def test_stored_columns_are_listed_whole_or_begun(converted: Path, tmp_path: Path) -> None:
    data = shutil.copytree(converted, tmp_path / "data")
    column = StoredColumn("text", "some/encoder", None, "0", 4, "bfloat16", max_tokens=14)

    def work(bucket: Bucket, part: Any) -> list[Encoded]:
        return [Encoded(b"12345678", (1, 4), 0.0, 1) for _ in part]

    def interrupted(bucket: Bucket, part: Any) -> list[Encoded]:
        if bucket != min(open_split(str(data), "train").manifest.buckets):
            raise KeyboardInterrupt
        return work(bucket, part)

    whole, begun = (encoded_folder(data, "train", name, "caption") for name in ("t5", "late"))
    encode_split(data / "train", whole, column, work, 100)
    with pytest.raises(KeyboardInterrupt):
        encode_split(data / "train", begun, column, interrupted, 100)
    late, t5 = statistics(open_split(str(data), "train"))["stored"]
    assert late == {"name": "late", "source": "caption", "whole": False, "parts": 1}
    assert t5["whole"] and t5["of_this_data"] and t5["samples"] == 29 and t5["encoder"] == "some/encoder"
    assert t5["bytes"] == sum(path.stat().st_size for path in whole.rglob("*.mds"))
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["buckets"][next(iter(manifest["buckets"]))] -= 1
    (whole / "manifest.json").write_text(json.dumps(manifest))
    told = as_text(statistics(open_split(str(data), "train")))
    assert "training refuses it" in told and "only begun, 1 part done" in told


def test_a_shard_that_ends_early_is_named(converted: Path, tmp_path: Path) -> None:
    data = shutil.copytree(converted, tmp_path / "data")
    shard = max((data / "train").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{shard.name} cannot be read.*ends early"):
        statistics(open_split(str(data), "train"))
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        statistics(open_split(str(data), "train"))
    (data / "train" / shard.relative_to(data / "train").parts[0] / "index.json").unlink()
    with pytest.raises(UserError, match=r"index.json is missing"):
        statistics(open_split(str(data), "train"))


def test_a_wrong_folder_is_answered_with_what_is_there(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / ".train.work").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    bucket = next(path for path in (converted / "train").iterdir() if path.is_dir())
    for path, split, said in [
        (tmp_path / "none", "train", "There is no folder"),
        (tmp_path / "empty", "train", r"is empty. Make one .*prx data convert"),
        (tmp_path / "other", "train", r"holds no data set.*prx data convert"),
        (tmp_path / "half", "train", "is not finished"),
        (tmp_path / "other" / "a.txt", "train", "is a file"),
        (converted / "train", "train", rf"is a split of a data set.*{converted} --split train"),
        (converted.parent, "train", rf"holds some: {converted}\. Name"),
        (converted, "test", r"no split 'test'; it has train"),
        (bucket, "train", rf"one bucket.*{converted}$"),
    ]:
        with pytest.raises(UserError, match=said):
            open_split(str(path), split)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for content, said in [("{", "Expecting"), ('{"version": 9}', "version 9"), ('{"version": 1}', "lacks"), ("[]", "lacks")]:
        (tmp_path / "train" / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=rf"train/manifest.json is no manifest.*{said}"):
            open_split(str(tmp_path), "train")


def test_a_spread_of_any_length_stays_small_and_right() -> None:
    values = np.random.default_rng(0).lognormal(8, 2, 200_000)
    spread = Spread()
    for value in values:
        spread.add(float(value))
    found = spread.to_json()
    assert (found["min"], found["max"]) == (values.min(), values.max())
    for name, share in (("5%", 0.05), ("median", 0.5), ("95%", 0.95)):
        assert found[name] == pytest.approx(plain_quantile(list(values), share), rel=0.005)
    assert len(spread._rounded) < 10_000
    distinct = Distinct()
    for number in range(5000):
        distinct.add(f"text {number}")
    assert distinct.to_json()["distinct"] == Distinct.LIMIT and distinct.to_json()["or_more"]


def test_the_command_prints_a_page_and_writes_json(converted: Path, tmp_path: Path) -> None:
    arguments = ["data", "stats", str(converted), "--batch-size", "3", "--json"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "stats.json")], catch_exceptions=False)
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found == json.loads(json.dumps(statistics(open_split(str(converted), "train"), batch_sizes=[3])))
    assert as_text(found) in done.stdout
    assert json.loads(CliRunner().invoke(app, [*arguments, "-"], catch_exceptions=False).stdout) == found


def test_a_recipe_brings_its_tokenizer_and_the_batches_of_its_stages(tiny_recipe: Any, write_recipe: Any) -> None:
    tiny_recipe["run_folder"] += "/never"
    recipe = write_recipe(tiny_recipe)
    options: Any = {"catch_exceptions": False}
    found = json.loads(
        CliRunner().invoke(app, ["data", "stats", recipe, "global_train_batch_size=48", "--json", "-"], **options).stdout
    )
    assert found["batch_sizes"] == [24, 48] and found["samples"] == 240
    assert found["captions"]["caption"]["max_tokens"] == 14 and found["captions"]["caption"]["cut"] == 0
    assert not Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny")).exists(), "looking writes nothing there"
    held = json.loads(CliRunner().invoke(app, ["data", "stats", recipe, "--split", "heldout", "--json", "-"], **options).stdout)
    assert held["samples"] == 30
