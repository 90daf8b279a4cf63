"""A recipe's stages in steps and samples, where a time string lies on that line, what a mixture gives, and it stretched."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError, at_path
from prx_composer.data.format import Manifest
from prx_composer.data.mixture import shares_in_words
from prx_composer.recipe.arguments import data_sets, entries
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import STAGES, check_batch_sizes, planned_stages, stages_of
from prx_composer.recipe.times import phases_of, weight_steps
from prx_composer.schedule.moments import BATCH, BUDGET, DURATION, EPOCH, SECONDS, Moment, Point, ScheduleWindow

_NEVER = 1 << 62  # steps


def placeable(text: str, path: str) -> Point | None:
    """Return the first alternative of "100000ba or 0.83budget" that says how far training has come, not how long it took.

    Raises:
        UserError: no time, at `path`.
    """
    with at_path(path):
        points = Moment(text).points
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
        """Return the first step at or after the moment that a time string names; None, and a note, if that can't be said."""
        time = placeable(text, path)
        step = None if time is None else self.place(time)
        if step is None:
            self.note(f"{path}: {text} cannot be placed in steps; it is left out of account")
        elif time is not None and " or " in text:
            self.note(f"{path}: {text} is taken as {time.text}")
        return step

    def place(self, time: Point) -> int | None:
        """Return the first step at or after a point of time; the last span is thought to go on.

        None stands for seconds and parts of a budget, and for epochs of unknown length.
        """
        value = time.value
        if time.unit == DURATION:
            return self.place(Point(value * self.max_duration.value, self.max_duration.unit, time.text))
        if time.unit == BATCH:
            return math.ceil(value - 1e-9)
        if time.unit == EPOCH:
            return None if self.epoch is None else math.floor(value * (self.epoch // self.spans[-1].batch_size))
        for span in self.spans:
            if value <= span.first_sample + span.samples or span is self.spans[-1]:
                return span.start + max(0, math.ceil((value - span.first_sample) / span.batch_size - 1e-9))
        return None

    def window(self, window: ScheduleWindow, path: str) -> tuple[int, int]:
        """Return the first step inside and the first after a window; it is open where its times cannot be placed."""
        first = self.step_of(window.start.text, f"{path}.start") or 0
        last = None if window.end is None else self.step_of(window.end.text, f"{path}.end")
        return first, self.steps if last is None else last

    def images_before(self, step: int) -> int:
        """Return the images trained before a step."""
        return sum(min(max(step - span.start, 0), span.steps) * span.batch_size for span in self.spans)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def timeline(recipe: Recipe, num_gpus: int, epoch: int | None) -> Timeline:
    """Lay out the recipe's stages; a recipe without `progressive_resolution` is one.

    Args:
        num_gpus: over which batches divide.
        epoch: images in the data, if known.

    Raises:
        UserError: batches that don't divide, a stage whose end cannot be placed, nothing to train.
    """
    max_duration = placeable(recipe.max_duration, "max_duration")
    if max_duration is None or max_duration.unit == DURATION:
        raise UserError(f"max_duration: {recipe.max_duration} must be a number of batches, epochs or samples, such as 1000ba.")
    line = Timeline([], max_duration, epoch)
    stages = planned_stages(vars(recipe), num_gpus)
    if len(stages) > 1 and max_duration.unit == EPOCH:
        raise UserError(
            f"max_duration: {recipe.max_duration} cannot be in epochs with {STAGES}, whose switch begins one; use ba."
        )
    for stage in stages:
        path, batch, microbatch = stage.path, stage.global_batch_size, stage.microbatch_size
        check_batch_sizes(path, batch, microbatch, num_gpus)
        endless = Span(path, stage.image_size, batch, microbatch, line.steps, _NEVER, line.samples)
        begun = dataclasses.replace(line, spans=[*line.spans, endless])  # where its end is looked for
        end = begun.place(max_duration)
        if end is None:
            raise UserError(
                f"max_duration: {recipe.max_duration} is in epochs of data that isn't here; say how many images with --samples."
            )
        if stage.window.end is not None:
            end = min(end, _end(begun, stage.window.end.text, path))
        if end <= line.steps:
            line.note(f"{path.rstrip('.') or 'the run'} has no step")
            continue
        line.spans.append(dataclasses.replace(endless, end=end))
    if not line.spans:
        raise UserError(f"max_duration: {recipe.max_duration} is no step of training.")
    return line


def _end(line: Timeline, until: str, path: str) -> int:
    """Return the step before which the last stage of a line ends; raise UserError if that can't be said."""
    time = placeable(until, f"{path}until")
    step = None if time is None else line.place(time)
    if time is None or step is None:
        raise UserError(
            f"{path}until: {until} says nothing of steps, so that the stage's length cannot be planned; "
            "give one in ba, sp or dur, such as 100000ba or 0.5dur."
        )
    if " or " in until:
        line.note(f"{path}until: {until} is taken as {time.text}")
    return step


# ------------------------------------------------------------------------------------------------------- a mixture


@dataclass(frozen=True)
class Source:
    """What a run takes of one data set of a mixture.

    Args:
        name: in the mixture.
        images: drawn from it. samples: that it has. epochs: how often each of them is seen. None where it isn't known.
    """

    name: str
    images: float | None
    samples: int | None
    epochs: float | None


def sources(recipe: Recipe, line: Timeline, manifests: Mapping[Path, Manifest] | None) -> tuple[str, list[Source]]:
    """Return the shares of the data sets in every phase, in words, and what the run takes of each; nothing of a single one."""
    mix = recipe.train_loader.get("mix")
    if not mix:
        return "", []
    phases, samples = phases_of(mix), dict.fromkeys(mix, 0)
    for where, part in data_sets(recipe.train_loader).items():
        manifest = (manifests or {}).get(Path(part["path"]) / str(part.get("split", "train")))
        samples[where.removeprefix("mix.")] = 0 if manifest is None else sum(manifest.buckets.values())
    if not all(samples.values()) and not phases[0].weights:  # shares are those of sizes that aren't known
        return "", []
    ends = [line.steps if phase.until is None else line.step_of(phase.until, "train_loader.mix") for phase in phases]
    drawn = dict.fromkeys(samples, 0.0)
    for phase, start, end in zip(phases, [0, *ends], ends, strict=False):
        for name, share in phase.shares(samples).items():
            drawn[name] += 0 if start is None or end is None else share * (line.images_before(end) - line.images_before(start))
    known = None not in ends
    told = [
        Source(name, drawn[name] if known else None, count or None, drawn[name] / count if known and count else None)
        for name, count in samples.items()
    ]
    return shares_in_words(phases, samples), told


# ----------------------------------------------------------------------------------------------- a schedule stretched


def stretched(recipe: Recipe, spans: list[Span], lengths: list[int]) -> tuple[dict[str, str], Recipe]:
    """Return the recipe with stages of other lengths, and the keys that change, with their new values.

    Windows of algorithms and a scheduler's `t_max` move along: those at a stage's end stay there.

    Args:
        spans: the recipe's stages.
        lengths: their new numbers of steps.
    """
    new: list[Span] = []
    for span, steps in zip(spans, lengths, strict=True):
        start, first = (new[-1].end, new[-1].first_sample + new[-1].samples) if new else (0, 0)
        new.append(dataclasses.replace(span, start=start, end=start + steps, first_sample=first))
    changes: dict[str, str] = {}

    def move(mapping: dict[str, Any], key: str, path: str) -> None:
        """Move the steps and samples in the time string of a key, and note it as a change if it isn't the same then."""
        points = Moment(str(mapping[key])).points
        moved = " or ".join(_moved(point, spans, new) for point in points)
        if moved != " or ".join(point.text for point in points):
            mapping[key] = changes[f"{path}{key}"] = moved

    last = Moment(recipe.max_duration).points[0]
    if last.unit == EPOCH:  # stages and epochs don't go together, so that there is one stage
        last = Point(spans[-1].end, BATCH, "")
    changes["max_duration"] = _moved(last, spans, new)
    algorithms, scheduler, loader = copy.deepcopy(recipe.algorithms), dict(recipe.scheduler), copy.deepcopy(recipe.train_loader)
    for _, path, step in weight_steps(loader.get("mix") or {}):
        if step.get("until"):
            move(step, "until", f"train_loader.{path}.")
    stages: list[Any] = stages_of({"algorithms": algorithms})[1:]
    for path, stage in stages if len(stages) > 1 else ():
        if stage.get("until"):
            move(stage, "until", path)
    for name, arguments in entries(algorithms, "algorithms"):
        for key in ("start", "end"):
            if arguments.get(key):
                move(arguments, key, f"algorithms.{name}.")
        for index, phase in enumerate(arguments.get("phases") or ()):
            if phase.get("until"):
                move(phase, "until", f"algorithms.{name}.phases[{index}].")
    if "t_max" in scheduler:
        move(scheduler, "t_max", "scheduler.")
    new_length = {"max_duration": changes["max_duration"]}
    return changes, dataclasses.replace(recipe, algorithms=algorithms, scheduler=scheduler, train_loader=loader, **new_length)


def _moved(point: Point, old: list[Span], new: list[Span]) -> str:
    """Return a point in steps or samples at the same place of the same stage, at a whole step; any other as it is."""
    if point.unit not in ("ba", "sp") or point.value <= 0:
        return point.text
    for before, after in zip(old, new, strict=True):
        first, length = (before.start, before.steps) if point.unit == BATCH else (before.first_sample, before.samples)
        if point.value <= first + length:
            step = after.start + round((point.value - first) / length * after.steps)
            return f"{step}ba" if point.unit == BATCH else f"{after.first_sample + (step - after.start) * after.batch_size}sp"
    return point.text  # after the end, which it stays


def left_in_steps(recipe: Recipe) -> list[str]:
    """Return what is counted in steps or samples and doesn't move with the schedule, as `key=value`."""
    times: dict[str, Any] = {"scheduler.t_warmup": recipe.scheduler.get("t_warmup"), "save_interval": recipe.save_interval}
    times["eval_interval"] = recipe.eval_interval if recipe.eval_loader else None
    for name, arguments in entries(recipe.callbacks, "callbacks"):
        times[f"callbacks.{name}.interval"] = arguments.get("interval")
    return [f"{key}={value}" for key, value in times.items() if str(value).endswith(("ba", "sp"))]
