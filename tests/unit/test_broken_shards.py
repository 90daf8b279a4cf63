"""A shard that is lost or damaged while a run trains: others take its samples' places, it is counted, and named once."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import MDSWriter
from test_data import encode, gradient

from prx_composer.common.errors import UserError
from prx_composer.data.contents import column_contents
from prx_composer.data.dataset import ImageCaptionDataset, UndecodableError, coprime
from prx_composer.data.format import COLUMNS, Bucket, Manifest, iterate_captions
from prx_composer.data.loader import ImageCaptionData
from prx_composer.data.sampler import SampleRequest
from prx_composer.data.stored import StoredColumn
from prx_composer.recipe import config
from prx_composer.training.run import run
from prx_composer.training.trial import check_recipe

SAMPLES, BUCKET = 400, Bucket(16, 16)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Some 20 shards of a bucket."""
    folder, image = tmp_path / "data" / "train", encode(gradient(16, 16))
    folder.mkdir(parents=True)
    limit = 20 * (len(image) + 150)
    with MDSWriter(out=str(folder / str(BUCKET)), columns=COLUMNS | {"caption": "str"}, size_limit=limit) as writer:
        for index in range(SAMPLES):
            writer.write({"image": image, "width": 16, "height": 16, "key": f"key-{index}", "caption": f"caption {index}"})
    Manifest(16, ("caption",), {BUCKET: SAMPLES}).write(folder)
    return tmp_path / "data"


def shards(data: Path) -> list[Path]:
    return sorted((data / "train" / str(BUCKET)).glob("*.mds"))


def held(data: Path, number: int) -> range:
    """The samples of a shard."""
    counts = [shard.samples for shard in ImageCaptionDataset(str(data))._rows._local[0].shards]
    return range(sum(counts[:number]), sum(counts[: number + 1]))


def damage(file: Path, how: str) -> None:
    if how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:300])
    elif how == "images":  # a damaged disk: what says where rows lie is whole, and what they hold is not
        content = bytearray(file.read_bytes())
        for at in range(len(content)):
            if content[at : at + 4] == b"\xff\xd8\xff\xe0" or content[at : at + 4] == b"\x89PNG":
                content[at : at + 30] = bytes(30)
        file.write_bytes(content)
    elif how == "zeros":
        file.write_bytes(b"\0" * file.stat().st_size)
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)


def drawn(dataset: ImageCaptionDataset, epoch: int = 0) -> list[int]:
    return [dataset[SampleRequest(sample, 16, 16, epoch)]["sample_id"] for sample in range(SAMPLES)]


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "zeros", "ones", "images"])
def test_others_of_the_bucket_take_the_places_evenly_and_the_same_ones_again(
    data: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    lost = held(data, 3)
    damage(shards(data)[3], how)
    dataset = ImageCaptionDataset(str(data), max_undecodable=0.5)
    with caplog.at_level(logging.WARNING):
        found = drawn(dataset)
        named = [record.message for record in caplog.records if "cannot be decoded" in record.message]
    assert not {*found} & {*lost} and [found[sample] for sample in range(SAMPLES) if sample not in lost] == [
        sample for sample in range(SAMPLES) if sample not in lost
    ]
    assert max(Counter(found).values()) <= 5, "not one in the place of all"
    tried = 3 if how == "images" else 1
    assert len(lost) <= dataset.undecodable < 1.5 * tried * len(lost) + 5, "what training met, and no more"
    assert found == drawn(ImageCaptionDataset(str(data), max_undecodable=0.5)) != drawn(dataset, epoch=1)
    if how in ("gone", "empty"):
        (said,) = named
        assert "another of its bucket takes its place" in said and "shard.00003.mds cannot be read (" in said


def test_more_than_max_undecodable_ends_the_run(data: Path) -> None:
    for file in shards(data)[:8]:
        file.unlink()
    dataset = ImageCaptionDataset(str(data), max_undecodable=0.1)
    with pytest.raises(UndecodableError, match="max_undecodable = 10.00%"):
        _ = drawn(dataset), drawn(dataset, 1)
    for file in shards(data):
        file.unlink()
    with pytest.raises(UndecodableError, match="None of the 400 images"):
        ImageCaptionDataset(str(data), max_undecodable=1.0)[SampleRequest(0, 16, 16, 0)]


def test_a_skip_list_holds_for_what_takes_a_place(data: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(f"key-{index}" for index in range(0, SAMPLES, 2)))
    dataset = ImageCaptionDataset(str(data), skip=str(tmp_path / "ids.txt"), max_undecodable=1.0)
    lost = held(data, 3)
    shards(data)[3].unlink()
    found = [dataset[SampleRequest(sample, 16, 16, 0)]["sample_id"] for sample in lost if sample % 2]
    assert all(sample % 2 and sample not in lost for sample in found) and len(found) > 5


def test_batches_are_the_same_with_any_number_of_workers(data: Path, tokenizer: Any) -> None:
    shards(data)[5].unlink()
    seen = []
    for workers in (0, 2):
        loader = ImageCaptionData(
            tokenizer, 14, 16, 40, 4, 0, path=str(data), num_workers=workers, max_undecodable=0.5
        ).dataloader
        seen.append(torch.stack([batch["sample_id"] for batch in loader]))
    assert torch.equal(*seen) and seen[0].shape == (10, 40)


def test_a_check_warns_of_what_training_survives_and_refuses_the_rest(
    data: Path, tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], encoder_folder: Path
) -> None:
    def said(limit: float) -> list[str]:
        tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(data), "max_undecodable": limit}
        results = check_recipe(config.load([write_recipe(tiny_recipe)]), 1, step=False)
        return [str(result) for result in results if "missing or cut short" in result.text]

    words = tiny_recipe["model"]["text_encoder"]
    tiny_recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(encoder_folder), "max_tokens": 14}
    assert said(0.1) == []
    share = len(held(data, 0)) / SAMPLES
    os.truncate(shards(data)[0], 300)
    (warning,) = said(0.1)
    assert warning.startswith("! train_loader: 1 of") and "16x16/shard.00000.mds (300 of" in warning and f"{share:.2%}" in warning
    (refusal,) = said(0.01)
    assert refusal.startswith("✗ train_loader: 1 of") and refusal.endswith("Copy or convert them again.")
    tiny_recipe["model"]["text_encoder"] = words
    (refusal,) = said(0.1)
    assert refusal.startswith("✗"), "a run's first start learns its words from all captions"
    with pytest.raises(UserError, match="cannot be read .* so captions are missing"):
        list(iterate_captions(data / "train", "caption"))


