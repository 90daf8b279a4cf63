"""The questions about speed that only a GPU answers, in order of worth, for one that is lent by the minute.

python benchmarks/suite.py yamls/24h.yaml --of 32 --gpu h200 --minutes 9 --output h200

Each is a benchmark or a test of this repository in a process of its own, on random weights and synthetic batches. One that is
not expected to end in time is left out, one that fails does not end the others. The folder gets what each writes, its log, and
`suite.json`: what was asked, by which command, how it ended and after how long.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from common import ROOT, as_json, circumstances, parse, say, write

HERE = ROOT / "benchmarks"
SKIPPED = "left out: not enough time"


@dataclass
class Options:
    """The command line."""

    recipe: Annotated[list[str], "YAML files and key=value, as for train.py; of two stages"]
    _: KW_ONLY
    output: Annotated[Path, "a folder"]
    of: Annotated[int, "GPUs that the recipe's batch is divided over"] = 1
    gpu: Annotated[str, "as for throughput.py"] = "h200"
    minutes: float = 9.0
    steps: Annotated[int, "of each measurement"] = 20
    only: Annotated[Sequence[str], "this question; may be repeated"] = ()


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


def questions(options: Options) -> list[Question]:
    """Correctness before speed, the recipe before its options, and each option at the image size where it should tell most."""

    def throughput(name: str, seconds: float, stage: int | None, *changes: str) -> Question:
        command = [str(HERE / "throughput.py"), *options.recipe, *changes, "--random-weights", "--stored-text"]
        command += ["--profile", str(options.output / "trace.json.gz")] if stage is None else ["--stage", str(stage)]
        command += ["--of", str(options.of), "--gpu", options.gpu, "--steps", str(options.steps)]
        return Question(name, seconds, [*command, "--output", str(options.output / f"{name}.json")])

    tests = [str(ROOT / "tests" / name) for name in ("integration/test_trainer.py", "unit/test_float8.py")]
    small = ["--hidden-size", "64", "--depth", "3", "--tokens", "64", "--text-tokens", "16", "--text-size", "32"]
    where = ["--device", "cuda"] if torch.cuda.is_available() else small
    numerics = [str(HERE / "step.py"), "numerics", *where, "--output", str(options.output / "numerics.json")]
    return [
        Question("tests", 60, ["-m", "pytest", "-n", "4", *tests]),
        Question("numerics", 60, numerics),
        throughput("recipe", 240, None),  # in one file, for `prx plan --throughput`
        throughput("large-flex", 120, 1, "model.compile=blocks", "model.attention=flex"),
        throughput("small-float8", 120, 0, "algorithms.float8={}"),
        throughput("small-whole-graph", 240, 0, "model.compile=true"),
        throughput("large-flex-float8", 120, 1, "model.compile=blocks", "model.attention=flex", "algorithms.float8={}"),
        throughput("large-eager", 90, 1, "model.compile=false"),
    ]


def ask(question: Question, folder: Path, seconds: float) -> str:
    """Return how it ended. Its output goes to a log, which is there even if it is stopped."""
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


def main(arguments: list[str]) -> int:
    """Ask all that there is time for; return 1 if any of them failed."""
    options = parse(Options, arguments, __doc__, "suite.py")
    began = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    answers: list[dict[str, Any]] = []
    for question in questions(options):
        if options.only and question.name not in options.only:
            continue
        asked = time.monotonic()
        left = 60 * options.minutes - (asked - began)
        ended = ask(question, options.output, left) if question.seconds <= left else SKIPPED
        seconds = round(time.monotonic() - asked, 1)
        answers.append({"name": question.name, "ended": ended, "seconds": seconds, "command": ["python", *question.command]})
        say(f"{question.name}: {ended} ({seconds:.0f} s)")
        found = {"what": "what a GPU was asked, and how each answer ended", **circumstances(), "asked": answers}
        write(options.output / "suite.json", as_json(found))
    return 1 if any(answer["ended"].startswith("failed") for answer in answers) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
