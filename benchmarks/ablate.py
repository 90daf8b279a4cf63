"""What does a trick buy? Trains stacks of tricks in turns, with equal seeds, and compares speed, memory, loss and score.

python benchmarks/ablate.py yamls/quickstart.yaml --stack base --stack +muon --stack +muon+tread-ema [key=value …]

A stack is `base`, the recipe as it is, with `+name` (yamls/ablations/name.yaml merged over it; or a path that ends in .yaml)
and `-name` (that algorithm left out), in the order written. The first stack is what the others are compared with.

Each stack is a process of its own and an ordinary run of train.py; they take turns of some steps (see turns.py). Writes a table
(.md), everything measured (.json) and curves (.png); the runs and their logs stay in runs/ablate-<name>/.

With --cost: what each algorithm of the recipe costs or saves in time and memory, one by one and together (ablate_cost.py).
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import ablate_cost
from common import ROOT, by_turn, circumstances, heading, parse, percentile, save, says_errors, subplots
from turns import Run, Stack, fresh_folder, publish, train

from prx_composer import registry
from prx_composer.common.errors import UserError, nearest
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.runs.folder import read_metrics

ABLATIONS = ROOT / "yamls" / "ablations"
PART = re.compile(r"\+(?P<path>[^+]+?\.ya?ml)|\+(?P<name>\w+)|-(?P<without>\w+)")
ACCURACIES = ("heldout_accuracy", "classifier_accuracy")
TARGET = 0.9  # the accuracy whose time is compared
HELDOUT_LOSS = "metrics/eval/validation_loss"
LAST = 0.05  # the share of steps over which losses are averaged: in the table the last ones, in the picture running


# --------------------------------------------------------------------------------------------------------- stacks


def parse_stack(text: str) -> Stack:
    """`base`, `+muon`, `+muon+tread-ema`, `base-ema`, `+my/own.yaml` → what to merge over the recipe.

    Raises:
        UserError: something else, or a file that isn't there.
    """
    rest, name, changes = text.removeprefix("base"), "base", []
    while rest:
        part = PART.match(rest)
        if part is None:
            raise UserError(f"--stack {text}: {rest!r} is not understood; write base, +name, -name or +path/to/own.yaml, joined.")
        if part["without"]:
            change, title = f"algorithms.{part['without']}=false", part.group()
        elif part["path"]:
            change, title = part["path"], f"+{Path(part['path']).stem}"
            if not Path(change).is_file():
                raise UserError(f"--stack {text}: there is no file {change}.")
        else:
            change, title = str(_ablation(text, part["name"])), part.group()
        name, rest = name + title, rest[part.end() :]
        changes.append(change)
    return Stack(name, tuple(changes))


def _ablation(text: str, name: str) -> Path:
    path = ABLATIONS / f"{name}.yaml"
    if not path.exists():
        available = [file.stem for file in ABLATIONS.glob("*.yaml")]
        raise UserError(f"--stack {text}: there is no {name}.yaml in yamls/ablations.{nearest(name, available)}")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def check_stack(recipe_files: list[str], stack: Stack, overrides: list[str]) -> Recipe:
    """Return the recipe with this stack.

    Raises:
        UserError: as `config.load` and `config.check`; leaving out what is not there.
    """
    try:
        recipe = config.load([*recipe_files, *stack.files, *overrides])
        present = [name for name, arguments in recipe.algorithms.items() if arguments is not False]
        for name in stack.left_out:
            if name not in present:
                raise UserError(f"the recipe has no algorithm {name} to leave out.{nearest(name, present)}")
        recipe = config.load([*recipe_files, *stack.changes, *overrides])
        registry.import_code(recipe.code_paths)
        config.check(recipe)
    except UserError as error:
        raise UserError(f"--stack {stack.name}: {error}") from error
    return recipe


# -------------------------------------------------------------------------------------------------------- numbers


def measure(run: Run, base: Run) -> dict[str, Any]:
    """Return what a run left, in numbers."""
    who = {"stack": run.stack.name, "seed": run.seed, "merged": list(run.stack.changes), "failed": run.failure()}
    header, *steps = run.rows() or [{}]
    metrics = run.folder / "metrics.jsonl"
    return who | summarise(header, steps, read_metrics(metrics) if metrics.exists() else [], base.rows()[1:])


def summarise(
    header: dict[str, Any], steps: list[dict[str, Any]], metrics: list[dict[str, Any]], base_steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """Compute numbers from the lines of turns.jsonl and metrics.jsonl; seconds are of training, without waiting and scoring."""
    spent = accumulate(step["loader_ms"] + step["step_ms"] for step in steps)
    seconds = {step["batch"]: round(ms / 1000, 3) for step, ms in zip(steps, spent, strict=True)}
    rows = [row for row in metrics if row["batch"] in seconds]
    times = [step["step_ms"] for step in steps]
    losses = [(seconds[row["batch"]], row["loss/train/flow"]) for row in rows if row.get("loss/train/flow") is not None]
    accuracy = next((key for key in ACCURACIES if any(key in row for row in rows)), ACCURACIES[0])
    curve = [(seconds[row["batch"]], row["batch"], row[accuracy]) for row in rows if accuracy in row]
    return {
        "steps": len(steps),
        "train_seconds": max(seconds.values(), default=0.0),
        "step_ms": {"median": median(times), "p10": percentile(times, 10), "p90": percentile(times, 90)} if times else None,
        "loader_ms": median(step["loader_ms"] for step in steps) if steps else None,
        "ratio": ratio_by_turn(steps, base_steps),
        "memory_mb": steps[-1]["memory_mb"] if steps else None,
        "memory_at_start_mb": header.get("memory_mb"),
        "trained_parameters": header.get("trained_parameters"),
        "loss": fmean(loss for _, loss in losses[-max(1, round(LAST * len(losses))) :]) if losses else None,
        "validation_loss": next((row[HELDOUT_LOSS] for row in reversed(rows) if HELDOUT_LOSS in row), None),
        "accuracy": curve[-1][2] if curve else None,
        "seconds_to_target": next((time for time, _, right in curve if right >= TARGET), None),
        "accuracy_curve": curve,
        "loss_curve": thinned(running_mean(losses)),
    }


def ratio_by_turn(steps: list[dict[str, Any]], base_steps: list[dict[str, Any]]) -> dict[str, float] | None:
    """Divide step times by the base's in the same round, when the machine was the same; the first, warming up, doesn't count."""
    own, base = by_turn(steps, "step_ms", median), by_turn(base_steps, "step_ms", median)
    shared = sorted(own.keys() & base.keys())
    ratios = [own[turn] / base[turn] for turn in (shared[1:] or shared)]
    if not ratios:
        return None
    spread = {"p25": percentile(ratios, 25), "p75": percentile(ratios, 75), "min": min(ratios), "max": max(ratios)}
    return {"median": median(ratios), **spread, "turns": len(ratios)}


def running_mean(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (seconds, loss) → points whose losses are means of the steps up to there."""
    width = max(1, round(LAST * len(curve)))
    sums = [0.0, *accumulate(loss for _, loss in curve)]
    return [(curve[end - 1][0], (sums[end] - sums[end - width]) / width) for end in range(width, len(sums))]