def test_a_bucket_is_gone_through_to_the_last_sample_that_is_left(data: Path) -> None:
    kept = held(data, 7)
    for number, file in enumerate(shards(data)):
        if number != 7:
            file.unlink()
    dataset = ImageCaptionDataset(str(data), max_undecodable=1.0)
    assert {dataset[SampleRequest(sample, 16, 16, 0)]["sample_id"] for sample in range(0, SAMPLES, 3)} <= {*kept}
    for count in (1, 2, 12, 35):
        for step in (coprime(number, count) for number in range(1, count + 1)):
            assert sorted(step * attempt % count for attempt in range(count)) == list(range(count))


def test_of_two_samples_the_other_is_found(tmp_path: Path) -> None:
    """Steps of one through a bucket, from wherever they begin, come to it, too."""
    folder, image = tmp_path / "train", encode(gradient(16, 16))
    with MDSWriter(out=str(folder / str(BUCKET)), columns=COLUMNS | {"caption": "str"}, size_limit=len(image) + 400) as writer:
        for index in range(2):
            writer.write({"image": image, "width": 16, "height": 16, "key": f"key-{index}", "caption": f"caption {index}"})
    Manifest(16, ("caption",), {BUCKET: 2}).write(folder)
    first, *_ = sorted((folder / str(BUCKET)).glob("*.mds"))
    first.unlink()
    data = ImageCaptionDataset(str(tmp_path), max_undecodable=1.0)
    assert {data[SampleRequest(0, 16, 16, epoch)]["sample_id"] for epoch in range(20)} == {1}


def test_what_is_stored_beside_the_images_may_break_too(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A shard of features is lost; the images and captions that are there are not trained on without them."""
    folder = data / "train" / "encoded" / "feature" / "image"
    with MDSWriter(out=str(folder / str(BUCKET)), columns={"shape": "str", "values": "bytes"}, size_limit=600) as writer:
        for index in range(SAMPLES):
            writer.write({"shape": "1", "values": torch.tensor([float(index)]).numpy().tobytes()})
    made_of = column_contents(data / "train", "image")
    column = StoredColumn("features", "none", None, "", 1, "float32", data=made_of, buckets={str(BUCKET): SAMPLES})
    (folder / "manifest.json").write_text(column.to_json())
    sorted((folder / str(BUCKET)).glob("*.mds"))[2].unlink()
    shards(data)[5].unlink()
    with caplog.at_level(logging.WARNING):
        dataset = ImageCaptionDataset(str(data), features=["feature"], max_undecodable=1.0)
    assert "is not compared: the shard" in caplog.text
    found = [dataset[SampleRequest(sample, 16, 16, 0)] for sample in range(SAMPLES)]
    assert len(held(data, 5)) < dataset.undecodable < SAMPLES / 2
    assert all(sample["features"]["feature"].item() == sample["sample_id"] for sample in found)


def test_a_run_goes_on_after_a_shard_was_cut_and_repeats_every_loss(
    data: Path, tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(data), "max_undecodable": 0.2}
    file, folder = write_recipe(tiny_recipe), tmp_path / "runs" / "tiny"

    def losses(*changes: str) -> list[float]:
        run(config.load([file, *changes]))
        return [json.loads(line)["loss/train/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    losses("max_duration=2ba")
    os.truncate(shards(data)[4], 300)
    whole = losses("autoresume=true")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(whole) == 8 and max(row.get("data/undecodable", 0) for row in rows) > 0
    for later in ("ba4", "ba6", "ba8"):
        for found in (path for path in (folder / "checkpoints").iterdir() if f"-{later}" in path.name or path.name == later):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    assert losses("autoresume=true") == whole
