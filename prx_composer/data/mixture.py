"""Several data sets as one, each with the share of samples that its weight says."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prx_composer.common.errors import UserError
from prx_composer.data.bucketed import BucketedDataset, SampleRequest
from prx_composer.data.buckets import Bucket
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.shares import Shares


class MixedDataset(BucketedDataset):
    """Data sets drawn from with given shares, as one data set for the sampler.

    An epoch has as many full batches as all data sets together would fill; a data set of weight w has w / Σw of their samples,
    see `Shares`. In every bucket it goes through its own samples in passes, each in an order of its own, and an epoch goes on
    where the one before it ended: no sample is seen n + 1 times before every other of its bucket has been seen n times.

    Args:
        parts: name → data set; all of one base size.
        weights: name → weight; None: every sample is seen equally often.
        seed: of the orders.

    Raises:
        UserError: data sets of different base sizes.
    """

    def __init__(self, parts: dict[str, ImageCaptionDataset], weights: dict[str, float] | None, seed: int):
        self.parts, self._seed = parts, seed
        sizes = {name: part.image_size for name, part in parts.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(f"mix: the data sets have different base sizes ({told} px); convert them with one --base-size.")
        self.image_size = next(iter(sizes.values()))
        self.buckets = sorted({bucket for part in parts.values() for bucket in part.buckets})
        self._names = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts.values())])
        natural = {name: float(len(part)) for name, part in parts.items()}
        self._weights = weights or natural
        self._shares: dict[int, Shares] = {}  # by batch size
        self.counts = [sum(self._count(part, bucket) for part in parts.values()) for bucket in self.buckets]
        self.images = all(part.images for part in parts.values())
        self.text_columns = {f"{name}/{key}": c for name, part in parts.items() for key, c in part.text_columns.items()}
        self.latent_columns = {f"{name}/{key}": c for name, part in parts.items() for key, c in part.latent_columns.items()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        index, local = self._locate(request.sample_id)
        sample = self.parts[self._names[index]][request._replace(sample_id=local)]
        return sample | {"sample_id": sample["sample_id"] + int(self._starts[index])}

    def look_at(self, request: SampleRequest) -> dict[str, Any]:
        """As `dataset[request]`, but what cannot be decoded is not counted."""
        index, local = self._locate(request.sample_id)
        return self.parts[self._names[index]].look_at(request._replace(sample_id=local))

    @property
    def undecodable(self) -> int:
        return sum(part.undecodable for part in self.parts.values())

    def check_sizes(self, image_size: int, sizes: list[Bucket]) -> None:
        """Raises ValueError if there are latents, but none of images of these sizes, bucket by bucket."""
        size_of = dict(zip(self.buckets, sizes, strict=True))
        for name, part in self.parts.items():
            try:
                part.check_sizes(image_size, [size_of[bucket] for bucket in part.buckets])
            except ValueError as error:
                raise ValueError(f"mix.{name}: {error}") from None

    def bucket_of(self, sample_id: int) -> int:
        """Index of the bucket that holds a sample."""
        index, local = self._locate(sample_id)
        part = self.parts[self._names[index]]
        return self.buckets.index(part.buckets[part.bucket_of(local)])

    def first_of(self, bucket: int) -> int:
        """Id of a sample of the bucket."""
        for start, part in zip(self._starts, self.parts.values(), strict=False):
            if self.buckets[bucket] in part.buckets:
                return int(start) + part.first_of(part.buckets.index(self.buckets[bucket]))
        raise IndexError(bucket)

    def ids(self) -> list[NDArray[np.int64]]:
        """Every sample once, by bucket, in stored order."""
        return [
            np.concatenate([self._first(index, bucket) + np.arange(count) for index, count in enumerate(counts)])
            for bucket, counts in enumerate(zip(*self._table(), strict=True))
        ]

    def epoch_ids(self, epoch: int, batch_size: int) -> list[NDArray[np.int64]]:
        """Of every bucket as many as fill the batches that it has in this epoch."""
        plan = self._plans(batch_size).epoch(epoch)
        return [
            np.concatenate([self._stretch(part, bucket, *stretch) for part, stretch in enumerate(zip(*stretches, strict=True))])
            for bucket, stretches in enumerate(zip(zip(*plan.before, strict=True), zip(*plan.draws, strict=True), strict=True))
        ]

    def epoch_steps(self, batch_size: int) -> int:
        """How many batches every epoch has."""
        return self._plans(batch_size).steps

    def _plans(self, batch_size: int) -> Shares:
        if batch_size not in self._shares:
            self._shares[batch_size] = Shares(self._table(), list(self._weights.values()), batch_size)
        return self._shares[batch_size]

    def _table(self) -> list[list[int]]:
        """Samples by data set and bucket."""
        return [[self._count(part, bucket) for bucket in self.buckets] for part in self.parts.values()]

    def _locate(self, sample_id: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return index, sample_id - int(self._starts[index])

    def _count(self, part: ImageCaptionDataset, bucket: Bucket) -> int:
        return part.counts[part.buckets.index(bucket)] if bucket in part.buckets else 0

    def _first(self, index: int, bucket: int) -> int:
        """Id of the first sample that a data set has in a bucket, if it has any."""
        part = self.parts[self._names[index]]
        place = part.buckets.index(self.buckets[bucket]) if self.buckets[bucket] in part.buckets else None
        return int(self._starts[index]) + (0 if place is None else part.first_of(place))

    def _stretch(self, index: int, bucket: int, begin: int, draws: int) -> NDArray[np.int64]:
        """So many of the endless shuffled passes through what a data set has in a bucket, from `begin` on."""
        if draws == 0:
            return np.empty(0, np.int64)
        count = self._count(self.parts[self._names[index]], self.buckets[bucket])
        passes = [self._pass(index, bucket, number, count) for number in range(begin // count, -(-(begin + draws) // count))]
        return self._first(index, bucket) + np.concatenate(passes)[begin % count : begin % count + draws]

    def _pass(self, index: int, bucket: int, number: int, count: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, index, bucket, number]).permutation(count)

    def identity(self) -> dict[str, Any]:
        total = sum(self._weights.values())
        return {"mix": {name: {"counts": part.counts, "share": self._weights[name] / total} for name, part in self.parts.items()}}
