"""`prx …`: what is done with a recipe besides training it."""

import sys
import warnings
from typing import Annotated

import typer

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def prx() -> None:
    """Tools around recipes. To train one: composer train.py RECIPE.yaml"""


@app.command()
def check(
    recipe: Annotated[list[str], typer.Argument(help="One or more YAML files, then key=value pairs, as for train.py.")],
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Only what needs no data, no weights and no network.")
    ] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Number of GPUs that will train it.")] = 1,
) -> None:
    """Check a recipe before it costs anything: exit code 0 if it is right, 1 with a message if it isn't.

    So far --config-only is the only kind of check, and must be given; train.py makes the others when it starts.
    """
    if not config_only:
        typer.echo("error: give --config-only; data and weights are checked by train.py when it starts.", err=True)
        raise typer.Exit(2)
    from prx_composer import config
    from prx_composer.preflight import check_config

    for line in check_config(config.load(recipe), ranks):
        typer.echo(f"✓ {line}")


def main() -> None:
    """Entry point: what is the user's to mend is said without a traceback."""
    from prx_composer.errors import UserError

    warnings.filterwarnings("ignore")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
