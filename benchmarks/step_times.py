"""Where the time of a Trainer's step goes, and batches that cost nothing to load: named in `code_paths` by `throughput.py`.

`StepTimes` looks at the Trainer's own events, so that what is timed is the step that a run makes. On a GPU it marks them with
CUDA events and waits for none of them before the last step.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase

from prx_composer import registry

__all__ = ["PARTS", "StepTimes", "SyntheticBatches"]

PARTS: tuple[str, ...] = ("loader", "text encoder", "forward", "losses", "backward", "optimizer", "rest")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # of the host for the device


# ------------------------------------------------------------------------------------------------------ batches


class SyntheticBatches:
    """The same random batch again and again, already where a loader's would be: in (pinned) memory of the host."""

    def __init__(self, batch: dict[str, torch.Tensor], length: int):
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(self.length):
            yield self.batch


@registry.loaders.register("synthetic")
def synthetic(
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    image_size: int,
    global_batch_size: int,
    multiple: int,
    seed: int,
    *,
    valid_text: float = 0.4,
    embedding_size: int | None = None,
    steps: int = 1_000_000,
) -> DataSpec:
    """Square images of the recipe's size and captions of which `valid_text` is no padding.

    Args:
        embedding_size: of stored text embeddings, which then come with the batch.
    """
    size = global_batch_size // dist.get_world_size()
    generator = torch.Generator().manual_seed(seed + dist.get_global_rank())
    lengths = (max_tokens * valid_text * (0.5 + torch.rand(size, generator=generator))).round().clamp(1, max_tokens)
    batch = {
        "image": torch.randint(0, 256, (size, 3, image_size, image_size), generator=generator, dtype=torch.uint8),
        "input_ids": torch.randint(0, len(tokenizer), (size, max_tokens), generator=generator),
        "attention_mask": torch.arange(max_tokens)[None] < lengths[:, None],
        "sample_id": torch.arange(size),
    }
    if embedding_size is not None:
        batch["text_embedding"] = torch.randn(size, max_tokens, embedding_size, generator=generator).to(torch.bfloat16)
    if torch.cuda.is_available():
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    loader: Any = SyntheticBatches(batch, steps)
    return DataSpec(loader, get_num_samples_in_batch=lambda b: len(b["image"]), get_num_tokens_in_batch=lambda b: 0)


# -------------------------------------------------------------------------------------------------------- times


@registry.callbacks.register("step_times")
class StepTimes(Callback):
    """Writes, for every step after the first `warmup`, how long it and its parts took, in milliseconds.

    Args:
        path: JSON file, of rank 0.
        warmup: steps that don't count; the first one has the compilation.
        trace: Chrome trace of the last steps, by torch.profiler; these don't count either.
        traced: how many they are.
    """

    def __init__(self, path: str, warmup: int = 3, trace: str | None = None, traced: int = 2):
        self.path, self.warmup, self.trace, self.traced = Path(path), warmup, trace, traced
        self._marks: list[list[tuple[str, Any]]] = []
        self._walls: list[float] = []
        self._profile: Any = None
        self._profiled: dict[str, float] | None = None

    # The part that a mark begins; a step is from one `loader` to the next.

    def _mark(self, part: str) -> None:
        if torch.cuda.is_available():
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[-1].append((part, event))
        else:
            self._marks[-1].append((part, time.perf_counter()))

    def fit_start(self, state: State, logger: Logger) -> None:
        model: Any = state.model
        model = model.module if hasattr(model, "module") else model
        encoder: nn.Module = model.text_encoder
        encoder.register_forward_pre_hook(self._around("text encoder"))
        encoder.register_forward_hook(self._around("forward"))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _around(self, part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._marks:
                self._mark(part)

        return hook

    def before_dataloader(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        self._walls.append(time.perf_counter())
        if self.trace is not None and step == _steps(state) - self.traced:
            self._start_profile()
        self._marks.append([])
        self._mark("loader")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._mark("rest")

    def before_forward(self, state: State, logger: Logger) -> None:
        self._mark("forward")

    def before_loss(self, state: State, logger: Logger) -> None:
        self._mark("losses")

    def before_backward(self, state: State, logger: Logger) -> None:
        self._mark("backward")

    def after_backward(self, state: State, logger: Logger) -> None:
        self._mark("rest")

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._mark("optimizer")

    def batch_end(self, state: State, logger: Logger) -> None:
        self._mark("rest")

    def fit_end(self, state: State, logger: Logger) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._walls.append(time.perf_counter())
        if self._profile is not None:
            self._stop_profile()
        if dist.get_global_rank() == 0:
            self.path.write_text(json.dumps(self._result()))

    def _result(self) -> dict[str, Any]:
        counted = len(self._marks) - (self.traced if self.trace is not None else 0)
        steps = [1000 * (after - before) for before, after in pairwise(self._walls)]
        parts = []
        for number in range(self.warmup, counted):
            spent = dict.fromkeys(PARTS, 0.0)
            following = self._marks[number + 1][:1] if number + 1 < len(self._marks) else []
            marks = self._marks[number] + following
            for (part, begin), (_, end) in pairwise(marks):
                spent[part] += begin.elapsed_time(end) if hasattr(begin, "elapsed_time") else 1000 * (end - begin)
            parts.append(spent)
        return {
            "first_step_ms": steps[0],
            "step_ms": steps[self.warmup : counted],
            "parts_ms": parts,
            "peak_memory_bytes": _peak_memory(),
            "profiled": self._profiled,
        }

    def _start_profile(self) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def _stop_profile(self) -> None:
        self._profile.__exit__(None, None, None)
        events = self._profile.events()
        if torch.cuda.is_available():
            busy = _covered([(e.time_range.start, e.time_range.end) for e in events if e.device_type.name == "CUDA"])
            waits = sum(e.name.startswith(_WAITS) and not e.name.startswith("cudaMemcpyAsync") for e in events)
            self._profiled = {"device_busy_ms": busy / 1000 / self.traced, "host_waits": waits / self.traced}
        if dist.get_global_rank() == 0:
            assert self.trace is not None
            self._profile.export_chrome_trace(self.trace)


def _steps(state: State) -> int:
    assert state.max_duration is not None
    return int(state.max_duration.value)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of their union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0
