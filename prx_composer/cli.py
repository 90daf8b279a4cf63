"""`prx …`: what is done with a recipe besides training it."""

import sys
import warnings
from typing import Annotated

import typer
import typer.core

from prx_composer.commands import data_cli as data_commands
from prx_composer.commands import encode_cli as encode_commands
from prx_composer.commands import evaluate_cli as evaluation_commands
from prx_composer.commands import model_cli as trained_commands
from prx_composer.commands import report_cli as report_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

app.add_typer(data_commands.app, name="data")
app.add_typer(encode_commands.app, name="encode")
trained_commands.register(app)
evaluation_commands.register(app)
app.command()(report_commands.report)

ASSUMED_UTILISATION = 0.33  # of `prx plan`, where nothing was measured


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
    no_step: Annotated[bool, typer.Option("--no-step", help="Do not try a forward and backward pass of every stage.")] = False,
) -> None:
    """Check a recipe before it costs anything: names, sizes, weights, data, disk, loggers, GPUs, and a step of every stage.

    One line per check: ✓ right, ! worth knowing, ✗ to be mended, – not checked here. The exit code is 1 if there is a ✗, else 0.
    What the recipe itself tells comes within a second; with --config-only a mistake in it ends the check there.
    Nothing is written, downloaded or trained. train.py makes the same checks when it starts.
    """
    from prx_composer.training.start import check_lines

    wrong = False
    for line in check_lines(recipe, ranks, config_only, step=not no_step):
        typer.echo(line)
        wrong = wrong or line.startswith("✗")
    if wrong:
        raise typer.Exit(1)


class OptionalFile(typer.core.TyperCommand):
    """Takes `--json` without a file as `--json -`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        bare = [a == "--json" and (i + 1 == len(args) or args[i + 1].startswith("--")) for i, a in enumerate(args)]
        return super().parse_args(ctx, [b for a, alone in zip(args, bare, strict=True) for b in ([a, "-"] if alone else [a])])


@app.command(cls=OptionalFile)
def plan(
    recipe: Annotated[list[str], typer.Argument(help="One or more YAML files, then key=value pairs, as for train.py.")],
    gpu: Annotated[
        str, typer.Option(help="a100-80gb, h100, h200, b200, mi300x, l40s or rtx4090. [default: the measurement's, or h200]")
    ] = "",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs, all nodes together. [default: the recipe's shard_degree, or 1]")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per GPU-hour.")] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            help="Share of what a bf16 matrix product reaches (not of the datasheet), waiting left out. [default: 0.33]",
        ),
    ] = None,
    throughput: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Measured speeds instead, as benchmarks/throughput.py writes them: JSON "
            '{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0}, …]}, one stage per image size.',
        ),
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Images in the data, such as 8.7M. [default: as many as lie in train_loader.path]")
    ] = None,
    disk: Annotated[str, typer.Option(help="How fast a checkpoint is written, all ranks together.")] = "1GB/s",
    network: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s per GPU between nodes, one way; 400 Gbit/s are 50. [default: usual for the GPU]"),
    ] = None,
    loader: Annotated[
        float | None,
        typer.Option(min=0.001, help="Images per second that one node's loaders deliver. [default: never waited for]"),
    ] = None,
    stored_text: Annotated[
        bool, typer.Option("--stored-text", help="Plan as if text embeddings came with the data: no text encoder runs.")
    ] = False,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Do not count this network, so that one of unknown size doesn't stop the plan: text_encoder, autoencoder, or an "
            "algorithm with a teacher, such as repa. Repeatable.",
        ),
    ] = None,
    fit: Annotated[str | None, typer.Option(metavar="TIME", help="Propose a schedule that takes this long, such as 12h.")] = None,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="[FILE]", help="Write the plan as JSON to FILE; without one, print it instead of the table."
        ),
    ] = None,
) -> None:
    """What a run will take, before anything is rented: hours, dollars, memory, disk and data of every stage.

    Nothing is downloaded or trained. How to read it, and what is assumed: recipes/speedrun_24h/PLAN.md
    """
    from prx_composer.commands.plan import fit as plan_fit
    from prx_composer.commands.plan import plan as planning
    from prx_composer.commands.plan import plan_inputs, plan_text
    from prx_composer.commands.plan.conditions import Conditions
    from prx_composer.commands.plan.hardware import find_gpu
    from prx_composer.commands.plan.quantities import parse_count, parse_rate
    from prx_composer.common.errors import UserError
    from prx_composer.recipe import config

    if mfu is not None and throughput is not None:
        raise UserError("--mfu and --throughput both say how fast training is; give one of them.")
    measured_on, speeds = (None, None) if throughput is None else plan_inputs.read_throughput(throughput)
    kind = find_gpu(gpu) if gpu else measured_on or find_gpu("h200")
    if measured_on is not None and measured_on != kind:
        raise UserError(
            f"--gpu: {throughput} was measured on {measured_on.name}, which says little of {kind.name}; measure there."
        )
    loaded = config.load(recipe)
    config.import_code(loaded.code_paths)
    config.check(loaded)
    conditions = Conditions(
        kind,
        gpus or planning.least_gpus(loaded),
        gpus_per_node,
        price,
        (mfu or ASSUMED_UTILISATION) if throughput is None else None,
        speeds,
        None if samples is None else parse_count(samples, "--samples"),
        parse_rate(disk, "--disk"),
        stored_text,
        network,
        loader,
        tuple(leave_out or ()),
    )
    fitted = None if fit is None else plan_fit.fit(loaded, conditions, planning.seconds(fit, "--fit"))
    made = fitted.plan if fitted else planning.make_plan(loaded, conditions)
    if json_file is not None:
        plan_text.write_json(made, fitted, json_file)
    if json_file != "-":
        typer.echo(plan_text.as_text(made) + (plan_text.fit_text(fitted) if fitted else ""))


def main() -> None:
    """Entry point: what is the user's to mend is said without a traceback."""
    from prx_composer.common.errors import UserError

    warnings.filterwarnings("ignore")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":  # composer -n 8 -m prx_composer.cli encode text …
    main()
