"""What does a trick buy? Trains stacks of tricks in turns, with the same seeds, and compares speed, memory, loss and score.

python benchmarks/ablate.py yamls/quickstart.yaml --stack base --stack +normuon --stack +normuon+tread-ema [key=value …]
python benchmarks/ablate.py yamls/icons.yaml --all

A stack is `base`, the recipe as it is, with `+name` (yamls/ablations/name.yaml merged over it; or a path that ends in .yaml)
and `-name` (that algorithm left out), in the order written. The first stack is what the others are compared with, in --all the
recipe as it is: then the others are every file of yamls/ablations, and every algorithm of the recipe left out.

Every stack is trained with three seeds, and compared with the base of the same seed: differences with their 95% intervals. Each
run is a process of its own and an ordinary run of train.py; six at a time take turns of some steps (see turns.py). The same
command goes on after a kill: runs that have ended are read, the others go on from their newest checkpoint. More stacks or seeds
are added. Writes a table (.md), everything measured (.json) and curves (.png); runs and logs stay in runs/ablate-<name>/.

With --cost: what each algorithm of the recipe costs or saves in time and memory, one by one and together (ablate_cost.py).
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ablate_cost
from ablate_folder import Folder, to_train
from ablate_numbers import VALIDATION, chance, compare, measure
from ablate_report import plot, report, table
from common import ROOT, circumstances, parse, say, says_errors
from turns import Stack, publish, train

from prx_composer import registry
from prx_composer.common.errors import UserError, nearest
from prx_composer.recipe import config
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe
from prx_composer.training import check_lines

ABLATIONS = ROOT / "yamls" / "ablations"
PART = re.compile(r"\+(?P<path>[^+]+?\.ya?ml)|\+(?P<name>\w+)|-(?P<without>\w+)")
TARGETS = {"icons_score": 0.2}  # the accuracy whose time is compared, where the recipe has this score …
TARGET = 0.9  # … and else
SEEDS = 3
SCORES = ("shapes_score", "icons_score")  # that look at the accuracy in training, too


# --------------------------------------------------------------------------------------------------------- stacks


def parse_stack(text: str) -> Stack:
    """`base`, `+normuon`, `+normuon+tread-ema`, `base-ema`, `+my/own.yaml` → what to merge over the recipe.

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
    lines = check_lines([*recipe_files, *stack.changes, *overrides], 1, config_only=True, step=False)
    if problems := [line.removeprefix("✗ ") for line in lines if line.startswith("✗")]:
        raise UserError(f"--stack {stack.name}: {' '.join(problems)}")
    return recipe


def every_stack(recipe: Recipe) -> list[str]:
    """Return what --all stands for: the base, every file of yamls/ablations, every algorithm of the recipe left out."""
    added = [f"+{path.stem}" for path in sorted(ABLATIONS.glob("*.yaml"))]
    return ["base", *added, *(f"-{name}" for name, _ in entries(recipe.algorithms, "algorithms"))]


# ------------------------------------------------------------------------------------------------- what a stack is


def known_of(stack: Stack, recipe: Recipe, base: Recipe, arguments: list[str]) -> dict[str, Any]:
    """Return what runs of a stack need and what the result says of it.

    `adds`, `leaves_out` and `sets` are names of algorithms (and the optimizer) and keys of the recipe that differ from the base.
    """
    own, others = _tricks(recipe), _tricks(base)
    different = [
        key for key in vars(base) if key not in ("algorithms", "run_name", "seed") and vars(recipe)[key] != vars(base)[key]
    ]
    sets = [f"algorithms.{name}" for name in own if name in others and own[name] != others[name] and name in recipe.algorithms]
    sets += [key for key in different if key != "optimizer" or recipe.optimizer["name"] == base.optimizer["name"]]
    adds = [name for name in own if name not in others]
    settings = {
        f"{name}.{key}": (others[name].get(key), own[name].get(key))
        for name in own
        if name in others
        for key in sorted(own[name].keys() | others[name].keys())
        if own[name].get(key) != others[name].get(key)
    }
    return {
        "changes": list(stack.changes),
        "adds": adds,
        "leaves_out": [name for name in others if name not in own],
        "sets": sets,
        "new_settings": [key for key, (before, _) in settings.items() if before is None],
        "notes": [
            *(RANDOM_TEACHER.format(name) for name in adds if _has_random_weights(own[name])),
            *([f"it sets {', '.join(f'{key} to {now}' for key, (_, now) in settings.items())}"] if settings and not adds else []),
        ],
        "not_compared": not_compared(recipe, base),
        "arguments": arguments,
        "code_paths": recipe.code_paths,
        "recipe": hashlib.sha256(json.dumps(vars(recipe), sort_keys=True, default=str).encode()).hexdigest()[:16],
    }


RANDOM_TEACHER = "{} looks through a network with random weights: this is what it costs, not what it brings"


