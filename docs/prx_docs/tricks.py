"""What was measured of tricks at which resolution, from the classes that `prx check` asks."""

import ast
from importlib.util import find_spec
from pathlib import Path

from prx_composer import registry
from prx_composer.recipe import evidence
from prx_composer.recipe.evidence import Evidence

from .docstrings import cell

_HEAD = ("| {}measured | image size | without | with | speed | source |", "|{}---|---|---|---|---|---|")


def evidence_of(name: str) -> list[Evidence]:
    """Return what an algorithm's class says was measured of it; nothing is imported that needs torch."""
    module, _, cls = registry.algorithms.builtin[name].partition(":")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        for line in node.body if isinstance(node, ast.ClassDef) and node.name == cls else ():
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "evidence":
                return list(eval(compile(ast.Expression(line.value), spec.origin, "eval"), dict(vars(evidence))))
    return []


def evidence_table(*names: str) -> str:
    """Return what was measured of these algorithms, or of all: one line for each comparison."""
    lines = [line.format(*of) for line, of in zip(_HEAD, (("",), ("",)) if names else (("trick | ",), ("---|",)), strict=True)]
    for name in names or sorted(registry.algorithms.builtin):
        for one in evidence_of(name):
            word = "**{:g}, worse**" if one.hurts else "{:g}"
            speed = "–" if one.speed is None else f"{one.speed:g} times"
            cells = (one.measure, f"{one.image_size} px", f"{one.without:g}", word.format(one.having), speed, _linked(one.source))
            trick = "" if names else f"[`{name}`](../../prx_composer/algorithms/README.md#{name}) | "
            lines.append(f"| {trick}{' | '.join(map(cell, cells))} |")
    return "\n".join([*lines, ""]) if len(lines) > len(_HEAD) else ""


def _linked(source: str) -> str:
    """Return a source as a link: "who, where", the latter an address or a file of the repository."""
    who, _, where = source.rpartition(", ")
    return f"[{who}]({where if '://' in where else f'../../{where}'})" if who else source
