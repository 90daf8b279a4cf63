"""Exponential moving average of the weights, for evaluation and sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from prx_composer.algorithms.base import Trick
from prx_composer.common.distributed import clean_name
from prx_composer.common.errors import UserError
from prx_composer.optim.exchange import local


class WeightAverage:
    """An average of a module's trained parameters, usable without a Trainer.

    Sharded parameters (DTensor) are averaged shard by shard: no communication.

    Args:
        module: its parameters that require gradients are averaged, starting from their present values.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self.parameters = {clean_name(name): p for name, p in module.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, smoothing: float) -> None:
        """average ← smoothing · average + (1 − smoothing) · parameters, in one fused call."""
        average = [local(tensor) for tensor in self.average.values()]
        current = [local(parameter) for parameter in self.parameters.values()]
        torch._foreach_lerp_(average, current, weight=1 - smoothing)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the present parameters."""
        for name, parameter in self.parameters.items():
            local(self.average[name]).copy_(local(parameter))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and parameters, exactly: two swaps change no bit."""
        for module in self._module.modules():  # what a forward pass left gathered would keep the weights of before
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in self.parameters.items():
            current, average = local(parameter), local(self.average[name])
            held = current.clone()
            current.copy_(average)
            average.copy_(held)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the module the averaged weights inside of this context."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self, full: bool = False) -> dict[str, Tensor]:
        """Return name → average; with `full`, sharded tensors are gathered (a collective)."""
        return {name: t.full_tensor() if full and isinstance(t, DTensor) else t for name, t in self.average.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError if the names differ: a partial average would be silently wrong."""
        if state.keys() != self.average.keys():
            different = sorted(state.keys() ^ self.average.keys())
            raise ValueError(f"The checkpoint's EMA is of another model; names that differ: {', '.join(different[:5])} …")
        for name, average in self.average.items():
            loaded = state[name]
            if isinstance(average, DTensor) and not isinstance(loaded, DTensor):
                loaded = distribute_tensor(loaded.to(average.device), average.device_mesh, average.placements)
            local(average).copy_(local(loaded))


class AverageState(Callback):
    """Carry a `WeightAverage` in and out of checkpoints.

    Composer puts callbacks' states into a sharded checkpoint tensor by tensor, but an algorithm's as one pickled object of
    rank 0, from which every other rank would load rank 0's shard.
    """

    def __init__(self, average: WeightAverage, gather: bool):
        self._average, self._gather = average, gather
        self._loaded = False

    def after_load(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch > 0 and not self._loaded:  # new to a run that goes on: nothing of its first weights is meant
            self._average.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average.state_dict(full=self._gather)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state["average"])
        self._loaded = True

    def kept_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name the tensors that no checkpoint is written of unless they are finite; see `optim.bad_state`."""
        for name, tensor in self._average.average.items():
            yield f"the average of {name}", tensor


class EMA(Trick):
    """Keep a `WeightAverage` and lend it to evaluation and sampling (`model.sampling_weights`).

    Checkpoints carry both the plain weights and the average, under the plain parameter names.

    Args:
        smoothing: share of the old average that is kept per batch. `update_interval` changes the cost, not the average:
            an update after n batches keeps smoothingⁿ.
        half_life: instead of `smoothing`, the number of batches ("700ba") after which a weight counts half.
        update_interval: how often to update, in batches.
        start, end: window; before `start` the plain weights are used, after `end` the average stays as it is. An average that
            has begun goes on when a longer `max_duration` puts a `start` in "dur" off.

    Raises:
        ValueError: both or neither of smoothing and half-life, or a value out of range.
    """

    name = "ema"
    weight_copies = 1

    def __init__(
        self,
        smoothing: float | None = None,
        half_life: str | None = None,
        update_interval: str = "1ba",
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(start, end)
        if (smoothing is None) == (half_life is None):
            raise ValueError("ema needs either `smoothing` (per batch, such as 0.9999) or `half_life` (such as 700ba).")
        if half_life is not None:
            smoothing = 0.5 ** (1 / _batches("half_life", half_life, "700ba"))
        assert smoothing is not None
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {smoothing}.")
        self.smoothing, self.interval = smoothing, _batches("update_interval", update_interval, "10ba")
        self.weight_passes = 3 / self.interval  # weights and average are read, the average is written
        self.average: WeightAverage | None = None
        self._swapped = False

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BEFORE_LOAD, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self.attach_to(state)
        elif event == Event.BEFORE_LOAD:  # parameters are sharded now and will stay the objects that they are
            self.average = WeightAverage(state.model)
            state.callbacks.append(AverageState(self.average, gather=state.fsdp_state_dict_type == "full"))
        elif event == Event.BATCH_END:
            self._update(state)
        elif (event == Event.EVAL_START and self.has_begun) or (event == Event.EVAL_END and self._swapped):
            self._exchange()

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        if not hasattr(model, "sampling_weights"):
            raise UserError("algorithms.ema needs a model with a `sampling_weights` seam, such as text_to_image.")
        model.sampling_weights = self.sampling_weights

    @contextmanager
    def sampling_weights(self) -> Iterator[None]:
        """Give the model the averaged weights inside of this context, once there are any; before `start` the plain ones."""
        if not self.has_begun or self._swapped or self.average is None:
            yield
            return
        with self.average.swapped():
            yield

    def _exchange(self) -> None:
        assert self.average is not None
        self.average.swap()
        self._swapped = not self._swapped

    def _update(self, state: State) -> None:
        assert self.average is not None
        if self.window.is_over(state) or not (self.has_begun or self.window.start.has_come(state)):
            return
        if not self.has_begun:
            self.has_begun = True
            if not self.window.start.is_beginning:
                self.average.reset()
                return
        if int(state.timestamp.batch) % self.interval == 0:
            self.average.update(self.smoothing**self.interval)

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.has_begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.has_begun = bool(state["started"])


def _batches(argument: str, time: str, example: str) -> int:
    """Return the number of batches in a time; raise ValueError for another unit and for less than one."""
    parsed = Time.from_timestring(time)
    if parsed.unit != TimeUnit.BATCH or parsed.value < 1:
        raise ValueError(f"{argument} must be a number of batches such as {example}, not {time}.")
    return int(parsed.value)
