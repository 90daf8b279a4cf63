"""Is a time budget met? Runs with random budgets on a machine slowed at random, some interrupted once.

python benchmarks/time_budget.py --runs 20 --output time-budget.json

A run is the quickstart at toy size, with two stages by budget, evaluation, scores, images and checkpoints. A third of the runs
gets SIGTERM on the way, a third stops after a part of the budget; both go on with the same command. The time that counts is that
of `Trainer.fit` over all processes of the run, measured by the callback that slows the machine. Met: the run ends within 2% of
the budget and one step (its longest), on either side, with evaluation, scores, images, averaged weights and checkpoint of the
last batch.
"""

import contextlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from common import environment, main, say, train_command
from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer import registry
from prx_composer.runs.checkpoints import newest_checkpoint
from prx_composer.runs.folder import read_metrics

TOLERANCE = 0.02
KINDS = ("undisturbed", "SIGTERM", "stop_after")
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
    "yamls/ablations/progressive_resolution.yaml",
    "algorithms.progressive_resolution.stages[0].until=100000ba or 0.5budget",
    "global_train_batch_size=16",
    "global_eval_batch_size=36",
    "callbacks.shapes_score={images_per_prompt: 1, num_inference_steps: 2}",
    "callbacks.images.num_inference_steps=2",
    "callbacks.images.interval=200ba",
    "eval_interval=100ba",
    "save_interval=10s",
    "progress_bar=false",
    f"code_paths=[{__file__}]",
]


@registry.callbacks.register("slow_machine")
class SlowMachine(Callback):
    """A machine that others use too, so that steps and evaluation are held up at random.

    Sleeps in every step: a random walk between a fifth of `seconds` and five times that; now and then three times as long.

    Args:
        folder: where `slow_machine-<n>.json` says how long the process trained and how long its longest step was, with the sleep.
        seed: of the sleeps; a resumed process draws others.
        seconds: of the typical sleep.
    """

    def __init__(self, folder: str, seed: int = 0, seconds: float = 0.1):
        self._folder, self._seed, self._seconds = Path(folder), seed, seconds
        self._level = 0.0
        self._began: float | None = None
        self._asked_for = 0.0
        self._longest = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._draw = random.Random(self._seed * 1_000_003 + int(state.timestamp.batch))
        self._began = time.monotonic()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked_for = time.monotonic()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._level = min(max(self._level + self._draw.gauss(0, 0.15), -math.log(5)), math.log(5))
        time.sleep(self._seconds * math.exp(self._level) * (3 if self._draw.random() < 0.02 else 1))

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        time.sleep(self._seconds * self._draw.uniform(0.5, 1.5))

    def batch_end(self, state: State, logger: Logger) -> None:
        self._longest = max(self._longest, time.monotonic() - self._asked_for)

    def close(self, state: State, logger: Logger) -> None:  # which Composer calls right after fit
        if self._began is not None:
            number = len(list(self._folder.glob("slow_machine-*.json")))
            facts = {"longest_step": self._longest, "seconds": time.monotonic() - self._began}
            (self._folder / f"slow_machine-{number}.json").write_text(json.dumps(facts))


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
    command = train_command([*RECIPE, f"run_name={folder.name}", f"seed={seed}", f"time_budget={budget:.1f}s", slow])
    surroundings = environment(OMP_NUM_THREADS="1")  # threads that wait for each other would measure the machine's load
    if kind == "stop_after":
        subprocess.run([*command, f"callbacks.stop_after.time={at:.2f}budget"], env=surroundings, check=True)
    if kind == "SIGTERM":
        process = subprocess.Popen(command, env=surroundings)
        while elapsed(folder) < at * budget and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait()
    subprocess.run(command, env=surroundings, check=True)
    return judged(folder, budget) | {"seed": seed, "kind": kind}


def judged(folder: Path, budget: float) -> dict[str, Any]:
    """Return whether a run met its budget, and what it has left."""
    processes = [json.loads(path.read_text()) for path in sorted(folder.glob("slow_machine-*.json"))]
    step, total = max(one["longest_step"] for one in processes), sum(one["seconds"] for one in processes)
    last, checkpoint = read_metrics(folder / "metrics.jsonl")[-1], newest_checkpoint(folder)
    assert checkpoint is not None
    state = torch.load(checkpoint.load_path, weights_only=False)["state"]  # our own run's
    complete = {
        "evaluation": "metrics/eval/validation_loss" in last,
        "scores": "heldout_accuracy" in last,
        "images": (folder / "images" / f"ba{last['batch']:06d}.png").exists(),
        "checkpoint": checkpoint.batch == last["batch"],
        "averaged weights": bool(state["callbacks"]["AverageState"]["average"]),
        "learning rate is 0": last["lr-AdamW/group0"] == 0,
    }
    return {
        "budget": budget,
        "seconds": total,
        "of_budget": total / budget,
        "longest_step": step,
        "batches": last["batch"],
        "processes": [one["seconds"] for one in processes],
        "complete": complete,
        "met": abs(total - budget) <= TOLERANCE * budget + step and all(complete.values()),
    }


def time_budget(
    *,
    runs: int = 20,
    first: Annotated[int, "seed of the first run"] = 0,
    shortest: Annotated[float, "budget, in seconds"] = 20.0,
    longest: float = 40.0,
    pace: Annotated[float, "longest typical sleep per step, in seconds"] = 0.15,
) -> dict[str, Any]:
    """Seconds of training of runs with a time budget, on a machine slowed at random."""
    found: list[dict[str, Any]] = []
    for seed in range(first, first + runs):
        found.append(one_run(seed, shortest, longest, pace))
        say(json.dumps(found[-1]))
    shares = [run["of_budget"] for run in found]
    met = sum(run["met"] for run in found)
    return {"met": f"{met} of {runs}", "of_budget": [min(shares), max(shares)], "runs": found, "failed": met < runs}


if __name__ == "__main__":
    sys.exit(main(__doc__, time_budget))
