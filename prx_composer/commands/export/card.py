"""The model card of an exported model: how to use it, samples, recipe, data, licence, and how the weights are recognised."""

import html
import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from prx_composer import __version__
from prx_composer.commands.drawing import DrawingSettings
from prx_composer.common.errors import redacted
from prx_composer.models.autoencoder import Pixels
from prx_composer.models.prompts import clean_caption, cleaning_of
from prx_composer.runs.opening import Trained
from prx_composer.runs.pretrained_models import RECIPE, REFERENCE

SAMPLES = "samples.png"
_CLEAN_FIRST = (
    " Clean a prompt first, with `diffusers.pipelines.prx.pipeline_prx.TextPreprocessor().clean_text`: the captions of training "
    "were, and this pipeline doesn't."
)
_MENDED = (
    " The pipeline mends a prompt before it reads it: HTML entities become the characters that they stand for, curly quotes "
    "straight ones, and what a wrong encoding has garbled is repaired."
)
VERSIONS = ("torch", "diffusers", "transformers", "mosaicml", "mosaicml-streaming")
_PLACE = re.compile(r"(?:/|~|file:|[A-Za-z]:\\)")  # how a path begins that another machine does not have
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)(?:/|$)")  # in the hub's cache


@dataclass(frozen=True)
class Card:
    """What the exporter says of a model on its card.

    Args:
        name: title.
        licence: an identifier of the hub (apache-2.0, cc-by-4.0, other …), or None: not stated.
        command: that exported it, without paths of this machine.
        digest: SHA-256 of the weights.
        sampling: settings that suit the model.
        prompts: of the samples.
    """

    name: str
    licence: str | None
    command: str
    digest: str
    sampling: DrawingSettings
    prompts: list[str]


def write_card(trained: Trained, folder: Path, card: Card) -> None:
    """Write README.md beside what `write_pipeline` wrote."""
    pixels = isinstance(trained.model.autoencoder, Pixels)
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["prx", "prx-composer"]}
    if card.licence is not None:
        head["license"] = card.licence
    parts = [
        _about(trained, pixels),
        "## Use\n\n" + _usage(trained, folder, card, pixels),
        _samples(folder, card),
        _training(trained),
        "## Data\n\n" + _data(trained.recipe),
        "## Licence\n\n"
        + (
            inline(card.licence or "")
            or "Not stated. Data and text encoder have licences of their own; say which this model has before sharing it."
        ),
        _provenance(trained, card),
    ]
    write_readme(folder, head, card.name, parts)


def write_readme(folder: Path, head: dict[str, Any], title: str, parts: list[str]) -> None:
    """Write a card as the hub reads it: facts as YAML, a title, and those parts that aren't empty."""
    top = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {inline(title)}"]
    (folder / "README.md").write_text("\n\n".join([*top, *filter(None, parts)]) + "\n", encoding="utf-8")


def _about(trained: Trained, pixels: bool) -> str:
    model = trained.model
    parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
    sizes = model.backbone.config
    space = "pixels" if pixels else f"latents of a {type(model.autoencoder.module).__name__}"  # pyright: ignore[reportAttributeAccessIssue]
    return (
        f"A PRX text-to-image diffusion transformer with {parameters / 1e6:,.1f}M parameters (hidden size "
        f"{sizes['hidden_size']}, depth {sizes['depth']}, patch {sizes['patch_size']}) that works on {space}, trained at "
        f"{trained.image_size} px with [MosaicML Composer](https://github.com/mosaicml/composer)."
    )


