"""`prx VERB …`: train a recipe, and everything around that.

A verb is a module or a folder of `commands/`; those that are one call of the library stand here.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import typer.core
from typer import Argument, Option

from prx_composer.commands import (
    RecipeArgument,
    average,
    command,
    convert,
    data,
    demo,
    encode,
    env,
    evaluate,
    export,
    generate,
    plan,
    recipes,
    report,
    show_log,
)
from prx_composer.common.errors import UserError
from prx_composer.common.installation import training

# What is imported here imports neither torch nor Composer before its verb is called: `prx --help` answers at once.


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `prx train`."""

    recipe: RecipeArgument


def train_recipe(options: TrainOptions) -> None:
    """Train a recipe on one GPU or on the CPU, as train.py of a clone does.

    On several GPUs: composer -n 8 -m prx_composer.cli train RECIPE.yaml
    """
    from prx_composer.training import main as train

    raise typer.Exit(train(options.recipe))


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
        typer.echo(line)
        wrong = wrong or line.startswith("✗")
    if wrong:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of `prx import`."""

    folder: Annotated[str, Argument(metavar="DIR", help="Folder that diffusers opens, or that `prx export` wrote.")]
    output: Annotated[str, Option(metavar="FILE", help="YAML to write.")]


def import_model(options: ImportOptions) -> None:
    """Write a YAML that trains on from a folder of diffusers: its sizes, text encoder, flow, and model.init_from.

    It is merged over a recipe: prx train RECIPE.yaml FILE run_name=…
    """
    from prx_composer.runs.pretrained_models import write_fragment

    show_log()
    target = Path(options.output).expanduser()
    write_fragment(options.folder, target)
    typer.echo(f"{target} · {' '.join(training())} RECIPE.yaml {target} run_name=…")


VERBS = {
    "train": train_recipe,
    "generate": generate.generate_images,
    "demo": demo.show_demo,
    "average": average.average_run,
    "export": export.export_model,
    "import": import_model,
    "evaluate": evaluate.evaluate_model,
    "report": report.report_run,
    "check": check_recipe,
    "plan": plan.plan_recipe,
    "env": env.show_environment,
}
GROUPS = {
    "recipes": (recipes.HELP, {"copy": recipes.copy_recipes}),
    "data": (
        data.HELP,
        {
            "convert": convert.convert_data,
            "caption": data.write_captions,
            "stats": data.print_statistics,
            "view": data.draw_samples,
        },
    ),
    "encode": (
        encode.HELP,
        {"text": encode.store_text, "features": encode.store_features, "latents": encode.store_latents},
    ),
}


class OptionalFile(typer.core.TyperCommand):
    """Takes `--json` without a file as `--json -`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        bare = [a == "--json" and (i + 1 == len(args) or args[i + 1].startswith("--")) for i, a in enumerate(args)]
        return super().parse_args(ctx, [b for a, alone in zip(args, bare, strict=True) for b in ([a, "-"] if alone else [a])])


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def prx() -> None:
    """Train text-to-image models from recipes. The beginning: prx recipes"""


for name, verb in VERBS.items():
    app.command(name, cls=OptionalFile if name in ("plan", "env") else None)(command(verb))
for name, (text, verbs) in GROUPS.items():
    alone = recipes.list_recipes if name == "recipes" else None  # what the group does without a verb
    group = typer.Typer(no_args_is_help=alone is None, invoke_without_command=alone is not None, callback=alone, help=text)
    for verb_name, verb in verbs.items():
        group.command(verb_name)(command(verb))
    app.add_typer(group, name=name)


def main() -> None:
    """Run `prx`; say what the user can mend without a traceback."""
    warnings.filterwarnings("ignore")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":  # composer -n 8 -m prx_composer.cli encode text …
    main()
