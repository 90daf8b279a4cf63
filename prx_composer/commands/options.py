"""Options of a verb, written once: dataclasses, of which typer makes the command line and which the verb is called with."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

RecipeArgument = Annotated[list[str], typer.Argument(help="One or more YAML files, then key=value pairs, as for train.py.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Run folder (runs/<run_name>), one of its checkpoints, or an exported folder.")
]
CodeOption = Annotated[
    list[str],
    typer.Option(
        "--code",
        metavar="FILE",
        help="Python file that registers classes of your own which the model is made of; it is executed. May be given again.",
    ),
]
REQUIRED = inspect.Parameter.empty


class Parsed(NamedTuple):
    """Says, in a field's annotation, that the command line gives the field as another type.

    Args:
        given: that type.
        parse: makes the field's value of it, or raises UserError.
        default: what the command line gives if the option is left out.
    """

    given: Any
    parse: Callable[[Any], Any]
    default: Any = REQUIRED


def command(verb: Callable[..., None]) -> Callable[..., None]:
    """Return the function that typer makes a command of: with a parameter for every field of the verb's dataclasses.

    Args:
        verb: takes one dataclass or several, whose fields are annotated as typer wants its parameters to be: `name:
            Annotated[type, typer.Option(help=…)] = default`. Other fields are no options. Its docstring is the command's help.
    """
    kinds = [hint for name, hint in get_type_hints(verb).items() if name != "return"]
    parameters = {kind: list(_parameters(kind)) for kind in kinds}

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        verb(*(kind(**{p.name: parse(given[p.name]) for p, parse in parameters[kind]}) for kind in kinds))

    every = [parameter for kind in kinds for parameter, _ in parameters[kind]]
    run.__signature__ = inspect.Signature(every)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return run


def _parameters(options: Any) -> Iterator[tuple[inspect.Parameter, Callable[[Any], Any]]]:
    """The parameters of a dataclass's options, each with what makes the field's value of what is given."""
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        annotation, default, parse = hints[field.name], _default(field), _as_given
        metadata = getattr(annotation, "__metadata__", ())
        if not metadata:
            continue
        if parsed := next((entry for entry in metadata if isinstance(entry, Parsed)), None):
            rest = [entry for entry in metadata if entry is not parsed]
            annotation, default, parse = Annotated[(parsed.given, *rest)], parsed.default, parsed.parse  # pyright: ignore[reportInvalidTypeForm]
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation), parse


def _as_given(value: Any) -> Any:
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default
