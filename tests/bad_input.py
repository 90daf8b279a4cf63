"""What recipes/data/README.md says of bad input, as cases: a row of its table → inputs and what becomes of them.

`bad_pictures.py`, `bad_archives.py`, `bad_tables.py` hold the cases; `unit/test_bad_input_table.py` holds them against the table.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from conversions import jpeg, settings

from prx_composer.commands.convert import check_columns
from prx_composer.commands.convert.outcome import REASONS, Dropped
from prx_composer.commands.convert.records import Record, open_source
from prx_composer.commands.convert.units import convert as convert_sample
from prx_composer.common.errors import UserError

README = Path(__file__).parents[1] / "recipes" / "data" / "README.md"
GOOD = jpeg(100, 100)


class Case(NamedTuple):
    """An input and what becomes of it.

    Args:
        make: writes the input into the folder that it is given, or returns records.
        kept: captions of the samples that are kept, in order.
        dropped: how many are left out for which reason.
        refused: pattern of the message, if nothing is converted.
        source: kind of the input.
        options: further settings.
    """

    make: Callable[[Path], Iterable[Record] | None]
    kept: tuple[str, ...] = ()
    dropped: dict[str, int] = {}
    refused: str = ""
    source: str = "webdataset"
    options: dict[str, Any] = {}


def picture(image: Callable[[], bytes | None], reason: str = "", caption: Any = "a caption", **options: Any) -> Case:
    """One record with this image: left out for the reason, or kept if there is none."""
    columns = options.pop("columns", {})
    kept = () if reason else ("a caption",)
    return Case(
        lambda _: [Record("key", image(), {"txt": caption} | columns)], kept, {reason: 1} if reason else {}, options=options
    )


def outcome(case: Case, folder: Path) -> tuple[tuple[str, ...], dict[str, int], str]:
    """Captions of what is kept, counts of what is not, the message of a refusal."""
    folder.mkdir()
    given = case.make(folder)
    chosen = settings(case.source, folder, **case.options)
    kept: list[str] = []
    dropped = Counter[str]()
    try:
        if given is None:
            source = open_source(chosen)
            units = source.plan()
            check_columns(chosen, source, units)
            given = itertools.chain.from_iterable(source.read(unit) for unit in units)
        for record in given:
            found = convert_sample(record, chosen)
            if isinstance(found, Dropped):
                dropped[found.reason] += 1
            else:
                kept.append(found.row[next(iter(chosen.captions))])
    except UserError as error:
        return (), {}, str(error)
    return tuple(kept), dict(dropped), ""


def table() -> dict[str, str]:
    """First cell → second cell of every row of the table."""
    part = README.read_text(encoding="utf-8").partition("## What becomes of bad input")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[1].strip() for row in rows[2:]}


def reasons_in(cell: str) -> set[str]:
    """The reasons that a cell names."""
    return {name for name in re.findall(r"`([^`]*)`", cell) if name in REASONS}
