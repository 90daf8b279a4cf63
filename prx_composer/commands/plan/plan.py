"""What a run will take, before anything is rented: time, money, memory, disk and data, from one count of FLOPs.

`make_plan` computes a recipe's plan, and `fit` stretches a recipe's schedule until it takes a given time.
"""

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from prx_composer.commands.plan.conditions import (
    LINK_SHARE,
    Conditions,
    left_out,
    read_manifests,
    skip_lists,
    stored_bytes,
    text_in_words,
)
from prx_composer.commands.plan.graphs import Compiling, compiling
from prx_composer.commands.plan.step_cost import Memory, Segment, StepTime, StepTimes, memory
from prx_composer.commands.plan.timeline import Source, Span, Timeline, left_in_steps, sources, stretched, timeline
from prx_composer.common.errors import UserError, at_path
from prx_composer.models.counting import TEXT_ENCODER
from prx_composer.recipe.checks import check_parallelism
from prx_composer.recipe.config import Recipe
from prx_composer.runs.stored_text import choose_text
from prx_composer.schedule.moments import SECONDS, duration_string, parse_duration
from prx_composer.training.meta_model import MetaModel, staged_bytes, training_state
from prx_composer.training.trainer import sharding

RESERVE = 0.1  # of a GPU's memory: CUDA's context, communication buffers, fragments, what runs without gradients
VALID_TEXT = 0.4  # share of the padded tokens that are real ones in long captions, which is what is stored of them
LANDED_TOKEN_BYTES = 9  # id (int64) and mask (bool)


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Args:
        image_size: side in pixels. batch_size, microbatch_size: images per step over all GPUs, and per pass of one.
        start, end: first step, and first step after it. images: trained in it.
        image_tokens, text_tokens: per image, padding included.
        flops: training FLOPs per image by component, averaged over the stage where a window opens or closes inside of it.
        optimizer_flops: per image, for Muon's orthogonalisation; not part of the work that utilisation is counted against.
        utilisation: share of what a bf16 matrix product reaches, with all that the step takes.
        images_per_second: per GPU. step: where its time goes. hours: of the stage's steps. dollars: None without a price.
        epochs: passes over the data, if its size is known.
        read_bytes, device_bytes: per image, as it lies on disk, and as it goes to the GPU.
        memory: of one GPU. fits: with a tenth of the GPU to spare. fitting_microbatch: the largest divisor of the GPU's share of
            the batch that fits, 0 if none does.
    """

    image_size: int
    batch_size: int
    microbatch_size: int
    start: int
    end: int
    images: int
    image_tokens: int
    text_tokens: int
    flops: dict[str, float]
    optimizer_flops: float
    utilisation: float
    images_per_second: float
    step: StepTime
    hours: float
    dollars: float | None
    epochs: float | None
    read_bytes: float
    device_bytes: float
    memory: Memory
    fits: bool
    fitting_microbatch: int

    @property
    def total_flops(self) -> float:
        """Training FLOPs per image."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class CheckpointPlan:
    """Checkpoints of the full state.

    Args:
        bytes, seconds: of one.
        count: over the run.
        on_disk: bytes of those that lie on disk at once.
        staged: bytes of a node's memory, beside the GPUs', that the state is copied to and written from while training goes on.
    """

    bytes: int
    seconds: float
    count: int
    on_disk: int
    staged: int


@dataclass(frozen=True)
class Plan:
    """What a whole run takes.

    Args:
        run_name: of the recipe.
        conditions: what it was planned for.
        parameters: of the backbone, and trained_parameters: those with heads and text encoder that are trained along.
        text: how the text embeddings come about. parallelism: how the state lies on the GPUs.
        samples: images in the data, if known. samples_from: who says so.
        shares: of the data sets of a mixture, phase by phase, in words. sources: what the run takes of each of them.
        stages, checkpoints, compiling: see there.
        hours: of training, of writing the last checkpoint, and of compiling once. dollars: None without a price.
        time_budget: of the recipe, in hours, if it has one.
        assumptions: what a reader must know of how the numbers came about.
        unknown: what is not counted.
    """

    run_name: str
    conditions: Conditions
    parameters: int
    trained_parameters: int
    text: str
    parallelism: str
    samples: int | None
    samples_from: str
    shares: str
    sources: list[Source]
    stages: list[StagePlan]
    checkpoints: CheckpointPlan
    compiling: Compiling
    hours: float
    dollars: float | None
    time_budget: float | None
    assumptions: list[str]
    unknown: list[str]

    @property
    def training_hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def images(self) -> int:
        return sum(stage.images for stage in self.stages)

    @property
    def fits_budget(self) -> bool | None:
        """Whether it ends inside of the recipe's time budget; None if there is none."""
        return None if self.time_budget is None else self.hours <= self.time_budget


