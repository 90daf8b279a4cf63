"""`prx generate`: images from a trained model, as PNGs that say how they were made, and a grid of them.

`prx export` and `prx evaluate` draw with the functions of this module too.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option, echo, progressbar

from prx_composer import __version__
from prx_composer.commands import (
    CodeOption,
    ModelArgument,
    WeightsOption,
    made_folder,
    parse_size,
    parse_weights,
    show_log,
    writing_output,
)
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import read_lines, write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prx_composer.models.text_to_image import TextToImage
    from prx_composer.runs.opening import Trained

PROMPT_NAMES = ("prompt", "caption", "text")
VERSIONS = ("torch", "diffusers", "transformers")


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
        Option(
            help="cfg (classifier-free), self (routed self-guidance, of models trained with tread), internal or internal:1.6 "
            "(with the readout of models trained with internal_guidance), or run: as the run drew."
        ),
    ] = "run"
    as_diffusers: Annotated[
        bool,
        Option("--as-diffusers", help="The steps of diffusers' PRXPixelPipeline, which keep most of the last step's noise."),
    ] = False
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
    from prx_composer.models.flow import check_seeds
    from prx_composer.models.processes import FlowMatching
    from prx_composer.registry import import_code
    from prx_composer.runs.opening import load_trained

    show_log()
    o = options
    asked = [check_prompt(text, "--prompt") for text in o.prompt]
    asked += read_prompts(o.prompts) if o.prompts is not None else []
    if not asked:
        raise UserError(
            'What is to be drawn? Give --prompt "…" (several times if you like), or --prompts FILE with one per line.'
        )
    device = find_device(o.device)
    import_code(o.code, "--code")
    trained = load_trained(o.model, parse_weights(o.weights))
    if o.as_diffusers:
        if not isinstance(trained.model.flow, FlowMatching):
            raise UserError("--as-diffusers: it is for flow matching, the steps of whose pipeline are others than ours.")
        trained.model.flow = replace(trained.model.flow, clamp_sampling=True)
    settings = chosen_settings(trained, device, o.size, o.guidance, o.precision, o.steps, o.guidance_scale)
    check_settings(trained.model, settings, device)
    texts = [text for text in asked for _ in range(o.images_per_prompt)]
    seeds = [o.seed + index for index in range(len(texts))]
    with at_path(f"--seed {o.seed}"):
        check_seeds(seeds, "image i is drawn from seed + i")
    folder = made_folder(o.output)
    trained.model.say_what_is_lost(asked)
    common = metadata(trained, settings, weights_hash(trained.model), device)
    trained.model.to(device)
    drawn, names = [], []
    with progressbar(length=len(texts), label="drawing", file=sys.stderr) as progress:
        for index, image in draw(trained.model, texts, seeds, settings, o.batch_size):
            names.append(file_name(index, seeds[index], texts[index]))
            with writing_output():
                save_png(image, folder / names[-1], {"prompt": texts[index], "seed": seeds[index]} | common)
            drawn.append(image)
            progress.update(1)
    with writing_output():
        if o.grid:
            save_grid(drawn, texts, folder / "grid.png")
        if o.captions:
            save_captions(names, texts, folder / "captions.jsonl")
    echo(f"{len(drawn)} image{'s' if len(drawn) > 1 else ''} of {drawn_with(trained, settings)} · {folder}")


# -------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class DrawingSettings:
    """Settings of drawing.

    Args:
        height, width: pixels.
        num_inference_steps: Euler steps.
        guidance: its name, for the record.
        guidance_scale: 1 = unguided.
        precision: "fp32", or "bf16" for autocast.
    """

    height: int
    width: int
    num_inference_steps: int = 28
    guidance: str = "cfg"
    guidance_scale: float = 3.5
    precision: str = "fp32"


def recipe_settings(trained: "Trained") -> tuple[list[str], DrawingSettings]:
    """Return prompts and settings of the recipe's `images` callback; without one, no prompts and the defaults."""
    from prx_composer.runs.diffusers_folder import recipe_beside

    recipe = trained.recipe or (recipe_beside(trained.source) if trained.weights == "exported" else None) or {}
    images = (recipe.get("callbacks") or {}).get("images") or {}
    images = images if isinstance(images, dict) else {}
    multiple = trained.model.backbone.patch_size * trained.model.autoencoder.downsampling
    side = max(multiple, round(trained.image_size / multiple) * multiple)
    settings = DrawingSettings(
        height=int(images.get("height") or side),
        width=int(images.get("width") or side),
        num_inference_steps=int(images.get("num_inference_steps", DrawingSettings.num_inference_steps)),
        guidance_scale=float(images.get("guidance_scale", DrawingSettings.guidance_scale)),
    )
    return [str(prompt) for prompt in images.get("prompts", [])], settings


