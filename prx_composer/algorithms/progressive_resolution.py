"""Stages of growing image size in one run, each with its own batch and microbatch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from composer.core import Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError, at_path
from prx_composer.recipe.consistency import check_batch_sizes
from prx_composer.schedule.moments import Moment

log = logging.getLogger(__name__)


@runtime_checkable
class StagedLoader(Protocol):
    """What a loader must offer to be staged; `data.loader.ImageCaptionLoader` does."""

    def set_stage(self, image_size: int, global_batch_size: int) -> None: ...

    def end_pass(self) -> None: ...


@runtime_checkable
class SizedLoader(Protocol):
    """What a loader of evaluation must offer to follow the stages."""

    @property
    def image_size(self) -> int: ...

    @property
    def global_batch_size(self) -> int: ...

    def set_stage(self, image_size: int, global_batch_size: int) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        until: end of the stage, a `Moment` ("100000ba", "0.6dur", "100000ba or 0.83budget"); None for the rest of the run.
        image_size: side of the square whose area the images have.
        global_train_batch_size: images per step over all ranks.
        device_train_microbatch_size: images per forward pass of one rank; by default its whole share of the batch.
    """

    image_size: int
    global_train_batch_size: int
    device_train_microbatch_size: int | None = None
    until: str | None = None


class ProgressiveResolution(Trick):
    """Moves the loaders, of training and evaluation, and the trainer from stage to stage.

    The stage is a function of the training time alone, a stage that was entered stays entered, and a switch ends the loader's
    pass (Composer counts an epoch), so a run that is stopped anywhere, the switch included, resumes as if it hadn't been.

    Args:
        stages: in order; all but the last need `until`, and the last must not end before training does.

    Raises:
        ValueError: no stages, a missing or unordered `until`.
    """

    name = "progressive_resolution"

    def __init__(self, stages: Sequence[Stage]):
        super().__init__()
        if not stages:
            raise ValueError("stages needs at least one stage.")
        ends: list[Moment] = []
        for index, stage in enumerate(stages):
            if stage.until is None:
                if index < len(stages) - 1:
                    raise ValueError(f"stages[{index}].until is missing; only the last stage may go on to the end.")
                continue
            end = Moment(stage.until)
            if any(point.unit == TimeUnit.EPOCH.value for point in end.points):
                raise ValueError(
                    f"stages[{index}].until: {stage.until} cannot be in epochs, since a switch begins one; use ba, sp or dur."
                )
            if ends and end.may_precede(ends[-1]):
                raise ValueError(f"stages[{index}].until: {stage.until} must be later than the stage before it ends.")
            ends.append(end)
        self.stages = list(stages)
        self._ends = ends
        self._current = 0
        self._switching = False  # the pass of the old stage is over, but Composer has not begun the next epoch

    @property
    def stage(self) -> Stage:
        return self.stages[self._current]

    @property
    def next_switch(self) -> Moment | None:
        """When the present stage ends, unless it is the last."""
        return self._ends[self._current] if self._current < len(self.stages) - 1 else None

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.AFTER_LOAD, Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_LOAD:
            self._check(state)
            self._enter(state)
            if self._switching:
                self._loader(state).end_pass()
        elif event == Event.BATCH_START:
            self._switching = False
            self._stage_evaluation(state)
            logger.log_metrics({"stage/index": self._current, "stage/image_size": self.stage.image_size})
        elif self.next_switch is not None and self.next_switch.has_come(state):
            self._current += 1
            self._switching = True
            self._enter(state)
            self._loader(state).end_pass()
            log.info("Stage %d: %s", self._current, self.stage)

    def _enter(self, state: State) -> None:
        stage = self.stage
        self._loader(state).set_stage(stage.image_size, stage.global_train_batch_size)
        state.device_train_microbatch_size = self._microbatch_size(stage)
        state.dataloader_len = -1  # read again: Composer would cut the new stage's passes to the old one's length

    def _stage_evaluation(self, state: State) -> None:
        """A model is judged at the size that it is trained at: that of the step in hand, also in the last before a switch."""
        for evaluator in state.evaluators:
            loader = evaluator.dataloader.dataloader
            if isinstance(loader, SizedLoader) and loader.image_size != self.stage.image_size:
                loader.set_stage(self.stage.image_size, loader.global_batch_size)

    @staticmethod
    def _try_evaluation(state: State, stage: Stage) -> None:
        """Raises ValueError if the loaders of evaluation cannot follow."""
        for evaluator in state.evaluators:
            loader = evaluator.dataloader.dataloader
            if isinstance(loader, SizedLoader):
                before = loader.image_size
                loader.set_stage(stage.image_size, loader.global_batch_size)
                loader.set_stage(before, loader.global_batch_size)

    def _check(self, state: State) -> None:
        if state.max_duration is not None and state.max_duration.unit == TimeUnit.EPOCH and len(self.stages) > 1:
            raise UserError(
                "max_duration cannot be in epochs with algorithms.progressive_resolution, whose switch begins one; use ba."
            )
        loader = self._loader(state)
        for index, stage in enumerate(self.stages):
            path = f"algorithms.progressive_resolution.stages[{index}]."
            check_batch_sizes(path, stage.global_train_batch_size, self._microbatch_size(stage), dist.get_world_size())
            with at_path(f"{path}image_size"):
                loader.set_stage(stage.image_size, stage.global_train_batch_size)
                self._try_evaluation(state, stage)

    @staticmethod
    def _microbatch_size(stage: Stage) -> int:
        return stage.device_train_microbatch_size or max(stage.global_train_batch_size // dist.get_world_size(), 1)

    @staticmethod
    def _loader(state: State) -> StagedLoader:
        if not isinstance(state.train_dataloader, StagedLoader):
            raise UserError(
                "algorithms.progressive_resolution needs a train_loader with set_stage and end_pass, such as image_caption."
            )
        return state.train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"current": self._current, "switching": self._switching}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._current, self._switching = int(state["current"]), bool(state["switching"])
        if self._current >= len(self.stages):
            raise UserError(
                f"The checkpoint is in stage {self._current}, but algorithms.progressive_resolution has only "
                f"{len(self.stages)} stages. Resume with the recipe the run was started with."
            )
