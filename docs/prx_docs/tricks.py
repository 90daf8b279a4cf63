"""What was measured of tricks at which resolution, from the classes that `prx check` asks."""

import ast

from prx_composer import registry
from prx_composer.recipe import evidence
from prx_composer.recipe.evidence import Evidence

from .docstrings import cell, class_body

_HEAD = ("| {}measured | image size | without | with | speed | source |", "|{}---|---|---|---|---|---|")


def evidence_of(name: str) -> list[Evidence]:
    """Return what an algorithm's class says was measured of it; nothing is imported that needs torch."""
    for line in class_body(registry.algorithms.builtin[name]):
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "evidence":
            return list(eval(compile(ast.Expression(line.value), name, "eval"), dict(vars(evidence))))
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
