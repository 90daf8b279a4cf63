"""The steps that a run will make, tried before the first: every stage, with the extreme image sizes, at its microbatch.

So that what fits no GPU, and what an auxiliary loss cannot do with images of a later stage, is said in the first minute.
"""

import gc
import json
import logging
import math
import random
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Trainer
from composer.core import State
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from prx_composer.algorithms.base import Trick
from prx_composer.common.distributed import from_rank_zero, unwrapped
from prx_composer.common.errors import UserError, problems_of
from prx_composer.data.format import Bucket
from prx_composer.data.loader import ImageCaptionLoader, channels_first
from prx_composer.data.sampler import SampleRequest
from prx_composer.models.huggingface import returned_afterwards
from prx_composer.optim import state_after_a_step
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import PlannedStage, planned_stages
from prx_composer.schedule.moments import ScheduleWindow
from prx_composer.training.meta_model import bytes_of
from prx_composer.training.preflight import Result, failed, passed, require, skipped

log = logging.getLogger(__name__)

RECORD = "preflight.json"
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # what cuDNN and cuBLAS say has no exception of its own


class _Failure(UserError):
    """Somebody's code raised what it doesn't raise on purpose.

    Args:
        reason: in words.
        place: where, which is the same in steps that fail alike.
    """

    def __init__(self, reason: str, place: str):
        super().__init__(reason)
        self.reason, self.place = reason, place


@dataclass(frozen=True)
class _Step:
    """One step to be tried.

    Args:
        stage: of the run.
        bucket: index in the data set.
        size: of its images in this stage.
        dense: without routing, which is off in a part of the stage.
    """

    stage: PlannedStage
    bucket: int
    size: Bucket
    dense: bool

    def __str__(self) -> str:
        return f"{self.stage.microbatch_size} × {self.size}" + (" without routing" if self.dense else "")


def extremes(sizes: list[Bucket]) -> list[int]:
    """Return the indices of the sizes with most and with fewest pixels, of the widest and the tallest; each size once."""
    pixels: Callable[[int], float] = lambda index: sizes[index].height * sizes[index].width  # noqa: E731
    aspect: Callable[[int], float] = lambda index: sizes[index].width / sizes[index].height  # noqa: E731
    every = range(len(sizes))
    chosen = [max(every, key=pixels), min(every, key=pixels), max(every, key=aspect), min(every, key=aspect)]
    return list({sizes[index]: index for index in reversed(chosen)}.values())[::-1]


def try_steps(trainer: Trainer, recipe: Recipe) -> list[Result]:
    """Make one forward and backward pass for every stage that is to come and every extreme image size; on all ranks alike.

    Afterwards nothing is different (see `undisturbed`). On a GPU a step is tried at its peak: beside what the optimizer will
    keep, and, where a batch has several microbatches, beside the gradients of the one before.
    """
    state = trainer.state
    if not isinstance(state.train_dataloader, ImageCaptionLoader):
        return [skipped("step", "the train_loader is not of this package")]
    loader, results, tried, peak, optimizer_bytes = state.train_dataloader, [], [], 0, 0
    failures: dict[str, list[tuple[_Step, str]]] = defaultdict(list)  # by place
    with undisturbed(state), ExitStack() as stage_context:
        if state.device.name == "gpu":
            optimizer_bytes = sum(bytes_of(state_after_a_step(one)[0]) for one in state.optimizers if not one.state)
        stage = None
        for step in _steps(state, recipe, loader):
            if step.stage is not stage:  # a teacher of one stage does not lie on the GPU in another
                stage_context.close()
                stage_context.enter_context(returned_afterwards())
                stage = step.stage
            try:
                step_peak = _try(state, step, loader, optimizer_bytes, failures)
            except UserError as error:
                if isinstance(error, _Failure):
                    failures[error.place].append((step, error.reason))
                else:
                    results.extend(map(failed, problems_of(error)))
                if is_sharded(state):  # the ranks may be at different collectives
                    break
                continue
            tried.append(str(step))
            peak = max(peak, step_peak)
            if step_peak:
                results.append(passed("step", f"{step}: peak {_of_memory(step_peak)}"))
    for alike in failures.values():
        results.append(failed(f"step: {alike[0][1]}, in a step of {', '.join(str(step) for step, _ in alike)}."))
    if tried and not peak:
        results.append(passed("step", f"forward and backward pass of {', '.join(dict.fromkeys(tried))}"))
    elif peak:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        results.append(passed("memory", f"the largest step takes {_of_memory(peak)}"))
    return results


