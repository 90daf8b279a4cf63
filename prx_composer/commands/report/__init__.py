"""`prx report`: a run as one page of facts, samples prompt by prompt, charts and stages."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from typer import Argument, Option, echo

from prx_composer.commands import writing
from prx_composer.common.errors import UserError
from prx_composer.common.files import write_whole
from prx_composer.schedule.moments import duration_string

if TYPE_CHECKING:
    from PIL.Image import Image

    from prx_composer.commands.report.reported_run import Run

STEPS, PROMPTS = 8, 12
_OF_MODEL = ("backbone", "flow", "text_encoder", "autoencoder")
_OF_RECIPE = {"optimizer": "optimizer", "scheduler": "schedule", "train_loader": "data"}
_OF_TRAINING = ("precision", "parallelism_config", "global_train_batch_size", "image_size", "max_duration", "time_budget", "seed")
SIDE = 192  # pixels of one image
SHEET_WIDTH = 720  # of a grid that cannot be taken apart


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `prx report`."""

    run: Annotated[str, Argument(help="The run's folder, such as runs/quickstart.")]
    output: Annotated[str | None, Option(metavar="FILE", help="The page to write. [default: report.html in the run]")] = None
    price: Annotated[float | None, Option(min=0, help="Dollars per GPU-hour.")] = None
    title: Annotated[str | None, Option(help="Heading of the page. [default: the run's name]")] = None


def report_run(options: ReportOptions) -> None:
    """Make one HTML page of a run: samples, losses, speed, stages, evaluation, cost, environment and recipe.

    The page is one file, needs no network, and can be made while the run goes on.
    """
    echo(write_page(options.run, options.output, options.price, options.title))


def write_page(run_path: str, output: str | None = None, price: float | None = None, title: str | None = None) -> str:
    """Write the page and say where it is.

    Args:
        run_path: the run's folder.
        output: by default `report.html` in it.
        price: dollars per GPU-hour.

    Raises:
        UserError: no run, or a file that cannot be written.
    """
    from prx_composer.commands.report.reported_run import read_run

    file = Path(output) if output is not None else Path(run_path) / "report.html"
    if output is not None and file.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it, such as {file / 'report.html'}.")
    run = read_run(run_path)
    page = make_page(run, price, title)
    with writing(f"--output {file}"):
        write_whole(file, page.encode())
    return f"{file}: {len(page.encode()) / 1e6:.1f} MB, {run.history.steps:,} steps of {run.name}"


def make_page(run: "Run", price: float | None, title: str | None) -> str:
    """Return the HTML of the page."""
    from prx_composer.commands.report.charts import chart_sections, evaluation
    from prx_composer.commands.report.reported_run import gpu_hours, stage_rows
    from prx_composer.common.pages import render

    return render(
        "prx_composer.commands.report",
        "report.html",
        title=title or run.name,
        run=run,
        samples=read_samples(run),
        charts=chart_sections(run),
        stages=stage_rows(run),
        evaluation=evaluation(run),
        stack=_stack(run),
        cost={
            "hours": gpu_hours(run),
            "price": price,
            "unit": "process" if set(run.devices) == {"cpu"} else "GPU",
        },
        number=number,
        duration=duration_string,
        at=run.history.seconds_at,
    )


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many significant digits; "–" for none, and what is not finite by that name."""
    if value is None:
        return "–"
    if value != value:
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}" if abs(value) < 1e-4 else f"{value:#.{digits}g}"
    return text.rstrip(".")


def _stack(run: "Run") -> list[tuple[str, str, str]]:
    """Return of each part its name and the arguments that the recipe gives it, as one line of YAML."""
    recipe, model = run.recipe, run.part("model")
    parts: list[tuple[str, Any]] = [(key.replace("_", " "), model.get(key)) for key in _OF_MODEL]
    parts.append(("model", {key: value for key, value in model.items() if not isinstance(value, dict)}))
    parts += [(label, recipe.get(key)) for key, label in _OF_RECIPE.items()]
    parts += [("algorithm", {"name": name} | spec) for name, spec in run.part("algorithms").items() if isinstance(spec, dict)]
    parts.append(("training", {key: recipe[key] for key in _OF_TRAINING if recipe.get(key) is not None}))
    rows = []
    for label, spec in parts:
        if isinstance(spec, dict) and spec:
            arguments = {key: value for key, value in spec.items() if key != "name"}
            rows.append((label, str(spec.get("name", "")), _one_line(arguments)))
    return rows


def _one_line(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 20).strip()
    return text[1:-1] if text.startswith("{") else text


# ---------------------------------------------------------------------------------------------------------- samples


def read_samples(run: "Run") -> dict[str, Any] | None:
    """Return what is shown of the samples that a run drew, from its first step to its last; None if it drew none.

    `images` has, for every prompt that is shown, a picture of each of `steps`. Where the grids cannot be taken apart, `sheets`
    has them whole instead. `drawn` is how many grids there were, `prompts` how many prompts the recipe has.
    """
    from PIL import Image

    from prx_composer.commands.report.reported_run import spread
    from prx_composer.common.pages import cut

    callbacks = run.part("callbacks")
    spec = next(
        (v for k, v in callbacks.items() if isinstance(v, dict) and "images" in (k, v.get("name")) and v.get("prompts")), {}
    )
    prompts = [str(prompt) for prompt in spec.get("prompts", [])]
    height, width = (spec.get(key) for key in ("height", "width"))
    aspect = width / height if isinstance(height, int) and isinstance(width, int) and height and width else 1.0
    steps, tiles, sheets, unreadable = [], [], [], []
    for step in spread(list(run.grids), STEPS):
        try:
            with Image.open(run.grids[step], formats=["PNG"]) as file:
                sheet = file.convert("RGB")
        except (OSError, SyntaxError, ValueError):  # half written
            unreadable.append(run.grids[step].name)
            continue
        steps.append(step)
        sheets.append(sheet)
        tiles.append(cut(sheet, prompts, aspect) if prompts else None)
    if not steps:
        return None
    rows: list[tuple[str, list[str]]] = []
    if all(tile is not None for tile in tiles):
        for index, prompt in list(enumerate(prompts))[:PROMPTS]:
            rows.append((prompt, [_webp(tile[index], SIDE) for tile in tiles if tile is not None]))
    whole = [] if rows else [_webp(sheet, SHEET_WIDTH) for sheet in sheets]
    return {
        "steps": steps,
        "drawn": len(run.grids),
        "images": rows,
        "sheets": whole,
        "prompts": len(prompts),
        "unreadable": unreadable,
    }


def _webp(image: "Image", longest: int) -> str:
    from PIL.Image import Resampling

    from prx_composer.common.pages import data_uri

    image.thumbnail((longest, longest * 4 if longest == SHEET_WIDTH else longest), Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return data_uri(file.getvalue(), "webp")
