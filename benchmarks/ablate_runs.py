"""Runs of stacks in turns, and what every comparison of them writes: for ablate.py and ablate_cost.py."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import circumstances
from turns import Player, take_turns

from prx_composer.common.errors import UserError
from prx_composer.runs.folder import read_metrics

__all__ = ["REFUSED", "Run", "Stack", "fresh_folder", "head", "outputs", "say", "train", "write_json"]

ROOT = Path(__file__).resolve().parents[1]
REFUSED = "error: "  # how train.py begins what it says of a recipe that it doesn't train


@dataclass(frozen=True)
class Stack:
    """A recipe's tricks, and what differs from the recipe."""

    name: str  # such as base+muon-ema
    changes: tuple[str, ...]  # files and `algorithms.x=false`, in order

    @property
    def files(self) -> list[str]:
        return [change for change in self.changes if "=" not in change]

    @property
    def left_out(self) -> list[str]:
        return [change.removeprefix("algorithms.").removesuffix("=false") for change in self.changes if "=" in change]


@dataclass
class Run:
    """One stack with one seed."""

    stack: Stack
    seed: int
    folder: Path
    arguments: list[str]  # of train.py
    code_paths: list[str]
    process: "subprocess.Popen[str] | None" = None

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def steps_file(self) -> Path:
        return self.folder / "turns.jsonl"

    def start(self, steps: int) -> Player:
        """Starts the training; it goes up to its first step and waits."""
        ours, theirs = socket.socketpair()
        own = [f"run_name={self.folder.name}", f"run_folder={self.folder}", f"seed={self.seed}", "autoresume=false"]
        own += [f"code_paths={json.dumps([*self.code_paths, str(Path(__file__).with_name('turns.py'))])}"]
        own += [f"callbacks.turns={json.dumps({'path': str(self.steps_file), 'link': theirs.fileno(), 'steps': steps})}"]
        with self.log.open("w") as log, theirs:  # not through `composer`: a single process needs no launcher, and no port
            command = [sys.executable, str(ROOT / "train.py"), *self.arguments, *own]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[theirs.fileno()], text=True)
        self.process = process
        return Player(self.folder.name, ours, lambda: process.poll() is not None)

    def rows(self) -> list[dict[str, Any]]:
        """What `Turns` wrote: a header, then a line per step; empty if the run didn't come that far."""
        return read_metrics(self.steps_file) if self.steps_file.exists() else []

    def failure(self) -> str | None:
        """If the run failed, what it said: of a recipe that is refused all of the message, else the last line of the log."""
        if self.process is None or self.process.returncode == 0:
            return None
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        refused = [index for index, line in enumerate(lines) if line.startswith(REFUSED)]
        if refused:
            return " ".join(lines[refused[-1] :])
        return lines[-1].removeprefix("[rank0]: ") if lines else f"exit code {self.process.returncode}"


def train(runs: list[Run], steps: int) -> None:
    """Trains all of them in turns."""
    try:
        for rounds, playing in take_turns([partial(run.start, steps) for run in runs]):
            if playing and (rounds % 10 == 0 or len(playing) < len(runs)):
                say(f"{rounds * steps} steps each; still training: {', '.join(player.name for player in playing)}")
    finally:
        for run in runs:
            if run.process is not None and run.process.poll() is None:
                run.process.terminate()
    for run in runs:
        if (failure := run.failure()) is not None:
            say(f"{run.folder.name} failed: {failure} (see {run.log})")


# -------------------------------------------------------------------------------------------------------- results


def outputs(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in (".json", ".md", ".png")]


def fresh_folder(output: Path, overwrite: bool) -> Path:
    """The empty folder in which the runs of a comparison lie, beside nothing of the same name.

    Raises:
        UserError: there are runs or results already, and they may not be overwritten.
    """
    folder = Path("runs", output.name if output.name.startswith("ablate-") else f"ablate-{output.name}")
    existing = [path for path in (folder, *outputs(output)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} is there already; give --overwrite to delete it, or another --output.")
    for path in existing:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True)
    return folder


def head(what: str, arguments: list[str]) -> dict[str, Any]:
    """What was done when, where, with what."""
    known = circumstances()
    gpu = f"{torch.cuda.get_device_name()} · " if torch.cuda.is_available() else ""
    command = shlex.join(["python", "benchmarks/ablate.py", *arguments])
    return {"what": what} | known | {"machine": f"{gpu}{known['machine']}", "command": command}


def write_json(result: dict[str, Any], path: Path) -> None:
    """Indented, but for lists of numbers, which stay on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    path.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), text) + "\n")


def say(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()
