"""Is a time budget met? Runs with random budgets on a machine slowed at random (`slow_machine.py`), some interrupted once.

python benchmarks/time_budget.py --runs 20 --output benchmarks/results/time-budget.json

A run is the quickstart at toy size, with two stages by budget, evaluation, scores, images and checkpoints. A third of the runs
gets SIGTERM on the way, a third stops after a part of the budget; both go on with the same command. The time that counts is that
of `Trainer.fit` over all processes of the run, measured around it. Met: the run ends within 2% of the budget and one step (its
longest), on either side, with evaluation, scores, images, averaged weights and checkpoint of the last batch.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from record import circumstances

from prx_composer.runs.checkpoints import newest_checkpoint
from prx_composer.runs.folder import read_metrics
from prx_composer.training.start import main as train

TOLERANCE = 0.02
KINDS = ("undisturbed", "SIGTERM", "stop_after")
FITS = "fits.jsonl"
RECIPE = [
    "yamls/quickstart.yaml",
    "train_loader.path=data/shapes-time-budget",
    "eval_loader.path=data/shapes-time-budget",
    "train_loader.source.images_per_scene=4",
    "model.backbone.hidden_size=64",
    "model.backbone.depth=2",
    "model.backbone.num_heads=2",
    "max_duration=1000000ba",
    "scheduler={name: warmup_stable_decay, t_warmup: 5ba, decay: 0.2}",
    "algorithms.progressive_resolution.stages[0].until=100000ba or 0.5budget",
    "global_train_batch_size=16",
    "algorithms.progressive_resolution.stages[0].global_train_batch_size=16",
    "algorithms.progressive_resolution.stages[1].global_train_batch_size=16",
    "global_eval_batch_size=36",
    "callbacks.shapes_score={images_per_prompt: 1, num_inference_steps: 2}",
    "callbacks.images.num_inference_steps=2",
    "callbacks.images.interval=200ba",
    "eval_interval=100ba",
    "save_interval=10s",
    "progress_bar=false",
    "code_paths=[benchmarks/slow_machine.py]",
]


def fit_timed(folder: Path, arguments: list[str]) -> int:
    """Trains, and adds to `fits.jsonl` how long `Trainer.fit` took."""
    fit = Trainer.fit

    def timed(trainer: Trainer, *args: Any, **options: Any) -> None:
        start = time.monotonic()
        try:
            fit(trainer, *args, **options)
        finally:
            with (folder / FITS).open("a") as file:
                file.write(json.dumps({"seconds": time.monotonic() - start}) + "\n")

    Trainer.fit = timed  # pyright: ignore[reportAttributeAccessIssue]
    return train(arguments)


def elapsed(folder: Path) -> float:
    with contextlib.suppress(OSError, IndexError):
        return read_metrics(folder / "metrics.jsonl")[-1]["budget/elapsed"]
    return 0.0


def one_run(seed: int, shortest: float, longest: float, pace: float) -> dict[str, Any]:
    draw = random.Random(seed)
    budget, kind, at = draw.uniform(shortest, longest), KINDS[seed % len(KINDS)], draw.uniform(0.3, 0.7)
    folder = Path("runs") / f"time-budget-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    slow = f"callbacks.slow_machine={{folder: {folder}, seed: {seed}, seconds: {draw.uniform(0.3, 1) * pace:.3f}}}"
    recipe = [*RECIPE, f"run_name={folder.name}", f"seed={seed}", f"time_budget={budget:.1f}s", slow]
    command = [sys.executable, __file__, "--fit", str(folder), *recipe]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)  # threads that wait for each other would measure the machine's load
    if kind == "stop_after":
        subprocess.run([*command, f"callbacks.stop_after.time={at:.2f}budget"], env=environment, check=True)
    if kind == "SIGTERM":
        process = subprocess.Popen(command, env=environment)
        while elapsed(folder) < at * budget and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait()
    subprocess.run(command, env=environment, check=True)

    fits = [json.loads(line)["seconds"] for line in (folder / FITS).read_text().splitlines()]
    machine = [json.loads(path.read_text()) for path in folder.glob("slow_machine-*.json")]
    step, total = max(process["longest_step"] for process in machine), sum(fits)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    state = torch.load(checkpoint.load_path, weights_only=False)["state"]  # our own run's
    complete = {
        "evaluation": "metrics/eval/mse" in last,
        "scores": "heldout_accuracy" in last,
        "images": (folder / "images" / f"ba{last['batch']:06d}.png").exists(),
        "checkpoint": checkpoint.batch == last["batch"],
        "averaged weights": bool(state["callbacks"]["AverageState"]["average"]),
        "learning rate is 0": last["lr-AdamW/group0"] == 0,
    }
    on_time = abs(total - budget) <= TOLERANCE * budget + step
    return {
        "seed": seed, "kind": kind, "budget": budget, "seconds": total, "of_budget": total / budget, "longest_step": step,
        "batches": last["batch"], "processes": fits, "complete": complete, "met": on_time and all(complete.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    parser.add_argument("--budget", type=float, nargs=2, default=[20.0, 40.0], help="shortest and longest, in seconds")
    parser.add_argument("--pace", type=float, default=0.15, help="longest typical sleep per step, in seconds")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.first, arguments.first + arguments.runs):
        runs.append(one_run(seed, arguments.budget[0], arguments.budget[1], arguments.pace))
        sys.stdout.write(json.dumps(runs[-1]) + "\n")
        sys.stdout.flush()
    result = {
        "what": "seconds of training of runs with a time budget, on a machine slowed at random",
        **circumstances(),
        "met": f"{sum(run['met'] for run in runs)} of {len(runs)}",
        "of_budget": [min(run["of_budget"] for run in runs), max(run["of_budget"] for run in runs)],
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fit"]:
        where = Path(sys.argv[2])
        sys.exit(fit_timed(where, sys.argv[3:]))
    main()
