"""What does each algorithm of a recipe cost or save? Time and memory of a step, one by one and in the whole stack.

python benchmarks/ablate.py yamls/24h_mini.yaml --cost [--stage 1] [--steps 50] [key=value …]

Measured are, for every stage, the bare recipe, without algorithms; the bare recipe with each one alone; the whole stack without
each one; and the whole stack. `progressive_resolution` is no row but the stage itself: its image size and batch hold for all
stacks. What is open in the middle of the stage is open all the time, and what isn't is left out and named.

Each stack is a process of its own and an ordinary run of train.py on the recipe's data, without evaluation, images and other
callbacks; they take turns of some steps (see turns.py). Not all at once, for their memory's sake: --together of them, with the
bare recipe and the whole stack always among them. Writes tables (.md), everything measured (.json) and bars (.png).

Whatever is compared is compared within rounds, when the machine was the same. A round counts with the mean of its steps, so that
what an algorithm does once in a while has its share; the first, warming up, doesn't count.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

from common import by_turn, circumstances, heading, middle_half, parse, save, say, says_errors, subplots
from stages import SHAPE, batch_of_share, closed_algorithms, one_stage, with_random_weights, with_synthetic_batches, write_recipe
from turns import REFUSED, Run, Stack, fresh_folder, publish, train

from prx_composer import registry
from prx_composer.commands.plan.timeline import Timeline, timeline
from prx_composer.common.errors import UserError, nearest
from prx_composer.recipe import config
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe

BARE, WHOLE = "bare", "whole"

Rounds = dict[tuple[int, int], float]  # (group, round) → mean over the steps of the turn


# -------------------------------------------------------------------------------------------------------- options


@dataclass
class Options:
    """The command line."""

    recipe: Annotated[list[str], "YAML files and key=value, as for train.py"]
    _: KW_ONLY
    cost: Annotated[bool, "what asks for all this"] = False
    stage: Annotated[Sequence[int], "only this one, from 0; may be repeated"] = ()
    steps: Annotated[int, "of every stack that count; whole turns of them"] = 50
    turn: Annotated[int, "steps in a row; what happens once in so many steps is seen"] = 10
    together: Annotated[int, "stacks that take turns with one another, each in memory"] = 6
    keep: Annotated[Sequence[str], "an algorithm that stays in all stacks; may be repeated"] = ()
    of: Annotated[int, "GPUs that the recipe's batch is divided over, such as 32"] = 1
    samples: Annotated[int | None, "images in the data, for recipes in epochs"] = None
    synthetic: Annotated[bool, "random batches instead of the recipe's data"] = False
    stored_text: Annotated[bool, "with --synthetic: text embeddings come with the batch"] = False
    random_weights: Annotated[bool, "teachers and text encoder by size, without download"] = False
    output: Annotated[Path | None, "where results go, without suffix; runs/cost-<recipe> by default"] = None
    overwrite: Annotated[bool, "delete runs and results of the same name first"] = False
    rounds: int = field(init=False)

    def __post_init__(self) -> None:
        for option, least in (("steps", 1), ("turn", 1), ("together", 3), ("of", 1)):
            if getattr(self, option) < least:
                raise UserError(f"--{option} must be at least {least}.")
        if self.stored_text and not self.synthetic:
            raise UserError("--stored-text says what --synthetic batches have; give both.")
        self.turn = min(self.turn, self.steps)
        self.rounds = -(-self.steps // self.turn)


def parse_arguments(arguments: list[str]) -> Options:
    return parse(Options, arguments, __doc__, "ablate.py --cost")


# --------------------------------------------------------------------------------------------------------- stacks


def stacks_of(algorithms: list[str]) -> dict[str, frozenset[str]]:
    """Return the algorithms of every stack: bare, bare+a …, whole-a …, whole; each set once, under its first name."""
    everything = frozenset(algorithms)
    named = {BARE: frozenset[str](), WHOLE: everything}
    named |= {f"{BARE}+{name}": frozenset({name}) for name in algorithms}
    named |= {f"{WHOLE}-{name}": everything - {name} for name in algorithms}
    return {name: present for name, present in named.items() if name == next(n for n in named if named[n] == present)}


def in_groups(names: list[str], together: int) -> list[list[str]]:
    """Return those that take turns with one another: `bare`, `whole` and as many others as there is room for."""
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


def plan_stage(recipe: Recipe, line: Timeline, number: int, options: Options) -> Stage:
    """Return the stage as a recipe of its own.

    Raises:
        UserError: nothing is open in it that could be measured.
    """
    span = line.spans[number]
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


def plan_runs(stage: Stage, folder: Path, options: Options) -> list[list[Run]]:
    """Return the runs of a stage, in groups that take turns."""
    content = stage.content
    if options.synthetic:
        content = with_synthetic_batches(content, folder, 0.4, options.stored_text, options.random_weights)
    path = write_recipe(content, folder / f"stage{stage.number}.yaml")
    stacks = stacks_of(stage.algorithms)
    groups: list[list[Run]] = []
    for number, names in enumerate(in_groups(list(stacks), options.together)):
        place = folder / f"stage{stage.number}" / f"group{number}"
        place.mkdir(parents=True)
        groups.append([])
        for name in names:
            changes = tuple(f"algorithms.{left}=false" for left in stage.algorithms if left not in stacks[name])
            arguments, code = [str(path), *changes], content["code_paths"]
            groups[-1].append(Run(Stack(name, changes), content["seed"], place / name, arguments, code))
    return groups


def plan(options: Options) -> list[tuple[Stage, list[list[Run]]]]:
    """Return the stages and their runs, checked.

    Raises:
        UserError: a recipe that is refused, stages or algorithms that aren't there, results that are.
    """
    recipe = config.load(options.recipe)
    registry.import_code(recipe.code_paths)
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


# -------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Measurement:
    """One run of a stack: the lines that `Turns` wrote, one per step, and what it said if it failed."""

    stack: str
    group: int
    steps: list[dict[str, Any]]
    failed: str | None = None


def measure(runs: list[list[Run]], turn: int) -> list[Measurement]:
    """Train group after group."""
    measured = []
    for number, group in enumerate(runs):
        say(f"group {number + 1} of {len(runs)}: {', '.join(run.stack.name for run in group)}")
        train(group, turn)
        for run in group:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # the last one, which cannot be switched off
            measured.append(Measurement(run.stack.name, number, run.rows()[1:], run.failure()))
    return measured


class Stacks:
    """What was measured of every stack, by its name.

    Args:
        algorithms: by name of the stack; the first is the bare recipe, the second the whole stack.
    """

    def __init__(self, measurements: list[Measurement], algorithms: Mapping[str, frozenset[str]]):
        self.algorithms = algorithms
        runs = {name: [m for m in measurements if m.stack == name] for name in algorithms}
        self.said = {name: next((m.failed for m in runs[name] if m.failed), None) for name in algorithms}
        good = {name: [] if self.said[name] else runs[name] for name in algorithms}
        self.times = {name: self._rounds(good[name], "step_ms") for name in algorithms}
        self.waiting = {name: self._rounds(good[name], "loader_ms") for name in algorithms}
        self.memory = {name: {m.group: m.steps[-1]["memory_mb"] for m in good[name] if m.steps} for name in algorithms}

    @staticmethod
    def _rounds(measurements: list[Measurement], key: str) -> Rounds:
        turns = {measured.group: by_turn(measured.steps, key, fmean) for measured in measurements}
        return {(group, turn): mean for group, means in turns.items() for turn, mean in means.items() if turn > 0}

    def row(self, name: str, order: list[str]) -> dict[str, Any]:
        """Return the numbers of a stack."""
        bare, whole = list(self.algorithms)[:2]
        times, failed, memory = self.times[name], self.said[name], self.memory[name].values()

        def relative(base: Rounds) -> dict[str, float] | None:
            return middle_half([times[key] / base[key] for key in sorted(times.keys() & base.keys())])

        return {
            "stack": name,
            "algorithms": [algorithm for algorithm in order if algorithm in self.algorithms[name]],
            "failed": failed,
            "refused": failed is not None and failed.startswith(REFUSED),
            "step_ms": middle_half(list(times.values())),
            "x_bare": relative(self.times[bare]),
            "x_whole": relative(self.times[whole]),
            "loader_ms": round(median(self.waiting[name].values()), 3) if self.waiting[name] else None,
            "memory_mb": round(median(memory), 1) if memory else None,
        }

    def added(self, with_it: str, without: str, reference: str) -> dict[str, Any]:
        """Return what is added: as a share of the reference within each round, that share of its median in ms, and memory."""
        more, less, base = (self.times[name] for name in (with_it, without, reference))
        shares = [(more[key] - less[key]) / base[key] for key in sorted(more.keys() & less.keys() & base.keys())]
        shared = self.memory[with_it].keys() & self.memory[without].keys()
        memory = [self.memory[with_it][group] - self.memory[without][group] for group in shared]
        return {
            "share": middle_half(shares),
            "ms": middle_half(shares, median(base.values())) if shares else None,
            "memory_mb": round(median(memory), 1) if memory else None,
            "failed": [f"{name}: {self.said[name]}" for name in dict.fromkeys((with_it, without)) if self.said[name]],
        }


def summarise(measurements: list[Measurement], algorithms: list[str], stacks: Mapping[str, frozenset[str]]) -> dict[str, Any]:
    """Return the numbers of every stack, and of every algorithm by itself and in the whole.

    Args:
        algorithms: those that are measured, in order.
        stacks: as of `Stacks`.
    """
    found, (bare, whole, *_) = Stacks(measurements, stacks), stacks
    named = {present: name for name, present in stacks.items()}
    effects = [
        {
            "algorithm": algorithm,
            "alone": found.added(named[frozenset({algorithm})], bare, bare),
            "in_the_whole": found.added(whole, named[stacks[whole] - {algorithm}], whole),
        }
        for algorithm in algorithms
    ]
    rows = [found.row(name, algorithms) for name in stacks]
    return {"stacks": rows, "effects": effects, "together": found.added(whole, bare, bare)}


# ---------------------------------------------------------------------------------------------------------- tables


def tables(stage: dict[str, Any]) -> str:
    """Write what the algorithms cost, and what was measured of every stack, in Markdown."""
    lines = [f"**Stage {stage['number']}: {stage['sizes']}.**"]
    if stage["kept"]:
        lines[0] += f" In all stacks: {', '.join(stage['kept'])}."
    if stage["closed"]:
        lines[0] += f" Not open in the middle of this stage, and left out: {', '.join(stage['closed'])}."
    lines += [
        "",
        "| algorithm | alone: ms | % of bare (middle half) | MB | in the whole: ms | % of whole (middle half) | MB |",
        "|---|" + "---:|" * 6,
    ]
    for row in stage["effects"]:
        lines.append("| " + " | ".join([f"`{row['algorithm']}`", *_cells(row["alone"]), *_cells(row["in_the_whole"])]) + " |")
    lines.append("| **together** | " + " | ".join([*_cells(stage["together"]), "", "", ""]) + " |")
    sums = [_sum(stage["effects"], side) for side in ("alone", "in_the_whole")]
    lines.append(f"| sum of the lines | {sums[0]} | | | {sums[1]} | | |")
    lines += [
        "",
        "| stack | step (ms) | × bare (middle half) | × whole (middle half) | waiting for data (ms) | memory (MB) |",
        "|---|" + "---:|" * 5,
    ]
    for row in stage["stacks"]:
        if row["failed"]:
            kind = "refused" if row["refused"] else "failed"
            reason = row["failed"].removeprefix(REFUSED).replace("|", "\\|")
            lines.append(f"| `{row['stack']}` | {kind}: {reason} | | | | |")
            continue
        numbers = [_number(row["step_ms"], "{median:.1f}")]
        numbers += [_number(row[key], "{median:.3f} ({p25:.3f}–{p75:.3f})") for key in ("x_bare", "x_whole")]
        numbers += ["–" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in (("loader_ms", 1), ("memory_mb", 0))]
        lines.append(f"| `{row['stack']}` | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + "\n"


def _cells(added: dict[str, Any]) -> list[str]:
    memory = "–" if added["memory_mb"] is None else f"{added['memory_mb']:+.0f}"
    percent = {name: 100 * value for name, value in added["share"].items()} if added["share"] else None
    return [_number(added["ms"], "{median:+.1f}"), _number(percent, "{median:+.1f} ({p25:+.1f} to {p75:+.1f})"), memory]


def _number(numbers: dict[str, float] | None, form: str) -> str:
    return "–" if numbers is None else form.format(**numbers)


def _sum(effects: list[dict[str, Any]], side: str) -> str:
    parts = [row[side]["ms"] for row in effects]
    return "–" if None in parts else f"{sum(part['median'] for part in parts):+.1f}"


def report(result: dict[str, Any]) -> str:
    """Write the tables with what one must know to read and to repeat them."""
    lines = [
        *heading(result),
        "Alone: what the algorithm adds to the bare recipe. In the whole: what the whole stack would save without it. Negative:",
        "it saves. Compared within rounds; ms are that share of the median step of the bare recipe, or of the whole stack.",
        "",
    ]
    return "\n".join([*lines, *(tables(stage) for stage in result["stages"])])


def plot(stages: list[dict[str, Any]], path: Path) -> None:
    """Draw bars for what each algorithm adds alone and in the whole; a row per stage, time left, memory right."""
    heights = [1.2 + 0.45 * (len(stage["effects"]) + 1) for stage in stages]
    figure, rows = subplots(len(stages), 2, (11, sum(heights)), height_ratios=heights, sharey="row")
    sides = (("alone", "added to the bare recipe", "C0", -0.19), ("in_the_whole", "in the whole stack", "C1", 0.19))
    for stage, (left, right) in zip(stages, rows, strict=True):
        names = [row["algorithm"] for row in stage["effects"]]
        for side, label, colour, shift in sides:
            for place, row in enumerate(stage["effects"]):
                _bar(left, right, place + shift, row[side], colour, 0.36)
            left.barh(0, 0, color=colour, label=label)
        _bar(left, right, len(names), stage["together"], "0.4", 0.5)
        left.set_yticks(range(len(names) + 1), [*names, "together"])
        left.set_ylim(len(names) + 0.6, -0.6)
        left.set(title=f"stage {stage['number']}: {stage['sizes']}", xlabel="ms per step; the line: middle half of the rounds")
        right.set(title="peak memory", xlabel="MB")
        for axes in (left, right):
            axes.axvline(0, color="0.3", linewidth=0.8)
            axes.grid(visible=False, axis="y")
    rows[0][0].legend(frameon=False, fontsize=9)
    save(figure, path)


def _bar(left: Any, right: Any, place: float, added: dict[str, Any], colour: str, height: float) -> None:
    if added["failed"]:
        left.text(0, place, " refused or failed", va="center", fontsize=8, color=colour)
        return
    if ms := added["ms"]:
        left.barh(place, ms["median"], height, color=colour)
        left.plot([ms["p25"], ms["p75"]], [place, place], color="0.15", linewidth=1.2)
    if added["memory_mb"] is not None:
        right.barh(place, added["memory_mb"], height, color=colour)


# ----------------------------------------------------------------------------------------------------------- main


@says_errors
def main(arguments: list[str]) -> int:
    """Train, measure, write; return 0 unless a run crashed, or there is nothing to compare with. A refused stack is a result."""
    options = parse_arguments(arguments)
    planned = plan(options)
    assert options.output is not None
    what = f"cost of the algorithms of {' '.join(options.recipe)}, {options.rounds} turns of {options.turn} steps"
    head = {"what": what} | circumstances(["benchmarks/ablate.py", *arguments])
    stages: list[dict[str, Any]] = []
    for stage, runs in planned:
        say(f"stage {stage.number}: {stage.sizes}")
        known = {key: getattr(stage, key) for key in ("number", "sizes", "algorithms", "kept", "closed")}
        stages.append(known | summarise(measure(runs, options.turn), stage.algorithms, stacks_of(stage.algorithms)))
        result = head | {"stages": stages}  # written after every stage, so that who stops it keeps what there is
        publish(options.output, result, report(result), partial(plot, stages), tables(stages[-1]))
    stacks = [stack for stage in stages for stack in stage["stacks"]]
    return 1 if any(stack["failed"] and (stack["stack"] in (BARE, WHOLE) or not stack["refused"]) for stack in stacks) else 0
