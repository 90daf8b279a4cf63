"""Features that come with the data: from the writer to the loss."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prx_composer.algorithms.repa import StoredFeatures, stored_features
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset, read_manifest
from prx_composer.data.format import MANIFEST, Bucket, BucketWriter, Manifest, RawSample
from prx_composer.data.loader import ImageCaptionData
from prx_composer.data.sampler import SampleRequest
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import run

SQUARE, WIDE = Bucket(16, 16), Bucket(12, 20)
GRIDS = {SQUARE: (8, 8), WIDE: (6, 10)}
WIDTH = 16


def features_of(index: int, bucket: Bucket) -> np.ndarray:
    """Half of what they say is common to all, and so can be learned in a few steps."""
    return (np.random.default_rng(index).normal(size=(*GRIDS[bucket], WIDTH)) + np.cos(np.arange(WIDTH))).astype(np.float16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in two buckets, with features `dino`."""
    path = tmp_path_factory.mktemp("data")
    with BucketWriter(path / "train", 16, ("caption",), {"dino": WIDTH}) as writer:
        for index in range(48):
            bucket = (SQUARE, WIDE)[index % 2]
            encoded = io.BytesIO()
            Image.new("RGB", (bucket.width, bucket.height), (index, 100, 200 - index)).save(encoded, "PNG")
            captions = {"caption": f"a picture of {index}"}
            features = {"dino": features_of(index, bucket)}
            writer.write(bucket, RawSample(encoded.getvalue(), bucket.width, bucket.height, captions, str(index), features))
    return path


def test_samples_carry_the_features_of_their_own_image(data: Path) -> None:
    dataset = ImageCaptionDataset(str(data), features=["dino"])
    for sample_id in range(len(dataset)):
        bucket = dataset.buckets[dataset.bucket_of(sample_id)]
        sample = dataset[SampleRequest(sample_id, *bucket, epoch=0)]
        index = int(sample["caption"].split()[-1])
        assert torch.equal(sample["features"]["dino"], torch.from_numpy(features_of(index, bucket)))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_them_as_a_tensor_of_their_own_dtype(data: Path, tokenizer: Any, workers: int) -> None:
    loader = ImageCaptionData(tokenizer, 14, 16, 8, 4, 0, path=str(data), features=["dino"], num_workers=workers).dataloader
    shapes = {(batch["dino"].dtype, tuple(batch["dino"].shape)) for batch in loader}  # pyright: ignore
    assert shapes == {(torch.float16, (8, *grid, WIDTH)) for grid in GRIDS.values()}
    plain = next(iter(ImageCaptionData(tokenizer, 14, 16, 8, 4, 0, path=str(data)).dataloader))  # pyright: ignore
    assert set(plain) == {"image", "input_ids", "attention_mask", "sample_id"}, "nobody asked for them"


def test_data_without_features_has_the_manifest_it_always_had(shapes_data: Path, data: Path) -> None:
    assert "features" not in json.loads((shapes_data / "train" / MANIFEST).read_text())
    assert Manifest.read(shapes_data / "train").features == {}
    assert Manifest.read(data / "train").features == {"dino": WIDTH}


def test_a_column_that_is_not_there_is_refused_naming_those_that_are(data: Path, shapes_data: Path) -> None:
    with pytest.raises(ValueError, match=r"features: no feature column 'dion'; the data set has dino\."):
        read_manifest(data, "train", None, ["dion"])
    with pytest.raises(ValueError, match=r"no feature column 'dino'; the data set has none\."):
        ImageCaptionDataset(str(shapes_data), features=["dino"])


def test_the_writer_refuses_taken_names_and_other_shapes(tmp_path: Path) -> None:
    for name in ("image", "caption", "input_ids"):
        with pytest.raises(ValueError, match=f"features: '{name}' is the name of another column"):
            BucketWriter(tmp_path / "train", 16, ("caption",), {name: 4})
    for features in (np.zeros((4, 4, 5), np.float16), np.zeros((16, 4), np.float16)):
        with pytest.raises(ValueError, match=r"k: dino must be \(h, w, 4\)"):
            with BucketWriter(tmp_path / "train", 16, ("caption",), {"dino": 4}) as writer:
                writer.write(SQUARE, RawSample(b"x", 16, 16, {"caption": "c"}, "k", {"dino": features}))
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- in the loss


def test_another_grid_is_resized_with_antialiasing_and_the_same_one_left_alone() -> None:
    features = torch.randn(2, 8, 12, 3, generator=torch.Generator().manual_seed(0)).half()
    batch = {"dino": features}
    same = stored_features(StoredFeatures("dino", 3), "", batch, 8, 12)
    assert torch.equal(same, features.float().flatten(1, 2)) and same.dtype == torch.float32
    coarse = stored_features(StoredFeatures("dino", 3), "", batch, 4, 6)
    for channel in range(3):
        image = Image.fromarray(features[0, :, :, channel].float().numpy()).resize((6, 4), Image.Resampling.BILINEAR)
        torch.testing.assert_close(coarse[0, :, channel], torch.from_numpy(np.array(image)).flatten(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            StoredFeatures("dion", 3),
            r"algorithms\.repa\.features\.column: .* no column 'dion'; set train_loader\.features: \[dion\]",
        ),
        (StoredFeatures("dino", 4), r"algorithms\.repa\.features\.width is 4, but 'dino' of the data is 3 wide"),
    ],
)
def test_what_the_batch_does_not_have_is_named(stored: StoredFeatures, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stored_features(stored, "algorithms.repa.features", {"dino": torch.zeros(2, 8, 8, 3)}, 4, 4)


def recipe_with_features(tiny_recipe: dict[str, Any], data: Path) -> dict[str, Any]:
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(data), "features": ["dino"]}
    tiny_recipe["algorithms"] = {
        "repa": {"features": {"column": "dino", "width": WIDTH}, "block": 1, "projector_hidden": 16},
        "tread": {"start_block": 1, "end_block": 1},
    }
    return tiny_recipe | {"global_train_batch_size": 12, "device_train_microbatch_size": 6}


def test_a_run_aligns_with_them(tiny_recipe: dict[str, Any], data: Path, write_recipe: Any, tmp_path: Path) -> None:
    recipe = recipe_with_features(tiny_recipe, data)
    run(config.load([write_recipe(recipe), "max_duration=30ba", "save_interval=30ba", "optimizer.lr=0.02"]))
    rows = read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    terms = [row["loss/train/repa"] for row in rows if "loss/train/repa" in row]
    assert len(terms) == 30 and np.mean(terms[-5:]) < np.mean(terms[:5]) - 0.1


def test_a_loader_that_was_not_asked_for_them_is_said_at_the_first_batch(
    tiny_recipe: dict[str, Any], data: Path, write_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with_features(tiny_recipe, data)
    del recipe["train_loader"]["features"]
    assert main([write_recipe(recipe)]) == 1
    printed = capsys.readouterr().err
    assert "set train_loader.features: [dino]" in printed and "Traceback" not in printed
