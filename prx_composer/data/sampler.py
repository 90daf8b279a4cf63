"""This rank's batches, in training and in evaluation."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from prx_composer.data.batches import epoch_batches, epoch_steps, evaluation_batches
from prx_composer.data.bucketed import BucketedDataset, SampleRequest
from prx_composer.data.buckets import Bucket


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


class BucketBatchSampler(DistributedSampler):
    """Yields this rank's batches of `SampleRequest`s.

    It is a DistributedSampler so that Composer calls `set_epoch`; the order is the same with any number of workers,
    and a resumed epoch goes on at `dataset.start_sample`.

    In evaluation every sample is counted once: batches are as large as what is left of a bucket, and ranks share them as evenly
    as they can. A rank that would have none gets one that isn't counted, so that all take the same number of steps.

    Attributes:
        keeps_shape: in evaluation, whether all batches are full, with samples that aren't counted: for a compiled model.

    Args:
        dataset: whose buckets are drawn from.
        image_size: side of the square whose area the images have.
        global_batch_size: over all ranks.
        multiple: sides of resized buckets are multiples of this (patch size × autoencoder downsampling).
        shuffle: a new order every epoch; off, the stored order.
        seed: of the order.
        num_ranks, rank: of this process.
        evaluation: see above; nothing is shuffled then.

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
        evaluation: bool = False,
    ):
        super().__init__(dataset, num_replicas=num_ranks, rank=rank, shuffle=shuffle, seed=seed)
        self.evaluation, self.keeps_shape = evaluation, False
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
        ids = self._dataset.epoch_ids(self.epoch, self.global_batch_size) if self.shuffle else self._dataset.ids()
        return epoch_batches(ids, self.global_batch_size, shuffle=self.shuffle, seed=self.seed, epoch=self.epoch)

    def __len__(self) -> int:
        if self.shuffle:
            return self._dataset.epoch_steps(self.global_batch_size)
        return epoch_steps(self._dataset.counts, self.global_batch_size, shuffle=False)

    def __iter__(self) -> Iterator[list[SampleRequest]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        first = self._dataset.take_start_sample() // self.global_batch_size
        if self.evaluation:
            yield from self._evaluation()
            return
        epoch = self.epoch if self.shuffle else 0
        share = self.global_batch_size // self.num_replicas
        for batch in self._batches()[first:, self.rank * share : (self.rank + 1) * share]:
            height, width = self._size_of(batch)
            yield [SampleRequest(int(sample_id), height, width, epoch) for sample_id in batch]

    def _evaluation(self) -> Iterator[list[SampleRequest]]:
        for batch in evaluation_batches(self._dataset.ids(), self.global_batch_size):
            height, width = self._size_of(batch)
            filled = np.resize(batch, max(len(batch), self.global_batch_size if self.keeps_shape else self.num_replicas))
            own = np.array_split(np.arange(len(filled)), self.num_replicas)[self.rank]
            yield [SampleRequest(int(filled[place]), height, width, 0, bool(place < len(batch))) for place in own]

    def _size_of(self, batch: NDArray[np.int64]) -> Bucket:
        return self._sizes[self._dataset.bucket_of(int(batch[0]))]
