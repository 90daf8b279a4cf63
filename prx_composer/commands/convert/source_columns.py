"""Which columns an input has: the one that holds the images, those that the settings name, and how many records had them."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from prx_composer.commands.convert.expressions import input_columns
from prx_composer.commands.convert.records import has
from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError, nearest

IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "jpeg", "image_path", "file_name", "file", "path")
PEEKED = 50  # records that are looked at in any case, to say which columns there are
ADVICE = "nothing is downloaded. img2dataset does, and makes tars for --source webdataset"
SECONDS = 30.0  # to look for a column that these do not have


class Seen(NamedTuple):
    """What is known of an input's columns before work begins.

    Args:
        names: columns that a record can be asked for.
        missing: what the settings ask for and no record has that was looked at.
        whole: whether the whole input was looked at, or its schema says what there is.
        image: the one column that holds the images, where it is the same in all records.
        looked_at: number of records, where records were looked at.
    """

    names: list[str]
    missing: list[str]
    whole: bool = True
    image: str | None = None
    looked_at: int = 0


def look(
    rows: Iterable[dict[str, Any]],
    settings: Settings,
    seconds: float = SECONDS,
    enough: Callable[[], bool] = lambda: True,
) -> Seen:
    """Look at records until every column that the settings name was seen, for inputs that have no schema.

    JSON lines and tars leave out what is empty, so a column may come late.

    Args:
        seconds: after which it ends in any case.
        enough: whether nothing else is looked for in the rows.
    """
    names, missing, number = set[str](), set(input_columns(settings)), 0
    end, whole = time.monotonic() + seconds, True
    for number, row in enumerate(rows, 1):
        names.update(map(str, row))
        missing = {name for name in missing if not has(row, name)}
        if number >= PEEKED and ((not missing and enough()) or time.monotonic() > end):
            whole = False
            break
    return Seen(sorted(names), sorted(missing), whole, looked_at=number)


def choose_image(sure: list[str], likely: list[str], names: list[str], wanted: str | None) -> str:
    """Return the column that holds the images.

    Args:
        sure: columns whose type is that of images.
        likely: columns that are called as one of paths might be.
        names: all columns.
        wanted: `--image`.

    Raises:
        UserError: there is none, or several of which none is called `image`.
    """
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"--image {wanted}: there is no such column.{nearest(wanted, names)}")
        return wanted
    if "image" in sure or "image" in likely:
        return "image"
    found = list(dict.fromkeys(sure or likely))
    if len(found) > 1:
        options = " or ".join(f"--image {name}" for name in found)
        raise UserError(f"--image: {', '.join(found)} could each hold the images. Say which one is trained on: {options}.")
    if not found:
        advice = next((f" If {name} holds addresses: {ADVICE}." for name in names if name.lower().endswith("url")), "")
        raise UserError(f"--image: say which column holds the images; there are {', '.join(names) or 'none'}.{advice}")
    return found[0]


def options_of(settings: Settings) -> list[tuple[str, str]]:
    """Option and column of all that the settings ask for by name, the image aside."""
    named = [("--caption", column) for column in settings.captions.values()]
    named += [("--metadata", column) for column, _ in settings.metadata.values()]
    others = input_columns(settings) - {column for _, column in named}
    return named + [("--where", column) for column in sorted(others)]


def as_text(statistics: dict[str, Any]) -> list[str]:
    """What the summary says of columns: from which one images were taken, and how many records had the others."""
    images, columns = statistics.get("images", {}), statistics.get("columns", {})
    records = statistics["counts"].get("read", 0)
    taken = [f"{column} in {columns.get(column, 0)} of {records} records" for column in statistics.get("asked", [])]
    many = len(images) > 1
    taken[:0] = [f"images from {name}{f' ({count})' if many else ''}" for name, count in sorted(images.items())]
    return [f"Columns taken: {'; '.join(taken)}."] if taken else []


def first(names: Iterable[str], count: int = 3) -> str:
    """`a, b, c and 5 more`, for messages."""
    names = list(names)
    shown = ", ".join(itertools.islice(names, count))
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown
