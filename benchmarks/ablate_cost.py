"""What does each algorithm of a recipe cost or save? Time and memory of a step, one by one and in the whole stack.

python benchmarks/ablate.py yamls/24h_mini.yaml --cost [--stage 1] [--steps 50] [key=value …]

Measured are, for every stage, the bare recipe, without algorithms; the bare recipe with each one alone; the whole stack without
each one; and the whole stack. `progressive_resolution` is no row but the stage itself: its image size and batch hold for all
stacks. What is open in the middle of the stage is open all the time, and what isn't is left out and named.

Each stack is a process of its own and an ordinary run of train.py on the recipe's data, without evaluation, images and other
callbacks; they take turns of some steps (see turns.py). Not all at once, for their memory's sake: --together of them, with the
bare recipe and the whole stack always among them. Writes tables (.md), everything measured (.json) and bars (.png).
"""

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablate_cost_report import Measurement, plot, report, summarise, tables
from ablate_runs import Run, Stack, fresh_folder, head, outputs, say, train, write_json
from one_stage import (
    SHAPE,
    batch_of_share,
    closed_algorithms,
    one_stage,
    with_random_weights,
    with_synthetic_batches,
    write_recipe,
)

from prx_composer.commands.plan.timeline import Span, Timeline, timeline
from prx_composer.common.errors import UserError, nearest
from prx_composer.recipe import config
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe

BARE, WHOLE = "bare", "whole"


# --------------------------------------------------------------------------------------------------------- stacks


def stacks_of(algorithms: list[str]) -> dict[str, frozenset[str]]:
    """Stacks by name, with the algorithms in each: bare, bare+a …, whole-a …, whole; each set once, under its first name."""
    everything = frozenset(algorithms)
    named = {BARE: frozenset[str](), WHOLE: everything}
    named |= {f"{BARE}+{name}": frozenset({name}) for name in algorithms}
    named |= {f"{WHOLE}-{name}": everything - {name} for name in algorithms}
    return {name: present for name, present in named.items() if name == next(n for n in named if named[n] == present)}


def in_groups(names: list[str], together: int) -> list[list[str]]:
    """Those that take turns with one another: `bare`, `whole` and as many others as there is room for."""
    anchors, others = [name for name in names if name in (BARE, WHOLE)], [name for name in names if name not in (BARE, WHOLE)]
    room = together - len(anchors)
    return [anchors + others[first : first + room] for first in range(0, len(others), room)] or [anchors]


@dataclass(frozen=True)
class Stage:
    """What is measured of one stage.

    Args:
        number: from 0.
        sizes: "16 px, batch 64, microbatch 64".
        algorithms: those that are measured, in the recipe's order.
        kept, closed: those that stay in all stacks, and those that aren't open.
        content: the stage as a recipe, with the whole stack.
    """

    number: int
    sizes: str
    algorithms: list[str]
    kept: list[str]
    closed: list[str]
    content: dict[str, Any]


def plan_stage(recipe: Recipe, line: Timeline, number: int, options: argparse.Namespace) -> Stage:
    """The stage as a recipe of its own.

    Raises:
        UserError: nothing is open in it that could be measured.
    """
    span: Span = line.spans[number]
    batch = batch_of_share(span, span.microbatch_size, options.of)
    content = one_stage(recipe, line, span, batch, span.microbatch_size, (options.rounds + 1) * options.turn)
    if options.random_weights:
        content = with_random_weights(content)
    closed = closed_algorithms(recipe, line, span)
    kept = [name for name in content["algorithms"] if name in options.keep]
    measured = [name for name in content["algorithms"] if name not in kept]
    if not measured:
        left = f" Not open in its middle: {', '.join(closed)}." if closed else ""
        raise UserError(f"stage {number} of the recipe has no algorithm whose cost could be measured.{left}")
    sizes = f"{span.image_size} px, batch {batch}, microbatch {span.microbatch_size}"
    return Stage(number, sizes, measured, kept, closed, content)


def plan_runs(stage: Stage, folder: Path, options: argparse.Namespace) -> list[list[Run]]:
    """The runs of a stage, in groups that take turns."""
    content = stage.content
    if options.synthetic:
        content = with_synthetic_batches(content, folder, 0.4, options.stored_text, options.random_weights)
    path = write_recipe(content, folder / f"stage{stage.number}.yaml")
    stacks = stacks_of(stage.algorithms)
    groups: list[list[Run]] = []
    for number, names in enumerate(in_groups(list(stacks), options.together)):
        place = folder / f"stage{stage.number}" / f"group{number}"
        place.mkdir(parents=True)
        runs = []
        for name in names:
            changes = tuple(f"algorithms.{left}=false" for left in stage.algorithms if left not in stacks[name])
            arguments = [str(path), *changes]
            runs.append(Run(Stack(name, changes), content["seed"], place / name, arguments, content["code_paths"]))
        groups.append(runs)
    return groups


