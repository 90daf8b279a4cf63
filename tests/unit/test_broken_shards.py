"""A shard that is lost or damaged while a run trains: others take its samples' places, it is counted, and named once."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import MDSWriter
from test_data import encode, gradient

from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset, UndecodableError
from prx_composer.data.format import COLUMNS, Bucket, Manifest, iterate_captions
from prx_composer.data.loader import ImageCaptionData
from prx_composer.data.sampler import SampleRequest
from prx_composer.recipe import config
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
    elif how == "zeros":
        file.write_bytes(b"\0" * file.stat().st_size)
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)


def drawn(dataset: ImageCaptionDataset, epoch: int = 0) -> list[int]:
    return [dataset[SampleRequest(sample, 16, 16, epoch)]["sample_id"] for sample in range(SAMPLES)]


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "zeros", "ones"])
def test_others_of_the_bucket_take_the_places_evenly_and_the_same_ones_again(
    data: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    lost = held(data, 3)
    damage(shards(data)[3], how)
    dataset = ImageCaptionDataset(str(data), max_undecodable=0.2)
    with caplog.at_level(logging.WARNING):
        found = drawn(dataset)
        named = [record.message for record in caplog.records if "cannot be decoded" in record.message]
    assert not {*found} & {*lost} and [found[sample] for sample in range(SAMPLES) if sample not in lost] == [
        sample for sample in range(SAMPLES) if sample not in lost
    ]
    assert max(Counter(found).values()) <= 5, "not one in the place of all"
    assert dataset.undecodable >= len(lost) and dataset.undecodable < 1.5 * len(lost) + 5, "what training met, and no more"
    assert found == drawn(ImageCaptionDataset(str(data), max_undecodable=0.2)) != drawn(dataset, epoch=1)
    if how in ("gone", "empty"):
        (said,) = named
        assert "another of its bucket takes its place" in said and "shard.00003.mds cannot be read" in said


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
            tokenizer, 14, 16, 40, 4, 0, path=str(data), num_workers=workers, max_undecodable=0.2
        ).dataloader
        seen.append(torch.stack([batch["sample_id"] for batch in loader]))
    assert torch.equal(*seen) and seen[0].shape == (10, 40)


def test_a_check_warns_of_what_training_survives_and_refuses_the_rest(
    data: Path, tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    def said(limit: float) -> list[str]:
        tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(data), "max_undecodable": limit}
        results = check_recipe(config.load([write_recipe(tiny_recipe)]), 1, step=False)
        return [str(result) for result in results if "missing or cut short" in result.text]

    assert said(0.1) == []
    share = len(held(data, 0)) / SAMPLES
    os.truncate(shards(data)[0], 300)
    (warning,) = said(0.1)
    assert warning.startswith("! train_loader: 1 of") and "16x16/shard.00000.mds (300 of" in warning and f"{share:.2%}" in warning
    (refusal,) = said(0.01)
    assert refusal.startswith("✗ train_loader: 1 of") and refusal.endswith("Copy or convert them again.")
    with pytest.raises(UserError, match="captions cannot be read"):
        list(iterate_captions(data / "train", "caption"))
