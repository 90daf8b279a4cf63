"""What the sampler needs of a data set, which samples form which batch, and which part of a batch is this rank's."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from prx_composer.common.errors import UserError
from prx_composer.data.format import Bucket
from prx_composer.data.stored import StoredColumn
from prx_composer.recipe.resume import DATA, advice


class SampleRequest(NamedTuple):
    """All that a worker needs to know to make one sample.

    Args:
        counted: in evaluation, whether it is one of the samples that are measured, and not there to fill a batch.
    """

    sample_id: int
    height: int
    width: int
    epoch: int
    counted: bool | None = None


class BucketedDataset(Dataset, ABC):
    """Samples by number, each in a bucket: those of one data set after the other, each data set's bucket by bucket.

    Args:
        image_size: side of the square whose area every bucket has, as it is stored.
        buckets: sorted.
        stored: samples by data set and bucket.
        skipped: places of those that are left out, likewise; by default none. The others keep their numbers.

    Attributes:
        table: samples by data set and bucket, without those that are left out.
        counts: samples of every bucket, over all data sets, likewise.
        images: whether images are decoded.
        text_columns, latent_columns: what is stored beside the images and taken from there, by name.
    """

    images: bool
    text_columns: dict[str, StoredColumn]
    latent_columns: dict[str, StoredColumn]
    start_sample = 0
    other_data_allowed = False  # by `resume.allow`: a new pass begins then
    begins_anew = False  # as one does after a resume
    _before_pass = _before_next_pass = 0  # samples of other data that Composer counts to the epoch

    def __init__(
        self,
        image_size: int,
        buckets: list[Bucket],
        stored: list[list[int]],
        skipped: Sequence[Sequence[NDArray[np.int64]]] | None = None,
    ):
        self.image_size, self.buckets, self.stored = image_size, buckets, stored
        self.skipped = skipped or [[np.empty(0, np.int64)] * len(buckets)] * len(stored)
        self.table = [
            [count - len(places) for count, places in zip(*rows, strict=True)] for rows in zip(stored, self.skipped, strict=True)
        ]
        self.counts = [sum(column) for column in zip(*self.table, strict=True)]
        self._starts = np.cumsum([0, *chain.from_iterable(stored)])

    def __len__(self) -> int:
        return sum(self.counts)

    @abstractmethod
    def __getitem__(self, request: SampleRequest) -> dict[str, Any]: ...

    @abstractmethod
    def look_at(self, request: SampleRequest) -> dict[str, Any]:
        """Return `dataset[request]`, but count nothing that cannot be decoded; while no worker runs."""

    @property
    @abstractmethod
    def undecodable(self) -> int:
        """Return how many decodings failed so far, over all workers of this rank."""

    @abstractmethod
    def check_sizes(self, image_size: int, sizes: list[Bucket]) -> None:
        """Raise ValueError if there are latents, but none of images of these sizes, bucket by bucket."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what decides the order of samples: `counts` by bucket, or of a mixture `mix`: counts and share by name."""

    def locate(self, sample_id: int) -> tuple[int, int, int]:
        """Return data set, bucket and place in it of a sample."""
        run = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return *divmod(run, len(self.buckets)), sample_id - int(self._starts[run])

    def bucket_of(self, sample_id: int) -> int:
        """Return the index of the bucket that holds a sample."""
        return self.locate(sample_id)[1]

    def first_of(self, bucket: int) -> int:
        """Return the id of a sample of the bucket with this index."""
        return next(int(self.ids_in(part, bucket)[0]) for part, counts in enumerate(self.table) if counts[bucket])

    def _start(self, part: int, bucket: int) -> int:
        return int(self._starts[part * len(self.buckets) + bucket])

    def ids_in(self, part: int, bucket: int) -> NDArray[np.int64]:
        """Return the samples that one of the data sets has in a bucket, without those that are left out."""
        return self._start(part, bucket) + np.delete(np.arange(self.stored[part][bucket]), self.skipped[part][bucket])

    def ids(self) -> list[NDArray[np.int64]]:
        """Return every sample once, by bucket, in stored order."""
        parts = range(len(self.table))
        return [np.concatenate([self.ids_in(part, bucket) for part in parts]) for bucket in range(len(self.buckets))]

    def epoch_ids(self, epoch: int, batch_size: int) -> list[NDArray[np.int64]]:
        """Return what an epoch of training draws from, by bucket; the sampler shuffles it and makes full batches of it.

        All of it, if nothing else is said: what doesn't fill a batch is another part in every epoch.
        """
        return self.ids()

    def end_epoch(self, epoch: int, batch_size: int, steps: int) -> None:
        """Take note that an epoch was ended after so many of its batches."""

    @property
    def least(self) -> int:
        """Return the samples that are drawn from, where they are fewest."""
        return len(self)

    def epoch_steps(self, batch_size: int) -> int:
        """Return how many batches those are, in every epoch."""
        return epoch_steps(self.counts, batch_size, shuffle=True)

    # Composer saves and restores these with its checkpoints.

    def state_dict(self, num_samples: int, from_beginning: bool = True) -> dict[str, Any]:
        return {"sample_in_epoch": num_samples - self._before_pass, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise UserError if the checkpoint was written with other data or shares, and so another order of samples."""
        there = {key: value for key, value in state.items() if key != "sample_in_epoch"}
        self.begins_anew = there != self.identity() and self.other_data_allowed
        if self.begins_anew:
            self._before_next_pass = int(state["sample_in_epoch"])
            return
        if there != self.identity():
            raise UserError(
                f"The checkpoint was trained on {_in_words(there)[0]}, but {_in_words(self.identity())[1]}. Resume with the "
                f"same data and weights; to begin a new pass over these, add  {advice([DATA])}  or begin another run: "
                "run_name=<new name>."
            )
        self.start_sample = int(state["sample_in_epoch"])

    def take_start_sample(self) -> int:
        """Return where the coming epoch starts: once after a resume not at 0."""
        start, self.start_sample = self.start_sample, 0
        self._before_pass, self._before_next_pass = self._before_next_pass, 0
        return start


def _in_words(identity: dict[str, Any]) -> tuple[str, str]:
    """Say what a checkpoint was trained on, and what a recipe has."""
    if "mix" in identity:
        shares = (
            f"{name}: {sum(part['counts']):,} samples at {_percent(part['share'])}{_without(part)}"
            for name, part in identity["mix"].items()
        )
        parts = ", ".join(shares)
        return f"train_loader.mix ({parts})", f"train_loader.mix is {parts}"
    counts, without = identity["counts"], _without(identity)
    return (
        f"one data set with {sum(counts):,} samples in {len(counts)} buckets{without}",
        f"train_loader.path has {sum(counts):,} in {len(counts)}{without}",
    )


def _percent(share: float | list[float]) -> str:
    return ", then ".join(f"{one:.1%}" for one in (share if isinstance(share, list) else [share]))


def _without(part: dict[str, Any]) -> str:
    return f", without {part['skip']}" if "skip" in part else ""


def epoch_batches(
    ids: Sequence[NDArray[np.int64]], batch_size: int, *, shuffle: bool, seed: int = 0, epoch: int = 0
) -> NDArray[np.int64]:
    """Return an epoch's batches of training, (steps, batch_size), whatever the number of ranks that share a batch.

    Every batch is full and of one bucket: all ranks have one shape at a time, so that none waits for another that has more
    to compute or a new shape to compile, and a run that goes on with another number of ranks sees the same samples. What
    doesn't fill a batch waits for another epoch's shuffle; a bucket smaller than one batch fills it by repetition. Without
    shuffling tails are filled by repetition too, so that every sample is seen.

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


def evaluation_batches(ids: Sequence[NDArray[np.int64]], batch_size: int) -> list[NDArray[np.int64]]:
    """Return every sample once, in order, in batches of one bucket: the last one of each bucket is of what is left."""
    return [members[start : start + batch_size] for members in ids for start in range(0, len(members), batch_size)]


def epoch_steps(counts: Sequence[int], batch_size: int, *, shuffle: bool) -> int:
    """Return how many batches there are of so many samples in every bucket."""
    return sum(_batches_per_bucket(counts, batch_size, shuffle))


def _batches_per_bucket(counts: Sequence[int], batch_size: int, shuffle: bool) -> list[int]:
    return [max(count // batch_size if shuffle else -(-count // batch_size), min(count, 1)) for count in counts]


def fewer_than_a_batch(samples: int, batch_size: int, path: str = "") -> str | None:
    """Say what is wrong with a batch that is larger than the data set, as the same image would be in it twice; None if it isn't.

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
    """Yield this rank's batches of `SampleRequest`s.

    It is a DistributedSampler so that Composer calls `set_epoch`; the order is the same with any number of workers,
    and a resumed epoch goes on at `dataset.start_sample`.

    In evaluation every sample is counted once: batches are as large as what is left of a bucket, and ranks share them as evenly
    as they can. A rank that would have none gets one that isn't counted, so that all take the same number of steps.

    Attributes:
        sizes: of the images in this stage, bucket by bucket.
        at_most: in evaluation, how many samples are measured, evenly spaced over all of them in stored order; all by default.
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
        self.at_most: int | None = None
        self.total_size = len(dataset)  # Composer trims the difference to this in evaluation; we leave nothing to trim
        self._dataset = dataset
        self.multiple = multiple
        self.set_stage(image_size, global_batch_size)

    def set_stage(self, image_size: int, global_batch_size: int) -> None:
        """Change what the next epoch's batches look like."""
        if global_batch_size % self.num_replicas:
            raise ValueError(f"global_train_batch_size {global_batch_size} does not divide over {self.num_replicas} ranks.")
        if image_size % self.multiple:
            raise ValueError(
                f"image_size {image_size} is not divisible by {self.multiple} (patch_size × autoencoder downsampling)."
            )
        self.image_size, self.global_batch_size = image_size, global_batch_size
        base = self._dataset.image_size
        self.sizes = [bucket.at(image_size, base, self.multiple) for bucket in self._dataset.buckets]
        for stored, size in zip(self._dataset.buckets, self.sizes, strict=True):
            if any(side % self.multiple for side in size):
                raise ValueError(
                    f"The data set's bucket {stored} cannot be cut into patches of {self.multiple}; "
                    "convert the data with that multiple, or change model.backbone.patch_size."
                )
        self._dataset.check_sizes(image_size, self.sizes)

    def __len__(self) -> int:
        if self.shuffle:
            return self._dataset.epoch_steps(self.global_batch_size)
        counts = [len(part) for part in self._evaluated()] if self.evaluation else self._dataset.counts
        return epoch_steps(counts, self.global_batch_size, shuffle=False)

    def __iter__(self) -> Iterator[list[SampleRequest]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        first = self._dataset.take_start_sample() // self.global_batch_size
        if self.evaluation:
            yield from self._evaluation()
            return
        ids = self._dataset.epoch_ids(self.epoch, self.global_batch_size) if self.shuffle else self._dataset.ids()
        batches = epoch_batches(ids, self.global_batch_size, shuffle=self.shuffle, seed=self.seed, epoch=self.epoch)
        share = self.global_batch_size // self.num_replicas
        for batch in batches[first:, self.rank * share : (self.rank + 1) * share]:
            height, width = self._size_of(batch)
            yield [SampleRequest(int(sample_id), height, width, self.epoch if self.shuffle else 0) for sample_id in batch]

    def _evaluation(self) -> Iterator[list[SampleRequest]]:
        for batch in evaluation_batches(self._evaluated(), self.global_batch_size):
            height, width = self._size_of(batch)
            filled = np.resize(batch, max(len(batch), self.global_batch_size if self.keeps_shape else self.num_replicas))
            own = np.array_split(np.arange(len(filled)), self.num_replicas)[self.rank]
            yield [SampleRequest(int(filled[place]), height, width, 0, bool(place < len(batch))) for place in own]

    def _evaluated(self) -> list[NDArray[np.int64]]:
        """Return the samples of an evaluation by bucket."""
        ids = self._dataset.ids()
        if self.at_most is None or self.at_most >= len(self._dataset):
            return ids
        places = np.arange(self.at_most) * len(self._dataset) // self.at_most
        return np.split(np.concatenate(ids)[places], np.searchsorted(places, np.cumsum([len(part) for part in ids])[:-1]))

    def _size_of(self, batch: NDArray[np.int64]) -> Bucket:
        return self.sizes[self._dataset.bucket_of(int(batch[0]))]
