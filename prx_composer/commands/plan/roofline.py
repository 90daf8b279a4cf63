"""The time of a training step by a roofline: every kernel takes as long as its FLOPs or its bytes do, whichever is longer.

What the kernels are is counted (`models.kernels`); what a GPU reaches is the table in `conditions` times the shares below. No
share has been measured in training with this package: see "What is predicted" in recipes/speedrun_24h/PLAN.md.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import NamedTuple, Protocol

import torch

from prx_composer.commands.plan.conditions import GPU
from prx_composer.models.counting import DENOISER
from prx_composer.models.kernels import ATTENTION, BLOCKS, CONVOLUTION, ENDS, MASKED_ATTENTION, MATMUL, Kernel
from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel, bytes_of, optimizer_traffic

# What a roofline needs beside peaks. Sources are others' measurements and kernels' own sizes; none is of this package.
BANDWIDTH_SHARE = 0.79  # of the datasheet's bytes per second: an H200's copy reaches 4.3 of 4.8 TB/s, pointwise kernels 88% of it
CONVOLUTION_SHARE = 0.45  # of a large product's FLOP/s: VGG's 3 × 3 of 64 to 512 channels by cuDNN, about 350 TFLOP/s on an H100
WITH_MASK = 0.25, 0.18  # forward and backward: the memory-efficient kernel under a mask, 200 and 140 TFLOP/s on an H100
WITHOUT_MASK = 0.5, 0.36  # cuDNN's and FlexAttention's, twice that
LAUNCH = 2e-6  # seconds in which a kernel starts and ends, whatever it does
HOST_EAGER, HOST_COMPILED = 7e-6, 3e-6  # seconds of the host to ask for a kernel, with autograd's bookkeeping, and from a graph
STEP_GAP = 4e-3  # seconds of a step in which the GPU has nothing to do: the host reads a number before the update
CONTENTION = 0.12  # of the time of sending: the processors that NCCL takes from computing, 16 of 132
TILES = ((128, 256), (256, 128))  # of a matrix product's result, one for each processor at a time
TILE_DEPTH = 256  # of the inner dimension: what filling and emptying a tile's pipeline costs


@dataclass(frozen=True)
class Peaks:
    """What a device reaches.

    Args:
        flops: per second, of large matrix products, by dtype; fp32's is taken where one isn't there.
        bandwidth: bytes per second.
        launch: seconds that every kernel takes besides.
        processors: over which the tiles of a matrix product are dealt in waves; 0: tiles don't matter.
        convolution: share of `flops` that they reach. attention: the same, forward and backward, by kind; 1 of one left out.
    """

    flops: Mapping[torch.dtype, float]
    bandwidth: float
    launch: float = 0.0
    processors: int = 0
    convolution: float = 1.0
    attention: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, kernel: Kernel) -> tuple[float, float]:
        """Return the seconds of a kernel's FLOPs, and of its bytes."""
        share = 1.0
        if kernel.kind == MATMUL:
            share = self._filled(kernel)
        elif kernel.kind == CONVOLUTION:
            share = self.convolution
        elif kernel.kind in self.attention:
            share = self.attention[kernel.kind][kernel.backward]
        peak = self.flops.get(kernel.dtype, self.flops[torch.float32])
        return kernel.flops / (share * peak), kernel.bytes / self.bandwidth

    def _filled(self, kernel: Kernel) -> float:
        """Return the share of the processors' time that a product's FLOPs are of: the last wave of tiles is not full."""
        size = prod(kernel.shape)
        if not self.processors or not size:
            return 1.0
        rows, columns, count = kernel.shape
        depth = kernel.flops / (2 * size)
        best = 0.0
        for height, width in TILES:
            for parts in (1, 2, 4):  # of the inner dimension, where there are too few tiles
                tiles = ceil(rows / height) * ceil(columns / width) * count * parts
                slots = ceil(tiles / self.processors) * self.processors
                inner = depth / parts
                best = max(best, size * parts / (slots * height * width) * inner / (inner + TILE_DEPTH))
        return best


def peaks_of(gpu: GPU, every_attention_fast: bool = False) -> Peaks:
    """Return what a GPU of the table reaches.

    Args:
        every_attention_fast: FlexAttention or cuDNN's, which a mask doesn't slow down.
    """
    return Peaks(
        {torch.float32: gpu.fp32_tflops * 1e12} | dict.fromkeys((torch.bfloat16, torch.float16), gpu.reachable_tflops * 1e12),
        BANDWIDTH_SHARE * gpu.bandwidth * 1e12,
        LAUNCH,
        gpu.processors,
        CONVOLUTION_SHARE,
        {ATTENTION: WITHOUT_MASK, MASKED_ATTENTION: WITHOUT_MASK if every_attention_fast else WITH_MASK},
    )


