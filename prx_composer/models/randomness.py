"""Every random draw of training, from (seed, rank, step, microbatch, purpose) and nothing else."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from composer.utils import dist

__all__ = ["RandomStreams", "derive_seed", "seeded_generator", "seeded_initialisation"]


def derive_seed(*entropy: int) -> int:
    """A well-mixed 63-bit seed of some non-negative integers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded_generator(device: torch.device, purpose: str, *entropy: int) -> torch.Generator:
    """A generator on `device`, another one for every purpose ("timesteps", "noise", …) and every entropy."""
    return torch.Generator(device).manual_seed(derive_seed(*entropy, zlib.crc32(purpose.encode())))


@contextmanager
def seeded_initialisation(seed: int, purpose: str) -> Iterator[None]:
    """Modules built inside draw their CPU weights from (seed, purpose) alone, whatever was built before them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, zlib.crc32(purpose.encode())))
        yield


class RandomStreams:
    """Hands out generators that a resumed run finds in the same state as the uninterrupted one.

    `begin_step` is called by `callbacks.RandomStep` at every batch. Without it (a plain loop around the model) each
    training forward counts as a microbatch of one endless step, which is reproducible but not resumable.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.step = 0
        self.microbatch = -1

    def begin_step(self, step: int) -> None:
        self.step, self.microbatch = step, -1

    def next_microbatch(self) -> None:
        self.microbatch += 1

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """For one purpose of the current microbatch of this rank."""
        return seeded_generator(device, purpose, self.seed, dist.get_global_rank(), self.step, max(self.microbatch, 0))
