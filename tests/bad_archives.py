"""Rows of the table of bad input that are about tars and about the folder they lie in; see `bad_input.py`."""

import gzip
import os
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


def broken(folder: Path) -> None:
    cut(lambda members: members[6].offset)(folder)
    content = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(content + b"no header" * 200)


def compressed(folder: Path) -> None:
    cut(lambda members: members[6].offset)(folder)
    content = gzip.compress((folder / "0.tar").read_bytes())
    (folder / "0.tar").unlink()
    (folder / "0.tar.gz").write_bytes(content[:-10])


def no_tar(folder: Path) -> None:
    tar([])(folder)
    (folder / "1.tar").write_bytes(b"what is this" * 1000)


def concatenated(folder: Path) -> None:
    for number in range(2):
        write_tar(folder / f"{number}", sample(f"{number}", jpeg(100, 100, number), f"{number}"))
    whole = [(folder / f"{number}").read_bytes() for number in range(2)]
    (folder / "a.tar").write_bytes(b"".join(whole))
    (folder / "b.tar.gz").write_bytes(b"".join(map(gzip.compress, whole)))


def apart(folder: Path) -> None:
    members = [part for i in range(3) for part in sample(f"{i}", jpeg(100, 100, i), f"{i}")]
    write_tar(folder / "0.tar", members[::2] + members[1::2])


def linked(folder: Path) -> None:
    write_tar(folder.parent / "disk" / "0.tar", sample("a", GOOD, "linked"))
    os.symlink(folder.parent / "disk", folder / "to")
    write_tar(folder / "a.tar", sample("a", GOOD, "first"))


TWICE = [("b.jpg", GOOD), ("b.jpg", GOOD), ("b.txt", b"of one"), ("b.txt", b"of the other")]
SIDES = [("b.left.jpg", GOOD), ("b.right.jpg", GOOD), ("b.txt", b"between")]


def only_sides(folder: Path) -> None:
    write_tar(folder / "0.tar", SIDES)


CASES: dict[str, list[Case]] = {
    "tar or its compression cut off (also between two members) or broken; no tar at all": [
        Case(cut(lambda members: members[4].offset_data + 100), ("0", "1"), {"damaged_input": 1}),
        Case(cut(lambda members: members[4].offset + 100), ("0", "1"), {"damaged_input": 1}),
        Case(cut(lambda members: members[4].offset), ("0", "1"), {"damaged_input": 1}),
        Case(broken, ("0", "1", "2"), {"damaged_input": 1}),
        Case(compressed, ("0", "1", "2"), {"damaged_input": 1}),
        Case(no_tar, BOTH, {"damaged_input": 1}),
    ],
    "several tars in one file (`cat a.tar b.tar`, also compressed)": [Case(concatenated, ("0", "1", "0", "1"))],
    "members of a sample that lie apart in a tar (all pictures first, then all texts)": [Case(apart, ("0", "1", "2"))],
    "dots in the names of a tar (`v1.2 final.jpg` and `v1.2 final.txt`; `cat.jpg`, `cat.txt`, `cat.v2.jpg`, `cat.v2.txt`)": [
        Case(tar([*sample("v1.2 final", GOOD, "dotted"), *sample("v1.3 x", GOOD, "too")]), ("first", "dotted", "too", "last")),
        Case(tar([*sample("cat", GOOD, "1"), *sample("cat.v2", GOOD, "2")]), ("first", "1", "2", "last")),
    ],
    "the same name twice in a tar": [
        Case(tar(TWICE), BOTH, {"same_name_twice": 2}),
        Case(tar([*sample("b", GOOD, "1"), *sample("c", GOOD, "2"), *sample("b", GOOD, "3")]), ("first", "1", "3", "2", "last")),
    ],
    "several images in a sample of a tar (`1.left.jpg`, `1.right.jpg`, `1.txt`)": [
        Case(tar(SIDES), BOTH, {"several_images": 1}),
        Case(only_sides, ("between",), options={"image": "right.jpg"}),
        Case(only_sides, refused="--image: say which one is meant. In 0.tar/b there are left.jpg, right.jpg"),
        Case(tar([*sample("b", GOOD, "between"), ("b.mask.png", GOOD)]), ("first", "between", "last")),
    ],
    "hidden members (`._1.jpg`) and members without a suffix in a tar": [Case(tar([("._a.jpg", b"x"), ("README", b"y")]), BOTH)],
    "path traversal or absolute names in a tar": [
        Case(
            tar(lambda folder: [*sample("../../../escaped", GOOD, "up"), *sample(f"{folder}/absolute", GOOD, "root")]),
            ("first", "up", "root", "last"),
        )
    ],
    "links to folders among the input's files": [
        Case(linked, ("first",)),
        Case(linked, ("first", "linked"), options={"follow_links": True}),
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
