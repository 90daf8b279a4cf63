"""What an ablation says: the table of verdicts, what was measured, what was left out, and the curves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ablate_numbers import COLUMNS, LAST, NEVER
from common import heading, save, subplots

MEASURED = ("stack", "step (ms)", "training (s)", "memory (MB)", "flow loss", "parameters", "accuracy", "validation loss")

# ------------------------------------------------------------------------------------------------------------ table


def table(result: Mapping[str, Any]) -> str:
    """Write Markdown, one line per stack: its mean over the seeds, and how it differs from the first, in words."""
    base, *others = result["stacks"]
    titles = [column.title for column in COLUMNS[:-1]] + [f"seconds to {result['target']:g}"]
    lines = ["| " + " | ".join(["stack", *titles]) + " |", "|---|" + "---|" * len(titles)]
    trained = {name: [run for run in result["runs"] if run["stack"] == name] for name in result["stacks"]}
    for name in (name for name in (base, *others) if trained[name]):
        runs = [run for run in trained[name] if not run["failed"]]
        if not runs:
            lines.append(f"| `{name}` | {escaped(failures(trained[name]))}" + " |" * len(titles))
            continue
        cells = []
        for column in COLUMNS:
            own = [run["ratio"] and run["ratio"]["median"] if column.key == "step" else run[column.key] for run in runs]
            text = spread(own, column.digits, name == base) + (" ×" if column.key == "step" and name != base else "")
            if column.key == "step" and name == base:
                text = f"{spread([run['step_ms'] and run['step_ms']['median'] for run in runs], 0, True)} ms"
            if name != base:
                comparison = next(c for c in result["comparisons"] if c["stack"] == name and c["column"] == column.key)
                text += f"; **{comparison['words']}**" if holds(comparison) else f"; {comparison['words']}"
            cells.append(escaped(text))
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines) + "\n"


def holds(comparison: Mapping[str, Any]) -> bool:
    """Return whether a difference holds for all comparisons together."""
    return comparison["verdict"] in ("better", "worse") and comparison["p_of_all"] <= 0.05


def failures(runs: Sequence[Mapping[str, Any]]) -> str:
    """Write what runs that failed said, each saying once."""
    said = dict.fromkeys(run["failed"] for run in runs if run["failed"])
    failed = [run for run in runs if run["failed"]]
    seeds = ", ".join(str(run["seed"]) for run in failed)
    return f"failed with seed {seeds}, after step {max(run['steps'] for run in failed)}: {' / '.join(said)}"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def measured(result: Mapping[str, Any]) -> str:
    """Write Markdown, one line per stack: what was measured, as a mean and its range over the seeds."""
    lines = ["| " + " | ".join(MEASURED) + " |", "|---|" + "---:|" * (len(MEASURED) - 1)]
    digits = {"train_seconds": 1, "memory_mb": 0, "loss": 4, "trained_parameters": 0, "accuracy": 3, "validation_loss": 4}
    for name in result["stacks"]:
        if runs := [run for run in result["runs"] if run["stack"] == name and not run["failed"]]:
            cells = [spread([run["step_ms"] and run["step_ms"]["median"] for run in runs], 1)]
            cells += [spread([run[key] for run in runs], places) for key, places in digits.items()]
            lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None], digits: int, ranged: bool = True) -> str:
    """Write the value; of several, their mean and range; a dash where one is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    text = f"{fmean(numbers):,.{digits}f}"
    if ranged and min(numbers) < max(numbers):
        text += f" ({min(numbers):,.{digits}f}–{max(numbers):,.{digits}f})"
    return text + (f", never in {len(values) - len(numbers)}" if len(numbers) < len(values) else "")


# ----------------------------------------------------------------------------------------------------------- report


def report(result: Mapping[str, Any]) -> str:
    """Write the tables with what one must know to believe and to repeat them."""
    base, *_ = result["stacks"]
    seeds, found = result["seeds"], result["chance"]
    lines = heading(result)
    if result["still_to_train"]:
        lines += [f"**Not complete: {result['still_to_train']} runs are still to be trained. The same command goes on.**", ""]
    lines += [
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: {', '.join(map(str, seeds))}. Each stack is compared with `{base}` of the "
        "same seed; in brackets is the 95% interval of the mean difference (Student's t over the pairs).",
        'Times are compared as factors, and "better" is less. "No difference seen" means that the interval holds 0: it says '
        "between what the difference may lie, not that there is none.",
    ]
    if len(seeds) == 1:
        lines.append("**One seed has no interval: nothing here is judged.**")
    if len(seeds) == 2:
        lines.append("**With two seeds an interval is more than three times as wide as with three: little can be seen.**")
    if found["comparisons"]:
        lines.append(
            f"Of {found['comparisons']} comparisons with an interval, {found['by_chance']:.1f} would be called better or worse "
            f"by chance alone if no stack differed from the base; {found['different']} are. **Bold** are the "
            f"{found['of_all_together']} that hold for all comparisons together (Holm's correction, 5%)."
        )
    lines += ["", table(result)]
    lines += _left_out(result)
    lines += ["## As measured", "", "Means, and the range over seeds.", "", measured(result)]
    lines += [
        f"Flow loss: mean of the last {LAST:.0%} of steps. Validation loss: `{_key(result, 'validation_key')}`; accuracy: "
        f"`{_key(result, 'accuracy_key')}`. Seconds: of training, without others' turns, evaluation, scoring.",
        "",
    ]
    for name, known in result["stacks"].items():
        notes = "".join(f". Note: {note}" for note in known["notes"])
        lines.append(f"- `{name}`: {', '.join(['the recipe', *known['changes']])}{notes}")
    lines += ["", *_starts(result)]
    return "\n".join(lines)


