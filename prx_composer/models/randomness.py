"""Random draws of training, each from (seed, rank, step, microbatch, purpose) and nothing else."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from composer.utils import dist
from torch._guards import detect_fake_mode

_WORDS = slice(24, 24 + 8 * 624)  # of a CPU generator's state: the Mersenne Twister's 624 words, 8 bytes each
_twister = np.random.RandomState(0)  # to be seeded again costs half of making one


def derive_seed(*entropy: int) -> int:
    """Return a well-mixed 63-bit seed of some non-negative integers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_from(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that every bit of a 64-bit seed decides.

    torch's CPU generator, a Mersenne Twister, is seeded with the lower 32 bits alone: seeds that agree in them draw the same. A
    seed below 2³² draws what `torch.Generator().manual_seed(seed)` does, and so what diffusers' pipelines do. From 2³² on its two
    halves are the key of its `init_by_array`, as in `numpy.random.RandomState([low, high])`. On a GPU torch uses all bits.

    Raises:
        RuntimeError: another torch, whose generator keeps its state elsewhere.
    """
    generator = torch.Generator(device).manual_seed(seed)
    low, high = seed % 2**32, seed % 2**64 >> 32
    if generator.device.type != "cpu" or high == 0:
        return generator
    if detect_fake_mode() is not None:  # a step is counted: its draws have no content
        return generator
    state = generator.get_state()
    words = state.numpy()[_WORDS].view(np.uint64)
    if words[0] != low:
        raise RuntimeError(f"torch {torch.__version__} keeps the state of its CPU generator elsewhere.")
    _twister.seed([low, high])
    words[:] = _twister.get_state(legacy=False)["state"]["key"]
    return generator.set_state(state)


def seeded_generator(device: torch.device, purpose: str, *entropy: int) -> torch.Generator:
    """Return a generator on `device`, another one for every purpose ("timesteps", "noise", …) and every entropy."""
    return generator_from(derive_seed(*entropy, zlib.crc32(purpose.encode())), device)


@contextmanager
def seeded_initialisation(seed: int, purpose: str) -> Iterator[None]:
    """Let modules that are built inside draw their weights on the CPU from (seed, purpose) alone, whatever came before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, zlib.crc32(purpose.encode())))
        yield


class RandomStreams:
    """Hands out generators that a resumed run finds in the same state as the uninterrupted one.

    The callback `RandomStep` calls `begin_step` at every batch. Without it, in a plain loop around the model, each forward pass
    of training counts as a microbatch of one endless step, which is reproducible but cannot be resumed.
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
        """Return the generator for one purpose of the current microbatch of this rank."""
        return seeded_generator(device, purpose, self.seed, dist.get_global_rank(), self.step, max(self.microbatch, 0))
