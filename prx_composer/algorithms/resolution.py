"""Image sizes: stages of growing size in one run, and a network that is told height and width."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from prx_composer.algorithms.base import Trick, unsuited
from prx_composer.common.errors import UserError, at_path
from prx_composer.models.backbone import PRXBackbone, ResolutionEmbedder
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.optim import add_parameters
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import check_batch_sizes, microbatch_of
from prx_composer.schedule.moments import Moment

log = logging.getLogger(__name__)


@runtime_checkable
class StagedLoader(Protocol):
    """What a loader must offer to be staged; `data.loader.ImageCaptionLoader` does."""

    def set_stage(self, image_size: int, global_batch_size: int) -> None: ...

    def end_pass(self) -> None: ...


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
    """Move the loaders, of training and evaluation, and the trainer from stage to stage.

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
        self._loaded = False

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
            if not self._loaded:  # new to a run that goes on: stages that are over are not gone through
                self._current = sum(end.has_come(state) for end in self._ends[: len(self.stages) - 1])
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
        """Judge the model at the size that it is trained at: that of the step in hand, also in the last before a switch."""
        for loader in _following(state):
            if loader.image_size != self.stage.image_size:
                loader.set_stage(self.stage.image_size, loader.global_batch_size)

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
                for following in _following(state):
                    before = following.image_size
                    following.set_stage(stage.image_size, following.global_batch_size)
                    following.set_stage(before, following.global_batch_size)

    @staticmethod
    def _microbatch_size(stage: Stage) -> int:
        return microbatch_of(stage.global_train_batch_size, stage.device_train_microbatch_size, dist.get_world_size())

    @staticmethod
    def _loader(state: State) -> StagedLoader:
        if not isinstance(state.train_dataloader, StagedLoader):
            raise UserError(
                "algorithms.progressive_resolution needs a train_loader with set_stage and end_pass, such as image_caption."
            )
        return state.train_dataloader

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"current": self._current, "switching": self._switching, "stage": vars(self.stage)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._current, self._switching, self._loaded = int(state["current"]), bool(state["switching"]), True
        if "stage" in state and state["stage"] != vars(self.stages[min(self._current, len(self.stages) - 1)]):
            same = [index for index, stage in enumerate(self.stages) if vars(stage) == state["stage"]]
            if same and same[0] != self._current:  # stages before it were added or left out
                log.warning("algorithms.progressive_resolution.stages: the run is in stages[%d] now.", same[0])
                self._current = same[0]
        if self._current >= len(self.stages):
            raise UserError(
                f"The checkpoint is in stage {self._current}, but algorithms.progressive_resolution has only "
                f"{len(self.stages)} stages. Resume with the recipe the run was started with."
            )


def _following(state: State) -> Iterator[Any]:
    """Yield the loaders of evaluation that can follow the stages."""
    for evaluator in state.evaluators:
        loader = evaluator.dataloader.dataloader
        if all(hasattr(loader, name) for name in ("image_size", "global_batch_size", "set_stage")):
            yield loader


def add_resolution_embedder(backbone: PRXBackbone) -> ResolutionEmbedder:
    """Give a backbone diffusers' `resolution_embeds` without changing what it computes: the last layer starts at zero."""
    embedder = ResolutionEmbedder(backbone.hidden_size, backbone.time_max_period)
    nn.init.normal_(embedder.mlp.in_layer.weight, std=0.02)
    nn.init.zeros_(embedder.mlp.in_layer.bias)
    nn.init.zeros_(embedder.mlp.out_layer.weight)
    nn.init.zeros_(embedder.mlp.out_layer.bias)
    embedder.added = True
    backbone.resolution_embedder = embedder
    backbone.config["resolution_embeds"] = True
    return embedder


class ResolutionAware(Trick):
    """Add an embedding of height and width, in the pixels that the backbone sees, to the time vector.

    Args:
        start, end: window; outside of it nothing is added, in training or sampling.
    """

    name = "resolution_aware"
    _adds = True
    shapes_sampling = True
    experimental = True

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        if not isinstance(backbone, PRXBackbone | None):
            raise unsuited(self.name, backbone, "only the backbone prx has a place for diffusers' embedding of height and width")

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        self.check(None, [], getattr(model, "backbone", model))
        self._adds = model.backbone.resolution_embedder is None
        if not self._adds:
            message = "resolution_aware adds nothing to a backbone with resolution_embeds: true."
            warnings.warn(NoEffectWarning(message), stacklevel=2)
            return
        with seeded_initialisation(model.random.seed, self.name):
            embedder = add_resolution_embedder(model.backbone)
        add_parameters(optimizer, embedder)

    def set_active(self, model: Any, active: bool) -> None:
        if self._adds:
            model.backbone.resolution_embedder.active = active
