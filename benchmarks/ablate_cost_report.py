"""From the steps of stacks that took turns to what each algorithm adds or saves; see ablate_cost.py.

Whatever is compared is compared within rounds, when the machine was the same. A round counts with the mean of its steps, so that
what an algorithm does once in a while has its share; the first, warming up, doesn't count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ablate_report import percentile
from ablate_runs import REFUSED

__all__ = ["Measurement", "plot", "report", "summarise", "tables"]

Rounds = dict[tuple[int, int], float]  # (group, round) → mean over the steps of the turn


@dataclass(frozen=True)
class Measurement:
    """One run of a stack: the lines that `Turns` wrote, one per step, and what it said if it failed."""

    stack: str
    group: int
    steps: list[dict[str, Any]]
    failed: str | None = None


def rounds_of(measurements: list[Measurement], key: str) -> Rounds:
    """A number of the steps, round by round."""
    rounds: Rounds = {}
    for measured in measurements:
        turns: dict[int, list[float]] = {}
        for step in measured.steps:
            turns.setdefault(step["turn"], []).append(step[key])
        rounds |= {(measured.group, turn): fmean(values) for turn, values in turns.items() if turn > 0}
    return rounds


def spread(values: list[float], times: float = 1.0) -> dict[str, float] | None:
    """Median and middle half; None of nothing."""
    if not values:
        return None
    numbers = {"median": median(values), "p25": percentile(values, 25), "p75": percentile(values, 75)}
    return {name: round(times * value, 4) for name, value in numbers.items()} | {"rounds": len(values)}


def effect(with_it: Rounds, without: Rounds, reference: Rounds) -> dict[str, Any] | None:
    """What is added, as a share of the reference within each round, and that share of the reference's median in ms."""
    shared = sorted(with_it.keys() & without.keys() & reference.keys())
    shares = [(with_it[key] - without[key]) / reference[key] for key in shared]
    if not shares:
        return None
    return {"share": spread(shares), "ms": spread(shares, median(reference.values()))}


def summarise(measurements: list[Measurement], algorithms: list[str], stacks: Mapping[str, frozenset[str]]) -> dict[str, Any]:
    """Numbers of every stack, and of every algorithm by itself and in the whole.

    Args:
        algorithms: those that are measured, in order.
        stacks: algorithms by name of the stack; the first is the bare recipe, the second the whole stack.
    """
    bare, whole = list(stacks)[:2]
    runs = {name: [m for m in measurements if m.stack == name] for name in stacks}
    said = {name: next((m.failed for m in runs[name] if m.failed), None) for name in stacks}
    good = {name: [] if said[name] else runs[name] for name in stacks}
    times = {name: rounds_of(good[name], "step_ms") for name in stacks}
    memory = {name: {m.group: m.steps[-1]["memory_mb"] for m in good[name] if m.steps} for name in stacks}

    def relative(name: str, base: str) -> dict[str, float] | None:
        shared = sorted(times[name].keys() & times[base].keys())
        return spread([times[name][key] / times[base][key] for key in shared])

    def added(with_it: str, without: str, reference: str) -> dict[str, Any]:
        more = [memory[with_it][group] - memory[without][group] for group in memory[with_it].keys() & memory[without].keys()]
        compared = effect(times[with_it], times[without], times[reference]) or {"share": None, "ms": None}
        refusals = [f"{name}: {said[name]}" for name in dict.fromkeys((with_it, without)) if said[name]]
        return compared | {"memory_mb": round(median(more), 1) if more else None, "failed": refusals}

    def named(present: frozenset[str]) -> str:
        return next(name for name in stacks if stacks[name] == present)

    rows = []
    for name in stacks:
        failed = said[name]
        loader = rounds_of(good[name], "loader_ms")
        rows.append(
            {
                "stack": name,
                "algorithms": [algorithm for algorithm in algorithms if algorithm in stacks[name]],
                "failed": failed,
                "refused": failed is not None and failed.startswith(REFUSED),
                "step_ms": spread(list(times[name].values())),
                "x_bare": relative(name, bare),
                "x_whole": relative(name, whole),
                "loader_ms": round(median(loader.values()), 3) if loader else None,
                "memory_mb": round(median(memory[name].values()), 1) if memory[name] else None,
            }
        )
    everything = stacks[whole]
    effects = [
        {
            "algorithm": algorithm,
            "alone": added(named(frozenset({algorithm})), bare, bare),
            "in_the_whole": added(whole, named(everything - {algorithm}), whole),
        }
        for algorithm in algorithms
    ]
    return {"stacks": rows, "effects": effects, "together": added(whole, bare, bare)}


# ---------------------------------------------------------------------------------------------------------- tables


def tables(stage: dict[str, Any]) -> str:
    """What the algorithms cost, and what was measured of every stack, in Markdown."""
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
    """The tables with what one must know to read and to repeat them."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    threads = f"{result['threads']} thread" + ("s" if result["threads"] != 1 else "")
    lines = [
        f"{result['what']}, {result['date']}, {result['machine']}, {threads}, load {result['load_before']} before. {versions}.",
        "",
        f"    {result['command']}",
        "",
        "Alone: what the algorithm adds to the bare recipe. In the whole: what the whole stack would save without it. Negative:",
        "it saves. Compared within rounds; ms are that share of the median step of the bare recipe, or of the whole stack.",
        "",
    ]
    return "\n".join([*lines, *(tables(stage) for stage in result["stages"])])


# --------------------------------------------------------------------------------------------------------- picture


def plot(stages: list[dict[str, Any]], path: Path) -> None:
    """A bar for what each algorithm adds alone, one for what it adds in the whole; a row per stage, time left, memory right."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    height = sum(1.2 + 0.45 * (len(stage["effects"]) + 1) for stage in stages)
    ratios = [1.2 + 0.45 * (len(stage["effects"]) + 1) for stage in stages]
    figure, rows = plt.subplots(
        len(stages), 2, figsize=(11, height), height_ratios=ratios, layout="constrained", squeeze=False, sharey="row"
    )
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
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", color="0.92")
            axes.set_axisbelow(True)
    rows[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bar(left: Any, right: Any, place: float, added: dict[str, Any], colour: str, height: float) -> None:
    if added["failed"]:
        left.text(0, place, " refused or failed", va="center", fontsize=8, color=colour)
        return
    if ms := added["ms"]:
        left.barh(place, ms["median"], height, color=colour)
        left.plot([ms["p25"], ms["p75"]], [place, place], color="0.15", linewidth=1.2)
    if added["memory_mb"] is not None:
        right.barh(place, added["memory_mb"], height, color=colour)