def make_plan(recipe: Recipe, conditions: Conditions) -> Plan:
    """Compute the plan of a recipe; what is assumed is said in recipes/speedrun_24h/PLAN.md.

    Raises:
        UserError: a recipe that cannot be planned, at its YAML path, or a throughput that lacks one of its image sizes.
    """
    check_parallelism(recipe.parallelism_config, conditions.num_gpus)
    recipe, chosen = choose_text(recipe, resumes=False)
    if recipe.train_loader.get("text_embedding"):
        conditions = dataclasses.replace(conditions, stored_text=True)
    planned = MetaModel(recipe, conditions.stored_text, conditions.leave_out)
    manifests = read_manifests(recipe)
    samples, source = conditions.samples, "--samples"
    skipped = left_out(recipe) if manifests is not None else []
    if manifests is not None:
        there = sum(count for manifest in manifests.values() for count in manifest.buckets.values())
        there -= sum(part.samples for part in skipped)
        if samples is None:
            samples, source = there, "train_loader.path"
        elif samples != there:
            source = f"--samples; train_loader.path has {there:,}"
    line = timeline(recipe, conditions.num_gpus, samples)
    shares, taken = sources(recipe, line, manifests)
    read_bytes, read_from = stored_bytes(manifests, max(span.image_size for span in line.spans))
    times = StepTimes(planned, recipe, conditions)
    cut = [(span, _segments(planned, line, span)) for span in line.spans]
    stages = [_stage(planned, recipe, conditions, line, *each, read_bytes, times) for each in cut]

    encoding = {stage.image_size: stage.flops.get(TEXT_ENCODER, 0.0) / stage.total_flops for stage in stages}
    text = [] if conditions.stored_text else text_in_words(chosen, encoding)
    training = sum(stage.hours for stage in stages)
    checkpoints = _checkpoints(planned, recipe, line, training, conditions)
    compiled = compiling(planned, recipe, cut, manifests, conditions.num_gpus)
    hours = training + (checkpoints.seconds + compiled.seconds) / 3600  # the last one's, for which training waits
    sharded = f"FSDP2, sharded over {sharding(recipe, conditions.num_gpus)}"
    return Plan(
        run_name=recipe.run_name,
        conditions=conditions,
        parameters=sum(p.numel() for p in planned.model.backbone.parameters()),
        trained_parameters=sum(p.numel() for p in planned.trained.values()),
        text=planned.text,
        parallelism="DDP, whole" if recipe.parallelism_config is None else sharded,
        samples=samples,
        samples_from=source,
        shares=shares,
        sources=taken,
        stages=stages,
        checkpoints=checkpoints,
        compiling=compiled,
        hours=hours,
        dollars=None if conditions.price is None else hours * conditions.num_gpus * conditions.price,
        time_budget=None if recipe.time_budget is None else seconds(recipe.time_budget, "time_budget") / 3600,
        assumptions=[*line.notes, read_from, *text, *skip_lists(recipe, skipped), *_assumptions(planned, recipe, conditions)],
        unknown=planned.uncounted.told,
    )


