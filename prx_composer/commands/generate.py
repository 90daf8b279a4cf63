"""`prx generate`: images from a trained model."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

from typer import Option, echo, progressbar

from prx_composer.commands.options import (
    CodeOption,
    ModelArgument,
    WeightsOption,
    made_folder,
    parse_weights,
    show_log,
    writing_output,
)
from prx_composer.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `prx generate`."""

    model: ModelArgument
    prompt: Annotated[list[str], Option("--prompt", "-p", help="What to draw. May be given again.")] = field(default_factory=list)
    prompts: Annotated[
        str | None, Option("--prompts", metavar="FILE", help='One prompt per line, or JSON lines with a "prompt".')
    ] = None
    output: Annotated[str, Option(metavar="DIR", help="Folder for PNGs and grid.png.")] = "images"
    size: Annotated[
        str | None, Option(metavar="HxW", help="Height x width in pixels, or one number. [default: as last trained]")
    ] = None
    seed: Annotated[int, Option(help="Of the first image, of 64 bits; the next ones count on.")] = 0
    images_per_prompt: Annotated[int, Option(min=1, help="Images of each prompt, from different seeds.")] = 1
    steps: Annotated[int | None, Option(min=1, help="Euler steps. [default: as the recipe's callbacks.images, or 28]")] = None
    guidance_scale: Annotated[float | None, Option(help="1 = unguided. [default: as the recipe's callbacks.images, or 3.5]")] = (
        None
    )
    guidance: Annotated[
        str,
        Option(help="cfg (classifier-free), self (routed self-guidance, of models trained with tread), or run: as the run drew."),
    ] = "run"
    batch_size: Annotated[int, Option(min=1, help="Images at a time.")] = 16
    weights: WeightsOption = None
    code: CodeOption = field(default_factory=list)
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1 … [default: a GPU if there is one]")] = None
    precision: Annotated[str | None, Option(help="fp32, or bf16 (GPU). [default: bf16 on a GPU, fp32 on the CPU]")] = None
    grid: Annotated[bool, Option("--grid/--no-grid", help="Also one picture of all images with their prompts.")] = True
    captions: Annotated[
        bool, Option("--captions", help="Also captions.jsonl: a folder to train on (train_loader.source: folder).")
    ] = False


def generate_images(options: GenerateOptions) -> None:
    """Draw images with a trained model: a PNG for each, which says in its metadata how it was made, and a grid of all.

    An image depends on its prompt, seed and settings only, not on the batch it is drawn in.

    prx generate runs/quickstart -p "a red circle on the left of a white background"
    """
    from prx_composer.commands import drawing
    from prx_composer.recipe.config import import_code
    from prx_composer.runs.opening import load_trained

    show_log()
    asked = [drawing.check_prompt(text, "--prompt") for text in options.prompt]
    asked += drawing.read_prompts(options.prompts) if options.prompts is not None else []
    if not asked:
        raise UserError(
            'What is to be drawn? Give --prompt "…" (several times if you like), or --prompts FILE with one per line.'
        )
    device = drawing.find_device(options.device)
    import_code(options.code, "--code")
    trained = load_trained(options.model, parse_weights(options.weights))
    o = options
    settings = drawing.chosen_settings(trained, device, o.size, o.guidance, o.precision, o.steps, o.guidance_scale)
    drawing.check_settings(trained.model, settings, device)
    texts = [text for text in asked for _ in range(options.images_per_prompt)]
    seeds = drawing.seeds_from(options.seed, len(texts))
    folder = made_folder(options.output)
    trained.model.say_what_is_lost(asked)
    common = drawing.metadata(trained, settings, drawing.weights_hash(trained.model), device)
    trained.model.to(device)
    drawn, names = [], []
    with progressbar(length=len(texts), label="drawing", file=sys.stderr) as progress:
        for index, image in drawing.draw(trained.model, texts, seeds, settings, options.batch_size):
            names.append(drawing.file_name(index, seeds[index], texts[index]))
            with writing_output():
                drawing.save_png(image, folder / names[-1], {"prompt": texts[index], "seed": seeds[index]} | common)
            drawn.append(image)
            progress.update(1)
    with writing_output():
        if options.grid:
            drawing.save_grid(drawn, texts, folder / "grid.png")
        if options.captions:
            drawing.save_captions(names, texts, folder / "captions.jsonl")
    of = f"{trained.weights} weights" + (f" of batch {trained.batch}" if trained.batch is not None else "")
    size = f"{settings.height}×{settings.width}"
    echo(f"{len(drawn)} image{'s' if len(drawn) > 1 else ''} of {size} with {of} · {folder}")
