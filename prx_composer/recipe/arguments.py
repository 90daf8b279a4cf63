"""Arguments of a recipe against what a component takes: names, missing ones, and types, each mistake with its YAML path."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prx_composer.common.errors import Problems, UserError, nearest
from prx_composer.common.outlines import CannotTell, constructor
from prx_composer.registry import NESTED, Registry
from prx_composer.schedule.moments import Moment

Spec = dict[str, Any]
NONE: frozenset[str] = frozenset()


def provided_by(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe has for its algorithms, callbacks and loggers, by the name of a constructor's parameter.

    A component that declares a parameter of one of these names is called with it, be it this package's or anybody's.

    Args:
        values: keys of a recipe.
    """
    return {
        "folder": str(values.get("run_folder")),
        "image_size": values.get("image_size"),
        "global_batch_size": values.get("global_train_batch_size"),
        "seed": values.get("seed"),
        "source": (values.get("train_loader") or {}).get("source") or {},
    }


_OFTEN_OWN = frozenset({"image_size", "global_batch_size", "seed"})


def is_filled(parameter: inspect.Parameter) -> bool:
    """Return whether the program fills a parameter that it has a value for, where the recipe gives none.

    A size or a seed with a default is the component's own setting: the size that a teacher sees, the seed of a callback's images.
    """
    return parameter.default is parameter.empty or parameter.name not in _OFTEN_OWN


def entries(components: dict[str, Any], kind: str) -> Iterator[tuple[str, Spec]]:
    """Name and arguments of the algorithms, callbacks or loggers of a recipe, in order, but those set to false."""
    for name, arguments in components.items():
        if arguments is False:
            continue
        if not isinstance(arguments, dict | None) and arguments is not True:
            raise UserError(f"{kind}.{name} must be a mapping of arguments, or false to leave it out, not {arguments!r}.")
        yield name, arguments if isinstance(arguments, dict) else {}


def check_entries(components: dict[str, Any], kind: str) -> None:
    """Raises UserError for all that `entries` would refuse."""
    problems = Problems()
    for name, arguments in components.items():
        with problems.noted():
            list(entries({name: arguments}, kind))
    problems.raise_any()


def split(spec: Any, path: str) -> tuple[str, Spec]:
    """`{name: …, **arguments}` → name, arguments."""
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise UserError(f"{path} must be a mapping with a `name`, not {spec!r}.")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def check_spec(
    components: Registry,
    spec: Any,
    path: str,
    provided: frozenset[str] = NONE,
    also: frozenset[str] = NONE,
    defaulted: frozenset[str] = NONE,
    imports: bool = True,
) -> None:
    """Checks `{name: …, **arguments}`; see `check_arguments`."""
    name, arguments = split(spec, path)
    check_component(components, name, arguments, path, provided, also, defaulted, imports)


def check_component(
    components: Registry,
    name: str,
    arguments: Spec,
    path: str,
    provided: frozenset[str] = NONE,
    also: frozenset[str] = NONE,
    defaulted: frozenset[str] = NONE,
    imports: bool = True,
) -> None:
    """Checks a component's name, and its arguments as `check_arguments` does.

    Args:
        imports: whether components may be imported for it. If not, what cannot be known without passes.
    """
    try:
        target = components.described(name, path, imports)
    except CannotTell:
        return
    check_arguments(target, arguments, path, provided, also, defaulted, imports)


