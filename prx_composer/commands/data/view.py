"""Samples of a data set as a model sees them: decoded, scaled and cropped, with the caption that is chosen, where it is cut."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prx_composer.commands.data.split import Split
from prx_composer.commands.data.subject import Subject
from prx_composer.common.errors import UserError, at_path
from prx_composer.data.bucketed import SampleRequest
from prx_composer.data.buckets import Bucket
from prx_composer.data.dataset import ImageCaptionDataset, UndecodableError
from prx_composer.data.sampler import BucketBatchSampler
from prx_composer.data.storage import is_remote
from prx_composer.data.transforms import UNDECODABLE, decode_image
from prx_composer.models.prompts import cleaned


@dataclass(frozen=True)
class Cut:
    """A caption as the tokenizer leaves it.

    Args:
        kept, lost: what the model reads and what it does not.
        tokens: of the whole caption.
    """

    kept: str
    lost: str
    tokens: int


@dataclass(frozen=True)
class Seen:
    """One sample.

    Args:
        image: uint8 (3, H, W), or None if it cannot be decoded.
        size: of the image in this stage. stored: the bucket it lies in.
        column: caption column that was chosen. others: the other captions by column.
        problem: why there is no image. replacement: the sample that training shows in its place, if there is one.
    """

    sample_id: int
    key: str
    stored: Bucket
    size: Bucket
    image: Tensor | None
    column: str
    caption: Cut
    others: dict[str, str]
    problem: str = ""
    replacement: int | None = None


@dataclass(frozen=True)
class View:
    """Some samples of a split.

    Args:
        total: samples that they were drawn from. max_tokens: 0 if captions are not cut.
    """

    split: Split
    image_size: int
    total: int
    bucket: str | None
    max_tokens: int
    samples: list[Seen]


def look(
    subject: Subject, split: Split, count: int = 32, seed: int = 0, image_size: int | None = None, bucket: str | None = None
) -> View:
    """Draws samples, all with the same probability, in the order of their buckets.

    Args:
        count: samples, at most.
        seed: of the draw.
        image_size: side of the square whose area images have; by default the recipe's, or the one they are stored at.
        bucket: only of this one, by the name that it has in the data set.

    Raises:
        UserError: no such bucket, or an image size that the data or the recipe cannot have.
    """
    image_size = image_size or subject.image_size or split.manifest.image_size
    with _dataset(subject) as dataset:
        sides = [side for stored in dataset.buckets for side in stored]
        multiple = subject.multiple or math.gcd(*sides, image_size)
        with at_path("--image-size"):
            sampler = BucketBatchSampler(dataset, image_size, 1, multiple, False, 0, 1, 0)
        first, total = 0, len(dataset)
        if bucket is not None:
            names = [str(stored) for stored in dataset.buckets]
            if bucket not in names:
                raise UserError(f"--bucket: there is no {bucket!r}; the data set has {', '.join(names)}.")
            first, total = sum(dataset.counts[: names.index(bucket)]), dataset.counts[names.index(bucket)]
        drawn = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
        samples = [_see(dataset, sampler, subject, first + int(index)) for index in sorted(drawn)]
    return View(split, image_size, total, bucket, subject.max_tokens if subject.tokenizer is not None else 0, samples)


@contextmanager
def _dataset(subject: Subject) -> Iterator[ImageCaptionDataset]:
    """The data set that the recipe's loader has; without a recipe, one with that loader's defaults."""
    given = {name: subject.loader[name] for name in ("captions", "remote") if subject.loader.get(name)}
    with tempfile.TemporaryDirectory(prefix="prx-look.") as cache, at_path(subject.key if subject.loader else subject.path):
        path = subject.loader.get("path") or subject.path
        if not subject.loader and is_remote(path):
            given["remote"], path = path.rstrip("/"), cache
        yield ImageCaptionDataset(path, subject.split, seed=subject.seed, **given)


def _see(dataset: ImageCaptionDataset, sampler: BucketBatchSampler, subject: Subject, sample_id: int) -> Seen:
    place = dataset.bucket_of(sample_id)
    size, row = sampler.sizes[place], dataset.row(sample_id)
    column = dataset.choose_caption(sample_id, 0)
    texts = {name: row[name] for name in dataset.manifest.captions if name in row}
    image, problem, replacement = _image(dataset, SampleRequest(sample_id, size.height, size.width, 0), row)
    return Seen(
        sample_id,
        str(row.get("key", "")),
        dataset.buckets[place],
        size,
        image,
        column,
        cut(row[column], subject.tokenizer, subject.max_tokens),
        {name: text for name, text in texts.items() if name != column},
        problem,
        replacement,
    )


def _image(dataset: ImageCaptionDataset, request: SampleRequest, row: dict[str, Any]) -> tuple[Tensor | None, str, int | None]:
    """What training gets for a request: the image, or why it is another one's and whose."""
    try:
        sample = dataset.look_at(request)
        if sample["sample_id"] == request.sample_id:
            return sample["image"], "", None
        replacement = int(sample["sample_id"])
    except UndecodableError:
        replacement = None
    try:
        decode_image(row["image"], request.height, request.width)
    except UNDECODABLE as error:
        return None, str(error) or type(error).__name__, replacement
    raise AssertionError("an image that was replaced can be decoded")


def cut(text: str, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> Cut:
    """Where a caption is cut; without a tokenizer it isn't."""
    if tokenizer is None:
        return Cut(text, "", 0)
    (text,) = cleaned(tokenizer, [text])
    whole: Any = tokenizer(text, verbose=False)
    tokens = len(whole["input_ids"])
    if tokens <= max_tokens:
        return Cut(text, "", tokens)
    options: dict[str, Any] = {"truncation": True, "max_length": max_tokens}
    if tokenizer.is_fast:
        read: Any = tokenizer(text, return_offsets_mapping=True, **options)
        end = max((stop for _, stop in read["offset_mapping"]), default=0)
        return Cut(text[:end], text[end:], tokens)
    read = tokenizer(text, **options)
    kept = str(tokenizer.decode(read["input_ids"], skip_special_tokens=True))
    return Cut(kept, text[len(kept) :] if text.startswith(kept) else "…", tokens)
