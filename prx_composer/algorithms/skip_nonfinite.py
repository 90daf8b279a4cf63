"""Steps whose loss or gradient is not finite are left out, and a run of them ends training."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError
from prx_composer.optim import not_finite, trained
from prx_composer.optim.exchange import local
from prx_composer.recipe.resume import against_what_is_not_finite
from prx_composer.runs.checkpoints import newest_checkpoint

log = logging.getLogger(__name__)


class _ReadLast(Callback):
    """Lets the host wait for the decision when all that others do at AFTER_TRAIN_BATCH has been handed to the device."""

    def __init__(self, decide: Callable[[State, Logger], None]):
        self._decide = decide

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._decide(state, logger)


class SkipNonfinite(Trick):
    """Makes no update in a step whose loss or gradient is not finite; after `limit` such steps in a row training ends.

    In a skipped step the optimizer finds no gradients: weights, moments, momentum and step counts stay what they were, to the
    bit. The batch counts as trained and the learning rate goes on. The gradients are looked at before they are clipped, wherever
    the algorithm stands in the recipe: clipping by value would turn an infinite one into a finite one.

    Ranks decide together, by an all-reduce of two numbers, since each sees only its own loss and, under FSDP2, its own shards.
    It costs one pass over the gradients and one read by the host per step, when everything but the update has been handed to the
    device: the one place where a step waits for the device with nothing left for it to do. Only an optimizer that takes a flag
    from the device could do without the read. Few do, and gradients of zero would not leave moments alone.

    Args:
        limit: so many skipped steps in a row end training.
        folder: of the run, to name its newest checkpoint when training ends.

    Raises:
        ValueError: a limit below 1.
        UserError: during training, after `limit` skipped steps in a row; at INIT, precision amp_fp16.
    """

    name = "skip_nonfinite"

    def __init__(self, limit: int = 10, folder: str | None = None):
        super().__init__()
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}.")
        self.limit, self._folder = limit, folder
        self.skipped = 0  # steps, so far
        self.in_a_row = 0
        self._loss: Tensor | None = None  # 0 or NaN, on the device
        self._flags: Tensor | None = None  # those of loss and gradient, of all ranks

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_BACKWARD, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self.attach_to(state)
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._loss = None
        elif event == Event.BEFORE_BACKWARD:
            term = not_finite([loss.detach().float() for loss in _losses(state)])
            self._loss = term if self._loss is None else self._loss + term
        else:
            self._look(state)

    def attach_to(self, state: State) -> None:
        if state.precision == Precision.AMP_FP16:
            raise UserError(
                "algorithms.skip_nonfinite: with precision amp_fp16 Composer's gradient scaler skips such steps already, in its "
                "search for a scale. Use precision amp_bf16, or set algorithms.skip_nonfinite=false."
            )
        # Composer runs algorithms in reverse order at AFTER_… events, and in order at BEFORE_… events: as the last one, it
        # sees the gradients that nobody has changed yet, and the loss that nobody changes any more.
        state.algorithms.remove(self)
        state.algorithms.append(self)
        state.callbacks.append(_ReadLast(self._decide))

    def _look(self, state: State) -> None:
        assert self._loss is not None
        gradient = not_finite([local(parameter.grad) for parameter in trained(state)])
        self._flags = torch.stack([self._loss, gradient.to(self._loss.device)])
        dist.all_reduce(self._flags)

    def _decide(self, state: State, logger: Logger) -> None:
        assert self._flags is not None
        bad_loss, bad_gradient = torch.isnan(self._flags).tolist()
        if bad_loss or bad_gradient:
            for parameter in trained(state):
                parameter.grad = None
            self._count(state, "loss" if bad_loss else "gradient")
        else:
            self.in_a_row = 0
        logger.log_metrics({"guard/skipped_steps": self.skipped})

    def _count(self, state: State, what: str) -> None:
        self.skipped += 1
        self.in_a_row += 1
        batch = int(state.timestamp.batch) + 1
        if self.in_a_row >= self.limit:
            raise UserError(self._verdict(what, batch))
        if dist.get_global_rank() == 0:
            message = "Batch %d: the %s is not finite; no update was made (%d in a row, %d in all)."
            log.warning(message, batch, what, self.in_a_row, self.skipped)

    def _verdict(self, what: str, batch: int) -> str:
        row = f"the last {self.in_a_row} in a row were skipped" if self.in_a_row > 1 else "one is the limit"
        return (
            f"Training ended at batch {batch}: the {what} is not finite, and {row} "
            f"(algorithms.skip_nonfinite.limit: {self.limit}). The weights are those of batch {batch - self.in_a_row}. "
            f"{self._places()} Go on from the checkpoint with {against_what_is_not_finite()}"
        )

    def _places(self) -> str:
        """Where to look, and where the run could go on."""
        if self._folder is None:
            return "Look at the terms of the loss before it."
        folder = Path(self._folder)
        newest = newest_checkpoint(folder)
        checkpoint = f"its newest checkpoint is {newest.path}" if newest is not None else "it has no checkpoint yet"
        return f"Look at loss/train/… in {folder / 'metrics.jsonl'}; {checkpoint}."

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])


def _losses(state: State) -> list[Tensor]:
    """What this microbatch is trained on: `total` if the model says it, else every term."""
    loss: Any = state.loss
    if isinstance(loss, dict):
        return [loss["total"]] if "total" in loss else list(loss.values())
    return [loss] if isinstance(loss, Tensor) else list(loss)
