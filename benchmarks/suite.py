"""The questions about speed that only a GPU answers, in order of worth, for one that is lent by the minute.

python benchmarks/suite.py yamls/24h.yaml --of 32 --gpu h200 --minutes 9 --output benchmarks/results/h200

Each is a benchmark or a test of this repository in a process of its own, on random weights and synthetic batches. One that is
not expected to end in time is left out, one that fails does not end the others. The folder gets what each writes, its log, and
`suite.json`: what was asked, by which command, how it ended and after how long.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import circumstances

HERE = Path(__file__).parent
SKIPPED = "left out: not enough time"


@dataclass(frozen=True)
class Question:
    """One thing to find out.

    Args:
        name: of its files.
        seconds: that it is expected to take: it is left out if fewer are left, and stopped when none are.
        command: after `python`.
    """

    name: str
    seconds: float
    command: list[str]


def questions(arguments: argparse.Namespace) -> list[Question]:
    """Correctness before speed, the recipe before its options, and each option at the image size where it should tell most."""

    def throughput(name: str, seconds: float, stage: int | None, *changes: str) -> Question:
        command = [str(HERE / "throughput.py"), *arguments.recipe, *changes, "--random-weights", "--stored-text"]
        command += ["--profile", str(arguments.output / "trace.json.gz")] if stage is None else ["--stage", str(stage)]
        command += ["--of", str(arguments.of), "--gpu", arguments.gpu, "--steps", str(arguments.steps)]
        return Question(name, seconds, [*command, "--output", str(arguments.output / f"{name}.json")])

    tests = [str(HERE.parent / "tests" / name) for name in ("integration/test_trainer.py", "unit/test_float8.py")]
    small = ["--hidden-size", "64", "--depth", "3", "--tokens", "64", "--text-tokens", "16", "--text-size", "32"]
    where = ["--device", "cuda"] if torch.cuda.is_available() else small
    return [
        Question("tests", 60, ["-m", "pytest", "-n", "4", *tests]),
        Question("numerics", 60, [str(HERE / "numerics.py"), *where, "--output", str(arguments.output / "numerics.json")]),
        throughput("recipe", 240, None),  # in one file, for `prx plan --throughput`
        throughput("large-flex", 120, 1, "model.compile=blocks", "model.attention=flex"),
        throughput("small-float8", 120, 0, "algorithms.float8={}"),
        throughput("small-whole-graph", 240, 0, "model.compile=true"),
        throughput("large-flex-float8", 120, 1, "model.compile=blocks", "model.attention=flex", "algorithms.float8={}"),
        throughput("large-eager", 90, 1, "model.compile=false"),
    ]


def ask(question: Question, folder: Path, seconds: float) -> str:
    """How it ended. Its output goes to a log, which is there even if it is stopped."""
    with (folder / f"{question.name}.log").open("wb") as log:
        command = [sys.executable, *question.command]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too: they hold the GPU
            process.wait()
            return "stopped: time is up"
    return "done" if code == 0 else f"failed with {code}: see {question.name}.log"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="+", help="YAML files and key=value, as for train.py; of two stages")
    parser.add_argument("--of", type=int, default=1, help="GPUs that the recipe's batch is divided over")
    parser.add_argument("--gpu", default="h200", help="as for throughput.py")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of each measurement")
    parser.add_argument("--only", action="append", help="this question; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    arguments = parser.parse_args()
    began = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    answers: list[dict[str, Any]] = []
    for question in questions(arguments):
        if arguments.only and question.name not in arguments.only:
            continue
        asked = time.monotonic()
        left = 60 * arguments.minutes - (asked - began)
        ended = ask(question, arguments.output, left) if question.seconds <= left else SKIPPED
        seconds = round(time.monotonic() - asked, 1)
        answers.append({"name": question.name, "ended": ended, "seconds": seconds, "command": ["python", *question.command]})
        sys.stdout.write(f"{question.name}: {ended} ({seconds:.0f} s)\n")
        sys.stdout.flush()
        found = {"what": "what a GPU was asked, and how each answer ended", **circumstances(), "asked": answers}
        (arguments.output / "suite.json").write_text(json.dumps(found, indent=1) + "\n")
    if any(answer["ended"].startswith("failed") for answer in answers):
        sys.exit(1)


if __name__ == "__main__":
    main()
