"""How many images per second and GPU a recipe trains, stage by stage, and where the time of a step goes.

python benchmarks/throughput.py yamls/24h.yaml --random-weights --stored-text --output benchmarks/results/throughput-h200.json
python benchmarks/throughput.py yamls/24h_mini.yaml --microbatch 32 --microbatch 64       # a sweep

What is timed is the Trainer's own step, by `train.py` with the recipe's whole stack, each point in a process of its own. A stage
is trained from its first step on, with what is active in its middle, on one synthetic batch of its shapes; `--data` takes the
recipe's loader instead. On fewer GPUs than `--of` the batch shrinks with them, so that each does what it would do in the run.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from interleaved import milliseconds, summary
from one_stage import batch_of_share, one_stage, with_random_weights, with_synthetic_batches, write_recipe
from record import circumstances
from step_times import PARTS

from prx_composer.commands.plan.conditions import Conditions
from prx_composer.commands.plan.hardware import GPUS
from prx_composer.commands.plan.plan import DENOISER, make_plan
from prx_composer.commands.plan.timeline import Span, timeline
from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing to measure: a stage, on a number of GPUs, in microbatches."""

    stage: int
    span: Span
    gpus: int
    microbatch: int
    batch: int  # per GPU


def points_of(recipe: Recipe, arguments: argparse.Namespace) -> list[Point]:
    line = timeline(recipe, arguments.of, arguments.samples)
    points = []
    for stage, span in enumerate(line.spans):
        if arguments.stage and stage not in arguments.stage:
            continue
        if arguments.image_size:
            span = dataclasses.replace(span, image_size=arguments.image_size)
        for gpus in arguments.gpus:
            for microbatch in arguments.microbatch or [span.microbatch_size]:
                points.append(Point(stage, span, gpus, microbatch, batch_of_share(span, microbatch, arguments.of)))
    return points


def build_recipe(recipe: Recipe, point: Point, folder: Path, arguments: argparse.Namespace) -> Path:
    """The point as a recipe in a file."""
    line = timeline(recipe, arguments.of, arguments.samples)
    steps = arguments.warmup + arguments.steps + (2 if arguments.profile else 0)
    content = one_stage(recipe, line, point.span, point.batch * point.gpus, point.microbatch, steps)
    times: dict[str, Any] = {"path": str(folder / "times.json"), "warmup": arguments.warmup}
    if arguments.profile:
        times["trace"] = str(Path(arguments.profile).resolve())
    content |= {
        "run_name": "throughput",
        "run_folder": str(folder / "run"),
        "callbacks": {"step_times": times},
        "code_paths": [*recipe.code_paths, str(HERE / "step_times.py")],
    }
    if arguments.random_weights:
        content = with_random_weights(content)
    if not arguments.data:
        content = with_synthetic_batches(content, folder, arguments.valid_text, arguments.stored_text, arguments.random_weights)
    return write_recipe(content, folder / "recipe.yaml")


def measure(point: Point, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="throughput-") as temporary:
        folder = Path(temporary)
        path = build_recipe(recipe, point, folder, arguments)
        command = [sys.executable, "-m", "composer.cli", "-n", str(point.gpus), str(HERE.parent / "train.py"), str(path)]
        with (folder / "log").open("wb") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code != 0:
            said = (folder / "log").read_text(errors="replace").strip().splitlines()
            return {"error": "out of memory" if any("OutOfMemory" in line for line in said) else "\n".join(said[-12:])}
        return json.loads((folder / "times.json").read_text())


