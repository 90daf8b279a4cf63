"""`prx plan`: what a run will take, before anything is rented."""

from dataclasses import dataclass, field
from typing import Annotated

from typer import Option, echo

from prx_composer.commands.options import RecipeArgument
from prx_composer.common.errors import UserError

ASSUMED_UTILISATION = 0.33  # where nothing was measured


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `prx plan`."""

    recipe: RecipeArgument
    gpu: Annotated[
        str, Option(help="a100-80gb, h100, h200, b200, mi300x, l40s or rtx4090. [default: the measurement's, or h200]")
    ] = ""
    gpus: Annotated[
        int | None, Option(min=1, help="Number of GPUs, all nodes together. [default: the recipe's shard_degree, or 1]")
    ] = None
    gpus_per_node: Annotated[int, Option(min=1, help="GPUs of one node.")] = 8
    price: Annotated[float | None, Option(min=0, help="Dollars per GPU-hour.")] = None
    mfu: Annotated[
        float | None,
        Option(
            min=0.001,
            max=1,
            help="Share of what a bf16 matrix product reaches (not of the datasheet), waiting left out. [default: 0.33]",
        ),
    ] = None
    throughput: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Measured speeds instead, as benchmarks/throughput.py writes them: JSON "
            '{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0}, …]}, one stage per image size.',
        ),
    ] = None
    samples: Annotated[
        str | None, Option(help="Images in the data, such as 8.7M. [default: as many as lie in train_loader.path]")
    ] = None
    disk: Annotated[str, Option(help="How fast a checkpoint is written, all ranks together.")] = "1GB/s"
    network: Annotated[
        float | None,
        Option(min=0.001, help="GB/s per GPU between nodes, one way; 400 Gbit/s are 50. [default: usual for the GPU]"),
    ] = None
    loader: Annotated[
        float | None, Option(min=0.001, help="Images per second that one node's loaders deliver. [default: never waited for]")
    ] = None
    stored_text: Annotated[
        bool, Option("--stored-text", help="Plan as if text embeddings came with the data: no text encoder runs.")
    ] = False
    leave_out: Annotated[
        list[str],
        Option(
            metavar="NAME",
            help="Do not count this network, so that one of unknown size doesn't stop the plan: text_encoder, autoencoder, or an "
            "algorithm with a teacher, such as repa. Repeatable.",
        ),
    ] = field(default_factory=list)
    fit: Annotated[str | None, Option(metavar="TIME", help="Propose a schedule that takes this long, such as 12h.")] = None
    json_file: Annotated[
        str | None,
        Option("--json", metavar="[FILE]", help="Write the plan as JSON to FILE; without one, print it instead of the table."),
    ] = None


def plan_recipe(options: PlanOptions) -> None:
    """What a run will take, before anything is rented: hours, dollars, memory, disk and data of every stage.

    Nothing is downloaded or trained. How to read it, and what is assumed: recipes/speedrun_24h/PLAN.md
    """
    from prx_composer.commands.plan import conditions as given
    from prx_composer.commands.plan import fit as plan_fit
    from prx_composer.commands.plan import plan as planning
    from prx_composer.commands.plan import plan_text
    from prx_composer.commands.plan.conditions import Conditions, find_gpu, parse_count, parse_rate
    from prx_composer.recipe import config

    if options.mfu is not None and options.throughput is not None:
        raise UserError("--mfu and --throughput both say how fast training is; give one of them.")
    measured_on, speeds = (None, None) if options.throughput is None else given.read_throughput(options.throughput)
    kind = find_gpu(options.gpu) if options.gpu else measured_on or find_gpu("h200")
    if measured_on is not None and measured_on != kind:
        raise UserError(
            f"--gpu: {options.throughput} was measured on {measured_on.name}, which says little of {kind.name}; measure there."
        )
    loaded = config.load(options.recipe)
    config.import_code(loaded.code_paths)
    config.check(loaded)
    conditions = Conditions(
        kind,
        options.gpus or planning.least_gpus(loaded),
        options.gpus_per_node,
        options.price,
        (options.mfu or ASSUMED_UTILISATION) if options.throughput is None else None,
        speeds,
        None if options.samples is None else parse_count(options.samples, "--samples"),
        parse_rate(options.disk, "--disk"),
        options.stored_text,
        options.network,
        options.loader,
        tuple(options.leave_out),
    )
    fitted = None if options.fit is None else plan_fit.fit(loaded, conditions, planning.seconds(options.fit, "--fit"))
    made = fitted.plan if fitted else planning.make_plan(loaded, conditions)
    if options.json_file is not None:
        plan_text.write_json(made, fitted, options.json_file)
    if options.json_file != "-":
        echo(plan_text.as_text(made) + (plan_text.fit_text(fitted) if fitted else ""))
