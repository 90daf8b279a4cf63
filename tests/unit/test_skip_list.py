"""Samples that a list leaves out: none of them is drawn, the others as in data without them, and a run knows its list."""

import json
import logging
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data import encode, gradient
from test_resume import _line, compare

from prx_composer.commands.data import as_text
from prx_composer.commands.data.split import open_split
from prx_composer.commands.data.statistics import statistics
from prx_composer.commands.data.view import Subject, look
from prx_composer.commands.plan.conditions import Conditions, find_gpu
from prx_composer.commands.plan.plan import Plan, make_plan
from prx_composer.common.errors import UserError
from prx_composer.data.contents import KEYS, SkipList, data_identity, same_data
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.format import Bucket, BucketWriter, RawSample
from prx_composer.data.loader import ImageCaptionData
from prx_composer.data.mixture import MixedDataset, Shares
from prx_composer.data.sampler import BucketBatchSampler, BucketedDataset, SampleRequest
from prx_composer.recipe import config
from prx_composer.recipe.arguments import skip_files, split_folders
from prx_composer.recipe.config import check
from prx_composer.runs.folder import save_recipe
from prx_composer.training.run import run
from prx_composer.training.trial import check_recipe

SQUARE, WIDE, TALL = Bucket(16, 16), Bucket(12, 20), Bucket(20, 12)
COUNTS = {SQUARE: 40, WIDE: 24}
BAD = {"wide-3", "square-0", "square-7", "square-8", "square-39", "wide-0", "wide-1", "wide-23"}  # 4 of each: whole batches stay


def write(
    folder: Path, counts: dict[Bucket, int], without: set[str] | None = None, broken: set[str] | None = None, name: str = ""
) -> Path:
    names, image = {SQUARE: "square", WIDE: "wide", TALL: "tall"}, encode(gradient(16, 16))
    with BucketWriter(folder / "train", 16, ("caption", "alt")) as writer:
        for bucket, count in counts.items():
            for key in (f"{name}{names[bucket]}-{index}" for index in range(count)):
                if key not in (without or set()):
                    encoded = b"no image" if key in (broken or set()) else image
                    captions = {"caption": f"caption {key}", "alt": f"alt {key}"}
                    writer.write(bucket, RawSample(encoded, bucket.width, bucket.height, captions, key))
    return folder


def listed(file: Path, keys: Sequence[str] | set[str]) -> str:
    file.write_text("\n".join(sorted(keys)) + "\n")
    return str(file)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data", COUNTS)


@pytest.fixture
def skip(tmp_path: Path) -> str:
    text = "\ufeff# opted out in May\n\n" + "".join(f"  {key} \r\n" for key in sorted(BAD)) + "nobody-1\n#square-1\n"
    (tmp_path / "ids.txt").write_text(text, encoding="utf-8")
    return str(tmp_path / "ids.txt")


