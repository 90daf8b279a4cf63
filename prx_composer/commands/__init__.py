"""What a person types: one module or folder for each `prx` verb. Nothing below imports from here.

A verb's options are written once: as dataclasses, of which `command` makes the command line and with which the verb is called.
"""

import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_type_hints

import typer

from prx_composer.common.errors import UserError

RecipeArgument = Annotated[list[str], typer.Argument(help="One or more YAML files, then key=value pairs, as for train.py.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Run folder (runs/<run_name>), one of its checkpoints, or an exported folder.")
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="ema (averaged) or raw. [default: ema if the run has an average, else raw]")
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
    """Yield the parameters of a dataclass's options, each with what makes the field's value of what is given."""
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        annotation, parse = hints[field.name], lambda value: value
        metadata = getattr(annotation, "__metadata__", ())
        if not metadata:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if parsed := next((entry for entry in metadata if isinstance(entry, Parsed)), None):
            rest = [entry for entry in metadata if entry is not parsed]
            annotation, default, parse = Annotated[(parsed.given, *rest)], parsed.default, parsed.parse  # pyright: ignore[reportInvalidTypeForm]
        default = REQUIRED if default is dataclasses.MISSING else default
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation), parse


# ------------------------------------------------------------------------------------- what several verbs make of theirs


def show_log(timed: bool = False) -> None:
    """Show what this package logs from INFO on and others' warnings, as plain lines or with the time.

    Of the hub's client only errors are shown.
    """
    form = "%(asctime)s %(levelname)s %(message)s" if timed else "%(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S")
    logging.getLogger("prx_composer").setLevel(logging.INFO)
    for library in ("httpx", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def parse_weights(name: str | None) -> Literal["ema", "raw"] | None:
    """Return the kind of weights of `--weights`. Raise UserError if it is none."""
    if name not in (None, "ema", "raw"):
        raise UserError(f"--weights must be ema or raw, not {name!r}.")
    return cast(Literal["ema", "raw"] | None, name)


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of `--size`. Raise UserError if it is none."""
    sides = text.lower().replace("×", "x").split("x")
    try:
        numbers = [int(side) for side in sides]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UserError(f"--size: {text!r} is no size; give HEIGHTxWIDTH such as 512x768, or one number.")
    return numbers[0], numbers[-1]


def made_folder(name: str) -> Path:
    """Make the folder of `--output` and return it. Raise UserError if it cannot be made."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be made: {error.strerror}.") from error
    return folder


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise a UserError that names an option and its file for a disk that is full or may not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error}") from error


def write_json(values: Any, file: str) -> None:
    """Write what `--json` asks for to a file or, for "-", to the terminal."""
    text = json.dumps(values, indent=1)
    with writing(f"--json {file}"):
        typer.echo(text) if file == "-" else Path(file).write_text(text + "\n")


@contextmanager
def writing_output() -> Iterator[None]:
    """Raise a UserError that names `--output` for a disk that is full or may not be written."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output: it cannot be written: {error}") from error
