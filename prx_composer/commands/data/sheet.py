"""A view as a picture or as a page."""

import base64
import io
from pathlib import Path

from PIL import Image, ImageDraw

from prx_composer.commands.data.view import Seen, View
from prx_composer.common.errors import UserError
from prx_composer.common.pages import Text, Tile, contact_sheet, picture, render, shown_factor

COLUMNS = 8
PROBLEM = (190, 30, 30)
WORDS = 6  # before and after a cut, in a picture


def check_output(path: str) -> None:
    """Raises UserError, before anything is read, for a file that will not be written."""
    if Path(path).suffix.lower() not in (".png", ".html"):
        raise UserError(f"--output {path}: a picture (.png) or a page (.html) can be written.")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {Path(path).parent}.")


def write(view: View, path: str) -> None:
    """Writes a .png or .html file. Raises UserError if it cannot be written."""
    try:
        if path.lower().endswith(".html"):
            Path(path).write_text(_page(view), encoding="utf-8")
        else:
            contact_sheet([_tile(seen, view.max_tokens) for seen in view.samples], COLUMNS, _font_size(view)).save(path)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error}") from error


def title(view: View) -> str:
    bucket = f" of bucket {view.bucket}" if view.bucket else ""
    tokens = f", captions cut to {view.max_tokens} tokens" if view.max_tokens else ""
    broken = sum(seen.image is None for seen in view.samples)
    undecodable = f"; {broken} cannot be decoded" if broken else ""
    what = f"{len(view.samples)} of {view.total:,} samples{bucket} of {view.split.folder}"
    return f"{what} at {view.image_size} px{tokens}{undecodable}"


def _font_size(view: View) -> int:
    widest = max(seen.size.width for seen in view.samples)
    return 11 if widest < 256 else 14


def _shown(seen: Seen) -> Image.Image:
    """Its pixels, or a crossed-out grey field of that size."""
    if seen.image is not None:
        return picture(seen.image)
    height, width = seen.size
    field = Image.new("RGB", (width, height), (225, 225, 225))
    draw = ImageDraw.Draw(field)
    draw.line((0, 0, width, height), fill=PROBLEM)
    draw.line((0, height, width, 0), fill=PROBLEM)
    return field


def _problem(seen: Seen) -> str:
    instead = "no image of its bucket can" if seen.replacement is None else f"training shows {seen.replacement} instead"
    return f"cannot be decoded ({seen.problem}); {instead}"


def _tile(seen: Seen, max_tokens: int) -> Tile:
    texts = [Text(f"{seen.sample_id}  {seen.stored}  {seen.key}", "gray", 2), Text(seen.caption.kept, lines=8)]
    if seen.caption.lost:
        before, after = seen.caption.kept.split()[-WORDS:], seen.caption.lost.split()[:WORDS]
        texts.append(
            Text(f"cut after {max_tokens} of {seen.caption.tokens} tokens: … {' '.join(before)} | {' '.join(after)} …", "red")
        )
    if seen.image is None:
        texts.append(Text(_problem(seen), "red"))
    return Tile(_shown(seen), tuple(texts))


def _page(view: View) -> str:
    factor = max(shown_factor(*seen.size) for seen in view.samples)
    tiles = [
        {"seen": seen, "image": _png(_shown(seen)), "width": seen.size.width * factor, "problem": _problem(seen)}
        for seen in view.samples
    ]
    return render("prx_composer.commands.data", "sheet.html", title=title(view), tiles=tiles, view=view)


def _png(image: Image.Image) -> str:
    """Base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
