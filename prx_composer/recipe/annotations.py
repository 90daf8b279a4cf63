"""What an annotation asks of a value from YAML, and what it is called in a message."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from prx_composer.schedule.moments import Moment


def hints_of(function: Any) -> dict[str, Any]:
    """Return the annotations of a function; none for a foreign one's that only resolve where they were written."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def dataclass_in(hint: Any, value: Any) -> Any:
    """Return the dataclass that a mapping, or each element of a list, is to become by an annotation; None if there is none."""
    for option in options_of(hint):
        item = next(iter(typing.get_args(option)), None)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return option
        if dataclasses.is_dataclass(item) and isinstance(value, list):
            return item
    return None


def options_of(hint: Any) -> Sequence[Any]:
    """Return what an annotation allows: the parts of a union, or itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


_PLAIN = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
_CONTAINERS = {dict: "a mapping", list: "a list", tuple: "a list", Sequence: "a list"}


def type_in_words(hint: Any) -> str:
    """Return what values of a type are called; "" if one of its options is none that YAML has, and nothing is checked."""
    named = [_describe(option) for option in options_of(hint)]
    return " or ".join(named) if all(named) else ""


def _describe(hint: Any) -> str:
    """Return what a YAML value of that type is called; "" for types that YAML doesn't have, which are not checked."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return _PLAIN.get(hint) or _CONTAINERS.get(typing.get_origin(hint) or hint, "")


def instead_of(value: Any, options: Sequence[Any], example: Any, path: str) -> str:
    """Return what to write where a number stands for a string: a time without its unit, most often."""
    if str not in options or isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    unit = _unit(example)
    if unit == "h":
        return f" A time has a unit: write {value if value > 0 else 24}h for hours, or 3d, 90m, 1h30m."
    counted = int(value) if value > 0 and value % 1 == 0 else 1000
    said = f"{counted}ba (batches), {counted}ep (epochs) or {counted}sp (samples)"
    if path != "max_duration":
        said = f"{value}dur (part of the run)" if 0 < value < 1 else f"{said}, or 0.5dur for half of the run"
    said = f" A time has a unit: write {said}."
    if unit:
        return said
    key = path.rpartition(".")[2]
    return f"{said} Any other string is quoted: {key}: '{value}' in a file, \"{path}='{value}'\" on the command line."


def _unit(example: Any) -> str:
    """Return the unit of a default such as "0.25dur" or "24h"; "" for one that is no time."""
    try:
        unit = Moment(example).points[0].unit if isinstance(example, str) else ""
    except ValueError:
        return ""
    return "h" if unit == "sec" else unit


def matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple)
    return isinstance(value, origin)
