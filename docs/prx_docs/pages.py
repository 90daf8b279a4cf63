"""Tables of the reference, in Markdown."""

import ast
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable

from typer.models import OptionInfo

from prx_composer import registry
from prx_composer.cli import GROUPS, VERBS
from prx_composer.commands import command
from prx_composer.common.outlines import CannotTell, constructor, outline
from prx_composer.recipe import resume
from prx_composer.recipe.arguments import given_by_recipe
from prx_composer.registry import BY_NAME

from .docstrings import arguments, cell, class_body, plain, sentence, summary
from .recipe_keys import Key, Section, sections

_CARDS = {"algorithms": "prx_composer/algorithms/README.md", "callbacks": "prx_composer/callbacks/README.md"}


def keys(*kinds: str) -> str:
    """Return the sections of these kinds, `top` being the keys at the top of a recipe."""
    return "\n".join(_section(section) for section in sections() if (section.kind or "top") in kinds)


def keys_of(kind: str, name: str) -> str:
    """Return the table of one component's keys."""
    return next(_table(section) for section in sections() if (section.kind, section.title) == (kind, name))


def _section(section: Section) -> str:
    lines = []
    if section.kind not in ("", "parallelism"):
        anchor = section.path if section.path.endswith(f".{section.title}") else f"{section.path}.{section.title}"
        lines = [f"### `{section.title}` {{ #{anchor} }}", "", _first(section.about), ""]
        if card := _card(section):
            lines += [card, ""]
        if section.kind in ("algorithms", "callbacks", "loggers"):
            rule = resume.rule_of(section.path)
            lines += [f"`{section.path}` may be added or left out when a run goes on: {rule.answer}. {rule.why}", ""]
    return "\n".join([*lines, _table(section)])


def _card(section: Section) -> str:
    target = next((file for kind, file in _CARDS.items() if section.kind == kind), None)
    if target is None or section.title in _COMPOSERS:
        return ""
    return f"[How, when, and what it costs](../../{target}#{section.title})"


_COMPOSERS = {"lr_monitor", "memory_monitor", "optimizer_monitor", "runtime_estimator", "speed_monitor"}


def _first(text: str) -> str:
    return plain(text).split("\n\n")[0].replace("\n", " ")


def _table(section: Section) -> str:
    if not section.keys:
        return "It takes no arguments.\n"
    prefix = f"{section.path}." if section.path else ""
    of_registry = f"{prefix}name" if section.kind not in BY_NAME else ""
    shown = [key for key in section.keys if key.path not in (of_registry, section.path)]
    if not shown:
        return "It takes no arguments.\n"
    lines = [_WIDE, "| key | meaning | type | default | unit | on resume |", "|---|---|---|---|---|---|"]
    lines += [_row(key, key.path.removeprefix(prefix)) for key in shown]
    return "\n".join([*lines, "", "</div>", ""])


_WIDE = '<div class="keys" markdown>\n'  # site.css has it narrow on a phone


def _row(key: Key, name: str) -> str:
    default = key.default if key.default.startswith("*") or not key.default else f"`{key.default}`"
    default = key.default if key.default in ("none", "as above", "the recipe's", "the library's") else default
    cells = (f"`{name}`", sentence(key.meaning), key.type, default, key.unit, key.rule.answer)
    return f"| {' | '.join(map(cell, cells))} |"


def classes(*kinds: str) -> str:
    """Return which class has which name in a recipe."""
    lines = ["| in a recipe | in Python |", "|---|---|"]
    for kind in kinds:
        for name, target in sorted(getattr(registry, kind).builtin.items()):
            lines.append("| `{}.{}` | `from {} import {}` |".format(kind, name, *target.split(":")))
    return "\n".join([*lines, ""])


def resume_table() -> str:
    return resume.table()


# ----------------------------------------------------------------------------------------------------------- commands


def commands() -> str:
    """Return every verb of `prx` with its options, as their dataclasses have them."""
    parts = [_verb(f"prx {name}", verb) for name, verb in VERBS.items()]
    parts += [_verb(f"prx {group} {name}", verb) for group, (_, verbs) in GROUPS.items() for name, verb in verbs.items()]
    return "\n".join(parts)