def report(point: Point, times: dict[str, Any], recipe: Recipe, peak: float, arguments: argparse.Namespace) -> dict[str, Any]:
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
    parts = {part: round(statistics.median(spent[part] for spent in times["parts_ms"]), 2) for part in PARTS}
    flops = flops_of(point, recipe, arguments)
    profiled = times["profiled"] or {}
    busy = profiled.get("device_busy_ms")
    return head | {
        "images_per_second_per_gpu": round(speed, 2),
        "step_ms": summary(times["step_ms"], 2),
        "parts_ms": parts,
        "device_idle_ms": None if busy is None else round(step - busy, 2),
        "host_waits_per_step": profiled.get("host_waits"),
        "gflop_per_image": {name: round(count / 1e9, 3) for name, count in flops.items()},
        "mfu": round(speed * sum(flops.values()) / peak, 4),
        "mfu_denoiser_only": round(speed * flops[DENOISER] / peak, 4),
        "peak_memory_gb": round(times["peak_memory_bytes"] / 1e9, 3),
        "first_step_s": round(times["first_step_ms"] / 1000, 2),
        "compile_s": round(max(times["first_step_ms"] - step, 0) / 1000, 2) if recipe.model.get("compile") else 0.0,
    }


def flops_of(point: Point, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, float]:
    """Per image, from the plan's formula."""
    conditions = Conditions(
        GPUS[arguments.gpu], arguments.of, utilisation=0.4, samples=arguments.samples, stored_text=arguments.stored_text
    )
    if arguments.image_size:
        alone = {name: given for name, given in recipe.algorithms.items() if name != "progressive_resolution"}
        recipe = dataclasses.replace(recipe, image_size=arguments.image_size, algorithms=alone)
        return make_plan(recipe, conditions).stages[0].flops
    return make_plan(recipe, conditions).stages[point.stage].flops


def matrix_product_rate() -> float:
    """FLOP/s of a large matrix product on this machine, in the precision that training uses here: what MFU is a share of."""
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
    """What the driver says of the GPU's clocks and power."""
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.max.sm,power.limit,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="+", help="YAML files and key=value, as for train.py")
    parser.add_argument("--stage", type=int, action="append", help="only this one, from 0; may be repeated")
    parser.add_argument("--microbatch", type=int, action="append", help="instead of the recipe's; repeated: a sweep")
    parser.add_argument("--image-size", type=int, help="instead of the stage's")
    parser.add_argument("--gpus", type=int, action="append", help="processes on this machine (1); repeated: a sweep")
    parser.add_argument("--of", type=int, default=1, help="GPUs that the recipe's batch is divided over, such as 32")
    parser.add_argument("--gpu", default="h200", choices=sorted(GPUS), help="the name under which prx plan finds the result")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--data", action="store_true", help="the recipe's own loader")
    parser.add_argument("--samples", type=int, default=None, help="images in the data, for recipes in epochs")
    parser.add_argument("--stored-text", action="store_true", help="text embeddings come with the (synthetic) batch")
    parser.add_argument("--valid-text", type=float, default=0.4, help="share of the caption's tokens that are no padding")
    parser.add_argument("--random-weights", action="store_true", help="teachers and text encoder by size, without download")
    parser.add_argument("--profile", help="Chrome trace of two steps, to this file (of the last point)")
    parser.add_argument("--output", type=Path, help="JSON; a Markdown table beside it")
    arguments = parser.parse_args()
    arguments.gpus = arguments.gpus or [1]

    recipe = config.load(arguments.recipe)
    config.import_code(recipe.code_paths)
    rate = matrix_product_rate()
    stages = []
    for point in points_of(recipe, arguments):
        stages.append(report(point, measure(point, recipe, arguments), recipe, rate, arguments))
        sys.stderr.write(json.dumps(stages[-1]) + "\n")
    result: dict[str, Any] = {
        "what": "the Trainer's step, images per second and GPU",
        "recipe": arguments.recipe[0],
        **circumstances(),
        "gpu": arguments.gpu if torch.cuda.is_available() else "cpu",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "clocks": clocks(),
        "matrix_product_tflops": round(rate / 1e12, 3),
        "stages": stages,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(markdown(result))
    sys.stdout.write(markdown(result))
    if any("error" in stage for stage in stages):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
