"""`prx export`: a trained model for diffusers, as one file, or on the hub with its card."""

import logging
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option, echo

from prx_composer.commands import CodeOption, ModelArgument, WeightsOption, parse_weights, show_log, writing_output
from prx_composer.common.errors import UserError

if TYPE_CHECKING:
    from prx_composer.runs.opening import Trained

_MOST_SAMPLES = 12  # on a card


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `prx export`."""

    model: ModelArgument
    output: Annotated[str, Option(metavar="DIR", help="Folder to write.")]
    format: Annotated[
        str, Option(help="diffusers: a whole pipeline. lora: of a run with algorithms.lora, its adapters alone.")
    ] = "diffusers"
    weights: WeightsOption = None
    code: CodeOption = field(default_factory=list)
    text_encoder: Annotated[
        str, Option(help="copy: its weights too, so that the folder stands alone. reference: only its hub id.")
    ] = "copy"
    license: Annotated[
        str | None, Option(metavar="ID", help="Licence of the model on its card, such as apache-2.0 or other.")
    ] = None
    name: Annotated[str | None, Option(help="Title of the card. [default: the run's name]")] = None
    prompt: Annotated[
        list[str], Option("--prompt", "-p", help="Of a sample on the card. [default: the recipe's callbacks.images]")
    ] = field(default_factory=list)
    no_samples: Annotated[bool, Option("--no-samples", help="Draw none.")] = False
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an export that is there.")] = False
    push: Annotated[str | None, Option(metavar="REPO", help="Also upload it to the hub, as USER/NAME.")] = None
    private: Annotated[bool, Option("--private", help="Create that repository as a private one.")] = False


def export_model(options: ExportOptions) -> None:
    """Write a folder that diffusers opens without this package, with a model card whose code draws what `prx generate` draws.

    PRXPixelPipeline.from_pretrained(DIR) opens a model on pixels, PRXPipeline.from_pretrained(DIR) one on latents. Adapters of a
    run with algorithms.lora are merged into its weights. A setting that diffusers has no place for is named and refused; of a
    backbone that it has no class for, the weights alone are written. The folder appears under its name only when it is complete.

    prx export runs/quickstart --output exported --license apache-2.0
    """
    from prx_composer.commands.export import pipeline
    from prx_composer.models.backbone import PRXBackbone
    from prx_composer.models.diffusers_backbone import DiffusersBackbone
    from prx_composer.registry import import_code
    from prx_composer.runs.opening import load_trained

    show_log()
    if options.format not in ("diffusers", "lora"):
        raise UserError(f"--format must be diffusers or lora, not {options.format!r}.")
    if options.text_encoder not in ("copy", "reference"):
        raise UserError(f"--text-encoder must be copy or reference, not {options.text_encoder!r}.")
    target = Path(options.output).expanduser()
    pipeline.check_output(target, options.overwrite)
    import_code(options.code, "--code")
    trained = load_trained(options.model, parse_weights(options.weights), merge=options.format != "lora")
    title = options.name or str((trained.recipe or {}).get("run_name") or target.name)
    if options.license is None:
        echo("The card will state no licence, since --license names none (apache-2.0, say).")
    with writing_output(), pipeline.written_aside(target) as partial:
        if options.format == "lora":
            pipeline.write_adapters(trained, partial, title, options.license)
        elif isinstance(trained.model.backbone, DiffusersBackbone):
            opened = pipeline.write_own_class(trained, partial, options.text_encoder == "reference")
            _write_card(trained, partial, title, options, opened)
            echo(opened)
        elif not isinstance(trained.model.backbone, PRXBackbone):
            pipeline.write_weights(trained, partial)
            echo(
                "diffusers has no class for the backbone: model.safetensors has the weights, with which a recipe can begin "
                "(model.init_from), and tokenizer/ the text encoder's words. `prx generate` draws from the run."
            )
        else:
            pipeline.write_pipeline(trained, partial, options.text_encoder == "reference")
            _write_card(trained, partial, title, options)
    echo(f"{trained.weights} weights of {trained.source} · {target}")
    if options.push is not None:
        echo(pipeline.push(target, options.push, options.private))


def _write_card(trained: "Trained", folder: Path, title: str, options: ExportOptions, opened: str = "") -> None:
    """Write the model card, with samples that are drawn as its code draws with the exported pipeline.

    Args:
        opened: how diffusers opens a class of its own; empty: the model is PRX.
    """
    from prx_composer.commands import generate
    from prx_composer.commands.export.card import SAMPLES, Card, public_command, write_card
    from prx_composer.runs.diffusers_folder import mends_prompts, pipeline_prompt
    from prx_composer.runs.opening import choose_guidance

    prompts, settings = generate.recipe_settings(trained)
    prompts = (options.prompt or prompts)[:_MOST_SAMPLES]
    guidance = choose_guidance(trained.model, "run")
    if guidance == "self":
        echo(
            "The run drew with routed self-guidance, which diffusers' pipelines don't have: samples on the card are drawn with "
            "classifier-free guidance, at the scale of the recipe. `prx generate` of the run draws as the run did."
        )
    if guidance.startswith("internal"):
        echo(
            "The run drew with internal guidance, which diffusers' pipelines don't have: its readout is left out, and samples on "
            "the card are drawn with classifier-free guidance alone. `prx generate` of the run draws with both."
        )
    choose_guidance(trained.model, "cfg")
    if not opened and mends_prompts(trained.model):
        trained.model.clean_prompt = pipeline_prompt
        if changed := [prompt for prompt in prompts if pipeline_prompt(prompt) != prompt]:
            logging.getLogger(__name__).warning(
                "%d of %d prompts of the samples are mended by diffusers' pipeline before it reads them, such as %r to %r. "
                "Samples on the card are drawn so; `prx generate` of the run draws prompts as they are.",
                len(changed),
                len(prompts),
                changed[0],
                pipeline_prompt(changed[0]),
            )
    if prompts and not options.no_samples:
        images = [image for _, image in generate.draw(trained.model, prompts, list(range(len(prompts))), settings, 4)]
        generate.save_grid(images, prompts, folder / SAMPLES)
    command = shlex.join(public_command(["prx", *sys.argv[1:]]))
    card = Card(title, options.license, command, generate.weights_hash(trained.model), settings, prompts, opened)
    write_card(trained, folder, card)
