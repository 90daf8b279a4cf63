"""Between backward pass and update: gradients are clipped, and a step that is not finite is skipped or ends the run."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import composer.algorithms
import torch
from composer.core import Callback, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch import Tensor, nn

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError
from prx_composer.optim import bad_state, clip_by_norm, first_of_ranks, magnitudes, not_finite, plain_names, trained
from prx_composer.optim.exchange import local
from prx_composer.recipe.resume import against_what_is_not_finite
from prx_composer.runs.checkpoints import newest_checkpoint

log = logging.getLogger(__name__)

TOTAL = "loss/train/total"
_GRADIENT = "finite_guard/gradient"


class GradientClipping(composer.algorithms.GradientClipping, Trick):
    """Composer's gradient clipping, inside of a window.

    Args:
        clipping_type: "norm" of all gradients together, "value" of every element, or "adaptive" per unit (arXiv:2102.06171).
        clipping_threshold: largest norm, value, or ratio to the weight's norm.
        start, end: window.

    Raises:
        ValueError: a threshold that is not positive.
    """

    name = "gradient_clipping"

    def __init__(
        self,
        clipping_type: Literal["norm", "value", "adaptive"],
        clipping_threshold: float,
        start: str = "0ba",
        end: str | None = None,
    ):
        if clipping_threshold <= 0:
            raise ValueError(f"clipping_threshold must be positive, not {clipping_threshold}.")
        composer.algorithms.GradientClipping.__init__(self, clipping_type, clipping_threshold)
        Trick.__init__(self, start, end)
        self.weight_passes = {"norm": 3, "value": 2, "adaptive": 4}.get(clipping_type, 0)  # read for norms, then read and written

    def match(self, event: Event, state: State) -> bool:
        return super().match(event, state) and self.window.contains(state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_TRAIN_BATCH and self.clipping_type == "norm":
            clip_by_norm(state.model.parameters(), self.clipping_threshold)
        else:
            super().apply(event, state, logger)


# --------------------------------------------------------------------------------------- steps that are not finite are skipped


class _ReadLast(Callback):
    """Let the host wait for the decision when all that others do at AFTER_TRAIN_BATCH has been handed to the device."""

    def __init__(self, decide: Callable[[State, Logger], None]):
        self._decide = decide

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._decide(state, logger)


class SkipNonfinite(Trick):
    """Make no update in a step whose loss or gradient is not finite; after `limit` such steps in a row, end training.

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
            assert self._loss is not None
            with torch.no_grad():
                gradient = not_finite([local(parameter.grad) for parameter in trained(state)])
            self._flags = torch.stack([self._loss, gradient.to(self._loss.device)])
            dist.all_reduce(self._flags)

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

    def _decide(self, state: State, logger: Logger) -> None:
        assert self._flags is not None
        bad_loss, bad_gradient = torch.isnan(self._flags).tolist()
        if bad_loss or bad_gradient:
            for parameter in trained(state):
                parameter.grad = None
            self._count("loss" if bad_loss else "gradient", int(state.timestamp.batch) + 1)
        else:
            self.in_a_row = 0
        logger.log_metrics({"guard/skipped_steps": self.skipped})

    def _count(self, what: str, batch: int) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            row = f"the last {self.in_a_row} in a row were skipped" if self.in_a_row > 1 else "one is the limit"
            raise UserError(
                f"Training ended at batch {batch}: the {what} is not finite, and {row} "
                f"(algorithms.skip_nonfinite.limit: {self.limit}). The weights are those of batch {batch - self.in_a_row}. "
                f"{self._where_to_look()} Go on from the checkpoint with {against_what_is_not_finite()}"
            )
        if dist.get_global_rank() == 0:
            message = "Batch %d: the %s is not finite; no update was made (%d in a row, %d in all)."
            log.warning(message, batch, what, self.in_a_row, self.skipped)

    def _where_to_look(self) -> str:
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


def _losses(state: State) -> Sequence[Tensor]:
    """Return what this microbatch is trained on: `total` if the model says it, else every term."""
    loss: Any = state.loss
    return [loss["total"]] if isinstance(loss, dict) and "total" in loss else ensure_tuple(loss)


# ------------------------------------------------------------------------------------------------- … or end the run


