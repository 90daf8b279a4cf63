"""From what stacks of tricks left behind to a table and a picture; see ablate.py."""

from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

__all__ = ["plot", "report", "spread", "summarise", "table"]

ACCURACIES = ("heldout_accuracy", "classifier_accuracy")
TARGET = 0.9  # the accuracy whose time is compared
LAST = 0.05  # the share of steps over which losses are averaged: in the table the last ones, in the picture running


def summarise(
    header: dict[str, Any], steps: list[dict[str, Any]], metrics: list[dict[str, Any]], base_steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """Numbers from the lines of turns.jsonl and metrics.jsonl; seconds are of training, without waiting and scoring."""
    seconds = dict(
        zip(
            (step["batch"] for step in steps),
            (round(ms / 1000, 3) for ms in accumulate(step["loader_ms"] + step["step_ms"] for step in steps)),
            strict=True,
        )
    )
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
        "eval_mse": next((row["metrics/eval/mse"] for row in reversed(rows) if "metrics/eval/mse" in row), None),
        "accuracy": curve[-1][2] if curve else None,
        "seconds_to_target": next((time for time, _, right in curve if right >= TARGET), None),
        "accuracy_curve": curve,
        "loss_curve": thinned(running_mean(losses)),
    }


def ratio_by_turn(steps: list[dict[str, Any]], base_steps: list[dict[str, Any]]) -> dict[str, float] | None:
    """Step time relative to the base's in the same round, when the machine was the same; the first, warming up, doesn't count."""
    own, base = median_by_turn(steps), median_by_turn(base_steps)
    shared = sorted(own.keys() & base.keys())
    ratios = [own[turn] / base[turn] for turn in (shared[1:] or shared)]
    if not ratios:
        return None
    spread = {"p25": percentile(ratios, 25), "p75": percentile(ratios, 75), "min": min(ratios), "max": max(ratios)}
    return {"median": median(ratios), **spread, "turns": len(ratios)}


def median_by_turn(steps: list[dict[str, Any]]) -> dict[int, float]:
    turns: dict[int, list[float]] = {}
    for step in steps:
        turns.setdefault(step["turn"], []).append(step["step_ms"])
    return {turn: median(times) for turn, times in turns.items()}


def percentile(values: list[float], percent: int) -> float:
    return values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[percent - 1]


# ---------------------------------------------------------------------------------------------------------- table


COLUMNS = (
    "stack",
    "step (ms)",
    "× base (middle half of turns)",
    "training (s)",
    "memory (MB)",
    "flow loss",
    "eval MSE",
    "accuracy",
    f"s to {TARGET}",
    "parameters",
)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line per stack; several seeds are a mean and its range."""
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
    def mean(key: str, digits: int) -> str:
        return spread([result[key] for result in results], digits)

    ratios = [result["ratio"] for result in results if result["ratio"]]
    low, high = (fmean(r[key] for r in ratios) if ratios else 0.0 for key in ("p25", "p75"))
    return [
        f"`{stack}`",
        spread([result["step_ms"]["median"] for result in results if result["step_ms"]], 1),
        f"{fmean(r['median'] for r in ratios):.2f} ({low:.2f}–{high:.2f})" if ratios else "–",
        mean("train_seconds", 1),
        mean("memory_mb", 0),
        mean("loss", 4),
        mean("eval_mse", 4),
        mean("accuracy", 3),
        mean("seconds_to_target", 0),
        f"{results[0]['trained_parameters']:,}",
    ]


def spread(values: list[float | None], digits: int) -> str:
    """The value; of several, their mean and range; a dash where one is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    text = f"{fmean(numbers):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(numbers):.{digits}f}–{max(numbers):.{digits}f})"
    return text + (f", never in {len(values) - len(numbers)}" if len(numbers) < len(values) else "")


def report(result: dict[str, Any]) -> str:
    """The table with what one must know to repeat it."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    merged = {run["stack"]: ", ".join(["the recipe", *run["merged"]]) for run in result["runs"]}
    return "\n".join(
        [
            f"{result['what']}, {result['date']}, {result['machine']}. {versions}.",
            "",
            f"    {result['command']}",
            "",
            table(result["runs"]),
            f"Flow loss: mean of the last {LAST:.0%} of steps. Seconds: of training, without others' turns, evaluation, scoring.",
            "",
            *(f"- `{stack}`: {files}" for stack, files in merged.items()),
            "",
        ]
    )


# ---------------------------------------------------------------------------------------------------------- curves


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and loss over training seconds, a colour per stack."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    stacks = list(dict.fromkeys(result["stack"] for result in results))
    colours = {stack: f"C{index % 10}" for index, stack in enumerate(stacks)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
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
    right.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
    to_axes = right.transData + right.transAxes.inverted()
    places = apart({stack: float(to_axes.transform((0, end))[1]) for stack, end in ends.items()}, gap=0.06)
    for stack, height in places.items():
        right.text(1.02, height, stack, color=colours[stack], transform=right.transAxes, va="center", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (seconds, loss) → points whose losses are means of the steps up to there."""
    width = max(1, round(LAST * len(curve)))
    sums = [0.0, *accumulate(loss for _, loss in curve)]
    return [(curve[end - 1][0], (sums[end] - sums[end - width]) / width) for end in range(width, len(sums))]


def thinned(curve: list[tuple[float, float]], points: int = 200) -> list[tuple[float, float]]:
    """Every n-th point, and the last."""
    return curve[:: -max(1, -(-len(curve) // points))][::-1]


def apart(places: dict[str, float], gap: float) -> dict[str, float]:
    """Moves labels no further than needed for `gap` between neighbours, in their order, about their common middle."""
    order = sorted(places, key=places.__getitem__)
    moved: list[float] = []
    for name in order:
        moved.append(max(places[name], moved[-1] + gap) if moved else places[name])
    shift = fmean(moved) - fmean(places.values()) if moved else 0.0
    return {name: height - shift for name, height in zip(order, moved, strict=True)}
