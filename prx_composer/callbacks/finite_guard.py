"""A run whose loss or gradient is not finite ends where that happens, with its last good checkpoint untouched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, Precision, State
from composer.loggers import Logger
from torch import Tensor, nn

from prx_composer.algorithms.skip_nonfinite import SkipNonfinite
from prx_composer.common.errors import UserError
from prx_composer.optim import bad_state, first_of_ranks, magnitudes, plain_names, trained
from prx_composer.optim.exchange import local
from prx_composer.recipe.resume import against_what_is_not_finite
from prx_composer.runs.checkpoints import newest_checkpoint

TOTAL = "loss/train/total"
_GRADIENT = "finite_guard/gradient"


def ways_on(folder: Path | None) -> str:
    """The last good checkpoint of a run that met what is not finite, and what to do about it."""
    newest = None if folder is None else newest_checkpoint(folder)
    if newest is None:
        return (
            "The run has no checkpoint before it. Start it anew (run_name=<another name>) with a lower optimizer.lr, a longer "
            "warm-up or gradient_clipping; or with algorithms.skip_nonfinite={}, which leaves single bad batches out."
        )
    return (
        f"The last good checkpoint is {newest.path}; nothing that came after it was kept. Go on from there with autoresume=true "
        "algorithms.skip_nonfinite={} , which leaves single bad batches out, or with "
        f"{against_what_is_not_finite()} Or in another run: run_name=<another name> model.init_from={newest.path}"
    )


class FiniteGuard(Callback):
    """Every recipe has it: what is not finite ends training at the batch where it is first seen, on all ranks at once.

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

    # ------------------------------------------------------------------------------------ called by the Trainer

    def questions(self, state: State) -> dict[str, Tensor]:
        """What must be read with the losses of a step, when its gradients are complete and nobody has changed them yet."""
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
        """Notes what isn't finite of the losses, and of the answers to `questions`; returns the losses alone."""
        losses = {name: value for name, value in values.items() if name != _GRADIENT}
        if not _is_skipped(state):
            judged = [TOTAL] if TOTAL in losses else list(losses)
            wrong = any(not _finite(losses[name]) for name in judged)
            self._bad = [name for name, value in losses.items() if not _finite(value)] if wrong else []
            self._bad_gradient = not _finite(values.get(_GRADIENT, 0.0))
        return losses

    # --------------------------------------------------------------------------------------------------- events

    def batch_end(self, state: State, logger: Logger) -> None:
        """As the last of the callbacks: others have named the samples of the batch by now."""
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
        raise UserError(f"Training ended at batch {int(state.timestamp.batch)}: {what}. {ways_on(self._folder)}")

    def _first_gradient(self, state: State) -> str:
        names, good = plain_names(state), [] if self._magnitudes is None else torch.isfinite(self._magnitudes).tolist()
        bad = (parameter for parameter, is_good in zip(self._parameters, good, strict=False) if not is_good)
        return first_of_ranks(next((names.get(parameter, "a parameter") for parameter in bad), None)) or "a parameter"

    def check_state(self, state: State) -> None:
        """Raises UserError, on all ranks, if what a checkpoint would hold is not finite."""
        bad = bad_state(state)
        if bad is not None:
            raise UserError(
                f"Training ended at batch {int(state.timestamp.batch)}: {bad} is not finite, and no checkpoint of it is written. "
                f"{ways_on(self._folder)}"
            )


def _is_skipped(state: State) -> bool:
    return any(isinstance(algorithm, SkipNonfinite) for algorithm in state.algorithms)


def _finite(value: Any) -> bool:
    return abs(float(value)) < float("inf")  # NaN is not
