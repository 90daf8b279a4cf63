"""`prx plan`: what a run will take, before anything is rented."""

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option, echo

from prx_composer.commands import RecipeArgument, write_json
from prx_composer.common.errors import UserError
from prx_composer.schedule.moments import duration_string

if TYPE_CHECKING:  # they import torch and Composer
    from prx_composer.commands.plan.plan import Fit, Plan, StagePlan


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `prx plan`."""

    recipe: RecipeArgument
    gpu: Annotated[
        str, Option(help="a100-80gb, h100, h200, b200, mi300x, l40s or rtx4090. [default: the measurement's, or h200]")
    ] = ""
    gpus: Annotated[
        int | None, Option(min=1, help="Number of GPUs, all nodes together. [default: the recipe's shard_degree, or 1]")
    ] = None
    gpus_per_node: Annotated[int, Option(min=1, help="GPUs of one node.")] = 8
    price: Annotated[float | None, Option(min=0, help="Dollars per GPU-hour.")] = None
    mfu: Annotated[
        float | None,
        Option(
            min=0.001,
            max=1,
            help="Share of what a bf16 matrix product reaches (not of the datasheet), waiting left out. [default: predicted by "
            "counting the kernels of a step]",
        ),
    ] = None
    throughput: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Measured speeds instead, as benchmarks/throughput.py writes them: JSON "
            '{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0}, …]}, one stage per image size.',
        ),
    ] = None
    samples: Annotated[
        str | None, Option(help="Images in the data, such as 8.7M. [default: as many as lie in train_loader.path]")
    ] = None
    disk: Annotated[str, Option(help="How fast a checkpoint is written, all ranks together.")] = "1GB/s"
    network: Annotated[
        float | None,
        Option(min=0.001, help="GB/s per GPU between nodes, one way; 400 Gbit/s are 50. [default: usual for the GPU]"),
    ] = None
    host_memory: Annotated[
        float | None, Option(min=0.001, help="GiB of memory of a node beside its GPUs', to be warned where the run needs more.")
    ] = None
    loader: Annotated[
        float | None, Option(min=0.001, help="Images per second that one node's loaders deliver. [default: never waited for]")
    ] = None
    stored_text: Annotated[
        bool, Option("--stored-text", help="Plan as if text embeddings came with the data: no text encoder runs.")
    ] = False
    leave_out: Annotated[
        list[str],
        Option(
            metavar="NAME",
            help="Do not count this network, so that one of unknown size doesn't stop the plan: text_encoder, autoencoder, or an "
            "algorithm with a teacher, such as repa. Repeatable.",
        ),
    ] = field(default_factory=list)
    fit: Annotated[str | None, Option(metavar="TIME", help="Propose a schedule that takes this long, such as 12h.")] = None
    json_file: Annotated[
        str | None,
        Option("--json", metavar="[FILE]", help="Write the plan as JSON to FILE; without one, print it instead of the table."),
    ] = None


def plan_recipe(options: PlanOptions) -> None:
    """What a run will take, before anything is rented: hours, dollars, memory, disk and data of every stage.

    Nothing is downloaded or trained. How to read it, and what is assumed: recipes/speedrun_24h/PLAN.md
    """
    from prx_composer import registry
    from prx_composer.commands.plan.conditions import Conditions, find_gpu, least_gpus, parse_count, parse_rate, read_throughput
    from prx_composer.commands.plan.plan import fit, make_plan, seconds
    from prx_composer.recipe import config

    if options.mfu is not None and options.throughput is not None:
        raise UserError("--mfu and --throughput both say how fast training is; give one of them.")
    measured_on, speeds = (None, None) if options.throughput is None else read_throughput(options.throughput)
    gpu = find_gpu(options.gpu) if options.gpu else measured_on or find_gpu("h200")
    if measured_on is not None and measured_on != gpu:
        raise UserError(
            f"--gpu: {options.throughput} was measured on {measured_on.name}, which says little of {gpu.name}; measure there."
        )
    recipe = config.load(options.recipe)
    registry.import_code(recipe.code_paths)
    config.check(recipe)
    conditions = Conditions(
        gpu,
        num_gpus=options.gpus or least_gpus(recipe),
        gpus_per_node=options.gpus_per_node,
        price=options.price,
        utilisation=options.mfu,
        throughput=speeds,
        samples=None if options.samples is None else parse_count(options.samples, "--samples"),
        disk=parse_rate(options.disk, "--disk"),
        stored_text=options.stored_text,
        network=options.network,
        host_memory=options.host_memory,
        loader=options.loader,
        leave_out=tuple(options.leave_out),
    )
    fitted = None if options.fit is None else fit(recipe, conditions, seconds(options.fit, "--fit"))
    plan = fitted.plan if fitted else make_plan(recipe, conditions)
    if options.json_file is not None:
        write_json(_as_json(plan, fitted), options.json_file)
    if options.json_file != "-":
        echo(as_text(plan) + (_fit_text(fitted) if fitted else ""))


# ---------------------------------------------------------------------------------------------------------- JSON


def _as_json(plan: "Plan", fitted: "Fit | None") -> dict[str, Any]:
    """Return a plan as JSON has it.

    Quantities are in the units of `Plan` and its parts, memory in bytes. The changes of a fitted schedule are in `fit`.
    """
    values: dict[str, Any] = dataclasses.asdict(plan)
    values["conditions"]["gpu"]["reachable_tflops"] = plan.conditions.gpu.reachable_tflops
    for stage, given in zip(plan.stages, values["stages"], strict=True):
        given |= {"total_flops": stage.total_flops, "memory": given["memory"] | {"peak": stage.memory.peak}}
        step = stage.step
        given |= {"images_per_second_per_gpu": stage.images_per_second, "parts": given["step"].pop("parts")}
        given["step"] |= {"total": step.total, "waiting": step.waiting, "efficiency": step.efficiency}
    values["compiling"]["count"] = plan.compiling.count
    values |= {"training_hours": plan.training_hours, "images": plan.images, "fits_budget": plan.fits_budget}
    if fitted:
        values["fit"] = fitted.changes
    return values


# ---------------------------------------------------------------------------------------------------------- text

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
_STEP = {
    "compute": "computing",
    "uncovered": "sending that outlasts it",
    "optimizer": "Muon, a GPU's share",
    "exchange": "Muon's exchange",
    "waiting": "waiting for data",
}
_NAMES = {"repa": "REPA", "irepa": "iREPA", "lpips": "LPIPS", "perceptual_dino": "perceptual DINO"}


def as_text(plan: "Plan") -> str:
    """Return the whole plan for a terminal."""
    assumed = ["assumed:", *(f"  - {text}" for text in plan.assumptions)]
    unknown = ["not counted, or guessed:", *(f"  - {text}" for text in plan.unknown)] if plan.unknown else []
    return "\n".join([*_head(plan), "", *_table(plan), "", *_totals(plan), "", *assumed, *unknown])


def _fit_text(fitted: "Fit") -> str:
    """Return what to give to train.py for the schedule of this plan, and what it leaves alone."""
    arguments = "".join(f" \\\n    {shlex.quote(argument)}" for argument in fitted.arguments)
    stays = f"\nstays as it is, though counted in steps: {', '.join(fitted.unmoved)}" if fitted.unmoved else ""
    return f"\n\nTo train this schedule, give train.py after the recipe:{arguments}{stays}"


def _head(plan: "Plan") -> list[str]:
    c = plan.conditions
    nodes = -(-c.num_gpus // c.gpus_per_node)
    on = f", {nodes} nodes of {c.gpus_per_node}" if nodes > 1 else ""
    price = "" if c.price is None else f" at ${c.price:,.2f} per GPU-hour"
    extra = plan.trained_parameters - plan.parameters
    beside = f", {extra / 1e6:,.1f}M beside it" if extra else ""
    data = f"{_count(plan.samples)} images ({plan.samples_from})" if plan.samples else "size unknown; give --samples for epochs"
    lines = {
        "peak": c.gpu.describe(),
        "speed": _speed(plan),
        "trained": f"{plan.parameters / 1e6:,.1f}M parameters in the backbone{beside}",
        "text": plan.text,
        "data": data,
    }
    if plan.shares:
        seen = [
            f"{source.name} {_count(source.images)} images" + (f", each {source.epochs:.2f} times" if source.epochs else "")
            for source in plan.sources
            if source.images is not None
        ]
        lines |= {"mixture": plan.shares} | ({"seen": "; ".join(seen)} if seen else {})
    return [f"{plan.run_name} on {c.num_gpus} × {c.gpu.name}{on}{price}", "", *(f"{key:<9}{text}" for key, text in lines.items())]


def _speed(plan: "Plan") -> str:
    c = plan.conditions
    if c.throughput is not None:
        shares = ", ".join(f"{stage.utilisation:.0%}" for stage in plan.stages)
        return f"measured images per second; {shares} of the reachable peak"
    if c.predicted:
        shares = ", ".join(f"{stage.utilisation:.0%}" for stage in plan.stages)
        return f"predicted by counting kernels, ±20% (no GPU has measured it yet); {shares} of the reachable peak"
    utilisation, share = c.utilisation or 0.0, c.gpu.reachable_tflops / c.gpu.datasheet_tflops
    of = f"{utilisation:.0%} of the reachable peak ({utilisation * share:.0%} of the datasheet's)"
    return f"assumed utilisation {of} while nothing is waited for"


def _table(plan: "Plan") -> list[str]:
    from prx_composer.commands.plan.plan import RESERVE

    stages, c = plan.stages, plan.conditions
    rows: list[tuple[str, list[str], str]] = [("", [f"stage {index + 1}" for index in range(len(stages))], "total")]

    def row(label: str, cell: "Callable[[StagePlan], str] | None" = None, total: str = "") -> None:
        rows.append((label, [cell(stage) for stage in stages] if cell else [], total))

    epochs = sum(stage.epochs or 0.0 for stage in stages)
    row("image size, px", lambda s: f"{s.image_size}")
    row("steps", lambda s: f"{s.end - s.start:,}", f"{stages[-1].end:,}")
    row("batch / microbatch of a GPU", lambda s: f"{s.batch_size:,} / {s.microbatch_size}")
    row("images", lambda s: _count(s.images), _count(plan.images))
    row("epochs", lambda s: "?" if s.epochs is None else f"{s.epochs:.2f}", f"{epochs:.2f}" if plan.samples else "?")
    row("tokens per image (image + text)", lambda s: f"{s.image_tokens:,} + {s.text_tokens}")
    row("training GFLOP per image")
    for name in dict.fromkeys(name for stage in stages for name in stage.flops):
        row(f"  {_NAMES.get(name, name)}", lambda s, name=name: _giga(s.flops[name]) if name in s.flops else "–")
    row("  sum", lambda s: _giga(s.total_flops))
    if any(stage.optimizer_flops for stage in stages):
        row("  Muon's, not in the sum", lambda s: _giga(s.optimizer_flops))
    row("images per second and GPU", lambda s: f"{s.images_per_second:,.1f}")
    row("seconds per step", lambda s: f"{s.step.total:#.3g}")
    for name, label in _STEP.items():
        if any(getattr(stage.step, name) for stage in stages):
            row(f"  {label}", lambda s, name=name: f"{getattr(s.step, name):#.3g}")
    parts = [_by_part(stage) for stage in stages]
    for name in dict.fromkeys(name for own in parts for name in own):
        if any(own.get(name, 0.0) >= 0.05 for own in parts):
            rows.append((f"    {_NAMES.get(name, name)}, ms", [f"{own[name]:.1f}" if name in own else "–" for own in parts], ""))
    if any(stage.step.sent for stage in stages):
        row("  (sending beside computing)", lambda s: f"{s.step.beside:#.3g}")
        row("GB sent per step and GPU", lambda s: f"{sum(s.step.sent.values()) / 1e9:#.3g}")
    row("scaling efficiency", lambda s: f"{s.step.efficiency:.1%}")
    row("hours", lambda s: _hours(s.hours), _hours(plan.training_hours))
    if c.price is not None:
        row("dollars", lambda s: f"{s.dollars:,.0f}", f"{sum(stage.dollars or 0.0 for stage in stages):,.0f}")
    row(f"data loading, for one GPU / for the {c.per_node} of a node" if c.per_node > 1 else "data loading")
    row("  images per second", lambda s: _pair(s.images_per_second, c.per_node))
    row("  MB/s read from disk", lambda s: _pair(s.images_per_second * s.read_bytes / 1e6, c.per_node))
    row("  MB/s to the GPU", lambda s: _pair(s.images_per_second * s.device_bytes / 1e6, c.per_node))
    row(f"memory of one GPU, GiB ({plan.parallelism})")
    for name, label in _MEMORY.items():
        row(f"  {label}", lambda s, name=name: f"{getattr(s.memory, name) / GIB:.2f}")
    row(f"  together, of {c.gpu.memory_gib:.1f}", lambda s: f"{s.memory.peak / GIB:.2f}")
    row(f"  fits with {RESERVE:.0%} to spare", lambda s: "yes" if s.fits else "NO")
    row("host memory of a node for checkpoints, GiB", lambda _: f"{plan.checkpoints.staged / GIB:.2f}")
    return _aligned(rows)


def _by_part(stage: "StagePlan") -> dict[str, float]:
    """Return milliseconds of a predicted step, its parts' kinds of kernels together."""
    found = dict[str, float]()
    for name, part in stage.step.parts.items():
        whole = name.partition(":")[0]
        found[whole] = found.get(whole, 0.0) + 1000 * part.seconds
    return found


