"""Evaluation during training measures every sample once, whatever the batches, ranks, workers and microbatches."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import SQUARE, WIDE, encode, write

from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.loader import Collator, ImageCaptionData, ImageCaptionLoader, split_batch
from prx_composer.data.mixture import MixedDataset
from prx_composer.data.sampler import BucketBatchSampler, SampleRequest
from prx_composer.models import TextToImage
from prx_composer.models.text_to_image import VALIDATION_TIMESTEPS

Build = Callable[..., TextToImage]
SQUARES, WIDES = 13, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    sizes = [*[SQUARE] * SQUARES, *[WIDE] * WIDES]
    pixels = [rng.integers(0, 256, (size.height, size.width, 3), np.uint8) // (1 + index) for index, size in enumerate(sizes)]
    samples = [(size, encode(Image.fromarray(image))) for size, image in zip(sizes, pixels, strict=True)]
    return write(tmp_path_factory.mktemp("held") / "out", samples)


def measured(
    model: TextToImage, loaders: list[ImageCaptionLoader], microbatch: int | None = None
) -> tuple[dict[str, torch.Tensor], Counter[int]]:
    """The metrics over the ranks' batches, which come in step, and how often each sample was counted."""
    metrics = model.get_metrics()
    for metric in metrics.values():
        metric.reset()
    counted = Counter[int]()
    with torch.no_grad():
        for step in zip(*loaders, strict=True):  # strict: a rank that had fewer would wait for the others for ever
            for batch in step:
                for part in split_batch(batch, microbatch):
                    outputs = model.eval_forward(part)
                    for metric in metrics.values():
                        model.update_metric(part, outputs, metric)
                    counted.update(part["sample_id"][part["counted"]].tolist())
    return {name: metric.compute() for name, metric in metrics.items()}, counted


def loaders_of(
    dataset: Any, tokenizer: Any, batch: int, ranks: int = 1, workers: int = 0, keeps_shape: bool = False
) -> list[ImageCaptionLoader]:
    samplers = [BucketBatchSampler(dataset, 16, batch, 4, False, 0, ranks, rank, evaluation=True) for rank in range(ranks)]
    for sampler in samplers:
        sampler.keeps_shape = keeps_shape
    loaders = [ImageCaptionLoader(dataset, sampler, Collator(tokenizer, 14, workers), workers) for sampler in samplers]
    assert all(len(loader) == len(list(sampler)) for loader, sampler in zip(loaders, samplers, strict=True))
    return loaders


@pytest.fixture
def alone(tiny_model: Build, tokenizer: Any, data: Path) -> tuple[TextToImage, dict[str, torch.Tensor]]:
    """A model, and its metrics by a plain loop over the samples, one by one."""
    model, dataset = tiny_model(seed=3, trainable_text=False).eval(), ImageCaptionDataset(str(data))
    errors = []
    for index in range(len(dataset)):
        size = dataset.buckets[dataset.bucket_of(index)]
        sample = dataset[SampleRequest(index, size.height, size.width, 0)]
        errors.append(model.eval_forward(Collator(tokenizer, 14)([sample])).double())
    at = torch.cat(errors).mean(0)
    each = {f"validation_loss_t{t:g}": error for t, error in zip(VALIDATION_TIMESTEPS, at, strict=True)}
    return model, {"validation_loss": at.mean(), **each}


@pytest.mark.parametrize(
    ("batch", "ranks", "microbatch", "workers", "keeps_shape"),
    [
        (1, 1, None, 0, False),
        (2, 1, None, 0, False),
        (7, 1, None, 0, False),
        (8, 1, None, 0, False),
        (64, 1, None, 0, False),
        (8, 1, 3, 2, False),
        (2, 2, None, 0, False),
        (10, 2, 2, 0, False),
        (3, 3, None, 0, False),
        (12, 3, 1, 0, False),
        (4, 4, None, 0, False),
        (64, 4, None, 0, False),
        (12, 3, 3, 0, True),
        (64, 2, None, 0, True),
    ],
)
def test_the_metrics_are_those_of_a_loop_over_the_samples(
    alone: tuple[TextToImage, dict[str, torch.Tensor]], tokenizer: Any, data: Path,
    batch: int, ranks: int, microbatch: int | None, workers: int, keeps_shape: bool,
) -> None:  # fmt: skip
    model, expected = alone
    loaders = loaders_of(ImageCaptionDataset(str(data), max_workers=workers), tokenizer, batch, ranks, workers, keeps_shape)
    found, counted = measured(model, loaders, microbatch)
    assert counted == Counter(range(SQUARES + WIDES)), "every sample once"
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=0, equal_nan=True)


def test_batches_are_of_one_shape_for_a_compiled_model_only(tokenizer: Any, data: Path) -> None:
    dataset = ImageCaptionDataset(str(data))
    for keeps_shape, sizes in ((False, {8, 5, 3}), (True, {8})):
        (loader,) = loaders_of(dataset, tokenizer, 8, keeps_shape=keeps_shape)
        assert {len(batch["sample_id"]) for batch in loader} == sizes


@pytest.mark.parametrize(("batch", "ranks", "keeps_shape"), [(4, 1, False), (4, 2, True), (16, 4, False)])
def test_a_part_of_the_samples_is_evenly_spaced_over_all_buckets_whatever_the_batches(
    tiny_model: Build, tokenizer: Any, data: Path, batch: int, ranks: int, keeps_shape: bool
) -> None:
    loaders = loaders_of(ImageCaptionDataset(str(data)), tokenizer, batch, ranks, keeps_shape=keeps_shape)
    for loader in loaders:
        loader.batch_sampler.at_most = 8
    assert len(loaders[0]) == len(list(loaders[0])), "Composer is told how many steps there are"
    _, counted = measured(tiny_model().eval(), loaders)
    assert counted == Counter(range(0, SQUARES + WIDES, 2))


def test_composer_is_told_how_many_samples_a_batch_counts(tokenizer: Any, data: Path) -> None:
    spec = ImageCaptionData(tokenizer, 14, 16, 64, 4, 0, True, path=str(data))
    loader: Any = spec.dataloader
    loader.batch_sampler.keeps_shape = True
    assert [spec.get_num_samples_in_batch(batch) for batch in loader] == [WIDES, SQUARES]  # as the buckets are sorted


def test_what_cannot_be_decoded_is_left_out_and_no_other_sample_counts_twice(
    tiny_model: Build, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [(SQUARE, encode(Image.new("RGB", (16, 16), (40 * index, 0, 0)))) for index in range(5)]
    dataset = ImageCaptionDataset(str(write(tmp_path / "d", [*good[:2], (SQUARE, b"no image"), *good[2:]])))
    _, counted = measured(tiny_model().eval(), loaders_of(dataset, tokenizer, 4))
    assert (
        counted == Counter([0, 1, 3, 4, 5]) and "Sample 2 (sample-2) cannot be decoded, evaluation leaves it out" in caplog.text
    )


def test_a_mixture_is_evaluated_sample_by_sample_too(tiny_model: Build, tokenizer: Any, data: Path) -> None:
    parts = {name: ImageCaptionDataset(str(data)) for name in ("one", "other")}
    mixed = MixedDataset(parts, {"one": 9.0, "other": 1.0}, 0)
    _, counted = measured(tiny_model().eval(), loaders_of(mixed, tokenizer, 6, ranks=2))
    assert counted == Counter(range(2 * (SQUARES + WIDES)))