def chosen_settings(
    trained: "Trained",
    device: "torch.device",
    size: str | None,
    guidance: str,
    precision: str | None,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> DrawingSettings:
    """Return the recipe's settings with those in place that options give, and set the model's guidance to them."""
    from prx_composer.runs.opening import choose_guidance

    _, recipe = recipe_settings(trained)
    height, width = (recipe.height, recipe.width) if size is None else parse_size(size)
    return DrawingSettings(
        height,
        width,
        steps or recipe.num_inference_steps,
        choose_guidance(trained.model, guidance),
        recipe.guidance_scale if guidance_scale is None else guidance_scale,
        precision or ("fp32" if device.type == "cpu" else "bf16"),
    )


def find_device(name: str | None) -> "torch.device":
    """Return the device of `--device`. Raise UserError if there is none of that name here."""
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


def check_settings(model: "TextToImage", settings: DrawingSettings, device: "torch.device") -> None:
    """Raise UserError, naming the option, for what the model or the device cannot do."""
    from prx_composer.models.flow import check_guidance_scale

    multiple = model.backbone.patch_size * model.autoencoder.downsampling
    height, width = settings.height, settings.width
    if height < 1 or width < 1 or height % multiple or width % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise UserError(
            f"--size: the sides of {height}x{width} must be multiples of {multiple}; the nearest is {near[0]}x{near[1]}."
        )
    try:
        check_guidance_scale(settings.guidance_scale, "--guidance-scale")
    except ValueError as error:
        raise UserError(str(error)) from error
    if settings.precision not in ("fp32", "bf16"):
        raise UserError(f"--precision must be fp32 or bf16, not {settings.precision!r}.")
    if settings.precision == "bf16" and device.type == "cpu":
        raise UserError("--precision bf16 is for GPUs; on the CPU leave the option out.")


def draw(
    model: "TextToImage",
    prompts: list[str],
    seeds: list[int],
    settings: DrawingSettings,
    batch_size: int,
    watch: "Callable[[int, Tensor], None] | None" = None,
) -> "Iterator[tuple[int, Tensor]]":
    """Draw in batches; yield index and image, uint8 (3, height, width) on the CPU, as soon as a batch is done.

    Args:
        watch: as `TextToImage.generate` has it.
    """
    import torch

    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        with torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext():
            s = settings
            sizes = (s.height, s.width, seeds[part], s.num_inference_steps, s.guidance_scale)
            images = model.generate(prompts[part], *sizes, watch)
        yield from enumerate(images.cpu(), start)


def drawn_with(trained: "Trained", settings: DrawingSettings) -> str:
    """Return the size of an image and what drew it, in words."""
    batch = f" of batch {trained.batch}" if trained.batch is not None else ""
    return f"{settings.height}×{settings.width} with {trained.weights} weights{batch}"


def weights_hash(model: "TextToImage") -> str:
    """Return the SHA-256 over names and values of the backbone's weights, the same wherever they were opened."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def metadata(trained: "Trained", settings: DrawingSettings, digest: str, device: "torch.device") -> dict[str, Any]:
    """Return what all images of a call have in common: model, weights, settings, versions."""
    return {
        "model": str(trained.source),
        "weights": trained.weights,
        "batch": trained.batch,
        "weights_sha256": digest,
        **asdict(settings),
        "as_diffusers": getattr(trained.model.flow, "clamp_sampling", False),
        "device": device.type,
        "versions": {"prx-composer": __version__} | {name: version(name) for name in VERSIONS},
    }


def save_png(image: "Tensor", path: Path, facts: dict[str, Any]) -> None:
    """Write uint8 (3, H, W) whole or not at all; `facts` become a text chunk named prx (JSON), prompt and seed their own."""
    from PIL.PngImagePlugin import PngInfo

    from prx_composer.common.pages import picture

    chunks = PngInfo()
    for key in ("prompt", "seed"):
        if key in facts:
            chunks.add_itxt(key, str(facts[key]))
    chunks.add_itxt("prx", json.dumps(facts, ensure_ascii=False))
    content = BytesIO()
    picture(image).save(content, "PNG", pnginfo=chunks)
    write_whole(path, content.getvalue())


def save_grid(images: "list[Tensor]", prompts: list[str], path: Path) -> None:
    """Write one picture of all images, with their prompts."""
    import torch

    from prx_composer.common.pages import image_grid

    content = BytesIO()
    columns = min(6, max(1, round(len(images) ** 0.5)))
    image_grid(torch.stack(images), prompts, columns).save(content, "PNG")
    write_whole(path, content.getvalue())


def save_captions(names: list[str], prompts: list[str], path: Path) -> None:
    """Write a line of JSON for every image, as `FolderSource` and Hugging Face's image folders read it."""
    lines = [
        json.dumps({"file_name": name, "caption": prompt}, ensure_ascii=False)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    write_whole(path, ("\n".join(lines) + "\n").encode())


def file_name(index: int, seed: int, prompt: str) -> str:
    """Return the name of an image's file: its number, seed, and the beginning of its prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{index:04d}-seed{seed}-{words}.png".replace("-.png", ".png")


def read_prompts(path: str) -> list[str]:
    """Read one prompt per line; a line of JSON may be a string, or a mapping with `prompt`, `caption` or `text`.

    Empty lines don't count, nor do blanks around a line that is no JSON.

    Raises:
        UserError: no such file, or a line that cannot be read, by number.
    """
    with at_path(f"--prompts: {path} cannot be read"):
        lines = read_lines(path)
    prompts = [
        _prompt_of(line.strip(), f"--prompts: {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise UserError(f"--prompts: {path} has no prompts; write one per line.")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    if not line.startswith(("{", '"')):
        return line
    try:
        content = json.loads(line)
    except ValueError as error:
        if line.startswith('"'):
            return line
        raise UserError(
            f"{where} begins as JSON and is none: {error}. A prompt that is to begin with a brace: {json.dumps(line)}"
        ) from error
    if isinstance(content, dict):
        content = next((content[name] for name in PROMPT_NAMES if name in content), None)
    prompt = content
    if not isinstance(prompt, str):
        raise UserError(f'{where} must have a "prompt", "caption" or "text", a string.')
    return check_prompt(prompt, where)


def check_prompt(prompt: str, where: str) -> str:
    """Return the prompt.

    Raises:
        UserError: it cannot be written as UTF-8: half of a pair of surrogates, or bytes that were no text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is no Unicode text: {prompt!r} has {error.object[error.start]!r} at place {error.start}."
        ) from error
    return prompt