def thinned(curve: list[tuple[float, float]], points: int = 200) -> list[tuple[float, float]]:
    """Keep every n-th point, and the last."""
    return curve[:: -max(1, -(-len(curve) // points))][::-1]


# ---------------------------------------------------------------------------------------------------------- table


COLUMNS = (
    "stack",
    "step (ms)",
    "× base (middle half of turns)",
    "training (s)",
    "memory (MB)",
    "flow loss",
    "validation loss",
    "accuracy",
    f"s to {TARGET}",
    "parameters",
)


def table(results: list[dict[str, Any]]) -> str:
    """Write Markdown, one line per stack; several seeds are a mean and its range."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for stack in dict.fromkeys(result["stack"] for result in results):
        of_stack = [result for result in results if result["stack"] == stack]
        for failed in (result for result in of_stack if result["failed"]):
            reason = failed["failed"].replace("|", "\\|")
            lines.append(f"| `{stack}` | failed after step {failed['steps']}: {reason} |" + " |" * (len(COLUMNS) - 2))
        if trained := [result for result in of_stack if not result["failed"]]:
            lines.append("| " + " | ".join(_cells(stack, trained)) + " |")
    return "\n".join(lines) + "\n"


def _cells(stack: str, results: list[dict[str, Any]]) -> list[str]:
    digits = {"train_seconds": 1, "memory_mb": 0, "loss": 4, "validation_loss": 4, "accuracy": 3, "seconds_to_target": 0}
    ratios = [result["ratio"] for result in results if result["ratio"]]
    low, high = (fmean(r[key] for r in ratios) if ratios else 0.0 for key in ("p25", "p75"))
    return [
        f"`{stack}`",
        spread([result["step_ms"]["median"] for result in results if result["step_ms"]], 1),
        f"{fmean(r['median'] for r in ratios):.2f} ({low:.2f}–{high:.2f})" if ratios else "–",
        *(spread([result[key] for result in results], places) for key, places in digits.items()),
        f"{results[0]['trained_parameters']:,}",
    ]


def spread(values: list[float | None], digits: int) -> str:
    """Write the value; of several, their mean and range; a dash where one is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    text = f"{fmean(numbers):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(numbers):.{digits}f}–{max(numbers):.{digits}f})"
    return text + (f", never in {len(values) - len(numbers)}" if len(numbers) < len(values) else "")


def report(result: dict[str, Any]) -> str:
    """Write the table with what one must know to repeat it."""
    merged = {run["stack"]: ", ".join(["the recipe", *run["merged"]]) for run in result["runs"]}
    return "\n".join(
        [
            *heading(result),
            table(result["runs"]),
            f"Flow loss: mean of the last {LAST:.0%} of steps. Seconds: of training, without others' turns, evaluation, scoring.",
            "",
            *(f"- `{stack}`: {files}" for stack, files in merged.items()),
            "",
        ]
    )


# ---------------------------------------------------------------------------------------------------------- curves


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy and loss over training seconds, a colour per stack."""
    from matplotlib.ticker import LogLocator

    figure, [[left, right]] = subplots(1, 2, (11, 4))
    stacks = dict.fromkeys(result["stack"] for result in results)
    colours = {stack: f"C{index % 10}" for index, stack in enumerate(stacks)}
    ends: dict[str, float] = {}
    for result in results:
        stack = result["stack"]
        if curve := result["loss_curve"]:
            seconds, losses = zip(*curve, strict=True)
            right.plot(seconds, losses, color=colours[stack], linewidth=1.5)
            ends[stack] = losses[-1]
        if curve := result["accuracy_curve"]:
            times, _, accuracies = zip(*curve, strict=True)
            left.plot(times, accuracies, color=colours[stack], linewidth=1.5, marker="o", markersize=3)
    left.set(title="accuracy on held-out prompts", xlabel="training seconds", ylim=(-0.03, 1.03))
    left.axhline(TARGET, color="0.7", linewidth=0.8, linestyle=":")
    right.set(title=f"flow loss (mean of {LAST:.0%} of steps)", xlabel="training seconds", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    to_axes = right.transData + right.transAxes.inverted()
    places = apart({stack: float(to_axes.transform((0, end))[1]) for stack, end in ends.items()}, gap=0.06)
    for stack, height in places.items():
        right.text(1.02, height, stack, color=colours[stack], transform=right.transAxes, va="center", fontsize=9)
    save(figure, path)


def apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """Move labels no further than needed for `gap` between neighbours, in their order, about their common middle."""
    order = sorted(places, key=places.__getitem__)
    moved: list[float] = []
    for name in order:
        moved.append(max(places[name], moved[-1] + gap) if moved else places[name])
    shift = fmean(moved) - fmean(places.values()) if moved else 0.0
    return {name: height - shift for name, height in zip(order, moved, strict=True)}


# ----------------------------------------------------------------------------------------------------------- main


@dataclass
class Options:
    """The command line."""

    recipe: Annotated[list[str], "YAML files, then key=value, as for train.py; these hold for every stack"]
    _: KW_ONLY
    stack: Annotated[Sequence[str], "base, +name, -name, or several joined; may be repeated"]
    cost: Annotated[bool, "cost of every algorithm instead; --cost --help has its options"] = False
    seed: Annotated[Sequence[int], "repeat for several; the recipe's by default"] = ()
    turn: Annotated[int, "steps that a stack trains before it is the next one's turn"] = 25
    output: Annotated[Path | None, "where results go, without suffix; runs/ablate-<recipe> by default"] = None
    overwrite: Annotated[bool, "delete runs and results of the same name first"] = False

    def __post_init__(self) -> None:
        if self.turn < 1:
            raise UserError("--turn must be at least 1.")


def parse_arguments(arguments: list[str]) -> Options:
    joined: list[str] = []
    for argument in arguments:  # --stack -ema would be an option -ema to argparse
        joined[-1:] = [f"--stack={argument}"] if joined[-1:] == ["--stack"] else [*joined[-1:], argument]
    return parse(Options, joined, __doc__, "ablate.py")


def defaults(recipe: Recipe) -> list[str]:
    """Return what a comparison sets unless the command line says otherwise."""
    settings = ["progress_bar=false", "save_interval=1dur"]
    if recipe.callbacks.get("images", False) is not False:
        settings.append("callbacks.images=false")
    if isinstance(recipe.callbacks.get("shapes_score"), dict):
        settings.append("callbacks.shapes_score.interval=0.05dur")
    return settings


def plan(options: Options) -> list[list[Run]]:
    """Check and return the runs: for every seed, those that are trained in turns."""
    overrides = [argument for argument in options.recipe if "=" in argument]
    files = [argument for argument in options.recipe if "=" not in argument]
    if not files:
        raise UserError("Name a recipe, such as yamls/quickstart.yaml.")
    stacks = [parse_stack(text) for text in options.stack]
    names = [stack.name for stack in stacks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--stack {twice[0]} is there twice; give own files other names.")
    recipes = [check_stack(files, stack, overrides) for stack in stacks]
    options.output = options.output or Path("runs", f"ablate-{Path(files[0]).stem}")
    group = fresh_folder(options.output, options.overwrite)

    seeds = options.seed or [recipes[0].seed]
    groups: list[list[Run]] = []
    for seed in dict.fromkeys(seeds):
        suffix, runs = f"-seed{seed}" if len(seeds) > 1 else "", []
        for stack, recipe in zip(stacks, recipes, strict=True):
            arguments = [*files, *stack.changes, *defaults(recipe), *overrides]
            runs.append(Run(stack, seed, group / f"{stack.name}{suffix}", arguments, recipe.code_paths))
        groups.append(runs)
    return groups


@says_errors
def main(arguments: list[str]) -> int:
    """Train, measure, write; return 0 if all stacks trained to their end."""
    if "--cost" in arguments:
        return ablate_cost.main(arguments)
    options = parse_arguments(arguments)
    measured = []
    for runs in plan(options):
        train(runs, options.turn)
        measured += [measure(run, runs[0]) for run in runs]
    what = f"stacks of {' '.join(options.recipe)}, in turns of {options.turn} steps"
    result = {"what": what} | circumstances(["benchmarks/ablate.py", *arguments]) | {"runs": measured}
    assert options.output is not None
    publish(options.output, result, report(result), partial(plot, measured), table(measured))
    return 1 if any(run["failed"] for run in measured) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