# ----------------------------------------------------------------------------------------------------------- runs


def measure(runs: list[list[Run]], turn: int) -> list[Measurement]:
    """Trains group after group."""
    measured = []
    for number, group in enumerate(runs):
        say(f"group {number + 1} of {len(runs)}: {', '.join(run.stack.name for run in group)}")
        train(group, turn)
        for run in group:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # the last one, which cannot be switched off
            measured.append(Measurement(run.stack.name, number, run.rows()[1:], run.failure()))
    return measured


# ----------------------------------------------------------------------------------------------------------- main


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablate.py --cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="+", help="YAML files and key=value, as for train.py")
    parser.add_argument("--cost", action="store_true", help="what asks for all this")
    parser.add_argument("--stage", type=int, action="append", help="only this one, from 0; may be repeated")
    parser.add_argument("--steps", type=int, default=50, help="of every stack that count; whole turns of them")
    parser.add_argument("--turn", type=int, default=10, help="steps in a row; what happens once in so many steps is seen")
    parser.add_argument("--together", type=int, default=6, help="stacks that are in memory at the same time, at least 3")
    parser.add_argument("--keep", action="append", default=[], help="an algorithm that stays in all stacks; may be repeated")
    parser.add_argument("--of", type=int, default=1, help="GPUs that the recipe's batch is divided over, such as 32")
    parser.add_argument("--samples", type=int, help="images in the data, for recipes in epochs")
    parser.add_argument("--synthetic", action="store_true", help="random batches instead of the recipe's data")
    parser.add_argument("--stored-text", action="store_true", help="with --synthetic: text embeddings come with the batch")
    parser.add_argument("--random-weights", action="store_true", help="teachers and text encoder by size, without download")
    parser.add_argument("--output", type=Path, help="where results go, without suffix; runs/cost-<recipe> by default")
    parser.add_argument("--overwrite", action="store_true", help="delete runs and results of the same name first")
    parsed = parser.parse_intermixed_args(arguments)
    for option, least in (("steps", 1), ("turn", 1), ("together", 3), ("of", 1)):
        if getattr(parsed, option) < least:
            parser.error(f"--{option} must be at least {least}.")
    if parsed.stored_text and not parsed.synthetic:
        parser.error("--stored-text says what --synthetic batches have; give both.")
    parsed.turn = min(parsed.turn, parsed.steps)
    parsed.rounds = -(-parsed.steps // parsed.turn)
    return parsed


def plan(options: argparse.Namespace) -> list[tuple[Stage, list[list[Run]]]]:
    """The stages and their runs, checked.

    Raises:
        UserError: a recipe that is refused, stages or algorithms that aren't there, results that are.
    """
    recipe = config.load(options.recipe)
    config.import_code(recipe.code_paths)
    config.check(recipe)
    present = [name for name, _ in entries(recipe.algorithms, "algorithms") if name != SHAPE]
    for name in options.keep:
        if name not in present:
            raise UserError(f"--keep {name}: the recipe has no such algorithm.{nearest(name, present)}")
    line = timeline(recipe, options.of, options.samples)
    numbers = sorted(set(options.stage or range(len(line.spans))))
    for number in numbers:
        if not 0 <= number < len(line.spans):
            raise UserError(f"--stage {number}: the recipe has {len(line.spans)} that train, from 0.")
    files = [argument for argument in options.recipe if "=" not in argument]
    options.output = options.output or Path("runs", f"cost-{Path(files[0]).stem}")
    stages = [plan_stage(recipe, line, number, options) for number in numbers]
    folder = fresh_folder(options.output, options.overwrite)
    return [(stage, plan_runs(stage, folder, options)) for stage in stages]


def main(arguments: list[str]) -> int:
    """Trains, measures, writes; 0 unless a run crashed, or there is nothing to compare with. A refused stack is a result."""
    options = parse_arguments(arguments)
    try:
        planned = plan(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    what = f"cost of the algorithms of {' '.join(options.recipe)}, {options.rounds} turns of {options.turn} steps"
    around = {"threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2)}
    data, text, picture = outputs(options.output)
    stages: list[dict[str, Any]] = []
    for stage, runs in planned:
        say(f"stage {stage.number}: {stage.sizes}")
        known = {key: getattr(stage, key) for key in ("number", "sizes", "algorithms", "kept", "closed")}
        found = summarise(measure(runs, options.turn), stage.algorithms, stacks_of(stage.algorithms))
        stages.append(known | found)
        result = head(what, arguments) | around | {"stages": stages}
        write_json(result, data)  # after every stage, so that who stops it keeps what there is
        text.write_text(report(result))
        plot(stages, picture)
        say(f"\n{tables(stages[-1])}\n{data} · {text} · {picture}")
    stacks = [stack for stage in stages for stack in stage["stacks"]]
    return 1 if any(stack["failed"] and (stack["stack"] in (BARE, WHOLE) or not stack["refused"]) for stack in stacks) else 0
