"""Which samples form which batch: a pure function of (seed, epoch, batch size), with every batch from one bucket."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from prx_composer.data.bucketed import BucketedDataset, SampleRequest
from prx_composer.data.buckets import Bucket

__all__ = ["BucketBatchSampler", "epoch_batches", "epoch_steps", "fewer_than_a_batch"]


def fewer_than_a_batch(samples: int, batch_size: int, path: str = "") -> str | None:
    """What is to be said of a batch that is larger than the data set, in which the same image would be several times.

    Args:
        path: what comes before `global_train_batch_size` in the YAML path.
    """
    if samples >= batch_size:
        return None
    return (
        f"{path}global_train_batch_size: {batch_size} is more than the {samples:,} images that there are to train on; set it to "
        f"at most {samples} (and {path}device_train_microbatch_size to a divisor of it), or add images."
    )


def epoch_batches(
    ids: Sequence[NDArray[np.int64]], batch_size: int, *, shuffle: bool, seed: int = 0, epoch: int = 0
) -> NDArray[np.int64]:
    """An epoch's batches, (steps, batch_size), whatever the number of ranks that share a batch.

    Every batch is full and of one bucket: all ranks have one shape at a time, so that none waits for another that has more
    to compute or a new shape to compile, and a run that goes on with another number of ranks sees the same samples. What
    doesn't fill a batch waits for another epoch's shuffle; a bucket smaller than one batch fills it by repetition. Without
    shuffling (evaluation) tails are filled by repetition too, so that every sample is seen.

    Args:
        ids: of the samples of every bucket.
        batch_size: over all ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for members, number in zip(ids, _batches_per_bucket([len(part) for part in ids], batch_size, shuffle), strict=True):
        if shuffle:
            members = members.copy()
            rng.shuffle(members)
        batches.append(np.resize(members, (number, batch_size)))
    stacked = np.concatenate(batches)
    if shuffle:
        rng.shuffle(stacked)
    return stacked


def epoch_steps(counts: list[int], batch_size: int, *, shuffle: bool) -> int:
    """How many batches `epoch_batches` has of so many samples in every bucket."""
    return sum(_batches_per_bucket(counts, batch_size, shuffle))


def _batches_per_bucket(counts: list[int], batch_size: int, shuffle: bool) -> list[int]:
    return [max(count // batch_size if shuffle else -(-count // batch_size), min(count, 1)) for count in counts]


class BucketBatchSampler(DistributedSampler):
    """Yields this rank's batches of `SampleRequest`s.

    It is a DistributedSampler so that Composer calls `set_epoch`; the order is the same with any number of workers,
    and a resumed epoch goes on at `dataset.start_sample`.

    Args:
        dataset: whose buckets are drawn from.
        image_size: side of the square whose area the images have.
        global_batch_size: over all ranks.
        multiple: sides of resized buckets are multiples of this (patch size × autoencoder downsampling).
        shuffle: a new order every epoch; off, the stored order.
        seed: of the order.
        num_ranks, rank: of this process.

    Raises:
        ValueError: a batch that doesn't divide over the ranks, or an image size that the patches don't divide or that has no
            stored latents, where the dataset takes them.
    """

    def __init__(
        self,
        dataset: BucketedDataset,
        image_size: int,
        global_batch_size: int,
        multiple: int,
        shuffle: bool,
        seed: int,
        num_ranks: int,
        rank: int,
    ):
        super().__init__(dataset, num_replicas=num_ranks, rank=rank, shuffle=shuffle, seed=seed)
        self.total_size = len(dataset)  # Composer trims the difference to this in evaluation; we leave nothing to trim
        self._dataset = dataset
        self.multiple = multiple
        self.set_stage(image_size, global_batch_size)

    def set_stage(self, image_size: int, global_batch_size: int) -> None:
        """Changes what the next epoch's batches look like."""
        if global_batch_size % self.num_replicas:
            raise ValueError(f"global_train_batch_size {global_batch_size} does not divide over {self.num_replicas} ranks.")
        if image_size % self.multiple:
            raise ValueError(
                f"image_size {image_size} is not divisible by {self.multiple} (patch_size × autoencoder downsampling)."
            )
        self.image_size, self.global_batch_size = image_size, global_batch_size
        base = self._dataset.image_size
        self._sizes = [bucket.at(image_size, base, self.multiple) for bucket in self._dataset.buckets]
        for stored, size in zip(self._dataset.buckets, self._sizes, strict=True):
            if any(side % self.multiple for side in size):
                raise ValueError(
                    f"The data set's bucket {stored} cannot be cut into patches of {self.multiple}; "
                    "convert the data with that multiple, or change model.backbone.patch_size."
                )
        self._dataset.check_sizes(image_size, self._sizes)

    @property
    def sizes(self) -> list[Bucket]:
        """Image sizes of this stage, bucket by bucket."""
        return self._sizes

    def _batches(self) -> NDArray[np.int64]:
        ids = self._dataset.epoch_ids(self.epoch, self.shuffle)
        return epoch_batches(ids, self.global_batch_size, shuffle=self.shuffle, seed=self.seed, epoch=self.epoch)

    def __len__(self) -> int:
        return epoch_steps(self._dataset.epoch_counts(self.shuffle), self.global_batch_size, shuffle=self.shuffle)

    def __iter__(self) -> Iterator[list[SampleRequest]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        first = self._dataset.take_start_sample() // self.global_batch_size
        epoch = self.epoch if self.shuffle else 0  # Composer counts evaluations there, which must not differ
        share = self.global_batch_size // self.num_replicas
        for batch in self._batches()[first:, self.rank * share : (self.rank + 1) * share]:
            height, width = self._sizes[self._dataset.bucket_of(int(batch[0]))]
            yield [SampleRequest(int(sample_id), height, width, epoch) for sample_id in batch]