def check_arguments(
    target: Any,
    arguments: Spec,
    path: str,
    provided: frozenset[str] = NONE,
    also: frozenset[str] = NONE,
    defaulted: frozenset[str] = NONE,
    imports: bool = True,
) -> None:
    """Binds arguments against a signature.

    Args:
        target: a class or function, or its outline.
        provided: what the program passes and a recipe may not.
        also: what a recipe may give though the signature doesn't have it.
        defaulted: what the program passes unless the recipe does.
        imports: whether components that are nested in it may be imported.
    """
    try:
        function = constructor(target)
    except CannotTell:
        return
    parameters = {
        name: parameter for name, parameter in inspect.signature(function).parameters.items() if name not in ("self", *provided)
    }
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    allowed = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)] + sorted(also)
    hints = hints_of(function)
    problems = Problems()
    for key, value in arguments.items():
        with problems.noted():
            default = parameters[key].default if key in parameters else None
            if key not in allowed and not open_ended:
                instead = nearest(str(key), allowed) if allowed else " It takes none."
                raise UserError(f"{path}.{key}: no such argument.{instead}")
            if key in NESTED:
                if value is not None or default is not None:
                    tokenizer = frozenset({"tokenizer"}) if key == "text_encoder" else NONE
                    check_spec(NESTED[key], value, f"{path}.{key}", provided=tokenizer, also=tokenizer, imports=imports)
            elif key in hints:
                check_type(value, hints[key], f"{path}.{key}", default)
    for name, parameter in parameters.items():
        if name not in defaulted and name not in arguments and parameter.default is parameter.empty and name in allowed:
            problems.found.append(f"{path} lacks the argument {name!r}.")
    problems.raise_any()


def hints_of(function: Any) -> dict[str, Any]:
    """Its annotations; none for a foreign function's that only resolve where they were written."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


# ----------------------------------------------------------------------------------------------------------- types


def check_type(value: Any, hint: Any, path: str, example: Any = None) -> None:
    """Compares a YAML value with an annotation, as far as the annotation is one that YAML can express.

    Args:
        example: a value that would be right, such as the default.

    Raises:
        UserError: it is of another type; says what to write.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    if value is None and type(None) in options:
        return
    for option in options:
        item = next(iter(typing.get_args(option)), None)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            check_arguments(option, value, path)
            return
        if dataclasses.is_dataclass(item) and isinstance(value, list):
            problems = Problems()
            for index, element in enumerate(value):
                with problems.noted():
                    check_type(element, item, f"{path}[{index}]")
            problems.raise_any()
            return
    expected = [_describe(option) for option in options]
    if not all(expected):
        return
    if not any(_matches(value, option) for option in options):
        raise UserError(f"{path}: expected {' or '.join(expected)}, not {value!r}.{_instead(value, options, example, path)}")
    if len(options) == 1 and isinstance(value, list | dict):
        _check_items(value, hint, path)


def _check_items(value: list[Any] | dict[Any, Any], hint: Any, path: str) -> None:
    """Elements of a list, or values of a mapping, where the annotation says of which type they are."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
    if isinstance(value, dict):
        pairs, hints = [(f".{key}", item) for key, item in value.items()], arguments[1:] * len(value)
    else:
        pairs = [(f"[{index}]", item) for index, item in enumerate(value)]
        hints = arguments * len(value) if len(arguments) == 1 else arguments  # of another length: the constructor's to judge
    problems = Problems()
    for (below, item), of_item in zip(pairs, hints, strict=False):
        with problems.noted():
            check_type(item, of_item, path + below)
    problems.raise_any()


_PLAIN = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
_CONTAINERS = {dict: "a mapping", list: "a list", tuple: "a list", Sequence: "a list"}


def _describe(hint: Any) -> str:
    """What a YAML value of that type is called; empty for types that YAML doesn't have, which are then not checked."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return _PLAIN.get(hint) or _CONTAINERS.get(typing.get_origin(hint) or hint, "")


def _instead(value: Any, options: Sequence[Any], example: Any, path: str) -> str:
    """What to write where a number stands for a string: a time without its unit, most often."""
    if str not in options or isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    unit = _unit(example)
    if unit == "h":
        return f" A time has a unit: write {value}h for hours, or 3d, 90m, 1h30m."
    counts = f"{value}ba (batches), {value}ep (epochs), {value}sp (samples) or 0.5dur (half of the run)"
    said = f" A time has a unit: write {counts if isinstance(value, int) else f'{value}dur (part of the run)'}."
    if unit:
        return said
    key = path.rpartition(".")[2]
    return f"{said} Any other string is quoted: {key}: '{value}' in a file, \"{key}='{value}'\" on the command line."


def _unit(example: Any) -> str:
    """Of a default such as "0.25dur" or "24h"; nothing for one that is no time."""
    try:
        unit = Moment(example).points[0].unit if isinstance(example, str) else ""
    except ValueError:
        return ""
    return "h" if unit == "sec" else unit


def _matches(value: Any, hint: Any) -> bool:
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