def _key(result: Mapping[str, Any], key: str) -> str:
    return "`, `".join(dict.fromkeys(run[key] for run in result["runs"] if not run["failed"])) or "–"


def _left_out(result: Mapping[str, Any]) -> list[str]:
    """Return lines that name stacks that were refused, runs that failed, and pairs that were dropped."""
    lines = [f"- `{refused['stack']}` was not trained: {escaped(refused['reason'])}" for refused in result["refused"]]
    for name in result["stacks"]:
        if failed := [run for run in result["runs"] if run["stack"] == name and run["failed"]]:
            lines.append(f"- `{name}` {escaped(failures(failed))}")
    dropped: dict[tuple[str, str], list[int]] = {}
    for comparison in result["comparisons"]:
        for pair in (pair for pair in comparison["dropped"] if not pair["why"].endswith(NEVER)):  # which the table says
            seeds = dropped.setdefault((comparison["stack"], pair["why"]), [])
            seeds += [] if pair["seed"] in seeds else [pair["seed"]]
    for (name, why), seeds in dropped.items():
        lines.append(f"- `{name}` has no pair with seed {', '.join(map(str, seeds))}: {escaped(why)}")
    return ["Left out:", "", *lines, ""] if lines else []


def _starts(result: Mapping[str, Any]) -> list[str]:
    starts = result["starts"]
    if len(starts) < 2:
        return []
    machines = dict.fromkeys(f"{start['machine']}, {start['threads']} threads" for start in starts)
    versions = len({str(start["versions"]) for start in starts})
    lines = [f"Trained in {len(starts)} starts, the first on {starts[0]['date']}, on: {'; '.join(machines)}."]
    if len(machines) > 1 or versions > 1:
        lines.append(
            "**Not all of them had the same machine and versions.** Seconds of several seeds may not compare; factors, which are "
            "taken within rounds, do."
        )
    return [*lines, ""]


# ----------------------------------------------------------------------------------------------------------- curves


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy and loss over training seconds, a colour per stack: the mean over seeds, and their range around it."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    figure, [[left, right]] = subplots(1, 2, (11, max(4, 1.5 + 0.18 * len(result["stacks"]))))
    palette = colormaps["tab10" if len(result["stacks"]) <= 10 else "tab20"]
    colours = {stack: palette(index % palette.N) for index, stack in enumerate(result["stacks"])}
    ends: dict[str, float] = {}
    for stack, colour in colours.items():
        runs = [run for run in result["runs"] if run["stack"] == stack and not run["failed"]]
        if curve := middle(runs, "loss_curve", lambda point: point[1]):
            _band(right, curve, colour)
            ends[stack] = curve[-1][1]
        if curve := middle(runs, "accuracy_curve", lambda point: point[2]):
            _band(left, curve, colour, marker="o", markersize=3)
    left.set(title="accuracy on held-out prompts", xlabel="training seconds", ylim=(-0.03, 1.03))
    left.axhline(result["target"], color="0.7", linewidth=0.8, linestyle=":")
    right.set(title=f"flow loss (mean of {LAST:.0%} of steps)", xlabel="training seconds", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    to_axes = right.transData + right.transAxes.inverted()
    places = apart({stack: float(to_axes.transform((0, end))[1]) for stack, end in ends.items()}, gap=0.05)
    for stack, height in places.items():
        right.text(1.02, height, stack, color=colours[stack], transform=right.transAxes, va="center", fontsize=9)
    seeds = len(result["seeds"])
    figure.suptitle(f"mean and range of {seeds} seeds" if seeds > 1 else "one seed", fontsize=10, color="0.4")
    save(figure, path)


def middle(runs: Sequence[Mapping[str, Any]], key: str, value: Callable[[Any], float]) -> list[tuple[float, float, float, float]]:
    """Return points (seconds, mean, lowest, highest) of several runs' curves, point by point as far as all of them go."""
    curves = [run[key] for run in runs if run[key]]
    found = []
    for points in zip(*curves, strict=False):
        values = [value(point) for point in points]
        found.append((fmean(point[0] for point in points), fmean(values), min(values), max(values)))
    return found


def _band(axes: Any, curve: list[tuple[float, float, float, float]], colour: Any, **style: Any) -> None:
    seconds, means, low, high = zip(*curve, strict=True)
    axes.plot(seconds, means, color=colour, linewidth=1.5, **style)
    axes.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)


def apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """Move labels no further than needed for `gap` between neighbours, in their order, about their common middle."""
    order = sorted(places, key=places.__getitem__)
    moved: list[float] = []
    for name in order:
        moved.append(max(places[name], moved[-1] + gap) if moved else places[name])
    shift = fmean(moved) - fmean(places.values()) if moved else 0.0
    return {name: height - shift for name, height in zip(order, moved, strict=True)}