def _tricks(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return dict(entries(recipe.algorithms, "algorithms")) | {recipe.optimizer["name"]: recipe.optimizer}


def _has_random_weights(arguments: dict[str, Any]) -> bool:
    return bool(arguments.get("random_weights")) or "config" in (arguments.get("teacher") or {})


def not_compared(recipe: Recipe, base: Recipe) -> dict[str, str]:
    """Return why a number of an evaluation cannot be compared with the base's, by its key.

    The error is one of a velocity: another noise scale, image size, autoencoder or data set has others. `mse`, of runs before the
    validation loss, is a mean over the recipe's own timesteps, too.
    """
    flow, other = dict(recipe.model.get("flow") or {}), dict(base.model.get("flow") or {})
    whole = ("image_size", "eval_loader", "eval_subset_num_batches")
    what = [key for key in whole if vars(recipe)[key] != vars(base)[key]]
    what += ["model.autoencoder"] if recipe.model.get("autoencoder") != base.model.get("autoencoder") else []
    scale = [f"model.flow.{key}" for key in ("noise_scale",) if flow.get(key) != other.get(key)]
    mean = [f"model.flow.{key}" for key in flow.keys() | other.keys() if key != "prediction" and flow.get(key) != other.get(key)]
    found = {VALIDATION[0]: what + scale, VALIDATION[1]: what + sorted(mean)}
    return {key: f"another {' and '.join(keys)}" for key, keys in found.items() if keys}


def redundant(name: str, known: dict[str, Any]) -> str | None:
    """Return why a file of yamls/ablations shows nothing on this recipe, if so."""
    if known["adds"] or known["leaves_out"]:
        return None
    if not known["sets"]:
        return "it changes nothing of this recipe"
    own = [key for key in known["sets"] if key.startswith("algorithms.") or key == "optimizer"]
    if own != known["sets"] or known["new_settings"]:
        return None
    return f"the recipe has {', '.join(own)} already, and only values of it would change; name it by --stack to compare those"


# ----------------------------------------------------------------------------------------------------------- main


@dataclass
class Comparison:
    """What every comparison of stacks can be asked."""

    recipe: Annotated[list[str], "YAML files, then key=value, as for train.py; these hold for every stack"]
    _: KW_ONLY
    seed: Annotated[Sequence[int], "repeat for several; three by default, the recipe's and the first others of 1, 2, 3"] = ()
    turn: Annotated[int, "steps that a stack trains before it is the next one's turn"] = 25
    together: Annotated[int, "runs that take turns with one another, the first stack among them, each in memory"] = 6
    target: Annotated[float | None, "the accuracy to which seconds are counted; 0.9, on icons 0.2"] = None
    again: Annotated[bool, "train again what failed"] = False
    output: Annotated[Path | None, "where results go, without suffix; runs/ablate-<recipe> by default"] = None
    overwrite: Annotated[bool, "delete runs and results of the same name first"] = False

    def __post_init__(self) -> None:
        for option, least in (("turn", 1), ("together", 2)):
            if getattr(self, option) < least:
                raise UserError(f"--{option} must be at least {least}.")

    @property
    def files(self) -> list[str]:
        return [argument for argument in self.recipe if "=" not in argument]

    @property
    def overrides(self) -> list[str]:
        return [argument for argument in self.recipe if "=" in argument]


@dataclass
class Options(Comparison):
    """The command line."""

    _: KW_ONLY
    stack: Annotated[Sequence[str], "base, +name, -name, or several joined; may be repeated"] = ()
    all: Annotated[bool, "every file of yamls/ablations, and every algorithm of the recipe left out"] = False
    cost: Annotated[bool, "cost of every algorithm instead; --cost --help has its options"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stack and not self.all:
            raise UserError("name stacks, such as --stack base --stack +normuon, or all of them: --all.")


def parse_arguments(arguments: list[str]) -> Options:
    joined: list[str] = []
    for argument in arguments:  # --stack -ema would be an option -ema to argparse
        joined[-1:] = [f"--stack={argument}"] if joined[-1:] == ["--stack"] else [*joined[-1:], argument]
    return parse(Options, joined, __doc__, "ablate.py")


def defaults(recipe: Recipe) -> list[str]:
    """Return what a comparison sets unless the command line says otherwise."""
    settings = ["progress_bar=false", "save_interval=0.1dur", "save_num_checkpoints_to_keep=2"]
    if recipe.callbacks.get("images", False) is not False:
        settings.append("callbacks.images=false")
    settings += [f"callbacks.{score}.interval=0.05dur" for score in SCORES if isinstance(recipe.callbacks.get(score), dict)]
    if isinstance(recipe.callbacks.get("icons_score"), dict):
        settings += ["callbacks.icons_score.wordings=[]", "callbacks.icons_score.shown=0"]
    return settings


def plan_stacks(options: Options) -> tuple[Recipe, dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return the first stack's recipe, what is known of every stack, and which of those that --all names the recipe refuses.

    Raises:
        UserError: no recipe, a stack that is there twice, or one named by --stack that the recipe refuses.
    """
    files, overrides = options.files, options.overrides
    if not files:
        raise UserError("Name a recipe, such as yamls/quickstart.yaml.")
    named = [parse_stack(text) for text in options.stack]
    names = [stack.name for stack in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--stack {twice[0]} is there twice; give own files other names.")
    every = [parse_stack(text) for text in every_stack(config.load([*files, *overrides]))] if options.all else []
    stacks = [*named, *(stack for stack in every if stack.name not in names)]
    if options.all:
        stacks.sort(key=lambda stack: stack.name != "base")  # which comes first
    base, known, refused = None, dict[str, dict[str, Any]](), list[dict[str, Any]]()
    for stack in stacks:
        try:
            recipe = check_stack(files, stack, overrides)
            base = base or recipe
            found = known_of(stack, recipe, base, [*files, *stack.changes, *defaults(recipe), *overrides])
            if stack in every and known and (why := redundant(stack.name, found)):
                raise UserError(f"--stack {stack.name}: {why}.")
            known[stack.name] = found
        except UserError as error:
            if stack not in every or stack.name == "base":
                raise
            reason = str(error).removeprefix(f"--stack {stack.name}: ")
            refused.append({"stack": stack.name, "changes": list(stack.changes), "reason": reason})
            say(f"{stack.name} is left out: {reason}")
    assert base is not None
    return base, known, refused


def default_seeds(first: int) -> list[int]:
    return list(dict.fromkeys([first, 1, 2, 3]))[:SEEDS]


def length_of(options: Comparison, recipe: Recipe) -> str:
    """Return how long runs are; if the command line made them shorter or longer, where the recipe has which."""
    before = config.load(options.files).max_duration
    return recipe.max_duration if before == recipe.max_duration else f"{recipe.max_duration}, where the recipe has {before}"


def collect(folder: Folder, head: dict[str, Any], target: float) -> dict[str, Any]:
    """Return all that the folder's runs have left so far, compared."""
    groups = folder.groups()
    planned = [(run, runs[0]) for runs in (group.runs() for group in groups) for run in runs]
    measured = [measure(run, base, target) for run, base in planned if run.end is not None]
    stacks = {name: known for group in groups for name, known in group.stacks.items()}
    comparisons = compare(measured, stacks)
    told = ("changes", "adds", "leaves_out", "sets", "notes", "not_compared", "architecture")
    return head | {
        "seeds": list(dict.fromkeys(group.seed for group in groups)),
        "target": target,
        "still_to_train": len(planned) - len(measured),
        "chance": chance(comparisons),
        "stacks": {name: {key: known[key] for key in told if key in known} for name, known in stacks.items()},
        "refused": folder.refuse([]),
        "comparisons": comparisons,
        "runs": measured,
    }


@says_errors
def main(arguments: list[str]) -> int:
    """Train, measure, write; return 0 if all stacks trained to their end."""
    if "--cost" in arguments:
        return ablate_cost.main(arguments)
    options = parse_arguments(arguments)
    recipe, stacks, refused = plan_stacks(options)
    output = options.output or Path("runs", f"ablate-{Path(options.files[0]).stem}")
    what = f"stacks of {' '.join(options.recipe)} ({length_of(options, recipe)})"
    return train_and_compare(options, recipe, stacks, refused, output, what, ["benchmarks/ablate.py", *arguments])


def train_and_compare(
    options: Comparison,
    recipe: Recipe,
    stacks: dict[str, dict[str, Any]],
    refused: list[dict[str, Any]],
    output: Path,
    what: str,
    command: list[str],
    write: Callable[[dict[str, Any]], str] = report,
) -> int:
    """Train stacks beside the first of them, or go on with it; write what was measured after every group of runs.

    Args:
        recipe: the first stack's.
        stacks: what is known of each, as `plan_stacks` gives it.
        what: is compared, in words.
        write: makes a page of the result.

    Returns:
        the command's exit code: 0 if all stacks trained to their end.
    """
    question = {"recipe": options.recipe, "first stack": next(iter(stacks)), "turn": options.turn}
    folder = Folder(output, options.overwrite, question)
    folder.refuse(refused)
    folder.add(options.seed or default_seeds(recipe.seed), stacks, options.together)
    head = {"what": f"{what}, in turns of {options.turn} steps", "recipe": options.recipe, "length": length_of(options, recipe)}
    head |= circumstances(command)
    starts = folder.start({key: head[key] for key in ("date", "machine", "load", "threads", "versions", "command")})
    target = options.target or next((TARGETS[score] for score in TARGETS if recipe.callbacks.get(score)), TARGET)
    for group in folder.groups():
        runs = group.runs(len(starts) - 1, folder.lock)
        if left := to_train(runs, options.again):
            say(f"seed {group.seed}: {', '.join(run.stack.name for run in left)}")
            train(left, options.turn)
            _publish(output, collect(folder, head | {"starts": starts}, target), write)
    found = collect(folder, head | {"starts": starts}, target)
    _publish(output, found, write)
    return 1 if any(run["failed"] for run in found["runs"]) else 0


def _publish(output: Path, result: dict[str, Any], write: Callable[[dict[str, Any]], str]) -> None:
    publish(output, result, write(result), partial(plot, result), table(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