def _verb(name: str, verb: Callable[..., None]) -> str:
    lines = [f"### `{name}` {{ #{name.replace(' ', '-')} }}", "", inspect.cleandoc(verb.__doc__ or ""), ""]
    lines += [_WIDE, "| argument or option | meaning | type | default |", "|---|---|---|---|"]
    options = inspect.signature(command(verb)).parameters.values()
    lines += [f"| {' | '.join(map(cell, _option(parameter)))} |" for parameter in options]
    return "\n".join([*lines, "", "</div>", ""])


def _option(parameter: inspect.Parameter) -> tuple[str, str, str, str]:
    """Return name, meaning, type and default of an option; the same as `--help` shows."""
    kind, said = typing.get_args(parameter.annotation)[:2]
    is_option = isinstance(said, OptionInfo)
    given = [text for text in (said.default, *(said.param_decls or ())) if isinstance(text, str) and text.startswith("-")]
    name = ", ".join(given) or f"--{parameter.name.replace('_', '-')}"
    name = name if is_option else said.metavar or parameter.name.upper()
    of = [part for part in typing.get_args(kind) or (kind,) if part is not type(None)]
    several = typing.get_origin(kind) is list
    text, _, default = (said.help or "").replace("*", r"\*").partition("[default: ")
    shown = default.rstrip("]")
    if parameter.default is parameter.empty:
        shown = "*required*"
    elif not shown and parameter.default not in (None, False, "", [], ()):
        shown = "on" if parameter.default is True else f"`{parameter.default}`"
    words = {
        bool: "switch",
        int: "integer",
        float: "number",
        str: (said.metavar and is_option and said.metavar.lower()) or "text",
    }
    limits = "".join(f", {word} {at}" for word, at in (("at least", said.min), ("at most", said.max)) if at is not None)
    again = ("; may be given again" if is_option else "; one or more") if several else ""
    return f"`{name}`", text.strip(), f"{words.get(of[0], 'text')}{limits}{again}", shown


# ---------------------------------------------------------------------------------------------------------- Python


def registries() -> str:
    """Return a table of the registries and of what each has of this package."""
    found = {name: value for name, value in vars(registry).items() if isinstance(value, registry.Registry)}
    rows = [f"| `{kind}` | {', '.join(f'`{name}`' for name in sorted(found[kind].builtin))} |" for kind in sorted(found)]
    return "\n".join(["| kind | built in |", "|---|---|", *rows, ""])


def api(names: Iterable[str]) -> str:
    """Return classes and functions, `module:name`, with what they are called with."""
    return "\n".join(_documented(*name.split(":")) for name in names)


def _documented(module: str, name: str) -> str:
    target = outline(module, name)
    lines = [f"### `{name}` {{ #{name} }}", "", f"`from {_imported_from(module, name)} import {name}`", ""]
    lines += [*summary(target).splitlines(), ""]
    meanings = arguments(target)
    try:
        parameters = given_by_recipe(constructor(target))
    except CannotTell:
        parameters = {}
    if dataclasses.is_dataclass(target):
        parameters = {f.name: parameters[f.name] for f in dataclasses.fields(target) if f.name in parameters}
    rows = []
    for key, p in parameters.items():
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            default = "*required*" if p.default is p.empty else f"`{p.default!r}`"
            rows.append(f"| `{key}` | {cell(default)} | {cell(sentence(meanings.get(key, '')))} |")
    if rows:
        lines += ["| argument | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def methods(name: str) -> str:
    """Return the public methods of a class, `module:name`, with what they are called with."""
    lines = ["| method | what it does |", "|---|---|"]
    for method in class_body(name):
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            given = "" if method.decorator_list and ast.unparse(method.decorator_list[0]) == "property" else "({})"
            called = given.format(", ".join(argument.arg for argument in method.args.args[1:]))
            said = _first(ast.get_docstring(method) or "As its base has it; call `super()` in yours.")
            lines.append(f"| `{method.name}{called}` | {cell(said)} |")
    return "\n".join([*lines, ""])


def _imported_from(module: str, name: str) -> str:
    """Return the shortest module that has the name."""
    for short in ("prx_composer.models", "prx_composer.optim"):
        if module.startswith(f"{short}."):
            try:
                outline(short, name)
            except CannotTell:
                continue
            return short
    return module
