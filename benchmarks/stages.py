"""One stage of a recipe as a recipe of its own, to be timed: some steps long, on batches that cost nothing to load.

`one_stage` makes that recipe, which names this file in its `code_paths`. `StepTimes` writes where the time of a step goes. It
looks at the Trainer's own events, so that what is timed is the step that a run makes. On a GPU it marks them with CUDA events and
waits for none of them before the last step.
"""

import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from common import peak_memory
from composer.core import Callback, DataSpec, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.commands.plan.timeline import Span, Timeline
from prx_composer.common.errors import UserError
from prx_composer.models.encoders import train_tokenizer
from prx_composer.models.huggingface import known_config
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe
from prx_composer.schedule.moments import ScheduleWindow

SHAPE = "progressive_resolution"  # the algorithm that is the stages
ALWAYS: dict[str, Any] = {"start": "0ba", "end": None}
PARTS: tuple[str, ...] = ("loader", "text encoder", "forward", "losses", "backward", "optimizer", "rest")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # of the host for the device


# --------------------------------------------------------------------------------------------------------- recipe


def batch_of_share(span: Span, microbatch: int, of: int) -> int:
    """Return the images per step of one GPU of `of`: whole microbatches, at least one."""
    whole = max(span.batch_size // of, microbatch)
    return whole - whole % microbatch


def one_stage(recipe: Recipe, line: Timeline, span: Span, batch_size: int, microbatch: int, steps: int) -> dict[str, Any]:
    """Return the recipe's keys, with the stage's sizes in place of `progressive_resolution`.

    Algorithms whose window is open in the middle of the stage are open from the first step to the last, the others are left
    out. Evaluation, callbacks, loggers, preflight and checkpoints but the last are off.

    Args:
        batch_size: images per step over all processes.
        steps: how long it trains.
    """
    windows = _windows(recipe)
    closed = [SHAPE, *closed_algorithms(recipe, line, span)]
    return dataclasses.asdict(recipe) | {
        "autoresume": False,
        "preflight": False,
        "time_budget": "1000h",  # never reached, but what is given as a part of it keeps its meaning
        "max_duration": f"{steps}ba",
        "scheduler": {"name": "constant"},  # a warm-up may be longer than these few steps, and is no part of what is measured
        "save_interval": "1000h",
        "progress_bar": False,
        "eval_loader": None,
        "image_size": span.image_size,
        "global_train_batch_size": batch_size,
        "device_train_microbatch_size": microbatch,
        "algorithms": {
            name: arguments | {key: ALWAYS[key] for key in windows.get(name, ())}
            for name, arguments in entries(recipe.algorithms, "algorithms")
            if name not in closed
        },
        "callbacks": {},
        "loggers": {},
    }


def closed_algorithms(recipe: Recipe, line: Timeline, span: Span) -> list[str]:
    """Return those whose window isn't open in the middle of the stage."""
    middle, closed = (span.start + span.end - 1) // 2, []  # of two middle steps the first, so that a window to 0.5dur is open
    for name, window in _windows(recipe).items():
        opened = ScheduleWindow(str(window.get("start", "0ba")), window.get("end"))
        first, last = line.window(opened, f"algorithms.{name}")
        if not first <= middle < last:
            closed.append(name)
    return closed


def _windows(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return `start` and `end` of the algorithms that aren't always open, as the recipe or the signature has them."""
    windows = {}
    for name, arguments in entries(recipe.algorithms, "algorithms"):
        parameters = inspect.signature(registry.algorithms.get(name, f"algorithms.{name}")).parameters
        given = {key: parameter.default for key, parameter in parameters.items()} | arguments
        window = {key: given[key] for key in ALWAYS if key in given}
        if window != {key: ALWAYS[key] for key in window}:
            windows[name] = window
    return windows


def with_synthetic_batches(
    content: dict[str, Any], folder: Path, valid_text: float, stored_text: bool, random_weights: bool
) -> dict[str, Any]:
    """Return the recipe with one random batch of its shapes for a loader, and with no need of captions or of a hub.

    Args:
        folder: where the tokenizer goes.
        valid_text: share of a caption's tokens that are no padding.
        stored_text: text embeddings come with the batch.
        random_weights: the tokenizer isn't to be downloaded either.
    """
    loader: dict[str, Any] = {"name": "synthetic", "valid_text": valid_text}
    if stored_text:
        loader["embedding_size"] = content["model"]["backbone"]["context_in_dim"]
    encoder = content["model"]["text_encoder"]
    if random_weights or isinstance(encoder.get("tokenizer"), dict):
        words = train_tokenizer(["a photograph of a lighthouse on a cliff above the sea at dawn"] * 2, 256)
        words.save_pretrained(str(folder / "words"))
        encoder["tokenizer"] = str(folder / "words")
    code = dict.fromkeys([*content["code_paths"], __file__])
    return content | {"train_loader": loader, "code_paths": list(code)}


def with_random_weights(content: Any) -> Any:
    """Turn every `pretrained:` into the configuration of that network: as much work, nothing to download."""
    if isinstance(content, list):
        return [with_random_weights(item) for item in content]
    if not isinstance(content, dict):
        return content
    changed = {key: with_random_weights(value) for key, value in content.items()}
    if isinstance(name := changed.get("pretrained"), str):
        known = known_config(name)
        if known is None:
            raise UserError(f"--random-weights: the sizes of {name} are not known here.")
        del changed["pretrained"]
        changed["config"] = known
    if changed.get("net") in ("vgg", "alex", "squeeze"):
        changed["random_weights"] = True
    return changed


def write_recipe(content: dict[str, Any], path: Path) -> Path:
    """Write the recipe as a YAML file; return its path."""
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False))
    return path


# -------------------------------------------------------------------------------------------------------- batches


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
    """Make square images of the recipe's size and captions of which `valid_text` is no padding.

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


# ---------------------------------------------------------------------------------------------------------- times

BEGINS = {  # the part that begins with an event of the Trainer; a step is from one `loader` to the next
    Event.AFTER_DATALOADER: "rest",
    Event.BEFORE_FORWARD: "forward",
    Event.BEFORE_LOSS: "losses",
    Event.BEFORE_BACKWARD: "backward",
    Event.AFTER_BACKWARD: "rest",
    Event.AFTER_TRAIN_BATCH: "optimizer",
    Event.BATCH_END: "rest",
}


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
        assert state.max_duration is not None
        self._walls.append(time.perf_counter())
        if self.trace is not None and int(state.timestamp.batch) == int(state.max_duration.value) - self.traced:
            self._start_profile()
        self._marks.append([])
        self._mark("loader")

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        if event in BEGINS:
            self._mark(BEGINS[event])

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
            for (part, begin), (_, end) in pairwise(self._marks[number] + following):
                spent[part] += begin.elapsed_time(end) if hasattr(begin, "elapsed_time") else 1000 * (end - begin)
            parts.append(spent)
        return {
            "first_step_ms": steps[0],
            "step_ms": steps[self.warmup : counted],
            "parts_ms": parts,
            "peak_memory_bytes": peak_memory(),
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
            waits = sum(e.name.startswith(WAITS) and not e.name.startswith("cudaMemcpyAsync") for e in events)
            self._profiled = {"device_busy_ms": busy / 1000 / self.traced, "host_waits": waits / self.traced}
        if dist.get_global_rank() == 0:
            assert self.trace is not None
            self._profile.export_chrome_trace(self.trace)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of their union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
