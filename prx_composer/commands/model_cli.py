"""`prx generate`, `prx export`, `prx import`: what follows training."""

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from prx_composer.common.errors import UserError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Run folder (runs/<run_name>), one of its checkpoints, or an exported folder.")
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="ema (averaged) or raw. [default: ema if the run has an average, else raw]")
]
CodeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--code",
        metavar="FILE",
        help="Python file that registers classes of your own which the model is made of; it is executed. May be given again.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to `prx`."""
    app.command()(generate)
    app.command()(export)
    app.command("import")(import_)


def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to draw. May be given again.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help='One prompt per line, or JSON lines with a "prompt".')
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder for PNGs and grid.png.")] = "images",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height x width in pixels, or one number. [default: as last trained]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image, of 64 bits; the next ones count on.")] = 0,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images of each prompt, from different seeds.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Euler steps. [default: as the recipe's callbacks.images, or 28]")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 = unguided. [default: as the recipe's callbacks.images, or 3.5]")
    ] = None,
    guidance: Annotated[
        str,
        typer.Option(
            help="cfg (classifier-free), self (routed self-guidance, of models trained with tread), or run: as the run drew."
        ),
    ] = "run",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    weights: WeightsOption = None,
    code: CodeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … [default: a GPU if there is one]")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or bf16 (GPU). [default: bf16 on a GPU, fp32 on the CPU]")] = None,
    grid: Annotated[bool, typer.Option("--grid/--no-grid", help="Also one picture of all images with their prompts.")] = True,
    captions: Annotated[
        bool, typer.Option("--captions", help="Also captions.jsonl: a folder to train on (train_loader.source: folder).")
    ] = False,
) -> None:
    """Draw images with a trained model: a PNG for each, which says in its metadata how it was made, and a grid of all.

    An image depends on its prompt, seed and settings only, not on the batch it is drawn in.

    prx generate runs/quickstart -p "a red circle on the left of a white background"
    """
    from prx_composer.commands import generate as drawing
    from prx_composer.commands.export.card import sample_settings
    from prx_composer.recipe.config import import_code
    from prx_composer.runs.opening import choose_guidance, load_trained

    _quiet()
    asked = [drawing.check_prompt(text, "--prompt") for text in prompt or []]
    asked += drawing.read_prompts(prompts) if prompts is not None else []
    if not asked:
        raise UserError(
            'What is to be drawn? Give --prompt "…" (several times if you like), or --prompts FILE with one per line.'
        )
    place = _device(device)
    import_code(code or [], "--code")
    trained = load_trained(model, _weights(weights))
    _, defaults = sample_settings(trained)
    height, width = (defaults.height, defaults.width) if size is None else parse_size(size)
    settings = drawing.DrawingSettings(
        height,
        width,
        steps or defaults.num_inference_steps,
        defaults.guidance_scale if guidance_scale is None else guidance_scale,
        choose_guidance(trained.model, guidance),
        precision or ("fp32" if place.type == "cpu" else "bf16"),
    )
    drawing.check_settings(trained.model, settings, place)
    texts = [text for text in asked for _ in range(images_per_prompt)]
    seeds = [seed + index for index in range(len(texts))]
    _check_seeds(seeds)
    folder = made_folder(output)
    trained.model.say_what_is_lost(asked)
    common = drawing.metadata(trained, settings, drawing.weights_hash(trained.model), place)
    trained.model.to(place)
    drawn, names = [], []
    with typer.progressbar(length=len(texts), label="drawing", file=sys.stderr) as progress:
        for index, image in drawing.draw(trained.model, texts, seeds, settings, batch_size):
            name = drawing.file_name(index, seeds[index], texts[index])
            with _writing("--output"):
                drawing.save_png(image, folder / name, {"prompt": texts[index], "seed": seeds[index]} | common)
            drawn.append(image)
            names.append(name)
            progress.update(1)
    if grid:
        with _writing("--output"):
            drawing.save_grid(drawn, texts, folder / "grid.png")
    if captions:
        with _writing("--output"):
            drawing.save_captions(names, texts, folder / "captions.jsonl")
    of = f"{trained.weights} weights" + (f" of batch {trained.batch}" if trained.batch is not None else "")
    typer.echo(f"{len(drawn)} image{'s' if len(drawn) > 1 else ''} of {height}×{width} with {of} · {folder}")


