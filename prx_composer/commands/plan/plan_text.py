"""A plan as a table to read, and as JSON."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prx_composer.commands.plan.conditions import GPU
from prx_composer.commands.plan.fit import Fit
from prx_composer.commands.plan.memory import RESERVE
from prx_composer.commands.plan.plan import Plan, StagePlan
from prx_composer.commands.plan.step_time import StepTime
from prx_composer.common.errors import UserError
from prx_composer.schedule.moments import duration_string

GIB = 2**30
_CELL = 10  # characters, at least
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "ema": "EMA",
    "frozen": "text encoder, teachers",
    "gathered": "gathered for communication",
    "casts": "16-bit copies of weights",
    "batch": "images of a step",
    "activations": "activations of a microbatch",
}
_NAMES = {"repa": "REPA", "irepa": "iREPA", "lpips": "LPIPS", "perceptual_dino": "perceptual DINO"}


def as_text(plan: Plan) -> str:
    """The whole plan, for a terminal."""
    return "\n".join([*_head(plan), "", *_table(plan), "", *_totals(plan), "", *_foot(plan)])


def as_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan as what JSON can hold; quantities in the units of `Plan` and its parts, memory in bytes."""
    values = dataclasses.asdict(plan)
    values["conditions"]["gpu"]["reachable_tflops"] = plan.conditions.gpu.reachable_tflops
    for stage, given in zip(plan.stages, values["stages"], strict=True):
        given |= {"total_flops": stage.total_flops, "memory": given["memory"] | {"peak": stage.memory.peak}}
        step = stage.step
        given["step"] |= {"total": step.total, "waiting": step.waiting, "efficiency": step.efficiency}
    return values | {"training_hours": plan.training_hours, "images": plan.images, "fits_budget": plan.fits_budget}


def write_json(plan: Plan, fitted: Fit | None, file: str) -> None:
    """Writes `as_dict`, with the changes of a fitted schedule as `fit`, to a file or, for "-", to the terminal."""
    values = as_dict(plan) | ({"fit": fitted.changes} if fitted else {})
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text)
    except OSError as error:
        raise UserError(f"--json: {file} cannot be written: {error}") from error


def fit_text(fitted: Fit) -> str:
    """What to give to train.py for the schedule of this plan, and what it leaves alone."""
    arguments = "".join(f" \\\n    {shlex.quote(argument)}" for argument in fitted.arguments)
    stays = f"\nstays as it is, though counted in steps: {', '.join(fitted.unmoved)}" if fitted.unmoved else ""
    return f"\n\nTo train this schedule, give train.py after the recipe:{arguments}{stays}"


