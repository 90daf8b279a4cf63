"""Tiny Iconify sets, drawn here: one thing per place in a grid; a style has a colour, perhaps an outline, and moves the grid."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

MOVED = {"flat": (0, 0), "lined": (1, 0), "dark-side": (0, 3), "paper": (3, 2)}  # so that things are mistaken across styles
STYLES = {"flat": "#d03020", "lined": "#2040d0", "dark-side": "#302020", "paper": "#20a040"}
THINGS = [f"{kind}-{number}" for kind in ("fish", "fruit", "tool") for number in range(12)]
CATEGORIES = {"Animals & Nature": "fish", "Food & Drink": "fruit", "Objects": "tool"}


def body(index: int, style: str) -> str:
    """A square whose place and size tell the thing, in the style's colour, with a dot in it."""
    right, down = MOVED[style]
    x, y, side = 1 + 5 * (index % 6) + right, 1 + 5 * (index // 6) + down, 8 + index % 3 * 2
    outline = ' stroke="#000" stroke-width="1.5"' if style == "lined" else ""
    square = f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{STYLES[style]}"{outline}/>'
    return f'{square}<circle cx="{x + side / 2}" cy="{y + side / 2}" r="2" fill="#ffd000"/>'


def content(style: str, extra: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the files of a set: name → JSON.

    Args:
        extra: further icons, name → body, in the last category.
    """
    icons = {thing: {"body": body(index, style)} for index, thing in enumerate(THINGS)}
    icons |= {name: {"body": text} for name, text in (extra or {}).items()}
    categories = {label: [thing for thing in THINGS if thing.startswith(kind)] for label, kind in CATEGORIES.items()}
    categories["Objects"] += list(extra or {})
    licence = {"title": "Test 1.0", "spdx": "LicenseRef-Test", "url": "https://example.com/licence"}
    info = {"prefix": style, "name": style.title(), "author": {"name": f"Author of {style}"}, "license": licence}
    return {
        "icons.json": {"prefix": style, "icons": icons, "width": 36, "height": 36},
        "metadata.json": {"categories": categories},
        "info.json": info,
    }


def write_tarball(folder: Path, style: str, extra: dict[str, str] | None = None) -> Path:
    """As `npm pack` leaves it."""
    path = folder / f"iconify-json-{style}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, value in content(style, extra).items():
            text = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


def write_sets(folder: Path, extra: dict[str, str] | None = None) -> Path:
    """All four styles: two tarballs, a folder, and one file with everything, as in iconify/icon-sets."""
    folder.mkdir(parents=True, exist_ok=True)
    flat, lined, dark, paper = STYLES
    write_tarball(folder, flat, extra)
    write_tarball(folder, lined, extra)
    (folder / dark).mkdir()
    for name, value in content(dark, extra).items():
        (folder / dark / name).write_text(json.dumps(value))
    parts = content(paper, extra)
    whole = parts["icons.json"] | parts["metadata.json"] | {"info": parts["info.json"]}
    (folder / f"{paper}.json").write_text(json.dumps(whole))
    return folder
