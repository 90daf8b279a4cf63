"""`prx check`: what is wrong with a recipe, before it costs anything."""

from dataclasses import dataclass
from typing import Annotated

from typer import Exit, Option, echo

from prx_composer.commands.options import RecipeArgument


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `prx check`."""

    recipe: RecipeArgument
    config_only: Annotated[bool, Option("--config-only", help="Only what needs no data, no weights and no network.")] = False
    ranks: Annotated[int, Option(min=1, help="Number of GPUs that will train it.")] = 1
    no_step: Annotated[bool, Option("--no-step", help="Do not try a forward and backward pass of every stage.")] = False


def check_recipe(options: CheckOptions) -> None:
    """Check a recipe before it costs anything: names, sizes, weights, data, disk, loggers, GPUs, and a step of every stage.

    One line per check: ✓ right, ! worth knowing, ✗ to be mended, – not checked here. The exit code is 1 if there is a ✗, else 0.
    What the recipe itself tells comes within a second; with --config-only a mistake in it ends the check there.
    Nothing is written, downloaded or trained. train.py makes the same checks when it starts.
    """
    from prx_composer.training import check_lines

    wrong = False
    for line in check_lines(options.recipe, options.ranks, options.config_only, step=not options.no_step):
        echo(line)
        wrong = wrong or line.startswith("✗")
    if wrong:
        raise Exit(1)