def _aligned(rows: list[tuple[str, list[str], str]]) -> list[str]:
    """Return lines of rows, each a label, cells and what stands at the end; a label without cells widens no column."""
    label_width = max(len(label) for label, cells, _ in rows if cells)
    widths = [max(_CELL, *map(len, column)) + 2 for column in zip(*(cells for _, cells, _ in rows if cells), strict=True)]
    lines = []
    for label, cells, total in rows:
        columns = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
        lines.append((f"{label:<{label_width}}{columns}" + (f"{total:>{_CELL}}" if total else "")).rstrip())
    return lines


def _totals(plan: "Plan") -> list[str]:
    from prx_composer.commands.plan.roofline import largest_losses

    c, ck = plan.conditions, plan.checkpoints
    dollars = "" if plan.dollars is None else f", ${plan.dollars:,.0f}"
    lines = [
        f"checkpoints: {ck.bytes / 1e9:,.2f} GB each, {ck.seconds:.1f} s at {c.disk / 1e9:g} GB/s; "
        f"{ck.count:,} of them, written beside training, and {ck.on_disk / 1e9:,.1f} GB of disk are needed at once",
        *_compiling(plan),
        f"total: {_hours(plan.hours)} hours with {'all this' if plan.compiling.count else 'the last checkpoint'}, "
        f"{plan.hours * c.num_gpus:,.0f} GPU-hours{dollars}",
    ]
    if plan.time_budget is not None:
        spare = duration_string(abs(plan.time_budget - plan.hours) * 3600)
        fits = f"it fits with {spare} to spare"
        if not plan.fits_budget:
            fits = f"it does NOT fit: {spare} too long; --fit proposes a schedule"
        lines.append(f"time_budget: {plan.time_budget:g} h, which {fits}")
    if c.host_memory is not None and ck.staged > c.host_memory * GIB:
        lines.append(
            f"checkpoints do NOT fit into {c.host_memory:g} GiB of a node: they are written from a copy of the state, of "
            f"{ck.staged / GIB:.2f} GiB; shard it over more nodes (parallelism_config.fsdp.shard_degree)"
        )
    for index, stage in enumerate(plan.stages):
        if losses := largest_losses(stage.step.parts):
            told = "; ".join(f"{name}, {1000 * seconds:.1f} ms" for name, seconds in losses)
            lines.append(f"stage {index + 1} loses most time to {told}")
        if not stage.fits:
            size = stage.fitting_microbatch
            hint = f"device_train_microbatch_size: {size} would" if size else "no microbatch would; shard it (parallelism_config)"
            lines.append(f"stage {index + 1} does NOT fit into the GPU's memory: {hint}")
    return lines


def _compiling(plan: "Plan") -> list[str]:
    compiled = plan.compiling
    if not compiled.count:
        return []
    told = ", ".join(f"{count} of {_NAMES.get(name, name)}" for name, count in compiled.graphs.items())
    first, again = (duration_string(seconds) for seconds in (compiled.seconds, compiled.seconds_again))
    return [
        f"compiling: {compiled.count} graphs ({told}); about {first} on the first start, assumed from others' measurements, and "
        f"{again} where the run goes on, whose folder keeps them"
    ]


def _count(number: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.1f}{suffix}"
    return f"{number:,.0f}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.1f}" if flops >= 1e10 else f"{flops / 1e9:.4f}"


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.3g}"


def _pair(of_gpu: float, gpus: int) -> str:
    return f"{of_gpu:,.0f} / {of_gpu * gpus:,.0f}" if gpus > 1 else f"{of_gpu:,.0f}"
