"""What sampler and loader need of a data set: its buckets, what an epoch sees of them, and where a resumed one goes on."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from prx_composer.common.errors import UserError
from prx_composer.data.buckets import Bucket
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
    """Samples by number, each in a bucket.

    Attributes:
        image_size: side of the square whose area every bucket has, as it is stored.
        buckets, counts: sorted, and how many samples each holds.
        images: whether images are decoded.
        text_columns, latent_columns: what is stored beside the images and taken from there.
    """

    image_size: int
    buckets: list[Bucket]
    counts: list[int]
    images: bool
    text_columns: dict[str, StoredColumn]
    latent_columns: dict[str, StoredColumn]
    start_sample = 0
    other_data_allowed = False  # by `resume.allow`: a new pass begins then
    _before_pass = _before_next_pass = 0  # samples of other data that Composer counts to the epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, request: SampleRequest) -> dict[str, Any]: ...

    @abstractmethod
    def look_at(self, request: SampleRequest) -> dict[str, Any]:
        """As `dataset[request]`, but what cannot be decoded is not counted; while no worker runs."""

    @property
    @abstractmethod
    def undecodable(self) -> int:
        """How many decodings failed so far, over all workers of this rank."""

    @abstractmethod
    def bucket_of(self, sample_id: int) -> int:
        """Index of the bucket that holds a sample."""

    @abstractmethod
    def first_of(self, bucket: int) -> int:
        """Id of a sample of the bucket with this index."""

    @abstractmethod
    def ids(self) -> list[NDArray[np.int64]]:
        """Every sample once, by bucket, in stored order."""

    @abstractmethod
    def epoch_ids(self, epoch: int, batch_size: int) -> list[NDArray[np.int64]]:
        """What an epoch of training draws from, by bucket; the sampler shuffles it and makes full batches of it."""

    @abstractmethod
    def epoch_steps(self, batch_size: int) -> int:
        """How many batches those are, in every epoch."""

    @abstractmethod
    def check_sizes(self, image_size: int, sizes: list[Bucket]) -> None:
        """Raises ValueError if there are latents, but none of images of these sizes, bucket by bucket."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the order of samples: `counts` by bucket, or of a mixture `mix`: counts and share by name."""

    # Composer saves and restores these with its checkpoints.

    def state_dict(self, num_samples: int, from_beginning: bool = True) -> dict[str, Any]:
        return {"sample_in_epoch": num_samples - self._before_pass, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError if the checkpoint was written with other data or shares, and so another order of samples."""
        there = {key: value for key, value in state.items() if key != "sample_in_epoch"}
        if there != self.identity() and self.other_data_allowed:
            self._before_next_pass = int(state["sample_in_epoch"])
            return
        if there != self.identity():
            raise UserError(
                f"The checkpoint was trained on {_told(there)[0]}, but {_told(self.identity())[1]}. Resume with the same data "
                f"and weights; to begin a new pass over these, add  {advice([DATA])}  or begin another run: run_name=<new name>."
            )
        self.start_sample = int(state["sample_in_epoch"])

    def take_start_sample(self) -> int:
        """Where the coming epoch starts: once after a resume not at 0."""
        start, self.start_sample = self.start_sample, 0
        self._before_pass, self._before_next_pass = self._before_next_pass, 0
        return start


def _told(identity: dict[str, Any]) -> tuple[str, str]:
    """What a checkpoint was trained on, and what a recipe has."""
    if "mix" in identity:
        shares = (f"{name}: {sum(part['counts']):,} samples at {part['share']:.1%}" for name, part in identity["mix"].items())
        parts = ", ".join(shares)
        return f"train_loader.mix ({parts})", f"train_loader.mix is {parts}"
    counts = identity["counts"]
    return (
        f"one data set with {sum(counts):,} samples in {len(counts)} buckets",
        f"train_loader.path has {sum(counts):,} in {len(counts)}",
    )
