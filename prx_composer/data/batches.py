"""Which samples form which batch: a pure function of (seed, epoch, batch size), with every batch from one bucket."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def epoch_batches(
    ids: Sequence[NDArray[np.int64]], batch_size: int, *, shuffle: bool, seed: int = 0, epoch: int = 0
) -> NDArray[np.int64]:
    """An epoch's batches of training, (steps, batch_size), whatever the number of ranks that share a batch.

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
    """Every sample once, in order, in batches of one bucket: the last one of each bucket is of what is left."""
    return [members[start : start + batch_size] for members in ids for start in range(0, len(members), batch_size)]


def epoch_steps(counts: Sequence[int], batch_size: int, *, shuffle: bool) -> int:
    """How many batches there are of so many samples in every bucket."""
    return sum(_batches_per_bucket(counts, batch_size, shuffle))


def _batches_per_bucket(counts: Sequence[int], batch_size: int, shuffle: bool) -> list[int]:
    return [max(count // batch_size if shuffle else -(-count // batch_size), min(count, 1)) for count in counts]
