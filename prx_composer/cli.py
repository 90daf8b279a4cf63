"""`prx VERB …`: what is done with a recipe besides training it. A verb is a module or a folder of `commands/`."""

import sys
import warnings

import typer
import typer.core

from prx_composer.commands import check_recipe, convert, data, encode, evaluate, export, generate, import_model, plan, report
from prx_composer.commands.options import command
from prx_composer.common.errors import UserError

# What is imported here imports neither torch nor Composer before its verb is called: `prx --help` answers at once.
VERBS = {
    "generate": generate.generate_images,
    "export": export.export_model,
    "import": import_model.import_model,
    "evaluate": evaluate.evaluate_model,
    "report": report.report_run,
    "check": check_recipe.check_recipe,
    "plan": plan.plan_recipe,
}
GROUPS = {
    "data": (data.HELP, {"convert": convert.convert_data, "stats": data.print_statistics, "view": data.draw_samples}),
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
    """Tools around recipes. To train one: composer train.py RECIPE.yaml"""


for name, verb in VERBS.items():
    app.command(name, cls=OptionalFile if name == "plan" else None)(command(verb))
for name, (text, verbs) in GROUPS.items():
    group = typer.Typer(no_args_is_help=True, help=text)
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
