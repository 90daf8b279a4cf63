"""Several data sets as one: their shares, their order, what is refused, and that a resumed run goes on where it was."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_data import encode

from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.format import Bucket, BucketWriter, RawSample
from prx_composer.data.mixture import MixedDataset
from prx_composer.data.sampler import BucketBatchSampler, SampleRequest
from prx_composer.recipe import config
from prx_composer.recipe.arguments import data_sets
from prx_composer.training.run import run
from prx_composer.training.trial import check_recipe

SQUARE, WIDE, TALL = Bucket(16, 16), Bucket(12, 20), Bucket(20, 12)


def write(folder: Path, colour: str, counts: dict[Bucket, int], size: int = 16) -> ImageCaptionDataset:
    with BucketWriter(folder / "train", size, ("caption",)) as writer:
        for bucket, count in counts.items():
            encoded = encode(Image.new("RGB", (bucket.width, bucket.height), colour))
            for index in range(count):
                writer.write(
                    bucket, RawSample(encoded, bucket.width, bucket.height, {"caption": f"{colour} {index}"}, str(index))
                )
    return ImageCaptionDataset(str(folder))


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, ImageCaptionDataset]:
    return {
        "red": write(tmp_path / "red", "red", {SQUARE: 40, WIDE: 20}),
        "blue": write(tmp_path / "blue", "blue", {SQUARE: 10, TALL: 30}),
    }


def colours(dataset: MixedDataset, ids: list[int]) -> Counter[str]:
    return Counter(dataset[SampleRequest(index, 16, 16, 0)]["caption"].split()[0] for index in ids)


def epoch_of(dataset: MixedDataset, epoch: int, batch_size: int = 4) -> list[int]:
    return [int(index) for members in dataset.epoch_ids(epoch, batch_size) for index in members]


@pytest.mark.parametrize(("red", "blue"), [(1, 1), (3, 1), (1, 9)])
def test_an_epoch_has_the_shares_that_the_weights_say(parts: dict[str, Any], red: float, blue: float) -> None:
    dataset = MixedDataset(parts, {"red": red, "blue": blue}, seed=0)
    seen = colours(dataset, epoch_of(dataset, 0))
    assert abs(seen["red"] - 100 * red / (red + blue)) <= 1 and sum(seen.values()) == 100 == 4 * dataset.epoch_steps(4)
    assert all(len(members) % 4 == 0 for members in dataset.epoch_ids(3, 4)), "full batches of one bucket"


def test_without_weights_every_sample_is_seen_once_and_all_are_found_in_their_bucket(parts: dict[str, Any]) -> None:
    dataset = MixedDataset(parts, None, seed=0)
    assert len(dataset) == 100 and sorted(epoch_of(dataset, 0, batch_size=10)) == list(range(100))
    thrice = Counter(sample for epoch in range(3) for sample in epoch_of(dataset, epoch, batch_size=4))
    assert len(thrice) == 100 and {*thrice.values()} <= {2, 3, 4}, "what fills no batch of four is carried on"
    assert dict(zip(dataset.buckets, dataset.counts, strict=True)) == {WIDE: 20, SQUARE: 50, TALL: 30}
    assert sorted(np.concatenate(dataset.ids()).tolist()) == list(range(100))
    for index, members in enumerate(dataset.ids()):
        assert {dataset.bucket_of(int(sample)) for sample in members} == {index} == {dataset.bucket_of(dataset.first_of(index))}
    for sample in (0, 59, 60, 99):
        assert dataset[SampleRequest(sample, 16, 16, 0)]["sample_id"] == sample


@pytest.mark.parametrize("weight", [0.2, 1.0, 4.0])
def test_no_sample_is_seen_again_before_every_other_of_its_bucket_was_seen(parts: dict[str, Any], weight: float) -> None:
    dataset = MixedDataset(parts, {"red": 1.0, "blue": weight}, seed=3)
    blues, seen = range(60, 70), Counter[int]()  # the ten blue squares
    for epoch in range(12):
        seen.update(index for index in epoch_of(dataset, epoch) if index in blues)
        counts = [seen[index] for index in blues]
        assert max(counts) - min(counts) <= 1, epoch
    assert min(seen[index] for index in blues) > 0
    assert epoch_of(dataset, 5) == epoch_of(MixedDataset(parts, {"red": 1.0, "blue": weight}, seed=3), 5)
    assert epoch_of(dataset, 5) != epoch_of(MixedDataset(parts, {"red": 1.0, "blue": weight}, seed=4), 5)


def test_batches_mix_data_sets_within_a_bucket_and_any_number_of_ranks_shares_them(parts: dict[str, Any]) -> None:
    dataset = MixedDataset(parts, {"red": 1.0, "blue": 1.0}, seed=0)

    def batches(ranks: int) -> list[list[int]]:
        samplers = [BucketBatchSampler(dataset, 16, 8, 4, True, 0, ranks, rank) for rank in range(ranks)]
        shares = [[[request.sample_id for request in share] for share in sampler] for sampler in samplers]
        return [[sample for share in together for sample in share] for together in zip(*shares, strict=True)]

    assert batches(1) == batches(2) == batches(4) and len(batches(1)) == len(BucketBatchSampler(dataset, 16, 8, 4, True, 0, 1, 0))
    assert any(len(colours(dataset, batch)) == 2 for batch in batches(1))
    whole = BucketBatchSampler(dataset, 16, 8, 4, False, 0, 1, 0)
    assert {request.sample_id for batch in whole for request in batch} == set(range(100)), "evaluation sees every sample"


def test_a_position_in_another_mixture_is_refused(parts: dict[str, Any]) -> None:
    state = MixedDataset(parts, {"red": 1.0, "blue": 1.0}, seed=0).state_dict(8)
    with pytest.raises(UserError, match=r"red: 60 samples at 50.0%.*train_loader.mix is red: 60 samples at 75.0%, blue: 40"):
        MixedDataset(parts, {"red": 3.0, "blue": 1.0}, seed=0).load_state_dict(state)
    with pytest.raises(UserError, match=r"trained on train_loader.mix"):
        parts["red"].load_state_dict(state)
    with pytest.raises(UserError, match=r"trained on one data set"):
        MixedDataset(parts, None, seed=0).load_state_dict(parts["red"].state_dict(8))


def test_data_sets_of_different_base_sizes_are_refused_by_name(parts: dict[str, Any], tmp_path: Path) -> None:
    large = write(tmp_path / "large", "green", {Bucket(32, 32): 4}, size=32)
    with pytest.raises(UserError, match=r"different base sizes \(red 16, blue 16, large 32 px\).*--base-size"):
        MixedDataset(parts | {"large": large}, None, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "path is missing"),
        ({"mix": {}}, "mix must be a mapping"),
        ({"mix": {"a": {"path": "a"}, "b": {}}}, "mix.b.path is missing.*or set path to the folder that holds them all"),
        ({"mix": {"a": {"path": "a", "weigth": 1}}}, "mix.a.weigth: unknown.*weight"),
        ({"mix": {"a": {"path": "a", "weight": 1}, "b": {"path": "b"}}}, "mix.b.weight is missing"),
        ({"mix": {"a": {"path": "a", "weight": -1}}}, "mix.a.weight must be a positive number, not -1"),
    ],
)
def test_a_mixture_that_says_too_little_or_too_much_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data_sets(spec)


def test_data_sets_lie_by_name_in_the_folder_of_the_mixture_unless_they_say_where() -> None:
    spec = {
        "path": "data/24h",
        "remote": "s3://b/24h",
        "captions": {"long": 1},
        "mix": {"a": {"weight": 2}, "b": {"path": "/x", "weight": 1}},
    }
    found = data_sets(spec)
    assert found["mix.a"] == {"path": "data/24h/a", "remote": "s3://b/24h/a", "captions": {"long": 1}}
    assert found["mix.b"] == {"path": "/x", "remote": "s3://b/24h/b", "captions": {"long": 1}}


def test_a_run_on_a_mixture_is_checked_trains_resumes_and_refuses_other_weights(
    tiny_recipe: dict[str, Any], write_recipe: Any, shapes_data: Path, tmp_path: Path
) -> None:
    shares = {"half": {"path": str(shapes_data), "weight": 1}, "more": {"path": str(shapes_data), "weight": 2}}
    tiny_recipe["train_loader"] = {"name": "image_caption", "mix": shares}
    file = write_recipe(tiny_recipe)
    said = [str(result) for result in check_recipe(config.load([file]), 1, step=False)]
    assert any("train_loader.mix.half" in line and "samples" in line for line in said), said
    assert not any(line.startswith("✗") for line in said), said

    run(config.load([file]))
    folder = tmp_path / "runs" / "tiny"
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    for later in ("ba4", "ba6", "ba8"):
        (checkpoint,) = (path for path in (folder / "checkpoints").iterdir() if f"-{later}" in path.name or path.name == later)
        shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    with pytest.raises(UserError, match=r"(?s)another recipe.*train_loader.mix.more.weight \(2 → 1\)"):
        run(config.load([file, "train_loader.mix.more.weight=1", "autoresume=true"]))
    run(config.load([file, "autoresume=true"]))
    again = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(again) == len(whole) == 8
    assert [json.loads(line)["loss/train/total"] for line in again] == [json.loads(line)["loss/train/total"] for line in whole]


def image_folder(folder: Path, colour: str, count: int) -> dict[str, Any]:
    """A folder of images and captions, as a source names it."""
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
    lines = [json.dumps({"file": f"{index}.png", "caption": f"a {colour} square"}) for index in range(count)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return {"name": "folder", "folder": str(folder), "image_size": 16, "multiple": 4}


def test_data_sets_of_a_mixture_are_made_on_first_use(tiny_recipe: dict[str, Any], write_recipe: Any, tmp_path: Path) -> None:
    few, many = image_folder(tmp_path / "few", "red", 5), image_folder(tmp_path / "many", "blue", 40)
    mix = {"few": {"weight": 1, "source": few}, "many": {"weight": 1, "source": many}}
    tiny_recipe |= {"train_loader": {"name": "image_caption", "path": str(tmp_path / "made"), "mix": mix}}
    tiny_recipe["algorithms"] = {}
    tiny_recipe |= {"max_duration": "2ba", "global_train_batch_size": 8, "device_train_microbatch_size": 8}
    recipe = config.load([write_recipe(tiny_recipe)])
    found = [result.text for result in check_recipe(recipe, 1)]
    assert any("train_loader.mix.few" in text and "makes the data on first use" in text for text in found), found
    assert not (tmp_path / "made").exists()
    run(recipe)
    dataset = MixedDataset({n: ImageCaptionDataset(str(tmp_path / "made" / n)) for n in mix}, {"few": 1, "many": 1}, seed=0)
    seen = Counter(dataset[SampleRequest(index, 16, 16, 0)]["caption"].split()[1] for index in epoch_of(dataset, 0))
    assert seen["red"] == seen["blue"] == 22, "five images as often as forty"
    mix["few"]["source"]["max_aspect"] = 3.0
    with pytest.raises(UserError, match=r"train_loader.mix.few.*made with other settings.*max_aspect"):
        run(config.load([write_recipe(tiny_recipe), "run_name=other"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mix": {"few": {"source": {"name": "fold"}}}}, r"train_loader.mix.few.source: there is no 'fold' among the sources"),
        ({"mix": {"few": {"source": {"name": "folder", "foldr": "x", "image_size": 16}}}}, r"train_loader.mix.few.source.foldr"),
        (
            {"mix": {"few": {"source": {"name": "folder", "folder": "nowhere", "image_size": 16}}}},
            r"train_loader.mix.few.source: folder: there is no folder nowhere",
        ),
        ({"mix": {"few": {}}, "source": {"name": "shapes"}}, r"train_loader.source is of one data set"),
    ],
)
def test_a_source_of_a_mixture_that_is_wrong_is_named(
    change: dict[str, Any], said: str, tiny_recipe: dict[str, Any], write_recipe: Any, tmp_path: Path
) -> None:
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(tmp_path / "made")} | change
    with pytest.raises(UserError, match=said):
        run(config.load([write_recipe(tiny_recipe)]))
