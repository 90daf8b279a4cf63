"""What every benchmark shares: its command line, timing in turns, medians, and the result file.

A question is a function. Its parameters are the command's options, its docstring says what is measured, and what it returns are
the numbers. `main` does all the rest.
"""

import argparse
import datetime
import functools
import gc
import inspect
import json
import os
import platform
import re
import resource
import shlex
import statistics
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch

from prx_composer.common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "diffusers", "transformers")
MEGABYTE = 2**20

Made = TypeVar("Made")


# --------------------------------------------------------------------------------------------------- command line


def says_errors(command: Callable[..., int]) -> Callable[..., int]:
    """Make a command say what the user has to mend, without a traceback, and return 1."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> int:
        try:
            return command(*arguments, **options)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1

    return wrapped


@says_errors
def main(document: str | None, *questions: Callable[..., dict[str, Any]], argv: Sequence[str] | None = None) -> int:
    """Answer the question that the command line names, the first one by default: print what is found, and write it to --output.

    A question whose result has something under `failed` ends the command with 1.
    """
    named = {question.__name__.replace("_", "-"): question for question in questions}
    script, *arguments = sys.argv if argv is None else argv
    if len(named) > 1 and arguments[:1] in (["-h"], ["--help"]):
        about = [f"  {name}: {inspect.getdoc(question)}" for name, question in named.items()]
        sys.stdout.write("\n".join([inspect.cleandoc(document or ""), "", "questions, each with --help:", *about, ""]))
        return 0
    name = arguments[0] if arguments[:1] and arguments[0] in named else next(iter(named))
    question = named[name]
    prog = f"{Path(script).name} {name}" if len(named) > 1 else None
    parser = make_parser(question, f"{inspect.getdoc(question)}\n\n{inspect.cleandoc(document or '')}", prog)
    parser.add_argument("--output", type=Path, help="result file, JSON")
    parser.add_argument("--json", action="store_true", help="print the medians of all ratios as the last line")
    options = vars(parser.parse_intermixed_args(arguments[1:] if arguments[:1] == [name] else arguments))
    output, last_line = options.pop("output"), options.pop("json")
    what = " ".join((inspect.getdoc(question) or "").split("\n\n")[0].split())
    head = {"what": what} | circumstances([script, *arguments])  # before it, for the load
    found = question(**options)
    result: dict[str, Any] = head | {"threads": torch.get_num_threads()} | found
    sys.stdout.write(as_json(result))
    if output is not None:
        write(output, as_json(result))
    if last_line and "ratios" in result:
        sys.stdout.write(json.dumps({name: ratio["median"] for name, ratio in result["ratios"].items()}) + "\n")
    return 1 if result.get("failed") else 0


def parse(options: type[Made], arguments: Sequence[str], document: str | None, prog: str) -> Made:
    """Make a dataclass of options from the command line; what its constructor refuses with a UserError is a usage error."""
    parser = make_parser(options, document, prog)
    try:
        return options(**vars(parser.parse_intermixed_args(arguments)))
    except UserError as error:
        parser.error(str(error))


def make_parser(function: Callable[..., Any], document: str | None, prog: str | None) -> argparse.ArgumentParser:
    """Make the parser of a function's arguments.

    Keyword-only parameters are options, the others are positional. A sequence that has a default is given whole (`--seeds 1 2`),
    one that hasn't, or is empty, is an option to repeat (`--stage 0 --stage 1`). `Annotated` has the help.
    """
    parser = argparse.ArgumentParser(prog=prog, description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(function if inspect.isfunction(function) else function.__init__, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        hint, default, told = hints[name], parameter.default, {}
        if typing.get_origin(hint) is Annotated:
            hint, told["help"] = typing.get_args(hint)[:2]
        is_option = parameter.kind is parameter.KEYWORD_ONLY
        if typing.get_origin(hint) in (list, Sequence):
            hint = typing.get_args(hint)[0]
            if is_option and default in ((), parameter.empty):
                told["action"] = "append"
            else:
                told["nargs"] = "*" if default == () else "+"
        if typing.get_origin(hint) is Literal:
            told["choices"] = typing.get_args(hint)
            hint = str
        if default is parameter.empty:
            told |= {"required": True} if is_option else {}
        else:
            told["default"] = list(default) if isinstance(default, tuple) else default
        if hint is bool:
            told["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            told["type"] = next(kind for kind in (*typing.get_args(hint), hint) if kind is not type(None))
        parser.add_argument(f"--{name.replace('_', '-')}" if is_option else name, **told)
    return parser


# -------------------------------------------------------------------------------------------------------- results


def processor() -> str:
    """Return the name of the CPU, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def circumstances(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what every result says beside its numbers: when, on what machine, with which versions, by which command."""
    gpu = f"{torch.cuda.get_device_name()} · " if torch.cuda.is_available() else ""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": gpu + processor(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES},
        "command": shlex.join(["python", *(sys.argv if command is None else command)]),
    }


def heading(result: Mapping[str, Any]) -> list[str]:
    """Return what a table begins with, so that one can judge and repeat it."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    threads = f"{result['threads']} thread" + ("s" if result["threads"] != 1 else "")
    what = f"{result['what']}, {result['date']}, {result['machine']}, {threads}, load {result['load']} before. {versions}."
    return [what, "", f"    {result['command']}", ""]


def as_json(result: Mapping[str, Any]) -> str:
    """Indent, but keep lists of numbers on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: f"[{' '.join(found.group()[1:-1].split())}]", text) + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def say(message: str) -> None:
    """Print a line at once, also into a pipe."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------- runs


def train_command(arguments: Sequence[str], ranks: int | None = None) -> list[str]:
    """Return the command that trains a recipe: in one process, or by Composer's launcher in so many."""
    launcher = [] if ranks is None else ["-m", "composer.cli", "-n", str(ranks)]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, in which a file that a recipe names in `code_paths` can import its neighbours here."""
    paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | more | {"PYTHONPATH": os.pathsep.join(paths)}


# --------------------------------------------------------------------------------------------------------- timing


def milliseconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes; the function must wait for its device by itself."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def time_in_turns(steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Time every step once per round, in milliseconds: A B, B A, A B …

    What slows the machine down slows all alike. The first rounds, `warmup` of them, don't count.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds + warmup):
            gc.collect()
            for name in list(steps) if number % 2 else reversed(list(steps)):
                elapsed = milliseconds(steps[name])
                if number >= warmup:
                    times[name].append(elapsed)
    finally:
        if was_collecting:
            gc.enable()
    return times


def summary(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, Any]:
    """Return median and quartiles of `slow` / `fast` within each round."""
    return summary([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def percentile(values: Sequence[float], percent: int) -> float:
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def middle_half(values: Sequence[float], times: float = 1.0) -> dict[str, float] | None:
    """Return median and middle half of the rounds' values; None of nothing."""
    if not values:
        return None
    numbers = {"median": statistics.median(values), "p25": percentile(values, 25), "p75": percentile(values, 75)}
    return {name: round(times * value, 4) for name, value in numbers.items()} | {"rounds": len(values)}


def by_turn(steps: Sequence[Mapping[str, Any]], key: str, middle: Callable[[list[float]], float]) -> dict[int, float]:
    """Return the mean or median of a number of the steps, by the turn in which they were made."""
    turns: dict[int, list[float]] = {}
    for step in steps:
        turns.setdefault(step["turn"], []).append(step[key])
    return {turn: middle(values) for turn, values in turns.items()}


def memory(key: str = "VmHWM") -> int:
    """Return bytes of this process's resident memory: at its peak, or now (`VmRSS`), which only Linux tells."""
    status = Path("/proc/self/status")
    if status.exists():  # rather than ru_maxrss, which begins with what the parent had
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory() -> int:
    """Return the peak so far in bytes: allocated on the GPU if there is one, else resident memory of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory()


# ------------------------------------------------------------------------------------------------- what must agree


def must_agree(differences: Mapping[str, float], tolerance: float) -> None:
    """End the command unless two ways to compute the same have done so: before anything is timed."""
    if max(differences.values()) > tolerance:
        raise SystemExit(f"They differ by {dict(differences)}: there is nothing to compare.")


# -------------------------------------------------------------------------------------------------------- pictures


def subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Make a figure to be saved, and its axes in rows, without frames and with a light grid."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    return figure, grid


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