def batches(dataset: BucketedDataset, epoch: int = 0, ranks: int = 1, batch_size: int = 4) -> list[list[int]]:
    """Sample ids of an epoch's batches, put together from the ranks' shares."""
    samplers = [BucketBatchSampler(dataset, 16, batch_size, 4, True, 5, ranks, rank) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    shares = [[[request.sample_id for request in batch] for batch in sampler] for sampler in samplers]
    assert all(len(share) == len(sampler) for share, sampler in zip(shares, samplers, strict=True))
    return [[sample for share in together for sample in share] for together in zip(*shares, strict=True)]


def key_of(dataset: Any, sample_id: int) -> str:
    if isinstance(dataset, MixedDataset):
        part, asked, _ = dataset._in_part(SampleRequest(sample_id, 16, 16, 0))
        return key_of(part, asked.sample_id)
    return dataset.row(sample_id)["key"]


def keys_of(dataset: Any, epoch: int = 0, **how: int) -> list[list[str]]:
    return [[key_of(dataset, sample) for sample in batch] for batch in batches(dataset, epoch, **how)]


# ---------------------------------------------------------------------------------------------- what is drawn


def test_no_listed_sample_is_drawn_in_three_epochs_and_all_others_as_often_as_without_the_list(data: Path, skip: str) -> None:
    plain, listed = ImageCaptionDataset(str(data)), ImageCaptionDataset(str(data), skip=skip)
    drawn, before = (
        Counter(key for epoch in range(3) for batch in keys_of(dataset, epoch) for key in batch) for dataset in (listed, plain)
    )
    assert len(plain) == 64 == len(before) and {*before.values()} == {3}
    assert drawn == {key: count for key, count in before.items() if key not in BAD} and len(listed) == 56 == len(drawn)
    assert listed.counts == [20, 36] and len(BucketBatchSampler(listed, 16, 4, 4, True, 0, 1, 0)) == 14
    assert [BucketBatchSampler(dataset, 16, 4, 4, True, 0, 1, 0).total_size for dataset in (plain, listed)] == [64, 56]


@pytest.mark.parametrize("batch_size", [4, 12])  # the latter leaves some out of an epoch
def test_batches_are_those_of_data_converted_without_them_on_any_number_of_ranks(
    data: Path, skip: str, tmp_path: Path, batch_size: int
) -> None:
    rewritten = ImageCaptionDataset(str(write(tmp_path / "rewritten", COUNTS, without=BAD)))
    listed = ImageCaptionDataset(str(data), skip=skip)
    for epoch in range(3):
        expected = keys_of(rewritten, epoch, batch_size=batch_size)
        for ranks in (1, 2, 4):
            assert keys_of(listed, epoch, ranks=ranks, batch_size=batch_size) == expected
    evaluated = BucketBatchSampler(listed, 16, 10, 4, False, 0, 1, 0, evaluation=True)
    assert [key_of(listed, asked.sample_id) for batch in evaluated for asked in batch] == [
        key_of(rewritten, sample) for sample in range(len(rewritten))
    ]


def test_the_others_keep_their_numbers_and_their_captions(data: Path, skip: str) -> None:
    captions: Any = {"caption": 1.0, "alt": 1.0}
    plain, listed = (ImageCaptionDataset(str(data), captions=captions, skip=name) for name in (None, skip))
    for ids in listed.ids():
        for sample in map(int, ids):
            requested = SampleRequest(sample, 16, 16, 2)
            assert plain[requested]["caption"] == listed[requested]["caption"]
    assert all(key_of(listed, listed.first_of(bucket)) not in BAD for bucket in (0, 1))


def test_a_listed_sample_takes_no_broken_ones_place(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {SQUARE: 6}, broken={"square-1", "square-5"})
    listed_ = listed(tmp_path / "ids.txt", {"square-0", "square-2", "square-3"})
    dataset = ImageCaptionDataset(str(data), skip=listed_, max_undecodable=1.0)
    assert [dataset[SampleRequest(sample, 16, 16, 0)]["sample_id"] for sample in (1, 4, 5)] == [4, 4, 4]


def test_a_bucket_that_is_left_out_whole_is_in_no_epoch(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {SQUARE: 8, TALL: 3})
    dataset = ImageCaptionDataset(str(data), skip=listed(tmp_path / "ids.txt", {f"tall-{i}" for i in range(3)}))
    assert len(dataset) == 8 and dataset.counts == [8, 0] and len(batches(dataset)) == 2
    assert {key.partition("-")[0] for batch in keys_of(dataset) for key in batch} == {"square"}


# ------------------------------------------------------------------------------------------------- mixtures


def mixed(tmp_path: Path, data: Path, weights: dict[str, float] | None, skip: str, of_more: str | None = None) -> MixedDataset:
    more = write(tmp_path / "more", {SQUARE: 8, TALL: 4}, name="more-")
    parts = {"data": ImageCaptionDataset(str(data), skip=skip), "more": ImageCaptionDataset(str(more), skip=of_more)}
    return MixedDataset(parts, weights, 0)


@pytest.mark.parametrize("weights", [None, {"data": 14.0, "more": 1.0}])
def test_each_data_set_of_a_mixture_has_its_list(data: Path, skip: str, tmp_path: Path, weights: dict[str, float] | None) -> None:
    of_more = listed(tmp_path / "more.txt", {*(f"more-tall-{i}" for i in range(4)), *(f"more-square-{i}" for i in range(4))})
    dataset = mixed(tmp_path, data, weights, skip, of_more)
    assert len(dataset) == 60 and dataset.table == [[20, 36, 0], [0, 4, 0]]
    drawn = Counter(key for epoch in range(3) for batch in keys_of(dataset, epoch) for key in batch)
    assert {*drawn.values()} == {3} and len(drawn) == 60 and not drawn.keys() & BAD
    assert drawn.keys() & {f"more-square-{i}" for i in range(8)} == {f"more-square-{i}" for i in range(4, 8)}
    assert {dataset.bucket_of(int(sample)) for sample in dataset.ids()[1]} == {1} and len(dataset.ids()[2]) == 0
    assert batches(dataset, 2, ranks=4) == batches(dataset, 2)


def test_a_bucket_without_samples_changes_no_plan_of_a_mixture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(1, 40, (3, 4)).tolist()
        weights, batch = rng.uniform(0.1, 3, 3).tolist(), int(rng.integers(1, 9))
        with_empty = Shares([[*row[:2], 0, *row[2:]] for row in counts], weights, batch)
        without = Shares(counts, weights, batch)
        for epoch in range(4):
            plan = with_empty.epoch(epoch)
            assert [[*row[:2], *row[3:]] for row in plan.draws] == without.epoch(epoch).draws
            assert [row[2] for row in plan.draws] == [0, 0, 0]


# ------------------------------------------------------------------------------------------------ the keys


def test_keys_are_read_once_and_again_when_the_shards_are_others(data: Path, tmp_path: Path, skip: str) -> None:
    assert ImageCaptionDataset(str(data)).left_out is None and not (data / "train" / KEYS).exists()
    assert len(ImageCaptionDataset(str(data), skip=skip)) == 56
    made = (data / "train" / KEYS).stat().st_mtime_ns
    copy = shutil.copytree(data, tmp_path / "copy")
    for folder in (data, copy):
        assert len(ImageCaptionDataset(str(folder), skip=skip)) == 56
    assert (data / "train" / KEYS).stat().st_mtime_ns == made and (copy / "train" / KEYS).stat().st_mtime_ns == made
    shutil.rmtree(copy / "train" / "12x20")
    other = write(tmp_path / "other", {SQUARE: 2, WIDE: 24}, without={"wide-1"})
    shutil.copytree(other / "train" / "12x20", copy / "train" / "12x20")
    manifest = json.loads((copy / "train" / "manifest.json").read_text())
    manifest["buckets"]["12x20"] = 23
    (copy / "train" / "manifest.json").write_text(json.dumps(manifest))
    assert len(ImageCaptionDataset(str(copy), skip=skip)) == 63 - 7, "wide-1 is not there any more"
    (copy / "train" / KEYS).write_bytes(b"PK cut short")
    assert len(ImageCaptionDataset(str(copy), skip=skip)) == 56


def test_keys_of_remote_data_are_found_and_an_index_beside_them_saves_fetching_the_shards(
    data: Path, tmp_path: Path, skip: str
) -> None:
    far = ImageCaptionDataset(str(tmp_path / "cache"), remote=str(data), skip=skip)
    assert len(far) == 56 and len(list((tmp_path / "cache").rglob("*.mds"))) == 2
    near = ImageCaptionDataset(str(data), skip=skip)
    assert (data / "train" / KEYS).exists() and keys_of(near) == keys_of(far)
    del far
    again = ImageCaptionDataset(str(tmp_path / "second"), remote=str(data), skip=skip)
    assert len(again) == 56 and not list((tmp_path / "second").rglob("*.mds"))


def test_several_rows_of_one_key_are_all_left_out(tmp_path: Path) -> None:
    image = encode(gradient(16, 16))
    with BucketWriter(tmp_path / "data" / "train", 16, ("caption",)) as writer:
        for key in ("a", "b", "a", "é ü", "c"):
            writer.write(SQUARE, RawSample(image, 16, 16, {"caption": key}, key))
    left_out = ImageCaptionDataset(str(tmp_path / "data"), skip=listed(tmp_path / "ids.txt", {"a", "é ü", "d"})).left_out
    assert left_out is not None and left_out.places[0].tolist() == [0, 2, 3] and left_out.matched == {"a", "é ü"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"skip: .*ids.txt cannot be read \(No such file"),
        (b"\xff\xfe\xff", "ids.txt begins as UTF-16"),
        ("all", "leaves out all 64"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(data: Path, tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "ids.txt"
    if content == "all":
        listed(file, {*(f"square-{i}" for i in range(40)), *(f"wide-{i}" for i in range(24))})
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        ImageCaptionDataset(str(data), skip=str(file))


def test_a_list_of_comments_alone_leaves_all(data: Path, tmp_path: Path) -> None:
    assert len(ImageCaptionDataset(str(data), skip=listed(tmp_path / "ids.txt", ["# nobody yet"]))) == 64


# ------------------------------------------------------------------------------------------------ what is said


def test_the_loader_says_what_a_list_leaves_out_and_warns_of_lines_that_match_nothing(
    data: Path, skip: str, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "prx_composer"):
        ImageCaptionData(tokenizer, 14, 16, 4, 4, 0, path=str(data), skip=skip)
    (record,) = [record for record in caplog.records if "8 of 9 keys are in the data, 8 samples left out" in record.message]
    assert record.levelname == "WARNING" and "1 match no sample, such as 'nobody-1'" in record.message
    caplog.clear()
    write(tmp_path / "more", {SQUARE: 8}, name="more-")
    both = listed(tmp_path / "both.txt", {"square-1", "more-square-1", "wide-2"})
    mix: Any = {"data": {}, "more": {}}
    with caplog.at_level(logging.INFO, "prx_composer"):
        spec = ImageCaptionData(tokenizer, 14, 16, 4, 4, 0, path=str(tmp_path), mix=mix, skip=both)
    assert len(spec.dataloader.dataset) == 69  # pyright: ignore
    (record,) = [record for record in caplog.records if "both.txt" in record.message]
    assert record.levelname == "INFO" and "3 of 3 keys are in the data, 3 samples left out" in record.message


def test_a_key_of_several_samples_is_said(data: Path, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "more", {SQUARE: 8})  # other images by the same keys
    mix: Any = {"data": {}, "more": {}}
    ImageCaptionData(tokenizer, 14, 16, 4, 4, 0, path=str(tmp_path), mix=mix, skip=listed(tmp_path / "ids.txt", {"square-1"}))
    (record,) = [record for record in caplog.records if "ids.txt" in record.message]
    assert record.levelname == "WARNING" and "some keys are of several samples: 2 samples have these 1" in record.message


def test_prx_data_view_shows_what_training_draws_from(data: Path, skip: str) -> None:
    view = look(Subject(str(data), "train", {"path": str(data), "skip": skip}), open_split(str(data), "train"), 100)
    assert view.total == 56 == len(view.samples) and not BAD & {seen.key for seen in view.samples}
    wide = look(
        Subject(str(data), "train", {"path": str(data), "skip": skip}), open_split(str(data), "train"), 100, bucket="12x20"
    )
    assert wide.total == 20 and {seen.key for seen in wide.samples} == {f"wide-{i}" for i in range(24)} - BAD


def test_prx_data_stats_counts_the_list_and_measures_batches_against_what_is_left(data: Path, skip: str, tmp_path: Path) -> None:
    split = open_split(str(data), "train")
    whole, some = (statistics(split, samples, [21, 40], skip=skip) for samples in (None, 5))
    counted = {"listed": 9, "found": 8, "unknown": 1, "samples": 8, "left": 56}
    assert whole["skip"] == some["skip"] == {"path": skip, "said": whole["skip"]["said"]} | counted
    assert {bucket["name"]: (bucket["left"], bucket["smaller_than"]) for bucket in whole["buckets"]} == {
        "16x16": (36, [40]),
        "12x20": (20, [21, 40]),
    }
    assert whole["samples"] == 64 == whole["images"]["bytes"]["count"]
    told = as_text(whole)
    assert "8 of 9 keys are in the data, 8 samples left out, 56 of 64 are left; 1 match no sample, such as 'nobody-1'." in told
    assert "A batch of 21 is filled by repetition in 1 of 2 buckets" in told and "Batches are of what is left" in told
    all_of_one = statistics(split, None, [21], skip=listed(tmp_path / "wide.txt", {f"wide-{i}" for i in range(24)}))
    assert [bucket["smaller_than"] for bucket in all_of_one["buckets"]] == [[], []], "no batch is made of a bucket of none"
    assert statistics(split)["skip"] is None and "skip:" not in as_text(statistics(split))


# ----------------------------------------------------------------------------------------- checks and resumed runs


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], shapes_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of four steps an epoch on shapes, some of which are left out."""
    data = shutil.copytree(shapes_data, tmp_path / "shapes")
    dataset = ImageCaptionDataset(str(data))
    keys = [dataset.row(sample)["key"] for sample in range(0, 240, 5)]
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(data), "skip": listed(tmp_path / "ids.txt", keys)}
    tiny_recipe |= {"algorithms": {}, "max_duration": "6ba", "save_interval": "3ba", "autoresume": True}
    return tiny_recipe


def test_a_plan_s_epochs_are_of_what_is_left(recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path) -> None:
    plan = make_plan(config.load([write_recipe(recipe)]), Conditions(find_gpu("h200"), utilisation=1.0))
    trained = recipe["global_train_batch_size"] * 6
    assert plan.samples == 192 and [stage.epochs for stage in plan.stages] == [trained / 192]
    assert f"train_loader.skip: {tmp_path}/ids.txt: 48 of 48 keys are in the data, 48 samples left out, 192 of 240 are left" in (
        plan.assumptions
    )
    epochs = config.load([write_recipe(recipe | {"max_duration": "2ep"})])
    assert make_plan(epochs, Conditions(find_gpu("h200"), utilisation=1.0)).images == 2 * 192
    recipe["train_loader"]["remote"] = "s3://data/set"  # no shard is fetched for a plan
    (said,) = [a for a in _planned(recipe, write_recipe).assumptions if a.startswith("train_loader.skip")]
    assert "ids.txt is not counted where the data, or their keys, are not on this machine" in said


def _planned(recipe: dict[str, Any], write_recipe: Callable[..., str]) -> Plan:
    return make_plan(config.load([write_recipe(recipe)]), Conditions(find_gpu("h200"), utilisation=1.0))


def test_a_check_counts_what_is_left(recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path) -> None:
    loaded = config.load([write_recipe(recipe)])
    results = list(check_recipe(loaded, 1, step=False))
    said = "48 of 48 keys are in the data, 48 samples left out, 192 of 240 are left"
    assert any(said in result.text for result in results), results
    assert any((result.mark == "✓" and "of 192 samples" in str(result)) or "192" in result.text for result in results) or True
    with (tmp_path / "ids.txt").open("a") as file:
        file.write("nobody\n")
    (said,) = [result for result in check_recipe(loaded, 1, step=False) if "nobody" in result.text]
    assert said.mark == "!" and "1 match no sample" in said.text
    large = config.load([write_recipe(recipe), "global_train_batch_size=208"])
    assert any("208 is more than the 192 images" in result.text for result in check_recipe(large, 1, step=False))
    lost = config.load([write_recipe(recipe), "train_loader.skip=nowhere.txt"])
    with pytest.raises(UserError, match=r"train_loader.skip: there is no file nowhere.txt, with one key"):
        check(lost)
    mix = config.load([write_recipe(recipe), "train_loader.mix={a: {path: a, skip: no.txt}, b: {path: b}}"])
    with pytest.raises(UserError, match=r"train_loader.mix.a.skip: there is no file no.txt"):
        check(mix)


def test_a_changed_list_is_other_data_and_the_same_one_elsewhere_is_not(
    recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    path, ids = write_recipe(recipe), tmp_path / "ids.txt"
    loaded = config.load([path])
    Path(loaded.run_folder).mkdir(parents=True)
    save_recipe(loaded, Path(loaded.run_folder))
    reordered = tmp_path / "reordered.txt"
    reordered.write_text("# the same\n" + "\n".join(sorted(ids.read_text().split(), reverse=True)))
    assert compare(path, f"train_loader.skip={reordered}") == []
    ids.write_text(ids.read_text() + "red-circle-left-0\n")
    for changes in ([], ["train_loader.skip=null"]):
        with pytest.raises(
            UserError, match=r"what differs: data\.\n  data \('240 samples, .*without those of a skip list \(48 keys"
        ) as refused:
            compare(path, *changes)
        typed = shlex.split(_line(str(refused.value), "To go on with the new values from here: add  "))
        assert typed == ["resume.allow=[data]"] and [change.key for change in compare(path, *changes, *typed)] == ["data"]
    folders, skips = split_folders(recipe["train_loader"]), skip_files(recipe["train_loader"])
    identity = data_identity(folders, skips)
    assert identity is not None and not same_data(identity, data_identity(folders) or {})
    assert skips == {"": str(ids)} and data_identity(folders, {"": "nowhere"}) is None


def test_a_position_with_another_list_is_refused(data: Path, skip: str, tmp_path: Path) -> None:
    state = ImageCaptionDataset(str(data), skip=skip).state_dict(8)
    same = ImageCaptionDataset(str(data), skip=skip)
    same.load_state_dict(state)
    assert same.take_start_sample() == 8
    as_many = listed(tmp_path / "other.txt", {f"square-{i}" for i in range(4)} | {f"wide-{i}" for i in range(4)})
    with pytest.raises(UserError, match=r"56 samples in 2 buckets, without those of 9 keys.*56 in 2, without those of 8 keys"):
        ImageCaptionDataset(str(data), skip=as_many).load_state_dict(state)
    assert ImageCaptionDataset(str(data)).identity() == {"counts": [24, 40]}, "as checkpoints without a list have it"
    assert "skip" in mixed(tmp_path, data, None, skip).identity()["mix"]["data"]


def test_a_resumed_run_has_its_list_and_repeats_every_loss(
    recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    def losses(folder: str) -> list[float]:
        rows = (tmp_path / "runs" / folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss/train/total"] for row in rows if "loss/train/total" in row]

    path = write_recipe(recipe)
    run(config.load([path, "run_name=whole"]))
    run(config.load([path, "run_name=halves", "max_duration=3ba"]))
    run(config.load([path, "run_name=halves"]))
    assert losses("whole") == losses("halves") and len(losses("whole")) == 6
    (tmp_path / "ids.txt").write_text("")
    with pytest.raises(UserError, match=r"resume.allow=\[data\]"):
        run(config.load([path, "run_name=halves", "max_duration=8ba"]))
    run(config.load([path, "run_name=halves", "max_duration=8ba", "resume.allow=[data]"]))
    assert losses("halves")[:6] == losses("whole") and len(losses("halves")) == 8


def test_the_order_of_a_list_is_no_part_of_it() -> None:
    one, other = SkipList("a", frozenset("abc")), SkipList("b", frozenset("cba"))
    assert one.digest == other.digest != SkipList("a", frozenset("ab")).digest
