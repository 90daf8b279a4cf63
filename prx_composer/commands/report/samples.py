"""The samples that a run drew, prompt by prompt, from its first step to its last."""

import io
from dataclasses import dataclass

from PIL import Image

from prx_composer.commands.report.reported_run import Run
from prx_composer.common.contact_sheet import cut
from prx_composer.common.html_page import data_uri

STEPS, PROMPTS = 8, 12
SIDE = 192  # pixels of one image
SHEET_WIDTH = 720  # of a grid that cannot be taken apart


@dataclass(frozen=True)
class Samples:
    """Args:
    steps: that are shown, of `drawn` times; images: prompt → one picture of each step, as `src`.
    sheets: the whole grids instead, where they cannot be taken apart.
    prompts: in the recipe; unreadable: names of files.
    """

    steps: list[int]
    drawn: int
    images: list[tuple[str, list[str]]]
    sheets: list[str]
    prompts: int
    unreadable: list[str]


def read_samples(run: Run) -> Samples | None:
    """None if the run drew none."""
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
    return Samples(steps, len(run.grids), rows, whole, len(prompts), unreadable)


def spread(items: list[int], most: int) -> list[int]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _webp(image: Image.Image, longest: int) -> str:
    image.thumbnail((longest, longest * 4 if longest == SHEET_WIDTH else longest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return data_uri(file.getvalue(), "webp")
