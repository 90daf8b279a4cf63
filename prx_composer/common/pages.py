"""What people look at: pictures with text below them, side by side in one picture, and HTML pages that are one file."""

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 8


@dataclass(frozen=True)
class Text:
    """A paragraph, wrapped to its tile's width and ended with … after `lines` lines."""

    content: str
    colour: str = "black"
    lines: int = 4


@dataclass(frozen=True)
class Tile:
    """A picture and the paragraphs below it."""

    image: Image.Image
    texts: tuple[Text, ...]


def picture(image: Tensor) -> Image.Image:
    """Return uint8 (3, H, W) as a picture of the same pixels."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def shown_factor(height: int, width: int, min_side: int = 128) -> int:
    """Return how often every pixel of a small image is repeated in either direction, for the shorter side to have `min_side`."""
    return max(1, -(-min_side // min(height, width)))


def image_grid(images: Tensor, captions: Sequence[str], columns: int = 6) -> Image.Image:
    """Return one picture of uint8 images (B, 3, H, W) with their captions; small images are enlarged pixel by pixel."""
    tiles = [Tile(picture(image), (Text(caption),)) for image, caption in zip(images, captions, strict=True)]
    return contact_sheet(tiles, columns)


def contact_sheet(tiles: Sequence[Tile], columns: int = 6, font_size: int | None = None) -> Image.Image:
    """Return a picture of tiles in rows, whose images may differ in size.

    All are enlarged alike, pixel by pixel, if the smallest is small.

    Args:
        columns: at most.
        font_size: pixels. By default it grows with the images.
    """
    factor = max(shown_factor(tile.image.height, tile.image.width) for tile in tiles)
    cell_width = max(tile.image.width for tile in tiles) * factor
    font_size, letters, line_height = _type(cell_width, font_size)
    font = ImageFont.load_default(size=font_size)
    columns = min(columns, len(tiles))
    texts = [[(text.colour, _wrap(text, letters)) for text in tile.texts] for tile in tiles]
    line_counts = [sum(len(lines) for _, lines in below) for below in texts]
    rows, bottom = _rows([tile.image.height * factor for tile in tiles], line_counts, line_height, columns)
    sheet = Image.new("RGB", (columns * (cell_width + GAP) + GAP, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for row, top in rows:
        for column, (tile, below) in enumerate(zip(tiles[row], texts[row], strict=True)):
            x, width, height = GAP + column * (cell_width + GAP), tile.image.width * factor, tile.image.height * factor
            sheet.paste(tile.image.resize((width, height), Image.Resampling.NEAREST), (x, top))
            draw.rectangle((x - 1, top - 1, x + width, top + height), outline=(200, 200, 200))
            y = top + height + 3
            for colour, lines in below:
                draw.multiline_text((x, y), "\n".join(lines), fill=colour, font=font, spacing=line_height - font_size)
                y += line_height * len(lines)
    return sheet


def cut(sheet: Image.Image, captions: Sequence[str], aspect: float = 1.0, columns: int = 6) -> list[Image.Image] | None:
    """Return the images that `image_grid` put together, as enlarged there; None if the sheet isn't one of these captions.

    Args:
        aspect: width / height of the images.
    """
    columns = min(columns, len(captions))
    cell_width, rest = divmod(sheet.width - GAP, columns)
    cell_width -= GAP
    if rest or cell_width < 1:
        return None
    height = round(cell_width / aspect)
    _, letters, line_height = _type(cell_width)
    line_counts = [len(_wrap(Text(caption), letters)) for caption in captions]
    rows, bottom = _rows([height] * len(captions), line_counts, line_height, columns)
    if bottom != sheet.height:
        return None
    lefts = [GAP + column * (cell_width + GAP) for column in range(columns)]
    boxes = [(left, top, left + cell_width, top + height) for _, top in rows for left in lefts]
    return [sheet.crop(box) for box in boxes[: len(captions)]]


def _type(cell_width: int, font_size: int | None = None) -> tuple[int, int, int]:
    """Return font size, letters of a line, and height of a line."""
    font_size = font_size or max(11, cell_width // 12)
    return font_size, max(8, int(cell_width / (font_size * 0.52))), int(font_size * 1.3)


def _rows(
    heights: Sequence[int], line_counts: Sequence[int], line_height: int, columns: int
) -> tuple[list[tuple[slice, int]], int]:
    """Return which tiles are in each row and where it begins, and the height of the whole."""
    rows, y = [], GAP
    for first in range(0, len(heights), columns):
        row = slice(first, first + columns)
        rows.append((row, y))
        y += max(heights[row]) + line_height * max(line_counts[row]) + 6 + GAP
    return rows, y


def _wrap(text: Text, letters: int) -> list[str]:
    lines = textwrap.wrap(text.content, letters)
    if len(lines) > text.lines:
        lines = lines[: text.lines]
        lines[-1] = f"{lines[-1][: letters - 2]} …"
    return lines


# --------------------------------------------------------------------------------------------------------------- pages


def render(package: str, template: str, **values: Any) -> str:
    """Return a page: a template of `package` that extends `page.html`, which has the common style.

    Everything is escaped, pictures are inside, and nothing is fetched.
    """
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("prx_composer.common", ".")])
    return Environment(loader=loader, autoescape=select_autoescape(), trim_blocks=True).get_template(template).render(**values)


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture for `src`; `kind` as in "png"."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