def _usage(trained: Trained, folder: Path, card: Card, pixels: bool) -> str:
    pipeline = "PRXPixelPipeline" if pixels else "PRXPipeline"
    prompt = card.prompts[0] if card.prompts else "a red circle"
    s = card.sampling
    arguments = (
        f"height={s.height}, width={s.width}, num_inference_steps={s.num_inference_steps}, guidance_scale={s.guidance_scale}"
    )
    lines = ["import torch", f"from diffusers import {pipeline}", ""]
    load = '"PATH_OR_HUB_ID"'
    if (folder / REFERENCE).exists():
        reference = json.loads((folder / REFERENCE).read_text())
        network = type(trained.model.text_encoder.network).__name__
        lines[1:1] = [f"from transformers import {network}"]
        known, of_hub = public_name(reference["pretrained"])
        of_hub = of_hub or known == reference["pretrained"]
        revision = "" if reference["revision"] is None or not of_hub else f", revision={reference['revision']!r}"
        name = known if of_hub else f"PATH_OF_{known}"  # a folder of the exporter's machine
        lines.append(f"text_encoder = {network}.from_pretrained({name!r}{revision})  # not in this repository")
        load += ", text_encoder=text_encoder"
    cleaning = cleaning_of(trained.model.text_encoder.tokenizer)
    skip = "" if pixels or cleaning == "prx" else ", skip_text_cleaning=True"
    if pixels and cleaning == "prx":
        prompt = clean_caption(prompt, "prx")
    lines += [
        f"pipe = {pipeline}.from_pretrained({load})",
        f"image = pipe({prompt!r}, {arguments},",
        f"    use_resolution_binning=False{skip}, generator=torch.Generator().manual_seed(0)).images[0]",
    ]
    code = "\n".join(lines)
    return (
        f"{fenced(code, 'python')}\n\nIt needs `pip install diffusers transformers ftfy`. `use_resolution_binning=False` keeps "
        "the size that is asked for; one prompt at a time."
    ) + (_CLEAN_FIRST if pixels and cleaning == "prx" else "" if cleaning == "prx" else _MENDED)


def _samples(folder: Path, card: Card) -> str:
    if not (folder / SAMPLES).exists():
        return ""
    s = card.sampling
    return (
        f"## Samples\n\n![Samples]({SAMPLES})\n\nSeeds 0 to {len(card.prompts) - 1}, {s.num_inference_steps} Euler steps, "
        f"classifier-free guidance {s.guidance_scale}, {s.height}×{s.width}, the first drawing of each prompt."
    )


def _training(trained: Trained) -> str:
    if trained.recipe is None:
        return ""
    recipe = trained.recipe
    rows = {
        "weights": {"ema": "averaged (EMA)", "raw": "plain"}.get(trained.weights, trained.weights),
        "batches": trained.batch,
        "batch size": recipe.get("global_train_batch_size"),
        "optimizer": (recipe.get("optimizer") or {}).get("name"),
        "algorithms": ", ".join(name for name, arguments in (recipe.get("algorithms") or {}).items() if arguments is not False),
        "seed": recipe.get("seed"),
    }
    table = "\n".join(f"| {name} | {inline(str(value)).replace('|', '/')} |" for name, value in rows.items())
    return f"## Recipe\n\nAll of it is in [{RECIPE}]({RECIPE}).\n\n| | |\n|---|---|\n{table}"


def _data(recipe: dict[str, Any] | None) -> str:
    loader = (recipe or {}).get("train_loader") or {}
    facts = {key: loader[key] for key in ("source", "path", "remote", "mix", "split", "captions") if loader.get(key)}
    if not facts:
        return "Not known: the model was not exported from its run."
    return fenced(yaml.safe_dump(without_places(redacted(facts)), sort_keys=False, allow_unicode=True), "yaml")


def _provenance(trained: Trained, card: Card) -> str:
    facts = {
        "weights_sha256": card.digest,
        "command": card.command,
        "versions": {"prx-composer": __version__} | {name: version(name) for name in VERSIONS},
        "sampling": {k: v for k, v in asdict(card.sampling).items() if k not in ("precision", "guidance")},
        "flow": asdict(trained.model.flow),
    }
    return "## Made with\n\n" + fenced(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), "yaml")


# ------------------------------------------- text that leaves this machine: nobody's markup, and none of its paths


def inline(text: str) -> str:
    """Return a text as one line of Markdown without HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("`", "'")


def fenced(text: str, language: str) -> str:
    """Return a block of code; whatever the text holds, it ends where the block does."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def public_name(path: str) -> tuple[str, bool]:
    """Return what others may know a path by, and whether it is an id of the hub, from whose cache the path is."""
    if cached := _CACHED.search(path):
        return f"{cached[1]}/{cached[2]}", True
    return (re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder") if _is_place(path) else path, False


def without_places(value: Any) -> Any:
    """Return a part of a recipe with nothing but the name of every path that begins at a root or a home; prompts stay."""
    if isinstance(value, dict):
        return {key: item if key == "prompts" else without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return public_name(value)[0] if isinstance(value, str) and _is_place(value) else value


def public_command(arguments: list[str]) -> list[str]:
    """Return a command line with nothing but the name of every such path."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        shown.append(f"{option}{equals}{public_name(value)[0] if _is_place(value) else value}")
    return shown


def _is_place(text: str) -> bool:
    return _PLACE.match(text) is not None and "\n" not in text and Path(text.replace("\\", "/")).name != ""