class FiniteGuard(Callback):
    """End training at the batch where something that is not finite is first seen, on all ranks at once; every recipe has it.

    `Trainer` reads the losses of a step once, summed over the ranks, and asks this guard for one number more: 0 if every element
    of every gradient is finite, else NaN. It costs one pass over the gradients, and neither a collective nor a wait. With
    `skip_nonfinite` in the recipe, losses and gradients are left to that. Under amp_fp16 gradients are left to the gradient
    scaler, which looks for its scale by them.

    No checkpoint is written of weights, averages or moments that are not finite (`check_state`): whatever they come from, the
    checkpoint before them is the one to go on from.

    Args:
        folder: of the run, to name its last checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._parameters: list[nn.Parameter] = []  # that have a gradient in this step …
        self._magnitudes: Tensor | None = None  # … and its magnitude on this rank, on the device
        self._bad: list[str] = []  # names of the losses of this step that are not finite
        self._bad_gradient = False

    @torch.no_grad()
    def questions(self, state: State) -> dict[str, Tensor]:
        """Return what the Trainer must read with the losses of a step.

        It asks when the gradients are complete and nobody has changed them yet.
        """
        self._magnitudes = None
        if state.precision == Precision.AMP_FP16 or _is_skipped(state):
            return {}
        self._parameters = trained(state)
        if not self._parameters:
            return {_GRADIENT: torch.zeros((), device=next(state.model.parameters()).device)}
        # A rank's shard of a small parameter may be empty: its magnitude is 0.
        self._magnitudes = magnitudes([local(parameter.grad) for parameter in self._parameters])
        return {_GRADIENT: 0 * self._magnitudes.sum()}

    def take_answers(self, state: State, values: Mapping[str, float]) -> dict[str, float]:
        """Note what isn't finite of the losses, and of the answers to `questions`; return the losses alone."""
        losses = {name: value for name, value in values.items() if name != _GRADIENT}
        if not _is_skipped(state):
            judged = [TOTAL] if TOTAL in losses else list(losses)
            wrong = not all(math.isfinite(losses[name]) for name in judged)
            self._bad = [name for name, value in losses.items() if not math.isfinite(value)] if wrong else []
            self._bad_gradient = not math.isfinite(values.get(_GRADIENT, 0.0))
        return losses

    def batch_end(self, state: State, logger: Logger) -> None:  # as the last callback: others have named the batch's samples
        if not self._bad and not self._bad_gradient:
            return
        for destination in logger.destinations:  # the line of this batch is written too
            for event in (Event.BATCH_END, Event.BATCH_CHECKPOINT):
                destination.run_event(event, state, logger)
        terms = [name.removeprefix("loss/train/") for name in self._bad if name != TOTAL]
        if self._bad:
            what = "the loss is not finite" + (f" (first {terms[0]})" if terms else "")
        else:
            what = f"the gradient is not finite (first that of {self._first_gradient(state)})"
        raise UserError(f"Training ended at batch {int(state.timestamp.batch)}: {what}. {self._ways_on()}")

    def _first_gradient(self, state: State) -> str:
        names, good = plain_names(state), [] if self._magnitudes is None else torch.isfinite(self._magnitudes).tolist()
        bad = (parameter for parameter, is_good in zip(self._parameters, good, strict=False) if not is_good)
        return first_of_ranks(next((names.get(parameter, "a parameter") for parameter in bad), None)) or "a parameter"

    def check_state(self, state: State) -> None:
        """Raise UserError, on all ranks, if what a checkpoint would hold is not finite."""
        bad = bad_state(state)
        if bad is not None:
            raise UserError(
                f"Training ended at batch {int(state.timestamp.batch)}: {bad} is not finite, and no checkpoint of it is written. "
                f"{self._ways_on()}"
            )

    def _ways_on(self) -> str:
        """Return the last good checkpoint, and what to do about what is not finite, in words."""
        newest = newest_checkpoint(self._folder)
        if newest is None:
            return (
                "The run has no checkpoint before it. Start it anew (run_name=<another name>) with a lower optimizer.lr, a "
                "longer warm-up or gradient_clipping; or with algorithms.skip_nonfinite={}, which leaves single bad batches out."
            )
        return (
            f"The last good checkpoint is {newest.path}; nothing that came after it was kept. Go on from there with "
            "autoresume=true algorithms.skip_nonfinite={} , which leaves single bad batches out, or with "
            f"{against_what_is_not_finite()} Or in another run: run_name=<another name> model.init_from={newest.path}"
        )


def _is_skipped(state: State) -> bool:
    return any(isinstance(algorithm, SkipNonfinite) for algorithm in state.algorithms)
