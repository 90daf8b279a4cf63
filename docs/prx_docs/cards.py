"""A page for each algorithm, and a list of them, made of its card in the one README of all."""

import re
from pathlib import Path
from typing import Any

import yaml

from prx_composer import registry
from prx_composer.common.outlines import constructor, outline
from prx_composer.recipe.annotations import dataclass_in, hints_of

from .docstrings import cell
from .pages import keys_of
from .tricks import evidence_table

FILE = Path(__file__).resolve().parents[2] / "prx_composer" / "algorithms" / "README.md"
_CARD = re.compile(r"^## ([a-z][a-z0-9_]*)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_YAML, _PYTHON = re.compile(r"```yaml\n(.*?)```\n", re.DOTALL), "```python\n"
_WIDE = 110  # characters of a line of code


def cards() -> dict[str, str]:
    """Return the cards, by name."""
    return {name: body.strip() for name, body in _CARD.findall(FILE.read_text(encoding="utf-8"))}


def page(name: str) -> str:
    """Return the page of one algorithm: its card, its class, what was measured of it elsewhere, and its keys."""
    body = cards()[name]
    if found := _YAML.search(body):
        given = yaml.safe_load(found[1])
        own = given["optimizer"] if name == "muon" else given["algorithms"][name]
        core = body[found.end() :].replace(_PYTHON, f"Its core, without a Trainer:\n{_PYTHON}", 1)
        script = (
            f"In a [script of your own](../../docs/guides/plain_composer.md), the same:\n```python\n{in_python(name, own)}```\n"
        )
        body = f"{body[: found.end()]}\n{script}\n{core}"
    lines = [f"# {name}", "", body, ""]
    if table := evidence_table(name) if name in registry.algorithms.builtin else "":
        lines += ["## Measured by size of image", "", "Of these, `prx check` tells what speaks against it.", "", table]
    kind = "optimizers" if name == "muon" else "algorithms"
    return "\n".join([*lines, "## Keys", "", keys_of(kind, name)])


def index(text: str) -> str:
    """Return the README with a table in place of its cards."""
    first, *_, last = _CARD.finditer(text)
    return f"{text[: first.start()]}## All of them\n\n{when_table()}\n{text[last.end() :]}"


def when_table() -> str:
    """Return what each algorithm is for, by the sentences of its card."""
    lines = ["| algorithm | when |", "|---|---|"]
    for name, body in cards().items():
        said = re.search(r"\*\*When\.\*\* (.*?)(?=\n\n)", body, re.DOTALL)
        assert said is not None, f"{FILE}: the card of {name} lacks **When.**"
        lines.append(f"| [`{name}`](../../prx_composer/algorithms/README.md#{name}) | {cell(said[1])} |")
    return "\n".join([*lines, ""])


def in_python(name: str, given: dict[str, Any]) -> str:
    """Return the code that makes an algorithm with these arguments of a recipe, or Muon."""
    components = registry.optimizers if name == "muon" else registry.algorithms
    module, _, cls = components.builtin[name].partition(":")
    imports = {(module, cls)}
    hints = hints_of(constructor(outline(module, cls)))
    arguments = [f"{key}={_code(value, hints.get(key, Any), imports)}" for key, value in given.items() if key != "name"]
    if name == "muon":
        made = _call(cls, ["model", *arguments])
        return "\n".join([*_lines(imports), "", f"optimizer = {made}  # Trainer(model=model, optimizers=optimizer, …)", ""])
    imports.add(("prx_composer.callbacks.checkpointing", "RandomStep"))
    lines = [
        *_lines(imports),
        "",
        f"algorithms = {_call('', [_call(cls, arguments)], '[]')}",
        "callbacks = [RandomStep()]  # resuming to the bit needs it",
    ]
    return "\n".join([*lines, "# Trainer(model=model, algorithms=algorithms, callbacks=callbacks, …)", ""])


def _lines(imports: set[tuple[str, str]]) -> list[str]:
    modules = sorted({module for module, _ in imports})
    return [f"from {module} import {', '.join(sorted(name for of, name in imports if of == module))}" for module in modules]


def _code(value: Any, hint: Any, imports: set[tuple[str, str]]) -> str:
    """Return a value of a recipe as a script writes it; what becomes a dataclass there is one here."""
    of = dataclass_in(hint, value)
    if isinstance(value, list):
        return _call("", [_object(of, item, imports) if of else _literal(item) for item in value], "[]")
    return _literal(value) if of is None else _object(of, value, imports)


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) and '"' not in value else repr(value)


def _object(of: Any, given: dict[str, Any], imports: set[tuple[str, str]]) -> str:
    imports.add((of.__module__, of.__name__))
    hints = hints_of(constructor(of))
    return _call(of.__name__, [f"{key}={_code(value, hints.get(key, Any), imports)}" for key, value in given.items()])


def _call(name: str, arguments: list[str], brackets: str = "()") -> str:
    """Return a call, or a list: on one line, or with an argument on each if that is too long."""
    line = f"{name}{brackets[0]}{', '.join(arguments)}{brackets[1]}"
    if len(line) <= _WIDE and "\n" not in line:
        return line
    inner = "".join(f"    {argument},\n".replace("\n", "\n    ").removesuffix("    ") for argument in arguments)
    return f"{name}{brackets[0]}\n{inner}{brackets[1]}"