def _head(plan: Plan) -> list[str]:
    c = plan.conditions
    nodes = -(-c.num_gpus // c.gpus_per_node)
    on = f", {nodes} nodes of {c.gpus_per_node}" if nodes > 1 else ""
    price = "" if c.price is None else f" at ${c.price:,.2f} per GPU-hour"
    lines = [f"{plan.run_name} on {c.num_gpus} × {c.gpu.name}{on}{price}", ""]
    lines.append(_line("peak", c.gpu.describe()))
    lines.append(_line("speed", _speed(plan, c.gpu)))
    extra = plan.trained_parameters - plan.parameters
    beside = f", {extra / 1e6:,.1f}M beside it" if extra else ""
    lines.append(_line("trained", f"{plan.parameters / 1e6:,.1f}M parameters in the backbone{beside}"))
    lines.append(_line("text", plan.text))
    data = (
        "size unknown; give --samples for epochs"
        if plan.samples is None
        else f"{_count(plan.samples)} images ({plan.samples_from})"
    )
    lines.append(_line("data", data))
    return lines


def _line(label: str, text: str) -> str:
    return f"{label:<9}{text}"


def _speed(plan: Plan, gpu: GPU) -> str:
    share = gpu.reachable_tflops / gpu.datasheet_tflops
    if plan.conditions.throughput is not None:
        shares = ", ".join(f"{stage.utilisation:.0%}" for stage in plan.stages)
        return f"measured images per second; {shares} of the reachable peak"
    utilisation = plan.conditions.utilisation or 0.0
    of = f"{utilisation:.0%} of the reachable peak ({utilisation * share:.0%} of the datasheet's)"
    return f"assumed utilisation {of} while nothing is waited for"


def _table(plan: Plan) -> list[str]:
    stages = plan.stages
    rows: list[tuple[str, list[str], str]] = []

    def row(label: str, cell: Callable[[StagePlan], str] | None = None, total: str = "") -> None:
        rows.append((label, [cell(stage) for stage in stages] if cell else [], total))

    rows.append(("", [f"stage {index + 1}" for index in range(len(stages))], "total"))
    row("image size, px", lambda s: f"{s.image_size}")
    row("steps", lambda s: f"{s.end - s.start:,}", f"{stages[-1].end:,}")
    row("batch / microbatch of a GPU", lambda s: f"{s.batch_size:,} / {s.microbatch_size}")
    row("images", lambda s: _count(s.images), _count(plan.images))
    row("epochs", lambda s: _optional(s.epochs, "{:.2f}"), _sum([s.epochs for s in stages], "{:.2f}"))
    row("tokens per image (image + text)", lambda s: f"{s.image_tokens:,} + {s.text_tokens}")
    row("training GFLOP per image")
    for name in dict.fromkeys(name for stage in stages for name in stage.flops):
        row(f"  {_NAMES.get(name, name)}", lambda s, name=name: _giga(s.flops.get(name)))
    row("  sum", lambda s: _giga(s.total_flops))
    if any(stage.optimizer_flops for stage in stages):
        row("  Muon's, not in the sum", lambda s: _giga(s.optimizer_flops))
    row("images per second and GPU", lambda s: f"{s.images_per_second:,.1f}")
    row("seconds per step", lambda s: f"{s.step.total:#.3g}")
    _step_rows(row, plan)
    row("hours", lambda s: _hours(s.hours), _hours(plan.training_hours))
    if plan.conditions.price is not None:
        row("dollars", lambda s: _optional(s.dollars, "{:,.0f}"), _sum([s.dollars for s in stages], "{:,.0f}"))
    per_node = min(plan.conditions.gpus_per_node, plan.conditions.num_gpus)
    row(f"data loading, for one GPU / for the {per_node} of a node" if per_node > 1 else "data loading")
    row("  images per second", lambda s: _pair(s.images_per_second, per_node))
    row("  MB/s read from disk", lambda s: _pair(s.images_per_second * s.read_bytes / 1e6, per_node))
    row("  MB/s to the GPU", lambda s: _pair(s.images_per_second * s.device_bytes / 1e6, per_node))
    row(f"memory of one GPU, GiB ({plan.parallelism})")
    for name, label in _MEMORY.items():
        row(f"  {label}", lambda s, name=name: f"{getattr(s.memory, name) / GIB:.2f}")
    row(f"  together, of {plan.conditions.gpu.memory_gib:.1f}", lambda s: f"{s.memory.peak / GIB:.2f}")
    row(f"  fits with {RESERVE:.0%} to spare", lambda s: "yes" if s.fits else "NO")

    label_width = max(len(label) for label, cells, _ in rows if cells)
    widths = [max(_CELL, *(len(cells[i]) for _, cells, _ in rows if cells)) for i in range(len(stages))]
    lines = []
    for label, cells, total in rows:
        columns = [f"{cell:>{width + 2}}" for cell, width in zip(cells, widths, strict=False)]
        lines.append((f"{label:<{label_width}}" + "".join(columns) + (f"{total:>{_CELL}}" if total else "")).rstrip())
    return lines


def _step_rows(row: Callable[..., None], plan: Plan) -> None:
    """Where a step's time goes; what takes none in any stage is left out."""
    parts: dict[str, Callable[[StepTime], float]] = {
        "  computing": lambda step: step.compute,
        "  sending that outlasts it": lambda step: step.uncovered,
        "  Muon, a GPU's share": lambda step: step.optimizer,
        "  Muon's exchange": lambda step: step.exchange,
        "  waiting for data": lambda step: step.waiting,
    }
    for label, part in parts.items():
        if any(part(stage.step) for stage in plan.stages):
            row(label, lambda s, part=part: f"{part(s.step):#.3g}")
    if any(stage.step.sent for stage in plan.stages):
        row("  (sending beside computing)", lambda s: f"{s.step.beside:#.3g}")
        row("GB sent per step and GPU", lambda s: f"{sum(s.step.sent.values()) / 1e9:#.3g}")
    row("scaling efficiency", lambda s: f"{s.step.efficiency:.1%}")


def _totals(plan: Plan) -> list[str]:
    c, ck = plan.conditions, plan.checkpoints
    writing = ck.count * ck.seconds
    lines = [
        f"checkpoints: {ck.bytes / 1e9:,.2f} GB each, {ck.seconds:.1f} s at {c.disk / 1e9:g} GB/s; "
        f"{ck.count:,} of them take {duration_string(writing)}, and {ck.on_disk / 1e9:,.1f} GB of disk are needed at once"
    ]
    dollars = "" if plan.dollars is None else f", ${plan.dollars:,.0f}"
    gpu_hours = plan.hours * c.num_gpus
    lines.append(f"total: {_hours(plan.hours)} hours with checkpoints, {gpu_hours:,.0f} GPU-hours{dollars}")
    if plan.time_budget is not None:
        spare = duration_string(abs(plan.time_budget - plan.hours) * 3600)
        if plan.fits_budget:
            lines.append(f"time_budget: {plan.time_budget:g} h, which it fits with {spare} to spare")
        else:
            lines.append(
                f"time_budget: {plan.time_budget:g} h, which it does NOT fit: {spare} too long; --fit proposes a schedule"
            )
    for index, stage in enumerate(plan.stages):
        if not stage.fits:
            size = stage.fitting_microbatch
            hint = f"device_train_microbatch_size: {size} would" if size else "no microbatch would; shard it (parallelism_config)"
            lines.append(f"stage {index + 1} does NOT fit into the GPU's memory: {hint}")
    return lines


def _foot(plan: Plan) -> list[str]:
    lines = ["assumed:"]
    lines += [f"  - {text}" for text in plan.assumptions]
    if plan.unknown:
        lines.append("not counted, or guessed:")
        lines += [f"  - {text}" for text in plan.unknown]
    return lines


# ---------------------------------------------------------------------------------------------------------- cells


def _count(number: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.1f}{suffix}"
    return f"{number:,.0f}"


def _giga(flops: float | None) -> str:
    if flops is None:
        return "–"
    return f"{flops / 1e9:,.1f}" if flops >= 1e10 else f"{flops / 1e9:.4f}"


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.3g}"


def _optional(value: float | None, form: str) -> str:
    return "?" if value is None else form.format(value)


def _sum(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known)) if len(known) == len(values) else "?"


def _pair(of_gpu: float, gpus: int) -> str:
    return f"{of_gpu:,.0f} / {of_gpu * gpus:,.0f}" if gpus > 1 else f"{of_gpu:,.0f}"
