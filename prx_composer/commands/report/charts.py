"""Which metrics are shown, and their curves over steps and time: small SVG pictures, whose colours follow the page's.

A curve has at most `POINTS` points: a run of 120,000 steps is drawn as the median of every 480 and the range that they span.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from prx_composer.commands.report.reported_run import Column, History, Numbers, Run, spread, stage_starts

POINTS = 250
WIDTH, HEIGHT = 3.9, 2.25  # inches; shown at about 380 pixels
LINES = 6  # of one chart; as many colours are in page.html
_INK = "#010203"  # stands for the colour of the text around
_SERIES = [f"#0a0b0{number}" for number in range(1, LINES + 1)]  # for var(--s1) …
EVALUATIONS = 8  # shown
# Everything else that is logged is a score, this package's or another's.
_NOT_SCORES = re.compile(
    r"(loss|time|throughput|budget|stage|guard|trainer|checkpoint|data|memory|l2_norm|norms?|optimizer)/|lr-|train_seconds$"
)
_BIN = re.compile(r"_t(\d\.\d+-\d\.\d+)$")
_SPEEDS = {
    "throughput/device/samples_per_sec": ("Images per second and GPU", 1.0),
    "throughput/device/mfu": ("MFU, % of the GPU's peak", 100.0),
    "throughput/device/flops_per_sec": ("Training TFLOP/s per GPU", 1e-12),
}


@dataclass(frozen=True)
class Chart:
    """A picture of one metric or several.

    Args:
        title: of the picture.
        names: of its lines, in the order of their colours, if there are several.
        svg: trusted: it has numbers in it and nothing of the recipe.
        last: the last value of every line.
        at: the steps of those.
    """

    title: str
    names: list[str]
    svg: str
    last: list[float]
    at: list[int]


def chart_sections(run: Run) -> list[tuple[str, list[Chart]]]:
    """Return the sections of the page with their pictures; those without any are left out."""
    columns, history, marks = run.history.columns, run.history, stage_starts(run)[1:]
    spikes = [spike["batch"] for spike in run.spikes if isinstance(spike.get("batch"), int) and spike["batch"] <= history.steps]

    def one(title: str, lines: dict[str, Column], at: list[int] | None = None) -> Chart:
        return draw(title, lines, history, marks, at or ())

    losses = sorted(
        (name for name in columns if name.startswith("loss/train/")), key=lambda name: (name != "loss/train/total", name)
    )
    found = [("Loss", [one(_loss_title(n), {n: columns[n]}, spikes if n.endswith("/total") else None) for n in losses])]
    speeds = [one(title, {name: columns[name].times(by)}) for name, (title, by) in _SPEEDS.items() if name in columns]
    rates = _distinct({name: column for name, column in columns.items() if name.startswith("lr-")})
    found.append(("Learning rate and speed", [*([one("Learning rate", rates)] if rates else []), *speeds]))
    norms = {name: column for name, column in columns.items() if re.search(r"grad.*norm|norm/grad", name)}
    whole = {name: column for name, column in norms.items() if "global" in name} or norms
    gradients = [one("Gradient norm", whole)] if whole else []
    for name, title in (("guard/skipped_steps", "Steps skipped, so far"), ("guard/loss_spikes", "Loss spikes, so far")):
        if name in columns and np.nan_to_num(columns[name].values).max() > 0:
            gradients.append(one(title, {name: columns[name]}))
    found.append(("Gradients and guards", gradients))
    found.append(("Evaluation", [one(title, lines) for title, lines in _score_groups(run).items()]))
    return [(section, pictures) for section, pictures in found if pictures]


def scores(run: Run) -> dict[str, Column]:
    """Return the metrics that are scores of the model."""
    return {name: column for name, column in run.history.columns.items() if not _NOT_SCORES.match(name)}


def evaluation(run: Run) -> dict[str, Any]:
    """Return the `steps` that are shown, `of` how many, and `rows` of each score at those."""
    found = scores(run)
    steps = sorted({int(batch) for column in found.values() for batch in column.batches})
    shown = spread(steps, EVALUATIONS)
    rows: list[tuple[str, list[float | None]]] = []
    for name, column in found.items():
        values = dict(zip(column.batches.astype(int).tolist(), column.values.tolist(), strict=True))
        rows.append((name.removeprefix("metrics/"), [values.get(step) for step in shown]))
    return {"steps": shown, "of": len(steps), "rows": rows}


def _score_groups(run: Run) -> dict[str, dict[str, Column]]:
    """Return which scores share a picture: parts of one. A score with a single value is in the table alone."""
    groups: dict[str, dict[str, Column]] = {}
    for name, column in scores(run).items():
        if len(column) < 2:
            continue
        short = name.removeprefix("metrics/")
        if match := _BIN.search(short):
            groups.setdefault(f"{short[: match.start()]} by timestep", {})[f"t {match[1]}"] = column
        elif short.startswith("images/"):
            groups.setdefault("The patch grid in images (1 = none)", {})[short.removeprefix("images/")] = column
        elif name == short:
            groups.setdefault(name.split("/")[0], {})[short.split("/", 1)[-1]] = column
        else:
            groups.setdefault(short, {})[short] = column
    return groups


def _loss_title(name: str) -> str:
    short = name.removeprefix("loss/train/")
    return "Total loss" if short == "total" else f"Loss: {short}"


def _distinct(lines: dict[str, Column]) -> dict[str, Column]:
    """Return one line of those that are equal: groups of parameters mostly have the same learning rate."""
    kept: dict[bytes, tuple[str, Column]] = {}
    for name, column in lines.items():
        kept.setdefault(column.values.tobytes(), (name, column))
    return dict(kept.values())


# ---------------------------------------------------------------------------------------------------------- drawing


def thinned(batches: Numbers, values: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Return middle steps, medians, least and greatest values of at most `POINTS` parts; what isn't finite is left out."""
    finite = np.isfinite(values)
    batches, values = batches[finite], values[finite]
    if len(values) <= POINTS:
        return batches, values, values, values
    edges = np.linspace(0, len(values), POINTS + 1).astype(int)
    parts = [values[start:end] for start, end in pairwise(edges)]
    middles = np.array([batches[(start + end - 1) // 2] for start, end in pairwise(edges)])
    typical, least, greatest = (np.array([reduce(part) for part in parts]) for reduce in (np.median, np.min, np.max))
    return middles, typical, least, greatest


def draw(
    title: str,
    lines: Mapping[str, Column],
    history: History,
    stages: Sequence[tuple[int, int | None, int]] = (),
    marks: Sequence[int] = (),
) -> Chart:
    """Draw one picture.

    Args:
        lines: name → metric; more than `LINES` are not drawn.
        stages: where one followed another, its image size, and its place in the recipe.
        marks: steps to point at.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = dict(list(lines.items())[:LINES])
    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8, "path.simplify_threshold": 0.2}
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(style | dict.fromkeys(colours, _INK)):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.spines[["right"]].set_visible(False)
        drawn = [thinned(column.batches, column.values) for column in shown.values()]
        for (steps, medians, least, greatest), colour in zip(drawn, _SERIES, strict=False):
            if least is not medians:
                axes.fill_between(steps, least, greatest, color=colour, alpha=0.22, linewidth=0)
            axes.plot(steps, medians, color=colour, linewidth=1.2, marker="o" if len(steps) <= 25 else None, markersize=2.5)
        _scale(axes, drawn)
        axes.set_xlim(0, max(history.steps, 1))
        for start, size, _ in stages:
            axes.axvline(start, color=_INK, linewidth=0.7, linestyle=(0, (3, 3)), alpha=0.7)
            axes.annotate(
                f"{size} px", (start, 1), (2, -7), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7
            )
        if marks:
            axes.plot(marks, [0.02] * len(marks), "^", color=_SERIES[-1], markersize=3, transform=axes.get_xaxis_transform())
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))  # pyright: ignore[reportAttributeAccessIssue]
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 10000 else f"{value:g}")
        axes.set_xlabel("step")
        axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
        _time_axis(axes, history)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    last = [float(column.last) for column in shown.values()]
    return Chart(title, list(shown), _inline(file.getvalue()), last, [int(column.batches[-1]) for column in shown.values()])


def _scale(axes: Any, drawn: Sequence[tuple[Numbers, ...]]) -> None:
    """Make the axis logarithmic where that shows more; outliers don't decide its range."""
    from matplotlib.ticker import NullFormatter

    medians = np.concatenate([line[1] for line in drawn])
    extremes = np.concatenate([line[index] for line in drawn for index in (2, 3)])
    if not len(medians):
        return
    if extremes.min() > 0 and medians.max() > 12 * medians.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    low, high = np.percentile(extremes, [1, 99])
    low, high = min(low, medians[len(medians) // 20 :].min()), max(high, medians[len(medians) // 20 :].max())
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))


def _time_axis(axes: Any, history: History) -> None:
    """Write the time of training above the picture."""
    from matplotlib.ticker import MaxNLocator

    known = np.isfinite(history.seconds)
    axes.spines["top"].set_visible(False)
    if known.sum() < 2:
        return
    longest = history.seconds[known].max()
    unit, name = next((u, n) for u, n in ((3600, "h"), (60, "min"), (1, "s")) if longest >= 2 * u or u == 1)
    ticks = [tick for tick in MaxNLocator(4).tick_values(0, longest / unit) if 0 < tick * unit <= longest]
    above = axes.twiny()
    above.patch.set_alpha(0)
    above.spines[["top", "right"]].set_visible(False)
    above.set_xlim(axes.get_xlim())
    positions = [float(np.interp(tick * unit, history.seconds[known], history.batches[known])) for tick in ticks]
    above.set_xticks(positions, [f"{tick:g} {name}" for tick in ticks])
    above.tick_params(length=2, labelsize=7)


def _inline(svg: str) -> str:
    """Return the SVG for a page: without what only a file needs, coordinates to a hundredth, colours from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (?:[a-z]+ )*([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" *font-family: [^;\"]*;?", "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), svg)  # not the labels between tags
    for number, colour in enumerate(_SERIES, start=1):
        svg = svg.replace(colour, f"var(--s{number})")
    return re.sub(r"\n\s*", "\n", svg.replace(_INK, "currentColor"))
