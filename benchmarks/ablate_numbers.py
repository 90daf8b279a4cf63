"""The numbers of an ablation: of one run, and differences between stacks over seeds, with what can be said of them.

A difference is of a pair: a stack and the base with the same seed, which took turns. Of the pairs' differences Student's t gives
an interval that holds the true difference in 95 of 100 comparisons. Of times it is the logarithms that are subtracted, so that
the difference is a factor. Where an interval holds 0 no difference was seen, which is not the same as none.

Many comparisons find something by chance: one in twenty says "better" or "worse" where nothing differs. So the number that is to
be expected is said beside the number that was found, and what holds for all comparisons together (Holm 1979, at 5%) is marked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, median
from typing import Any

from common import by_turn, percentile
from scipy import stats
from turns import Run

from prx_composer.runs.folder import read_metrics

ACCURACIES = ("heldout_accuracy", "classifier_accuracy")
VALIDATION = ("metrics/eval/validation_loss", "metrics/eval/mse")
LAST = 0.05  # the share of steps over which losses are averaged: in the table the last ones, in the picture running
CONFIDENCE = 0.95
NEVER = "never reached the target"

# --------------------------------------------------------------------------------------------------------- one run


def measure(run: Run, base: Run, target: float) -> dict[str, Any]:
    """Return what a run left, in numbers."""
    who = {"stack": run.stack.name, "seed": run.seed, "group": run.folder.parent.name, "failed": run.failure()}
    header, *steps = run.rows() or [{}]
    metrics = run.folder / "metrics.jsonl"
    return who | summarise(header, steps, read_metrics(metrics) if metrics.exists() else [], base.rows()[1:], target)


def summarise(
    header: dict[str, Any],
    steps: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    base_steps: list[dict[str, Any]],
    target: float = 0.9,
) -> dict[str, Any]:
    """Compute numbers from the lines of turns.jsonl and metrics.jsonl; seconds are of training, without waiting and scoring.

    A number that is not there, or not finite, is None.
    """
    spent = accumulate(step["loader_ms"] + step["step_ms"] for step in steps)
    seconds = {step["batch"]: round(ms / 1000, 3) for step, ms in zip(steps, spent, strict=True)}
    rows = [row for row in metrics if row["batch"] in seconds]
    times = [step["step_ms"] for step in steps]
    losses = [(seconds[row["batch"]], row["loss/train/flow"]) for row in rows if row.get("loss/train/flow") is not None]
    accuracy = next((key for key in ACCURACIES if any(key in row for row in rows)), ACCURACIES[0])
    validation = next((key for key in VALIDATION if any(key in row for row in rows)), VALIDATION[0])
    curve = [(seconds[row["batch"]], row["batch"], row[accuracy]) for row in rows if accuracy in row]
    return {
        "steps": len(steps),
        "train_seconds": max(seconds.values(), default=0.0),
        "step_ms": {"median": median(times), "p10": percentile(times, 10), "p90": percentile(times, 90)} if times else None,
        "loader_ms": median(step["loader_ms"] for step in steps) if steps else None,
        "ratio": ratio_by_turn(steps, base_steps),
        "memory_mb": max((step["memory_mb"] for step in steps), default=None),
        "memory_at_start_mb": header.get("memory_mb"),
        "trained_parameters": header.get("trained_parameters"),
        "loss": _finite(fmean(loss for _, loss in losses[-max(1, round(LAST * len(losses))) :])) if losses else None,
        "validation_key": validation,
        "validation_loss": _finite(next((row[validation] for row in reversed(rows) if validation in row), None)),
        "accuracy_key": accuracy,
        "accuracy": _finite(curve[-1][2]) if curve else None,
        "seconds_to_target": next((time for time, _, right in curve if right >= target), None),
        "accuracy_curve": curve,
        "loss_curve": thinned(running_mean([point for point in losses if math.isfinite(point[1])])),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def ratio_by_turn(steps: list[dict[str, Any]], base_steps: list[dict[str, Any]]) -> dict[str, float] | None:
    """Divide step times by the base's in the same round, when the machine was the same.

    The first round of a start, warming up, doesn't count; nor does one that the two made in different starts of the comparison.
    """
    ratios, shared_of_all = [], list[float]()
    for start in sorted({step.get("start", 0) for step in steps}):
        own, base = (
            by_turn([row for row in rows if row.get("start", 0) == start], "step_ms", median) for rows in (steps, base_steps)
        )
        shared = [own[turn] / base[turn] for turn in sorted(own.keys() & base.keys())]
        shared_of_all += shared
        ratios += shared[1:]
    ratios = ratios or shared_of_all
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


# ------------------------------------------------------------------------------------------------------ comparisons


@dataclass(frozen=True)
class Column:
    """A number that stacks are compared by.

    Args:
        factor: it is a time: what is compared is how many times as long it takes, not by how much more.
    """

    key: str
    title: str
    more_is_better: bool
    factor: bool
    digits: int


COLUMNS = (
    Column("accuracy", "accuracy", True, False, 3),
    Column("validation_loss", "validation loss", False, False, 4),
    Column("step", "time of a step", False, True, 2),
    Column("seconds_to_target", "seconds to the target", False, True, 0),
)


def interval(differences: Sequence[float]) -> dict[str, Any]:
    """Return `mean`, and of two differences or more the ends of the 95% interval, `low` and `high`, and `p`.

    Without a spread there is neither interval nor p: differences that are all alike, but not 0, are those of a coarse scale, and
    tell nothing of what another seed would give. If all are 0, so are the ends, and p is 1.
    """
    mean = fmean(differences) if differences else None
    found: dict[str, Any] = {"mean": mean, "low": None, "high": None, "p": None}
    if mean is None or len(differences) < 2:
        return found
    if max(differences) - min(differences) <= 1e-9 * max(map(abs, differences)):
        return found if mean else found | {"low": 0.0, "high": 0.0, "p": 1.0}
    error = stats.sem(differences)
    low, high = stats.t.interval(CONFIDENCE, len(differences) - 1, loc=mean, scale=error)
    p = 2 * stats.t.sf(abs(mean / error), len(differences) - 1)
    return {"mean": mean, "low": float(low), "high": float(high), "p": float(p)}


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values that hold for all of them together: Holm's step-down correction."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    corrected, largest = [1.0] * len(chances), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[index]))
        corrected[index] = largest
    return corrected


def compare(runs: Sequence[dict[str, Any]], stacks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare every stack with the first, by every column.

    Args:
        runs: as `measure` gives them.
        stacks: name → what is known of it; `not_compared` says why by name of a number, such as metrics/eval/mse.
    """
    base, *others = stacks
    found = [_comparison(column, name, base, runs, stacks[name].get("not_compared", {})) for name in others for column in COLUMNS]
    judged = [comparison for comparison in found if comparison["p"] is not None]
    for comparison, corrected in zip(judged, holm([comparison["p"] for comparison in judged]), strict=True):
        comparison["p_of_all"] = corrected
    return [comparison | {"words": in_words(comparison)} for comparison in found]