def _assumptions(planned: MetaModel, recipe: Recipe, c: Conditions) -> list[str]:
    """Return what a reader must know of the time of a step, in words."""
    assumed = ["left out of the hours: start, evaluation, drawing images"]
    assumed += [f"algorithms.{name}: {trick.schedule}" for name, trick in planned.tricks.items() if trick.schedule]
    if not planned.amp and c.utilisation is not None:
        assumed.append(f"precision: {recipe.precision} does not come near the peak, which is bf16's; --mfu has to allow for it")
    if recipe.model.get("compile"):
        assumed.append("activations: as eager PyTorch keeps them; a compiled model keeps fewer")
    for size, measured in sorted((c.throughput or {}).items()):
        gpus, batch = measured.gpus or c.num_gpus, f" with {measured.batch} images each" if measured.batch else ""
        on = f"{gpus} GPU{'s' if gpus > 1 else ''}{batch}" + ("" if measured.gpus else ": the file doesn't say otherwise")
        assumed.append(f"speed at {size} px: {measured.images_per_second:,.1f} images per second and GPU, measured on {on}")
    if c.num_gpus > 1:
        between = f", {c.between_nodes:g} between nodes" if c.num_gpus > c.per_node else ""
        assumed.append(
            f"links: {c.gpu.link:g} GB/s per GPU and direction in a node{between}, used to {LINK_SHARE:.0%}, no latency"
        )
        assumed.append(
            "sending runs beside the passes it belongs to, kinds one after the other; Muon's exchange as if nothing ran beside it"
        )
    deliver = "fast enough" if c.loader is None else f"{c.loader:,.0f} images per second and node"
    return [*assumed, f"loaders deliver: {deliver}"]


def seconds(text: str, path: str) -> float:
    """Parse "24h", "1h30m", "90m" or "86400s". Raise UserError, at `path`, for anything else or nothing."""
    with at_path(path):
        length = parse_duration(text)
        if length <= 0:
            raise ValueError(f"{text} is no time to train in.")
    return length


# ------------------------------------------------------------------------------------------------------- stages


def _stage(
    planned: MetaModel,
    recipe: Recipe,
    conditions: Conditions,
    line: Timeline,
    span: Span,
    segments: list[Segment],
    read_bytes: float,
    times: StepTimes,
) -> StagePlan:
    image_tokens = planned.image_tokens(span.image_size, f"{span.path}image_size")
    flops = defaultdict[str, float](float)
    for segment in segments:
        for name, count in segment.count.flops.items():
            flops[name] += segment.share * count
    own_batch = span.batch_size // conditions.num_gpus
    step = times.of(span, segments)
    hours = span.steps * step.total / 3600
    speed = own_batch / step.total
    needed = memory(planned, recipe, conditions.num_gpus, span, segments)
    room = (1 - RESERVE) * conditions.gpu.memory_gib * 2**30
    of_image = needed.activations // span.microbatch_size  # all that grows with the microbatch
    divisors = [size for size in range(1, own_batch + 1) if own_batch % size == 0]
    fitting = [size for size in divisors if dataclasses.replace(needed, activations=size * of_image).peak <= room]
    return StagePlan(
        image_size=span.image_size,
        batch_size=span.batch_size,
        microbatch_size=span.microbatch_size,
        start=span.start,
        end=span.end,
        images=span.samples,
        image_tokens=image_tokens,
        text_tokens=planned.model.text_encoder.max_tokens,
        flops=dict(flops),
        optimizer_flops=times.muon_flops / span.batch_size,
        utilisation=speed * sum(flops.values()) / (conditions.gpu.reachable_tflops * 1e12),
        images_per_second=speed,
        step=step,
        hours=hours,
        dollars=None if conditions.price is None else hours * conditions.num_gpus * conditions.price,
        epochs=None if line.epoch is None else span.samples / line.epoch,
        read_bytes=read_bytes,
        device_bytes=_device_bytes(planned, recipe, conditions, span.image_size),
        memory=needed,
        fits=needed.peak <= room,
        fitting_microbatch=max(fitting, default=0),
    )


def _segments(planned: MetaModel, line: Timeline, span: Span) -> list[Segment]:
    """Cut a stage where the window of a trick opens or closes; raise UserError for a size that patches don't divide."""
    planned.image_tokens(span.image_size, f"{span.path}image_size")
    windows = {trick.name: line.window(trick.window, f"algorithms.{trick.name}") for trick in planned.switched}
    edges = {span.start, span.end, *(edge for window in windows.values() for edge in window)}
    segments = []
    for first, last in pairwise(sorted(edge for edge in edges if span.start <= edge <= span.end)):
        active = {name for name, window in windows.items() if window[0] <= first < window[1]}
        frozen = sum(size for name, size in planned.frozen.items() if name not in windows or name in active)
        count = planned.count(span.image_size, active, span.microbatch_size)
        segments.append(Segment((last - first) / span.steps, count, frozen, frozenset(active)))
    return segments


