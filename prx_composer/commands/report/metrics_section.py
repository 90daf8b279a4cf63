"""Which metrics are shown, where, and under which name."""

import re

import numpy as np

from prx_composer.commands.report.charts import Chart, draw
from prx_composer.commands.report.history import Column
from prx_composer.commands.report.reported_run import Run
from prx_composer.commands.report.samples import spread
from prx_composer.commands.report.stages import switches

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


def charts(run: Run) -> list[tuple[str, list[Chart]]]:
    """Sections with their pictures; those without any are left out."""
    columns, history, marks = run.history.columns, run.history, switches(run)
    spikes = [spike["batch"] for spike in run.spikes if isinstance(spike.get("batch"), int) and spike["batch"] <= history.steps]

    def one(title: str, lines: dict[str, Column], at: list[int] | None = None) -> Chart:
        return draw(title, lines, history, marks, at or ())

    losses = sorted(
        (name for name in columns if name.startswith("loss/train/")), key=lambda name: (name != "loss/train/total", name)
    )
    found = [("Loss", [one(_loss_title(n), {n: columns[n]}, spikes if n.endswith("/total") else None) for n in losses])]
    speeds = [one(title, {name: _times(columns[name], by)}) for name, (title, by) in _SPEEDS.items() if name in columns]
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
    return {name: column for name, column in run.history.columns.items() if not _NOT_SCORES.match(name)}


def evaluation(run: Run) -> tuple[list[int], int, list[tuple[str, list[float | None]]]]:
    """Steps shown, how many there were, and the scores at each of those shown."""
    found = scores(run)
    steps = sorted({int(batch) for column in found.values() for batch in column.batches})
    shown = spread(steps, EVALUATIONS)
    rows: list[tuple[str, list[float | None]]] = []
    for name, column in found.items():
        values = dict(zip(column.batches.astype(int).tolist(), column.values.tolist(), strict=True))
        rows.append((name.removeprefix("metrics/"), [values.get(step) for step in shown]))
    return shown, len(steps), rows


def _score_groups(run: Run) -> dict[str, dict[str, Column]]:
    """One picture for scores that are parts of another; a score with one value is in the table alone."""
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


def _times(column: Column, factor: float) -> Column:
    scaled = Column()
    for batch, value in zip(column.batches.astype(int).tolist(), column.values.tolist(), strict=True):
        scaled.append(batch, value * factor)
    return scaled


def _distinct(lines: dict[str, Column]) -> dict[str, Column]:
    """Groups of parameters mostly have the same learning rate; one of them is drawn."""
    kept: dict[bytes, tuple[str, Column]] = {}
    for name, column in lines.items():
        kept.setdefault(column.values.tobytes(), (name, column))
    return dict(kept.values())
