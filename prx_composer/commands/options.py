"""Options of a verb, written once: a dataclass, of which typer makes the command line and which the verb is called with."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

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


def command(verb: Callable[[Any], None]) -> Callable[..., None]:
    """Return the function that typer makes a command of: with a parameter for every field of the verb's dataclass.

    Args:
        verb: takes one dataclass, whose fields are annotated as typer wants its parameters to be: `name: Annotated[type,
            typer.Option(help=…)] = default`. Its docstring is the command's help.
    """
    ((_, options),) = ((name, hint) for name, hint in get_type_hints(verb).items() if name != "return")

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        verb(options(**given))

    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hints[field.name])
        for field in dataclasses.fields(options)
    ]
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