def _device_bytes(planned: MetaModel, recipe: Recipe, conditions: Conditions, image_size: int) -> float:
    """Return the bytes of an image, with its caption and what is stored of it, as they go to the GPU."""
    encoder = planned.model.text_encoder
    text = encoder.max_tokens * LANDED_TOKEN_BYTES
    if conditions.stored_text:
        text += VALID_TEXT * encoder.max_tokens * 2 * encoder.hidden_size
    seen = 0.0
    if latent := recipe.train_loader.get("latent"):  # in 16 bits
        seen += 2 * planned.model.autoencoder.channels * (image_size / planned.model.autoencoder.downsampling) ** 2
    if not latent or recipe.train_loader.get("images"):
        seen += 3 * image_size**2
    return seen + text


def _checkpoints(planned: MetaModel, recipe: Recipe, line: Timeline, training_hours: float, c: Conditions) -> CheckpointPlan:
    """Count checkpoints as the recipe's `save_interval` has them.

    Raises:
        UserError: an interval that is none, or in epochs of data whose size isn't known.
    """
    with at_path("save_interval"):
        interval = recipe.save_every
    length = {SECONDS: training_hours * 3600, "ba": line.steps, "sp": line.samples, "dur": 1.0}
    if line.epoch is not None:
        length["ep"] = line.samples / line.epoch
    if interval.unit not in length:
        raise UserError(f"save_interval: {recipe.save_interval} of data that isn't here; say how many images with --samples.")
    count = max(1, math.ceil(length[interval.unit] / interval.value - 1e-9))  # the last is written at the end, whenever that is
    kept = count if recipe.save_num_checkpoints_to_keep < 0 else min(count, max(recipe.save_num_checkpoints_to_keep, 1) + 1)
    size = training_state(planned).checkpoint
    return CheckpointPlan(size, size / c.disk, count, kept * size, staged_bytes(planned, recipe, c.num_gpus, c.per_node))


# ------------------------------------------------------------------------------------------------------- fitting

_DIGITS = 3  # of a number of steps; rounded down
_ATTEMPTS = 200


@dataclass(frozen=True)
class Fit:
    """A changed schedule.

    Args:
        changes: key of the recipe → new value, to be given to train.py as `key=value`.
        unmoved: keys in steps that are left as they are, in words.
        plan: of the recipe with the changes.
    """

    changes: dict[str, str]
    unmoved: list[str]
    plan: Plan

    @property
    def arguments(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.changes.items()]


def fit(recipe: Recipe, conditions: Conditions, longest: float) -> Fit:
    """Scale the stages' numbers of steps so that training and checkpoints take at most `longest` seconds, and nearly that.

    What is tied to steps moves along; see `stretched`. Times in parts of the run ("0.5dur") move by themselves. A time budget of
    the recipe becomes the new time.

    Raises:
        UserError: a recipe that cannot be planned, or a time that is too short for one step of each stage.
    """
    before = make_plan(recipe, conditions)
    spans = timeline(recipe, conditions.num_gpus, before.samples).spans
    fixed = (before.compiling.seconds + before.checkpoints.seconds) / 3600  # takes as long whatever the schedule
    left = longest / 3600 - fixed
    factor = left / (before.hours - fixed)
    for _ in range(_ATTEMPTS):
        lengths = [_round_down(span.steps * factor) for span in spans]
        if min(lengths) < 1:
            break
        changes, moved = stretched(recipe, spans, lengths)
        if recipe.budget not in (None, longest):
            changes["time_budget"] = duration_string(longest)
            moved = dataclasses.replace(moved, time_budget=changes["time_budget"])
        plan = make_plan(moved, conditions)
        if plan.hours * 3600 <= longest:
            return Fit(changes, left_in_steps(recipe), plan)
        factor *= min(0.995, left / (plan.hours - fixed))
    now = f"the recipe as it is takes {before.hours:.2f} h"
    raise UserError(f"--fit: {duration_string(longest)} is too short for a step of every stage; {now}.")


def _round_down(steps: float) -> int:
    grain = 10 ** max(0, math.floor(math.log10(max(steps, 1))) - _DIGITS + 1)
    return math.floor(steps / grain + 1e-9) * grain
