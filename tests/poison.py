"""`code_paths` of the guards' tests: an auxiliary loss that goes wrong at chosen batches, and a step that is taken back."""

from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.utils import dist
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.algorithms.base import LossTrick


@registry.algorithms.register("poison")
class Poison(LossTrick):
    """A weight decay on eight numbers of its own; at times it isn't.

    Args: kinds: batch (counted from 1) → kind, in the batch's first microbatch; rank: on which rank, None = on all.
    """

    name = "poison"

    def __init__(self, kinds: dict[int, str], rank: int | None = None, end: str | None = None):
        super().__init__(1.0, end=end)
        self.kinds, self.rank = {int(batch): kind for batch, kind in kinds.items()}, rank
        self.kind: str | None = None  # of the microbatch in hand

    def build(self, model: Any) -> dict[str, nn.Parameter]:
        return {"scale": nn.Parameter(torch.ones(8))}

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        scale: Tensor = self.term.scale
        kind, value = self.kind, 1e-2 * scale.square().sum()
        if kind == "nan":  # value and gradient
            return value * float("nan")
        if kind == "loss":  # infinite, with the finite gradient of `value`
            return value + float("inf")
        if kind == "gradient":  # finite, with an infinite derivative by the last number alone
            return value + (scale[-1] - scale[-1].detach()).sqrt()
        if kind == "spike":
            return value + 1000
        return value

    def match(self, event: Event, state: State) -> bool:
        return super().match(event, state) or event == Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Any) -> None:
        if event == Event.AFTER_LOSS:
            self.kind = None
            return
        super().apply(event, state, logger)
        if event == Event.BATCH_START and self.rank in (None, dist.get_global_rank()):
            self.kind = self.kinds.get(int(state.timestamp.batch) + 1)


@registry.algorithms.register("take_back")
class TakeBack(Algorithm):
    """After these batches (counted from 1) puts every weight and every tensor of the optimizer back to what it was before."""

    def __init__(self, batches: list[int]):
        self.batches = batches
        self.before: list[Tensor] = []
        self.first = False  # step, before which the optimizer has no state

    def match(self, event: Event, state: State) -> bool:
        batch = int(state.timestamp.batch) + (event == Event.BATCH_START)
        return event in (Event.BATCH_START, Event.BATCH_END) and batch in self.batches

    def apply(self, event: Event, state: State, logger: Any) -> None:
        if event == Event.BATCH_START:
            self.before = [tensor.detach().clone() for tensor in self.tensors(state)]
            self.first = not state.optimizers[0].state
        elif self.first:
            state.optimizers[0].state.clear()
        with torch.no_grad():
            for tensor, before in zip(self.tensors(state), self.before, strict=True):
                tensor.copy_(before)

    @staticmethod
    def tensors(state: State) -> list[Tensor]:
        moments = [value for slots in state.optimizers[0].state.values() for value in slots.values()]
        return [*state.model.parameters(), *(moment for moment in moments if isinstance(moment, Tensor))]
