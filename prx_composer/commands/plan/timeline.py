"""A recipe's stages in steps and samples, and where on that line a time string lies."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from composer.core import TimeUnit

from prx_composer.algorithms.progressive_resolution import Stage
from prx_composer.common.errors import UserError
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import check_batch_sizes
from prx_composer.schedule.moments import BUDGET, SECONDS, Moment, Point, ScheduleWindow

STAGES = "algorithms.progressive_resolution.stages"
_NEVER = 1 << 62  # steps
_DUR = TimeUnit.DURATION.value


def placeable(text: str, path: str) -> Point | None:
    """The first alternative of "100000ba or 0.83budget" that says how far training has come, not how much time has passed.

    Raises:
        UserError: no time, at `path`.
    """
    try:
        points = Moment(text).points
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return next((point for point in points if point.unit not in (SECONDS, BUDGET)), None)


@dataclass(frozen=True)
class Span:
    """One stage of the run.

    Args:
        path: of the stage in the recipe, for messages.
        image_size, batch_size: in pixels, and images per step over all GPUs.
        microbatch_size: images per forward pass of one GPU.
        start, end: steps.
        first_sample: images trained before it.
    """

    path: str
    image_size: int
    batch_size: int
    microbatch_size: int
    start: int
    end: int
    first_sample: int

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size


@dataclass
class Timeline:
    """The run from its first step to its last.

    Args:
        spans: the stages that there is time for, in order.
        max_duration: of the recipe.
        epoch: images in the data, if known.
        notes: what a reader should know of how times were placed.
    """

    spans: list[Span]
    max_duration: Point
    epoch: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.spans[-1].end if self.spans else 0

    @property
    def samples(self) -> int:
        return sum(span.samples for span in self.spans)

    def step_of(self, text: str, path: str) -> int | None:
        """The first step at or after the moment that a time string names; None, and a note, if that can't be said."""
        time = placeable(text, path)
        step = None if time is None else _step(time, self.spans, self.max_duration, self.epoch)
        if step is None:
            self.note(f"{path}: {text} cannot be placed in steps; it is left out of account")
        elif " or " in text:
            self.note(f"{path}: {text} is taken as {time.text if time else text}")
        return step

    def window(self, window: ScheduleWindow, path: str) -> tuple[int, int]:
        """First step inside and first step after a window; open where its times cannot be placed."""
        first = self.step_of(window.start.text, f"{path}.start") or 0
        last = None if window.end is None else self.step_of(window.end.text, f"{path}.end")
        return first, self.steps if last is None else last

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def stages(recipe: Recipe) -> list[tuple[str, Stage]]:
    """Each stage with its YAML path; a recipe without `progressive_resolution` is one."""
    spec = recipe.algorithms.get("progressive_resolution")
    if not isinstance(spec, dict):
        size, batch, microbatch = recipe.image_size, recipe.global_train_batch_size, recipe.device_train_microbatch_size
        return [("", Stage(size, batch, microbatch))]
    listed: Any = spec.get("stages") or []
    if not listed:
        raise UserError(f"{STAGES} needs at least one stage.")
    return [(f"{STAGES}[{index}].", Stage(**stage)) for index, stage in enumerate(listed)]


def timeline(recipe: Recipe, num_gpus: int, epoch: int | None) -> Timeline:
    """Lays the recipe's stages out.

    Args:
        num_gpus: over which batches divide.
        epoch: images in the data, if known.

    Raises:
        UserError: batches that don't divide, a stage whose end cannot be placed, nothing to train.
    """
    max_duration = placeable(recipe.max_duration, "max_duration")
    if max_duration is None or max_duration.unit == _DUR:
        raise UserError(f"max_duration: {recipe.max_duration} must be a number of batches, epochs or samples, such as 1000ba.")
    line = Timeline([], max_duration, epoch)
    listed = stages(recipe)
    if len(listed) > 1 and max_duration.unit == TimeUnit.EPOCH.value:
        raise UserError(
            f"max_duration: {recipe.max_duration} cannot be in epochs with {STAGES}, whose switch begins one; use ba."
        )
    for index, (path, stage) in enumerate(listed):
        microbatch = stage.device_train_microbatch_size or max(stage.global_train_batch_size // num_gpus, 1)
        check_batch_sizes(path, stage.global_train_batch_size, microbatch, num_gpus)
        endless = Span(path, stage.image_size, stage.global_train_batch_size, microbatch, line.steps, _NEVER, line.samples)
        end = _step(max_duration, [*line.spans, endless], max_duration, epoch)
        if end is None:
            raise UserError(
                f"max_duration: {recipe.max_duration} is in epochs of data that isn't here; say how many images with --samples."
            )
        if index < len(listed) - 1:  # the last goes on to the end of the run, whatever it says
            until = None if stage.until is None else placeable(stage.until, f"{path}until")
            step = None if until is None else _step(until, [*line.spans, endless], max_duration, epoch)
            if step is None:
                raise UserError(
                    f"{path}until: {stage.until} says nothing of steps, so that the stage's length cannot be planned; "
                    "give one in ba, sp or dur, such as 100000ba or 0.5dur."
                )
            if until is not None and " or " in str(stage.until):
                line.note(f"{path}until: {stage.until} is taken as {until.text}")
            end = min(end, step)
        if end <= line.steps:
            line.note(f"{path.rstrip('.') or 'the run'} has no step")
            continue
        line.spans.append(dataclasses.replace(endless, end=end))
    if not line.spans:
        raise UserError(f"max_duration: {recipe.max_duration} is no step of training.")
    return line


def _step(time: Point, spans: list[Span], max_duration: Point, epoch: int | None) -> int | None:
    """The first step at or after that moment; the last span is thought to go on. None for epochs of unknown length."""
    value = time.value
    if time.unit == _DUR:
        return _step(Point(value * max_duration.value, max_duration.unit, time.text), spans, max_duration, epoch)
    if time.unit == TimeUnit.BATCH.value:
        return math.ceil(value - 1e-9)
    if time.unit == TimeUnit.EPOCH.value:
        return None if epoch is None else math.floor(value * (epoch // spans[-1].batch_size))
    for span in spans:
        if value <= span.first_sample + span.samples or span is spans[-1]:
            return span.start + max(0, math.ceil((value - span.first_sample) / span.batch_size - 1e-9))
    return None
