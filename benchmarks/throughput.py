"""How many images per second and GPU a recipe trains, stage by stage, and where the time of a step goes.

python benchmarks/throughput.py yamls/24h.yaml --random-weights --stored-text --output throughput.json
python benchmarks/throughput.py yamls/24h_mini.yaml --microbatch 32 --microbatch 64       # a sweep

What is timed is the Trainer's own step, by `train.py` with the recipe's whole stack, each point in a process of its own. A stage
is trained from its first step on, with what is active in its middle, on one synthetic batch of its shapes; `--data` takes the
recipe's loader instead. On fewer GPUs than `--of` the batch shrinks with them, so that each does what it would do in the run.
`prx plan --throughput` reads what is written.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import stages
import torch
from common import as_json, circumstances, environment, milliseconds, parse, says_errors, summary, train_command, write
from stages import PARTS, batch_of_share, one_stage, with_random_weights, with_synthetic_batches, write_recipe

from prx_composer import registry
from prx_composer.commands.plan.conditions import GPUS, Conditions
from prx_composer.commands.plan.plan import make_plan
from prx_composer.commands.plan.timeline import Span, timeline
from prx_composer.common.errors import UserError
from prx_composer.models.counting import DENOISER
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe


@dataclass
class Options:
    """The command line."""

    recipe: Annotated[list[str], "YAML files and key=value, as for train.py"]
    _: KW_ONLY
    stage: Annotated[Sequence[int], "only this one, from 0; may be repeated"] = ()
    microbatch: Annotated[Sequence[int], "instead of the recipe's; repeated: a sweep"] = ()
    image_size: Annotated[int | None, "instead of the stage's"] = None
    gpus: Annotated[Sequence[int], "processes on this machine (1); repeated: a sweep"] = ()
    of: Annotated[int, "GPUs that the recipe's batch is divided over, such as 32"] = 1
    gpu: Annotated[str, "the name under which prx plan finds the result"] = "h200"
    steps: int = 20
    warmup: int = 5
    data: Annotated[bool, "the recipe's own loader"] = False
    samples: Annotated[int | None, "images in the data, for recipes in epochs"] = None
    stored_text: Annotated[bool, "text embeddings come with the (synthetic) batch"] = False
    valid_text: Annotated[float, "share of the caption's tokens that are no padding"] = 0.4
    random_weights: Annotated[bool, "teachers and text encoder by size, without download"] = False
    profile: Annotated[str | None, "Chrome trace of two steps, to this file (of the last point)"] = None
    output: Annotated[Path | None, "JSON; a Markdown table beside it"] = None

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu}: one of {', '.join(sorted(GPUS))}.")


@dataclass(frozen=True)
class Point:
    """One thing to measure: a stage, on a number of GPUs, in microbatches."""

    stage: int
    span: Span
    gpus: int
    microbatch: int
    batch: int  # per GPU


def points_of(recipe: Recipe, options: Options) -> list[Point]:
    line = timeline(recipe, options.of, options.samples)
    points = []
    for stage, span in enumerate(line.spans):
        if options.stage and stage not in options.stage:
            continue
        if options.image_size:
            span = dataclasses.replace(span, image_size=options.image_size)
        for gpus in options.gpus or [1]:
            for microbatch in options.microbatch or [span.microbatch_size]:
                points.append(Point(stage, span, gpus, microbatch, batch_of_share(span, microbatch, options.of)))
    return points


def build_recipe(recipe: Recipe, point: Point, folder: Path, options: Options) -> Path:
    """Write the point as a recipe."""
    line = timeline(recipe, options.of, options.samples)
    steps = options.warmup + options.steps + (2 if options.profile else 0)
    content = one_stage(recipe, line, point.span, point.batch * point.gpus, point.microbatch, steps)
    times: dict[str, Any] = {"path": str(folder / "times.json"), "warmup": options.warmup}
    if options.profile:
        times["trace"] = str(Path(options.profile).resolve())
    content |= {
        "run_name": "throughput",
        "run_folder": str(folder / "run"),
        "callbacks": {"step_times": times},
        "code_paths": [*recipe.code_paths, stages.__file__],
    }
    if options.random_weights:
        content = with_random_weights(content)
    if not options.data:
        content = with_synthetic_batches(content, folder, options.valid_text, options.stored_text, options.random_weights)
    return write_recipe(content, folder / "recipe.yaml")


def measure(point: Point, recipe: Recipe, options: Options) -> dict[str, Any]:
    """Train it in processes of its own; return what `StepTimes` wrote, or the error."""
    with tempfile.TemporaryDirectory(prefix="throughput-") as temporary:
        folder = Path(temporary)
        command = train_command([str(build_recipe(recipe, point, folder, options))], point.gpus)
        with (folder / "log").open("wb") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), check=False).returncode
        if code != 0:
            said = (folder / "log").read_text(errors="replace").strip().splitlines()
            return {"error": "out of memory" if any("OutOfMemory" in line for line in said) else "\n".join(said[-12:])}
        return json.loads((folder / "times.json").read_text())


def report(point: Point, times: dict[str, Any], recipe: Recipe, peak: float, options: Options) -> dict[str, Any]:
    """Return the numbers of a point; `peak` is what utilisation is a share of."""
    head = {
        "stage": point.stage,
        "image_size": point.span.image_size,
        "gpus": point.gpus,
        "batch_per_gpu": point.batch,
        "microbatch": point.microbatch,
    }
    if "error" in times:
        return head | times
    step = statistics.median(times["step_ms"])
    speed = 1000 * point.batch / step
    flops = flops_of(point, recipe, options)
    profiled = times["profiled"] or {}
    busy = profiled.get("device_busy_ms")
    return head | {
        "images_per_second_per_gpu": round(speed, 2),
        "step_ms": summary(times["step_ms"], 2),
        "parts_ms": {part: round(statistics.median(spent[part] for spent in times["parts_ms"]), 2) for part in PARTS},
        "device_idle_ms": None if busy is None else round(step - busy, 2),
        "host_waits_per_step": profiled.get("host_waits"),
        "gflop_per_image": {name: round(count / 1e9, 3) for name, count in flops.items()},
        "mfu": round(speed * sum(flops.values()) / peak, 4),
        "mfu_denoiser_only": round(speed * flops[DENOISER] / peak, 4),
        "peak_memory_gb": round(times["peak_memory_bytes"] / 1e9, 3),
        "first_step_s": round(times["first_step_ms"] / 1000, 2),
        "compile_s": round(max(times["first_step_ms"] - step, 0) / 1000, 2) if recipe.model.get("compile") else 0.0,
    }


def flops_of(point: Point, recipe: Recipe, options: Options) -> dict[str, float]:
    """Return FLOPs per image, by what they are for, as the plan counts them."""
    conditions = Conditions(
        GPUS[options.gpu], options.of, utilisation=0.4, samples=options.samples, stored_text=options.stored_text
    )
    stage = point.stage
    if options.image_size:
        alone = {name: given for name, given in recipe.algorithms.items() if name != stages.SHAPE}
        recipe, stage = dataclasses.replace(recipe, image_size=options.image_size, algorithms=alone), 0
    return make_plan(recipe, conditions).stages[stage].flops


def matrix_product_rate() -> float:
    """Return the FLOP/s of a large matrix product on this machine, in the precision that training uses here."""
    on_gpu = torch.cuda.is_available()
    size, dtype, device = (8192, torch.bfloat16, "cuda") if on_gpu else (1536, torch.float32, "cpu")
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize()

    return 2 * size**3 / (min(milliseconds(product) for _ in range(10)) / 1000)


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['recipe']}, {result['machine']}, torch {result['versions']['torch']}, {result['date']}",
        "",
        "| image | GPUs | microbatch | images/s/GPU | step ms | MFU | denoiser alone | memory GB | " + " | ".join(PARTS) + " |",
        "|---|---|---|---|---|---|---|---|" + "---|" * len(PARTS),
    ]
    for stage in result["stages"]:
        first = f"| {stage['image_size']} | {stage['gpus']} | {stage['microbatch']} | "
        if "error" in stage:
            lines.append(first + stage["error"].splitlines()[-1] + " |" * 5 + " |" * len(PARTS))
            continue
        parts = " | ".join(f"{stage['parts_ms'][part]:.1f}" for part in PARTS)
        lines.append(
            f"{first}{stage['images_per_second_per_gpu']:.1f} | {stage['step_ms']['median']:.1f} | {stage['mfu']:.1%} | "
            f"{stage['mfu_denoiser_only']:.1%} | {stage['peak_memory_gb']:.2f} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def clocks() -> str | None:
    """Return what the driver says of the GPU's clocks and power."""
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.max.sm,power.limit,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@says_errors
def main(arguments: list[str]) -> int:
    """Measure every point and write them; return 0 if all have trained."""
    options = parse(Options, arguments, __doc__, "throughput.py")
    recipe = config.load(options.recipe)
    registry.import_code(recipe.code_paths)
    rate = matrix_product_rate()
    measured = []
    for point in points_of(recipe, options):
        measured.append(report(point, measure(point, recipe, options), recipe, rate, options))
        sys.stderr.write(json.dumps(measured[-1]) + "\n")
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {
        "what": "the Trainer's step, images per second and GPU",
        "recipe": options.recipe[0],
        **circumstances(),
        "gpu": options.gpu if on_gpu else "cpu",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "clocks": clocks(),
        "matrix_product_tflops": round(rate / 1e12, 3),
        "stages": measured,
    }
    if options.output:
        write(options.output, as_json(result))
        write(options.output.with_suffix(".md"), markdown(result))
    sys.stdout.write(markdown(result))
    return 1 if any("error" in point for point in measured) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
