"""Timesteps of training that are drawn otherwise in the beginning of a run than at its end."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from composer.core import State
from composer.utils import dist

from prx_composer.algorithms.base import Trick
from prx_composer.common.distributed import unwrapped
from prx_composer.common.errors import UserError
from prx_composer.models.processes import FlowMatching, Process
from prx_composer.schedule.moments import Moment, ScheduleWindow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TimestepPhase:
    """A part of the run, and how its timesteps are drawn; what is left out is as in `model.flow`.

    Args:
        until: end of the phase, a `Moment` ("0.4dur", "100000ba or 0.4budget"); None for the rest of the run.
        logit_mean: of the logit-normal ones, before the shift. t = 1 is noise: positive is more noise.
        logit_std: their spread.
        uniform_fraction: share of uniform ones.
    """

    until: str | None = None
    logit_mean: float | None = None
    logit_std: float | None = None
    uniform_fraction: float | None = None

    @property
    def changes(self) -> dict[str, float]:
        """What is given, by its name in `FlowMatching`."""
        return {name: value for name, value in asdict(self).items() if name != "until" and value is not None}

    def __str__(self) -> str:
        drawn = ", ".join(f"{name} {value:g}" for name, value in self.changes.items()) or "as model.flow has them"
        return f"until {self.until}: {drawn}" if self.until else drawn


class TimestepPhases(Trick):
    """Draw the timesteps of training from another distribution in each phase of the run.

    The phase is a function of the training time alone, so a run that is stopped anywhere, the border included, resumes as if it
    hadn't been. The validation loss has timesteps of its own, and stays comparable.

    Args:
        phases: in order; all but the last need `until`. After a last one that ends too, `model.flow` holds.

    Raises:
        ValueError: no phases, a missing or unordered `until`, values outside their range.
    """

    name = "timestep_phases"
    experimental = True

    def __init__(self, phases: Sequence[TimestepPhase]):
        super().__init__()
        if not phases:
            raise ValueError("phases needs at least one phase.")
        self.phases = list(phases)
        self._windows = list[ScheduleWindow]()
        self._flow: FlowMatching | None = None
        self._current: int | None = None
        start = "0ba"
        for index, phase in enumerate(phases):
            if phase.until is None and index < len(phases) - 1:
                raise ValueError(f"phases[{index}].until is missing; only the last phase may go on to the end.")
            window = ScheduleWindow(start, phase.until)
            if window.end is not None and (window.end.is_beginning or window.end.may_precede(Moment(start))):
                before = "the phase before it ends" if index else "the beginning"
                raise ValueError(f"phases[{index}].until: {phase.until} must be later than {before}.")
            self._windows.append(window)
            start = phase.until or start
            try:
                replace(FlowMatching(), **phase.changes)
            except ValueError as error:
                raise ValueError(f"phases[{index}].{error}") from error

    @property
    def windows(self) -> dict[str, ScheduleWindow]:
        return {f"{self.name}.phases[{index}]": window for index, window in enumerate(self._windows)}

    @property
    def schedule(self) -> str:
        last = "" if self.phases[-1].until is None else "; then as model.flow has them"
        return "timesteps of training: " + "; then ".join(map(str, self.phases)) + last

    def check_flow(self, flow: Process) -> None:
        if not isinstance(flow, FlowMatching):
            raise UserError(
                f"algorithms.{self.name} changes the draws of flow matching, and {type(flow).__name__} has others: leave "
                "it out, or set model.flow.name to flow_matching."
            )

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        if not hasattr(model, "training_flow"):
            raise UserError(f"algorithms.{self.name} needs a model with `training_flow`, such as text_to_image.")
        self.check_flow(model.flow)
        if model.training_flow is not None:
            raise UserError(f"algorithms.{self.name} is there twice; one of them is enough.")
        self._flow = model.training_flow = model.flow

    def follow_window(self, state: State) -> None:
        """Let the model draw as the phase of the step at hand says; at Event.BATCH_START."""
        current = next((index for index, window in enumerate(self._windows) if window.contains(state)), None)
        if current == self._current:
            return
        self._current = current
        assert self._flow is not None
        unwrapped(state.model).training_flow = self._flow if current is None else self.drawn_in(current)
        if dist.get_global_rank() == 0:
            told = "as model.flow has them" if current is None else self.phases[current]
            log.info("Timesteps from batch %d on: %s.", int(state.timestamp.batch), told)

    def drawn_in(self, index: int) -> FlowMatching:
        """Return the process with the timesteps of one phase, once attached."""
        assert self._flow is not None
        return replace(self._flow, **self.phases[index].changes)
