"""Rows of the table of bad input that are about tars and about the folder they lie in; see `bad_input.py`."""

import tarfile
from collections.abc import Callable
from pathlib import Path

from bad_input import GOOD, Case
from conversions import jpeg, sample, write_tar

Members = list[tuple[str, bytes]]


def tar(members: Callable[[Path], Members] | Members) -> Callable[[Path], None]:
    """A maker of one tar of these members between two good samples."""

    def make(folder: Path) -> None:
        between = members(folder) if callable(members) else members
        around = [*sample("a", jpeg(100, 100, 1), "first"), *between, *sample("z", jpeg(100, 100, 2), "last")]
        write_tar(folder / "0.tar", around)

    return make


def cut(bytes_left: Callable[[list[tarfile.TarInfo]], int]) -> Callable[[Path], None]:
    """A maker of a tar of four samples that is cut at an offset, which follows from its headers."""

    def make(folder: Path) -> None:
        path = write_tar(folder / "0.tar", [part for i in range(4) for part in sample(f"{i}", jpeg(100, 100, i), f"{i}")])
        with tarfile.open(path) as opened:
            size = bytes_left(opened.getmembers())
        path.write_bytes(path.read_bytes()[:size])

    return make


def special(folder: Path) -> None:
    """A link, a hard link and a device, each alone and each with a caption."""
    tar([])(folder)
    with tarfile.open(folder / "0.tar", "a") as opened:
        for kind, name in ((tarfile.SYMTYPE, "link.jpg"), (tarfile.LNKTYPE, "hard.jpg"), (tarfile.CHRTYPE, "device.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            opened.addfile(member)


BOTH = ("first", "last")

CASES: dict[str, list[Case]] = {
    "path traversal or absolute names in a tar": [
        Case(
            tar(lambda folder: [*sample("../../../escaped", GOOD, "up"), *sample(f"{folder}/absolute", GOOD, "root")]),
            ("first", "up", "root", "last"),
        )
    ],
    "symbolic links, hard links and devices in a tar": [Case(special, BOTH)],
    "control characters in a name": [Case(tar(sample("bad\x1b[31mname\n", GOOD, "odd")), ("first", "odd", "last"))],
    "column that no record has": [
        Case(tar([]), refused="--caption: there is no column 'text'.*Did you mean 'txt'", options={"captions": {"text": "text"}})
    ],
    "filters": [
        Case(tar([]), dropped={"caption_length": 2}, options={"caption_chars": (500, None)}),
        Case(tar([]), dropped={"min_side": 2}, options={"min_side": 101}),
        Case(tar(sample("wide", jpeg(50, 100), "wide")), BOTH, {"max_aspect": 1}, options={"max_aspect": 1.5}),
        Case(tar([]), dropped={"where": 2}, options={"where": "width > 100"}),
        Case(
            tar(sample("scored", GOOD, "scored", score=1)),
            ("scored",),
            {"where_failed": 2},
            options={"where": "score > 0"},
        ),
    ],
}