@dataclass(frozen=True)
class PartTime:
    """What one part of a step takes on one GPU.

    Args:
        seconds: as predicted. by_bytes: those of kernels that wait for memory. by_launches: those in which kernels start.
        flops, bytes, kernels: of the step.
    """

    seconds: float = 0.0
    by_bytes: float = 0.0
    by_launches: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: "PartTime") -> "PartTime":
        return PartTime(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def __mul__(self, times: float) -> "PartTime":
        return PartTime(*(times * value for value in vars(self).values()))


def time_of(kernel: Kernel, peaks: Peaks) -> PartTime:
    """Return what one kernel takes."""
    compute, memory = peaks.seconds(kernel)
    waits = memory if memory > compute else 0.0
    return PartTime(max(compute, memory) + peaks.launch, waits, peaks.launch, kernel.flops, kernel.bytes, 1)


def times_by_part(kernels: Iterable[Kernel], peaks: Peaks, casts: bool = True) -> dict[str, PartTime]:
    """Return what each part takes, by its name and the kind of kernels.

    Args:
        casts: whether the step casts the blocks' weights itself; not where they are gathered in 16 bits.
    """
    found: dict[str, PartTime] = defaultdict(PartTime)
    for kernel in kernels:
        if casts or not kernel.weight or kernel.part != BLOCKS:
            found[f"{kernel.part}: {'casts of weights' if kernel.weight else kernel.kind}"] += time_of(kernel, peaks)
    return dict(found)


def traffic_of(size: float, kernels: int, peaks: Peaks) -> PartTime:
    """Return what kernels take that only move so many bytes."""
    memory, launches = size / peaks.bandwidth, kernels * peaks.launch
    return PartTime(memory + launches, memory, launches, 0, size, kernels)


class Counted(Protocol):
    """What `step_cost.Segment` is: a share of a stage's steps, and what one of them is made of."""

    @property
    def share(self) -> float: ...
    @property
    def kernels(self) -> Sequence[Kernel]: ...
    @property
    def images(self) -> int: ...


def passes(segments: Iterable[Counted], images: int, peaks: Peaks, graphs: Collection[str], casts: bool) -> dict[str, PartTime]:
    """Return what the forward and backward passes over a GPU's images take, and by how much the host is behind.

    Args:
        images: of one step and GPU.
        graphs: parts that are compiled, which the host asks for faster.
        casts: see `times_by_part`.
    """
    found: dict[str, PartTime] = defaultdict(PartTime)
    behind = 0.0
    for segment in segments:
        times = segment.share * images / segment.images
        parts = times_by_part(segment.kernels, peaks, casts)
        for name, time in parts.items():
            found[name] += time * times
        host = sum(HOST_COMPILED if kernel.part in graphs else HOST_EAGER for kernel in segment.kernels)
        behind += times * max(0.0, host - sum(part.seconds for part in parts.values()))
    if behind:
        found["waiting for the host to ask for kernels"] = PartTime(behind, by_launches=behind)
    return dict(found)


class Own(NamedTuple):
    """A step of one GPU: its images, parts that the state is cut into, bytes that FSDP2 copies, seconds of sending."""

    images: int
    shards: int
    copied: float
    sending: float


def computing(
    planned: MetaModel, recipe: Recipe, gpu: GPU, segments: Iterable[Counted], own: Own, casts: bool = True
) -> dict[str, PartTime]:
    """Return what computing is made of: passes over a GPU's images, FSDP2's copies, and the update of the state."""
    peaks = peaks_of(gpu, recipe.model.get("attention") in ("flex", "cudnn"))
    graphs = {*planned.graphs, BLOCKS, ENDS} if DENOISER in planned.graphs else {*planned.graphs}
    found = passes(segments, own.images, peaks, graphs, casts)
    found["FSDP2's copies, out of what is gathered and into what is reduced"] = traffic_of(own.copied, 0, peaks)
    found["processors that sending takes"] = PartTime(CONTENTION * own.sending)
    moved, kernels = optimizer_traffic(planned)
    found["optimizer: state"] = traffic_of(moved / own.shards, kernels, peaks)
    times = 1 + sum(trick.weight_passes for trick in planned.tricks.values())  # every run looks for what isn't finite
    found["clipping, checks and EMA"] = traffic_of(times * bytes_of(planned.trained.values(), own.shards), 0, peaks)
    found["waiting for the host before the update"] = PartTime(STEP_GAP)
    return found


def largest_losses(parts: Mapping[str, PartTime], count: int = 3) -> list[tuple[str, float]]:
    """Return where most time goes that isn't FLOPs: (what, seconds), the largest first."""
    losses = []
    for name, part in parts.items():
        if part.flops == 0 and part.kernels == 0:
            losses.append((name, part.seconds))
        else:
            losses += [(f"{name}, waiting for memory", part.by_bytes), (f"{name}, starting kernels", part.by_launches)]
    return sorted(losses, key=lambda loss: -loss[1])[:count]
