"""Metrics over steps and time as small SVG pictures, whose colours follow the page's.

A curve has at most `POINTS` points: a run of 120,000 steps is drawn as the median of every 480 and the range that they span.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from prx_composer.commands.report.history import Column, History, Numbers

POINTS = 250
WIDTH, HEIGHT = 3.9, 2.25  # inches; shown at about 380 pixels
LINES = 6  # of one chart; as many colours are in page.html
_INK = "#010203"  # stands for the colour of the text around
_SERIES = [f"#0a0b0{number}" for number in range(1, LINES + 1)]  # for var(--s1) …


@dataclass(frozen=True)
class Switch:
    """A vertical mark: a stage begins after this step."""

    batch: int
    label: str


@dataclass(frozen=True)
class Chart:
    """Args:
    title: of the picture. names: of its lines, in the order of their colours, if there are several.
    svg: trusted: it has numbers in it and nothing of the recipe.
    last: the last value of every line; `at`: its step.
    """

    title: str
    names: list[str]
    svg: str
    last: list[float]
    at: list[int]


def thinned(batches: Numbers, values: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Middle steps, medians, least and greatest values of at most `POINTS` parts; values that aren't finite are left out."""
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
    title: str, lines: Mapping[str, Column], history: History, switches: Sequence[Switch] = (), marks: Sequence[int] = ()
) -> Chart:
    """One picture.

    Args:
        lines: name → metric; more than `LINES` are not drawn.
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
        for switch in switches:
            axes.axvline(switch.batch, color=_INK, linewidth=0.7, linestyle=(0, (3, 3)), alpha=0.7)
            axes.annotate(
                switch.label,
                (switch.batch, 1),
                (2, -7),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=7,
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
    """Logarithmic where that shows more; outliers don't decide the range."""
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
    """Training time above."""
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
    """Without what a file needs and a page does not, coordinates to a hundredth, colours from the page."""
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