def chance(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many comparisons have an interval, how many of them chance alone would call different, and how many are."""
    judged = [comparison for comparison in comparisons if comparison["p"] is not None]
    return {
        "comparisons": len(judged),
        "by_chance": round((1 - CONFIDENCE) * len(judged), 2),
        "different": sum(comparison["verdict"] in ("better", "worse") for comparison in judged),
        "of_all_together": sum(comparison["p_of_all"] <= 1 - CONFIDENCE for comparison in judged),
    }


def _comparison(
    column: Column, stack: str, base: str, runs: Sequence[dict[str, Any]], not_compared: Mapping[str, str]
) -> dict[str, Any]:
    pairs, dropped = list[dict[str, Any]](), list[dict[str, Any]]()
    unreached, own_runs = False, [run for run in runs if run["stack"] == stack]
    reason = next((not_compared.get(run["validation_key"], "") for run in own_runs if not run["failed"]), "")
    for run in own_runs:
        beside = next((other for other in runs if other["stack"] == base and other["group"] == run["group"]), None)
        why = _without_pair(column, run, beside, stack, base)
        if beside is None or why:
            dropped.append({"seed": run["seed"], "why": why})
            unreached |= why.endswith(NEVER)
            continue
        own, other = _value(column, run), _value(column, beside)
        difference = math.log(own / other) if column.factor else own - other
        pairs.append({"seed": run["seed"], "base": other, "stack": own, "difference": difference})
    found = {"stack": stack, "column": column.key, "factor": column.factor, "pairs": pairs, "dropped": dropped}
    reason = reason if column.key == "validation_loss" else ""
    if reason or unreached:
        reached = " and ".join(
            f"{sum(run['seconds_to_target'] is not None for run in of)} of {len(of)} with {name}"
            for name in (stack, base)
            if (of := [run for run in runs if run["stack"] == name and not run["failed"]])
        )
        nothing = {"mean": None, "low": None, "high": None, "p": None}
        return found | nothing | {"verdict": "not compared", "why": reason or f"seeds that reached it: {reached}"}
    numbers = interval([pair["difference"] for pair in pairs])
    verdict, why = _verdict(column, numbers, len(pairs))
    return found | numbers | {"verdict": verdict, "why": why}


def _value(column: Column, run: Mapping[str, Any]) -> Any:
    """Return the number of a run; a step's time is one in units of the base's in the same rounds."""
    if column.key == "step":
        return run["ratio"] and run["ratio"]["median"]
    return run[column.key]


def _without_pair(column: Column, run: Mapping[str, Any], beside: Mapping[str, Any] | None, stack: str, base: str) -> str:
    """Return why a run has nothing to be compared with, or an empty text."""
    if beside is None:
        return f"{base} has not been trained beside it"
    for name, one in ((stack, run), (base, beside)):
        if one["failed"]:
            return f"{name} failed after step {one['steps']}: {one['failed']}"
    if column.key in ("accuracy", "validation_loss") and (now := run[f"{column.key.removesuffix('_loss')}_key"]) != (
        before := beside[f"{column.key.removesuffix('_loss')}_key"]
    ):
        return f"{stack} has {now}, {base} {before}"
    for name, one in ((stack, run), (base, beside)):
        if _value(column, one) is None:
            return f"{name} {NEVER if column.key == 'seconds_to_target' else f'has no {column.title} that is finite'}"
    return ""


def _verdict(column: Column, numbers: Mapping[str, Any], pairs: int) -> tuple[str, str]:
    """Return better, worse, no difference seen or why neither, and a reason if there is one to say."""
    if pairs == 0:
        return "no pair", "no seed has this number of both"
    if pairs == 1:
        return "one seed", "one seed has no interval"
    if numbers["low"] is None:
        return "not judged", "the same difference in every seed has no interval"
    if numbers["low"] <= 0 <= numbers["high"]:
        return "no difference seen", ""
    return ("better" if (numbers["mean"] > 0) == column.more_is_better else "worse"), ""


def in_words(comparison: Mapping[str, Any]) -> str:
    """Write a verdict: "better by 0.021 (0.004 to 0.038)", "worse by 13% (10% to 16%)", "no difference seen (−2% to +5%)"."""
    column = next(column for column in COLUMNS if column.key == comparison["column"])
    mean, low, high = (
        math.expm1(number) if column.factor else number for number in (comparison[key] or 0.0 for key in ("mean", "low", "high"))
    )

    def size(value: float, signed: bool = False) -> str:
        value = value if signed else abs(value)
        text = f"{100 * value:{'+' * signed}.0f}%" if column.factor else f"{value:{'+' * signed}.{column.digits}f}"
        return text.replace("-", "−")

    verdict = comparison["verdict"]
    if verdict in ("better", "worse"):
        ends = sorted((low, high), key=abs)
        text = f"{verdict} by {size(mean)} ({size(ends[0])} to {size(ends[1])})"
    elif verdict == "no difference seen":
        text = f"{verdict} ({size(low, True)} to {size(high, True)})"
    elif verdict in ("one seed", "not judged"):
        text = f"{size(mean, True)}, not judged: {comparison['why']}"
    else:
        text = f"{verdict}: {comparison['why']}"
    total = len(comparison["pairs"]) + len(comparison["dropped"])
    few = comparison["dropped"] and comparison["pairs"] and verdict != "not compared"
    return text + (f", in {len(comparison['pairs'])} of {total} seeds" if few else "")