def export(
    model: Model,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder to write.")],
    format: Annotated[
        str, typer.Option(help="diffusers: a whole pipeline. lora: of a run with algorithms.lora, its adapters alone.")
    ] = "diffusers",
    weights: WeightsOption = None,
    code: CodeOption = None,
    text_encoder: Annotated[
        str, typer.Option(help="copy: its weights too, so that the folder stands alone. reference: only its hub id.")
    ] = "copy",
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence of the model on its card, such as apache-2.0 or other.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Title of the card. [default: the run's name]")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Of a sample on the card. [default: the recipe's callbacks.images]")
    ] = None,
    no_samples: Annotated[bool, typer.Option("--no-samples", help="Draw none.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Also upload it to the hub, as USER/NAME.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create that repository as a private one.")] = False,
) -> None:
    """Write a folder that diffusers opens without this package, with a model card; its pipeline draws what `prx generate` draws.

    PRXPixelPipeline.from_pretrained(DIR) opens a model on pixels, PRXPipeline.from_pretrained(DIR) one on latents. Adapters of a
    run with algorithms.lora are merged into its weights. A setting that
    diffusers has no place for is named and refused. The folder appears under its name only when it is complete.

    prx export runs/quickstart --output exported --license apache-2.0
    """
    from prx_composer.commands import generate as drawing
    from prx_composer.commands.export import export as exporting
    from prx_composer.commands.export import lora_file
    from prx_composer.commands.export.card import SAMPLES, Card, sample_settings, write_card
    from prx_composer.commands.export.card_text import public_command
    from prx_composer.recipe.config import import_code
    from prx_composer.runs.diffusers_folder import mends_prompts, pipeline_prompt
    from prx_composer.runs.opening import choose_guidance, load_trained

    _quiet()
    if format not in ("diffusers", "lora"):
        raise UserError(f"--format must be diffusers or lora, not {format!r}.")
    if text_encoder not in ("copy", "reference"):
        raise UserError(f"--text-encoder must be copy or reference, not {text_encoder!r}.")
    target = Path(output).expanduser()
    exporting.check_output(target, overwrite)
    import_code(code or [], "--code")
    trained = load_trained(model, _weights(weights), merge=format != "lora")
    title = name or str((trained.recipe or {}).get("run_name") or target.name)
    with _writing("--output"), exporting.written_aside(target) as partial:
        if format == "lora":
            lora_file.write_adapters(trained, partial, title, license)
        else:
            exporting.write_pipeline(trained, partial, text_encoder == "reference")
            prompts, settings = sample_settings(trained)
            prompts = list(prompt or prompts)[:12]
            choose_guidance(trained.model, "cfg")
            if mends_prompts(trained.model):
                trained.model.clean_prompt = pipeline_prompt  # the card's samples are what its code draws
                _tell_of_cleaning(prompts)
            if prompts and not no_samples:
                images = [image for _, image in drawing.draw(trained.model, prompts, list(range(len(prompts))), settings, 4)]
                drawing.save_grid(images, prompts, partial / SAMPLES)
            command = shlex.join(public_command(["prx", *sys.argv[1:]]))
            write_card(trained, partial, Card(title, license, command, drawing.weights_hash(trained.model), settings, prompts))
    typer.echo(f"{trained.weights} weights of {trained.source} · {target}")
    if license is None:
        typer.echo("The card states no licence; --license apache-2.0, say, would.")
    if push is not None:
        typer.echo(exporting.push(target, push, private))


def import_(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a diffusers PRXPixelPipeline or PRXPipeline.")],
    output: Annotated[str, typer.Option(metavar="FILE", help="YAML to write.")],
) -> None:
    """Write a YAML that trains on from a diffusers PRX model: its sizes, text encoder, flow, and model.init_from.

    It is merged over a recipe: composer train.py RECIPE.yaml FILE run_name=…
    """
    from prx_composer.runs.init_from import write_fragment

    _quiet()
    target = Path(output).expanduser()
    write_fragment(folder, target)
    typer.echo(f"{target} · composer train.py RECIPE.yaml {target} run_name=…")


def _quiet() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("prx_composer").setLevel(logging.INFO)
    for name in ("httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _writing(option: str) -> Iterator[None]:
    """A disk that is full or may not be written is the user's to mend."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{option}: it cannot be written: {error}") from error


def _check_seeds(seeds: list[int]) -> None:
    from prx_composer.models.sampling import check_seeds

    try:
        check_seeds(seeds, f"--seed {seeds[0]}")
    except ValueError as error:
        raise UserError(str(error)) from error


def _tell_of_cleaning(prompts: list[str]) -> None:
    from prx_composer.runs.diffusers_folder import pipeline_prompt

    if changed := [prompt for prompt in prompts if pipeline_prompt(prompt) != prompt]:
        logging.getLogger(__name__).warning(
            "%d of %d prompts of the samples are mended by diffusers' pipeline before it reads them, such as %r to %r. Samples "
            "on the card are drawn so; `prx generate` of the run draws prompts as they are.",
            len(changed),
            len(prompts),
            changed[0],
            pipeline_prompt(changed[0]),
        )


def _weights(name: str | None) -> Literal["ema", "raw"] | None:
    if name not in (None, "ema", "raw"):
        raise UserError(f"--weights must be ema or raw, not {name!r}.")
    return cast(Literal["ema", "raw"] | None, name)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of `--size`. Raises UserError if it is none."""
    sides = text.lower().replace("×", "x").split("x")
    try:
        numbers = [int(side) for side in sides]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UserError(f"--size: {text!r} is no size; give HEIGHTxWIDTH such as 512x768, or one number.")
    return numbers[0], numbers[-1]


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: {name!r} is no device; give cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device: there is no {name} here ({torch.cuda.device_count()} GPUs); use --device cpu.")
    return device


def made_folder(name: str) -> Path:
    """The folder of `--output`, made. Raises UserError if it cannot be."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be made: {error.strerror}.") from error
    return folder