def _steps(state: State, recipe: Recipe, loader: ImageCaptionLoader) -> Iterator[_Step]:
    dataset, model = loader.dataset, unwrapped(state.model)
    multiple = model.backbone.patch_size * model.autoencoder.downsampling
    for stage in planned_stages(vars(recipe), dist.get_world_size()):
        if stage.window.is_over(state):  # before a resumed run goes on
            continue
        sizes = [bucket.at(stage.image_size, dataset.image_size, multiple) for bucket in dataset.buckets]
        there = [index for index, count in enumerate(dataset.counts) if count]  # a skip list may leave nothing of one
        for number, index in enumerate(there[place] for place in extremes([sizes[index] for index in there])):
            yield _Step(stage, index, sizes[index], dense=False)
            if number == 0 and is_sometimes_dense(state, stage.window):
                yield _Step(stage, index, sizes[index], dense=True)


def _try(state: State, step: _Step, loader: ImageCaptionLoader, optimizer_bytes: int, known: Collection[str]) -> int:
    """Return the peak of memory in bytes, 0 without a GPU.

    Args:
        optimizer_bytes: what the optimizer will keep, beside what it keeps already.
        known: places of failures whose tracebacks are in the log.

    Raises:
        UserError: whatever went wrong.
    """
    try:
        with switched(state, step.stage.window, step.dense):
            batch = channels_first(state.device.batch_to_device(_microbatch(loader, step)))
            return _run(state, step, batch, optimizer_bytes)
    except UserError:
        raise
    except Exception as error:  # of anybody's loss
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            wrong = UserError(_out_of_memory(step))
        elif isinstance(error, KeyError) and error.args == ("image",) and not loader.dataset.images:
            wrong = UserError(
                "train_loader.images: an algorithm looks at the batch's images, which train_loader.latent leaves out; set "
                "train_loader.images: true."
            )
        else:
            wrong = _failure(error)
            if wrong.place not in known:
                log.warning("A step of %s failed", step, exc_info=True)
    finally:
        for parameter in state.model.parameters():
            parameter.grad = None
    if state.device.name == "gpu":
        gc.collect()  # the traceback, which is gone now, held the activations
        torch.cuda.empty_cache()
    raise wrong


def _run(state: State, step: _Step, batch: Any, optimizer_bytes: int) -> int:
    on_gpu = state.device.name == "gpu"
    passes = 1
    ballast: list[torch.Tensor] = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        passes += step.stage.device_batch_size > step.stage.microbatch_size
        ballast.append(torch.empty(optimizer_bytes, dtype=torch.uint8, device=torch.cuda.current_device()))
    losses = {}
    for _ in range(passes):
        losses = forward_and_backward(state, batch)
    if wrong := [name for name, loss in losses.items() if not math.isfinite(loss.float().mean().item())]:
        terms = ", ".join(wrong)
        raise _Failure(f"the loss is not finite ({terms})", terms)
    ballast.clear()
    return torch.cuda.max_memory_allocated() if on_gpu else 0


def _microbatch(loader: ImageCaptionLoader, step: _Step) -> Any:
    """Return the first sample of the bucket, as often as a microbatch needs it, with captions of full length."""
    dataset = loader.dataset
    sample = dataset.look_at(SampleRequest(dataset.first_of(step.bucket), *step.size, epoch=0))
    batch: dict[str, torch.Tensor] = loader.collate_fn([sample] * step.stage.microbatch_size)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        if "text_position" in batch:  # stored embeddings of valid tokens: of all of them now
            places = batch["attention_mask"].numel()
            batch["text_embedding"] = torch.zeros(places, batch["text_embedding"].shape[1], dtype=batch["text_embedding"].dtype)
            batch["text_position"] = torch.arange(places)
    return batch


