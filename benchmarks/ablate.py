"""What does a trick buy? Trains stacks of tricks in turns, with equal seeds, and compares speed, memory, loss and score.

python benchmarks/ablate.py yamls/quickstart.yaml --stack base --stack +muon --stack +muon+tread-ema [key=value …]

A stack is `base`, the recipe as it is, with `+name` (yamls/ablations/name.yaml merged over it; or a path that ends in .yaml)
and `-name` (that algorithm left out), in the order written. The first stack is what the others are compared with.

Each stack is a process of its own and an ordinary run of train.py; they take turns of some steps (see turns.py). Writes a table
(.md), everything measured (.json) and curves (.png); the runs and their logs stay in runs/ablate-<name>/.

With --cost: what each algorithm of the recipe costs or saves in time and memory, one by one and together (ablate_cost.py).
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import ablate_cost
from ablate_report import plot, report, summarise, table
from ablate_runs import Run, Stack, fresh_folder, head, outputs, say, train, write_json

from prx_composer.common.errors import UserError, nearest
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.runs.folder import read_metrics

ABLATIONS = Path(__file__).resolve().parents[1] / "yamls" / "ablations"
PART = re.compile(r"\+(?P<path>[^+]+?\.ya?ml)|\+(?P<name>\w+)|-(?P<without>\w+)")


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
    """The recipe with this stack.

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
        config.import_code(recipe.code_paths)
        config.check(recipe)
    except UserError as error:
        raise UserError(f"--stack {stack.name}: {error}") from error
    return recipe


# ----------------------------------------------------------------------------------------------------------- runs


def defaults(recipe: Recipe) -> list[str]:
    """What a comparison sets unless the command line says otherwise."""
    settings = ["progress_bar=false", "save_interval=1dur"]
    if recipe.callbacks.get("images", False) is not False:
        settings.append("callbacks.images=false")
    if isinstance(recipe.callbacks.get("shapes_score"), dict):
        settings.append("callbacks.shapes_score.interval=0.05dur")
    return settings


def measure(run: Run, base: Run) -> dict[str, Any]:
    """What a run left, in numbers."""
    who = {"stack": run.stack.name, "seed": run.seed, "merged": list(run.stack.changes), "failed": run.failure()}
    header, *steps = run.rows() or [{}]
    metrics = run.folder / "metrics.jsonl"
    return who | summarise(header, steps, read_metrics(metrics) if metrics.exists() else [], base.rows()[1:])


# ----------------------------------------------------------------------------------------------------------- main


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="+", help="YAML files, then key=value, as for train.py; these hold for every stack")
    parser.add_argument("--cost", action="store_true", help="cost of every algorithm instead; --cost --help has its options")
    parser.add_argument("--stack", action="append", required=True, help="base, +name, -name, or several joined")
    parser.add_argument("--seed", type=int, action="append", help="repeat for several; the recipe's by default")
    parser.add_argument("--turn", type=int, default=25, help="steps that a stack trains before it is the next one's turn")
    parser.add_argument("--output", type=Path, help="where results go, without suffix; runs/ablate-<recipe> by default")
    parser.add_argument("--overwrite", action="store_true", help="delete runs and results of the same name first")
    joined: list[str] = []
    for argument in arguments:  # --stack -ema would be an option -ema to argparse
        joined[-1:] = [f"--stack={argument}"] if joined[-1:] == ["--stack"] else [*joined[-1:], argument]
    parsed = parser.parse_intermixed_args(joined)
    if parsed.turn < 1:
        parser.error("--turn must be at least 1.")
    return parsed


def plan(options: argparse.Namespace) -> list[list[Run]]:
    """The runs, checked: for every seed, those that are trained in turns."""
    overrides = [argument for argument in options.recipe if "=" in argument]
    files = [argument for argument in options.recipe if "=" not in argument]
    if not files:
        raise UserError("Name a recipe, such as yamls/quickstart.yaml.")
    stacks = [parse_stack(text) for text in options.stack]
    names = [stack.name for stack in stacks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--stack {twice[0]} is there twice; give own files other names.")
    recipes = [check_stack(files, stack, overrides) for stack in stacks]
    output = options.output or Path("runs", f"ablate-{Path(files[0]).stem}")
    group = fresh_folder(output, options.overwrite)
    options.output = output

    seeds = options.seed or [recipes[0].seed]
    runs = []
    for seed in dict.fromkeys(seeds):
        suffix = f"-seed{seed}" if len(seeds) > 1 else ""
        runs.append(
            [
                Run(
                    stack,
                    seed,
                    group / f"{stack.name}{suffix}",
                    [*files, *stack.changes, *defaults(recipe), *overrides],
                    recipe.code_paths,
                )
                for stack, recipe in zip(stacks, recipes, strict=True)
            ]
        )
    return runs


def main(arguments: list[str]) -> int:
    """Trains, measures, writes; 0 if all stacks trained to their end."""
    if "--cost" in arguments:
        return ablate_cost.main(arguments)
    options = parse_arguments(arguments)
    try:
        groups = plan(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    measured = []
    for runs in groups:
        train(runs, options.turn)
        measured += [measure(run, runs[0]) for run in runs]
    what = f"stacks of {' '.join(options.recipe)}, in turns of {options.turn} steps"
    result = head(what, arguments) | {"runs": measured}
    data, text, picture = outputs(options.output)
    write_json(result, data)
    text.write_text(report(result))
    plot(measured, picture)
    say(f"\n{table(measured)}\n{data} · {text} · {picture}")
    return 1 if any(run["failed"] for run in measured) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
