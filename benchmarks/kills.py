"""Kills a run with SIGKILL again and again, and compares what comes out in the end with an undisturbed run, bit for bit.

python benchmarks/kills.py yamls/24h_mini.yaml --kills 30 --output benchmarks/results/kills.json -- save_interval=3sec

After every kill the same command is given again. Kills come at random moments of start-up and training, while a checkpoint
is being written (as soon as its folder appears, or a few milliseconds later), and around the switch of stages. All processes
of the run die at once, as on a machine that loses power. Weights, their average, the optimizer's state and every logged loss
must be equal; the result says so, and for each kill where the run was.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import circumstances
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from prx_composer.runs.checkpoints import all_checkpoints, newest_checkpoint
from prx_composer.runs.folder import read_metrics

KINDS = ("training", "writing", "switch", "start-up", "writing", "training")  # in turn
LONGEST = 900.0  # seconds that a run may take to its moment


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    with contextlib.suppress(OSError):
        return read_metrics(path)
    return []


def losses(folder: Path) -> dict[int, dict[str, float]]:
    return {row["batch"]: {k: v for k, v in row.items() if k.startswith("loss/")} for row in rows(folder)}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Paths at which two nested states are not the same to the bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [path]
    if isinstance(first, dict) and isinstance(second, dict):
        return [d for key in first.keys() | second.keys() for d in differences(first.get(key), second.get(key), f"{path}/{key}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [d for i, (a, b) in enumerate(zip(first, second, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    return [] if type(first) is type(second) and first == second else [path]


def final_state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint, put together if it is sharded. It is our own run's: loading it may execute what it says."""
    checkpoint = all_checkpoints(folder / "checkpoints")[-1]
    path = Path(checkpoint.load_path)
    if path.is_dir():
        path = folder / "together.pt"
        dcp_to_torch_save(checkpoint.path, path)
    return torch.load(path, weights_only=False)


class Run:
    """A run that can be started, killed and started again with the same command."""

    def __init__(self, recipe: str, name: str, overrides: list[str], processes: int):
        self.folder = Path("runs") / name
        options = [recipe, f"run_name={name}", "progress_bar=false", *overrides]
        self.command = ["composer", "-n", str(processes), "train.py", *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = Path("runs") / f"{self.folder.name}.log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(self.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        assert self._process is not None
        for pid in session_of(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def finish(self) -> int:
        assert self._process is not None
        return self._process.wait()

    def batch(self) -> int:
        found = rows(self.folder)
        return found[-1]["batch"] if found else 0

    def is_writing(self) -> bool:
        return any((self.folder / "checkpoints").glob(".ba*.partial"))


def session_of(leader: int) -> list[int]:
    """The leader and every process of its session: ranks are in process groups of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                    found.append(int(entry.name))
    return sorted(found, key=lambda pid: pid != leader)


def wait_for(run: Run, kind: str, switch: int | None, rng: random.Random) -> bool:
    """Waits until the moment of a kill; False if the run ended first."""
    begin, deadline = run.batch(), time.monotonic() + LONGEST
    delay = rng.uniform(0.5, 15) if kind == "start-up" else rng.uniform(0, 6) if kind == "training" else 0.0
    if kind == "start-up":
        time.sleep(delay)
        return run.is_alive()
    seen_saved = newest_checkpoint(run.folder)
    while run.is_alive() and time.monotonic() < deadline:
        if kind == "training" and run.batch() > begin:
            time.sleep(delay)
            return run.is_alive()
        if kind == "writing" and run.is_writing():
            time.sleep(rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.2)]))
            return run.is_alive()
        if kind == "switch" and switch is not None:
            if run.batch() >= switch - 2:
                time.sleep(rng.uniform(0, 1.5))
                return run.is_alive()
            if newest_checkpoint(run.folder) != seen_saved and run.batch() < switch - 60:
                return wait_for(run, "training", switch, rng)  # too far away: another time
        time.sleep(0.002)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--switch", type=int, help="batch at which the second stage begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="key=value, as for train.py")
    arguments = parser.parse_intermixed_args()
    rng = random.Random(arguments.seed)

    whole = Run(arguments.recipe, "kills-undisturbed", arguments.overrides, arguments.processes)
    killed = Run(arguments.recipe, "kills-killed", arguments.overrides, arguments.processes)
    whole.start()
    if whole.finish() != 0:
        sys.exit("The undisturbed run failed; see runs/kills-undisturbed.log")

    kills: list[dict[str, Any]] = []
    while len(kills) < arguments.kills:
        kind = KINDS[len(kills) % len(KINDS)]
        killed.start()
        if not wait_for(killed, kind, arguments.switch, rng):
            break
        writing = killed.is_writing()
        killed.kill()
        newest = newest_checkpoint(killed.folder)
        kills.append(
            {
                "kind": kind,
                "batch": killed.batch(),
                "half_a_checkpoint": writing and killed.is_writing(),
                "goes_on_from": newest.batch if newest else 0,
            }
        )
        sys.stdout.write(json.dumps(kills[-1]) + "\n")
        sys.stdout.flush()
    if not killed.is_alive():
        killed.start()
    exit_code = killed.finish()

    states = [final_state(run.folder) for run in (whole, killed)]
    compared = [{key: state["state"][key] for key in ("model", "optimizers")} for state in states]
    for part, state in zip(compared, states, strict=True):
        part["average"] = state["state"]["callbacks"]["AverageState"]["average"]
    unequal = differences(compared[0], compared[1])
    result = {
        "what": "final state of a run killed again and again against the undisturbed one",
        **circumstances(),
        "exit_code": exit_code,
        "kills": len(kills),
        "of_these_while_a_checkpoint_was_written": sum(kill["half_a_checkpoint"] for kill in kills),
        "final_batch": [all_checkpoints(run.folder / "checkpoints")[-1].batch for run in (whole, killed)],
        "equal_weights_average_and_optimizer": not unequal,
        "unequal": unequal[:20],
        "equal_losses": losses(whole.folder) == losses(killed.folder),
        "steps_with_losses": len(losses(killed.folder)),
        "log": kills,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["equal_weights_average_and_optimizer"] and result["equal_losses"] and exit_code == 0 else 1)


if __name__ == "__main__":
    main()