def _failure(error: Exception) -> _Failure:
    """Return what was raised, with the innermost line that is of no installed library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
    return _Failure(f"{what} ({place})", place)


def _out_of_memory(step: _Step) -> str:
    stage = step.stage
    smaller = [size for size in range(1, stage.microbatch_size) if stage.device_batch_size % size == 0]
    remedy = (
        f"Set it to {smaller[-1]}"
        if smaller
        else "Shard the weights (parallelism_config: {fsdp: {}}), or take smaller images or a smaller model"
    )
    return (
        f"{stage.path}device_train_microbatch_size: out of memory in a step of {step} ({stage.image_size} px): it does not fit "
        f"{_device()}. {remedy}."
    )


def _of_memory(peak: int) -> str:
    return f"{peak / 1e9:.1f} GB of {_device()}"


def _device() -> str:
    if not torch.cuda.is_available():
        return "this machine"
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"the {total / 1e9:.1f} GB of a {torch.cuda.get_device_name()}"


# --------------------------------------------------------------------------------- a pass from which nothing remains


def is_sharded(state: State) -> bool:
    """Return whether passes are collective."""
    return any(isinstance(module, FSDPModule) for module in state.model.modules())


def forward_and_backward(state: State, batch: Any) -> dict[str, Tensor]:
    """Pass one microbatch as Composer's Trainer does it, but for its events; return the losses, detached.

    Under DDP the model is called without its wrapper: gradients are not reduced, and DDP does not learn the order in which they
    are ready. Under FSDP2 it is called as it is, on all ranks.
    """
    model = unwrapped(state.model)
    with get_precision_context(state.precision, state.precision_config):
        outputs = model(batch)
    with get_precision_context(state.precision, state.precision_config):
        losses = model.loss(outputs, batch)
    losses = losses if isinstance(losses, dict) else {"total": losses}
    total = losses["total"] if "total" in losses else torch.stack([loss.mean() for loss in losses.values()]).sum()
    total.backward()
    return {name: loss.detach() for name, loss in losses.items()}


@contextmanager
def undisturbed(state: State) -> Iterator[None]:
    """Put back what passes change: gradients, buffers, modes, random streams and generators, and where frozen networks are."""
    model = unwrapped(state.model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    streams = getattr(model, "random", None)
    position = None if streams is None else (streams.step, streams.microbatch)
    generators = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), returned_afterwards():
        try:
            state.model.train()
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, training in modes:
                module.training = training
            if streams is not None and position is not None:
                streams.step, streams.microbatch = position
            random.setstate(generators[0])
            np.random.set_state(generators[1])


@contextmanager
def switched(state: State, window: ScheduleWindow, dense: bool = False) -> Iterator[None]:
    """Put tricks that may act inside of `window` on, and the others off; afterwards they are as they were.

    Args:
        dense: tricks that save memory, such as routers, are off, for the part of the window in which they don't act.
    """
    model = unwrapped(state.model)
    tricks = [algorithm for algorithm in state.algorithms if isinstance(algorithm, Trick)]
    try:
        for trick in tricks:
            trick.set_active(model, _may_act(trick, window, state) and not (dense and trick.saves_memory))
        yield
    finally:
        for trick in tricks:
            trick.set_active(model, trick.active)


def _may_act(trick: Trick, window: ScheduleWindow, state: State) -> bool:
    return not trick.window.is_disjoint_from(window) and not trick.window.is_over(state)


def is_sometimes_dense(state: State, window: ScheduleWindow) -> bool:
    """Return whether a trick that saves memory, such as a router, may act inside of `window` and may also be off there."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, Trick) and algorithm.saves_memory and _may_act(algorithm, window, state):
            own = algorithm.window
            begins = own.start.surely_by(window.start)
            lasts = own.end is None or (window.end is not None and window.end.surely_by(own.end))
            if not (begins and lasts):
                return True
    return False


# ------------------------------------------------------------------------------------------------- before training


def try_steps_before_training(trainer: Trainer, recipe: Recipe, folder: Path) -> None:
    """Try the steps, unless this run goes on where they were tried before: as many ranks on the same kind of device.

    Raises:
        UserError: with everything that failed; where the weights are sharded, with what failed on this rank.
    """
    already = int(trainer.state.timestamp.batch) > 0 and _record(folder) == _circumstances()
    if from_rank_zero(already):
        return
    results = try_steps(trainer, recipe)
    if not is_sharded(trainer.state):  # else a rank that failed may have left the others in a collective
        every: list[list[Result]] = dist.all_gather_object(results)
        results += [result for of_rank in every for result in of_rank if result.mark == "✗"]
    require(results)
    if dist.get_global_rank() == 0:
        for result in results:
            log.info("Preflight: %s", result)


def remember_steps(folder: Path) -> None:
    """Write into the run folder on what the steps were tried."""
    (folder / RECORD).write_text(json.dumps(_circumstances()) + "\n")


def _record(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None


def _circumstances() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"ranks": dist.get_world_size(), "device": device, "torch": torch.__version__}
