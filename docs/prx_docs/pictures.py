"""The two pictures of the architecture, as SVG that follows the page's colours."""

import ast
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "prx_composer"
_WIDTH, _GAP, _HEIGHT = 640, 14, 34
_SAID = {  # what a room is for
    "cli": "prx VERB",
    "commands": "one for each verb",
    "integrations": "llm-foundry",
    "training": "recipe → run",
    "callbacks": "watch a run",
    "loggers": "trackers",
    "algorithms": "tricks",
    "metrics": "scores",
    "runs": "folders, checkpoints",
    "data": "images, captions",
    "optim": "Muon, schedules",
    "models": "network, flow",
    "recipe": "keys, checks",
    "registry": "names → classes",
    "schedule": "times",
    "common": "errors, files",
}


def _text(x: float, y: float, said: str, size: int = 13, anchor: str = "middle", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(said)}</text>'


def _box(x: float, y: float, width: float, height: float, said: str, below: str = "", kind: str = "box") -> str:
    shape = f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6"/>'
    middle = x + width / 2
    if not below:
        return shape + _text(middle, y + height / 2 + 5, said, weight="bold")
    return shape + _text(middle, y + height / 2 - 2, said, weight="bold") + _text(middle, y + height / 2 + 14, below, 11)


def _picture(width: float, height: float, title: str, parts: list[str]) -> str:
    head = f'<svg class="picture" viewBox="0 0 {width:.0f} {height:.0f}" role="img" xmlns="http://www.w3.org/2000/svg">'
    arrow = '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    arrow += '<path d="M0,0 L8,4 L0,8 z" fill="currentColor"/></marker></defs>'
    return f"{head}<title>{escape(title)}</title>{arrow}{''.join(parts)}</svg>"


# ------------------------------------------------------------------------------------------------------------ the house


def floors() -> list[list[str]]:
    """Return the rooms of every floor, from the ground up, as the test of the house has them."""
    tree = ast.parse((REPOSITORY / "tests" / "unit" / "test_house.py").read_text())
    table = next(
        statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "FLOORS"
    )
    return [sorted(rooms) for rooms in ast.literal_eval(table)]


def imports() -> dict[str, set[str]]:
    """Return which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prx_composer"):
                part = [*node.module.split("."), *(alias.name for alias in node.names)]
                names = part[1:2] if len(node.module.split(".")) > 1 else part[1:]
                found.setdefault(room, set()).update(names)
    return {room: names - {room} for room, names in found.items()}


def house() -> str:
    """Return the floors, the ground below, with how many rooms each imports."""
    storeys, above = floors(), imports()
    width, parts = _WIDTH, list[str]()
    for floor, rooms in enumerate(reversed(storeys)):
        y = 10 + floor * (_HEIGHT + 18)
        room_width = (width - 20 - _GAP * (len(rooms) - 1)) / len(rooms)
        for index, room in enumerate(rooms):
            used = len(above.get(room, set()) & {name for names in storeys for name in names})
            said = f"{_SAID.get(room, '')}" + (f" · imports {used} rooms" if used > 1 else "")
            parts.append(_box(10 + index * (room_width + _GAP), y, room_width, _HEIGHT + 8, room, said))
    return _picture(width, 20 + len(storeys) * (_HEIGHT + 18), "The floors of prx_composer: imports go down only", parts)


# ------------------------------------------------------------------------------------------------------------- the step

_STEPS = (
    ("batch", "images, captions", ()),
    ("encode", "autoencoder, text encoder", ()),
    ("noise", "timesteps, x_t", ("training_flow",)),
    ("denoise", "backbone", ("router", "fusion", "taps", "conditioners", "resolution_embedder")),
    ("FlowOutput", "prediction, x0, ε, t, taps", ()),
    ("losses", "flow, and others", ("auxiliary_losses",)),
    ("update", "Muon, AdamW", ()),
)
_DRAWING = ("generate", "guidance", "sampling_weights")


def step() -> str:
    """Return the step from a batch to the update, with the seams that algorithms fill."""
    width, box, height = 560, 230, 48
    parts, y = [], 10.0
    for index, (name, below, seams) in enumerate(_STEPS):
        parts.append(_box(20, y, box, height, name, below))
        tall = max(height, len(seams) * 30 - 6)
        for place, seam in enumerate(seams):
            top = y + place * 30
            parts.append(f'<path class="line" d="M{20 + box},{y + height / 2:.0f} L330,{top + 12:.0f}"/>')
            parts.append(_box(330, top, 210, 24, seam, kind="seam"))
        if index < len(_STEPS) - 1:
            middle = 20 + box / 2
            down = f"M{middle:.0f},{y + height:.0f} L{middle:.0f},{y + tall + 18:.0f}"
            parts.append(f'<path class="line" d="{down}" marker-end="url(#tip)"/>')
        y += tall + 20
    parts.append(_box(20, y + 10, box, height, "generate", "the same network, step by step"))
    for place, seam in enumerate(_DRAWING[1:]):
        parts.append(f'<path class="line" d="M{20 + box},{y + 10 + height / 2:.0f} L330,{y + 22 + place * 30:.0f}"/>')
        parts.append(_box(330, y + 10 + place * 30, 210, 24, seam, kind="seam"))
    return _picture(width, y + 20 + height + 10, "A training step, and the places that algorithms fill", parts)
