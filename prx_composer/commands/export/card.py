"""The model card of an export, and what may stand in it: no path of this machine, and no markup of the run."""

import html
import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import diffusers
import yaml
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from typer import echo

from prx_composer import __version__
from prx_composer.commands.generate import DrawingSettings
from prx_composer.common.errors import redacted
from prx_composer.common.pages import render
from prx_composer.data.format import MANIFEST, Manifest
from prx_composer.models.autoencoder import Pixels
from prx_composer.models.caption_format import cleaner, cleaning_of
from prx_composer.models.encoders import HuggingFaceTextEncoder
from prx_composer.models.processes import PIXEL_MIN_TIMESTEP
from prx_composer.models.several_encoders import parts_of
from prx_composer.recipe.arguments import data_sets
from prx_composer.runs.diffusers_folder import RECIPE, REFERENCE
from prx_composer.runs.opening import Trained

SAMPLES = "samples.png"
ADAPTERS = "pytorch_lora_weights.safetensors"  # by the name that diffusers looks for
_VERSIONS = ("torch", "diffusers", "transformers", "mosaicml", "mosaicml-streaming")
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
        opened: how diffusers opens a class of its own; empty: the model is PRX.
    """

    name: str
    licence: str | None
    command: str
    digest: str
    sampling: DrawingSettings
    prompts: list[str]
    opened: str = ""


def write_card(trained: Trained, folder: Path, card: Card) -> None:
    """Write README.md beside what `write_pipeline` or `write_own_class` wrote."""

    model, recipe = trained.model, trained.recipe or {}
    pixels, cleaned = isinstance(model.autoencoder, Pixels), cleaning_of(model.text_encoder.tokenizer) == "prx"
    prompt = card.prompts[0] if card.prompts else "a red circle"
    loader = recipe.get("train_loader") or {}
    data = {key: loader[key] for key in ("source", "path", "remote", "mix", "split", "captions") if loader.get(key)}
    attribution, missing = _attribution(loader) if loader.get("path") or loader.get("mix") else ({}, [])
    if missing:
        echo(f"The card does not say whose work the data are: {', '.join(missing)} cannot be read here.")
    head: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*([] if card.opened else ["prx"]), "prx-composer"],
    }
    if card.licence is not None:
        head["license"] = card.licence
    made_with = {
        "weights_sha256": card.digest,
        "command": card.command,
        "versions": {"prx-composer": __version__} | {name: version(name) for name in _VERSIONS},
        "sampling": {k: v for k, v in asdict(card.sampling).items() if k not in ("precision", "guidance")},
        "flow": {"name": type(model.flow).__name__} | asdict(model.flow),
    }
    write_readme(
        folder,
        "card.md.jinja",
        card=card,
        trained=trained,
        head=head,
        parameters=sum(parameter.numel() for parameter in model.backbone.parameters()),
        backbone=model.backbone,
        pixels=pixels,
        autoencoder=type(getattr(model.autoencoder, "module", None)).__name__,
        pipeline="PRXPixelPipeline" if pixels else "PRXPipeline",
        call=pipeline_call(trained, folder, card.sampling.guidance_scale) if card.opened else None,
        network=type(getattr(model.text_encoder, "network", None)).__name__,
        reference=_public_reference(folder),
        cleaned=cleaned,
        exact=pixels and not getattr(model.flow, "clamp_sampling", False),
        clamp=PIXEL_MIN_TIMESTEP,
        prompt=cleaner("prx")(prompt) if pixels and cleaned else prompt,
        s=card.sampling,
        samples=SAMPLES if (folder / SAMPLES).exists() else None,
        recipe_file=RECIPE,
        training=_training(trained, recipe),
        data=without_places(redacted(data)),
        attribution=attribution,
        made_with=made_with,
    )


def _training(trained: Trained, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what the card says of the training."""
    weights = {"ema": "averaged (EMA)", "raw": "plain"}.get(trained.weights, trained.weights)
    return {
        "weights": f"merged from {', '.join(trained.merged)}" if trained.merged else weights,
        "batches": trained.batch,
        "batch size": recipe.get("global_train_batch_size"),
        "optimizer": (recipe.get("optimizer") or {}).get("name"),
        "algorithms": ", ".join(name for name, arguments in (recipe.get("algorithms") or {}).items() if arguments is not False),
        "seed": recipe.get("seed"),
    }


def _public_reference(folder: Path) -> dict[str, Any] | None:
    """Return the text encoder that the export refers to, if it does, by the name that others know."""
    if not (folder / REFERENCE).exists():
        return None
    reference = json.loads((folder / REFERENCE).read_text())
    known, of_hub = public_name(reference["pretrained"])
    if of_hub or known == reference["pretrained"]:
        return reference | {"pretrained": known}
    return {"pretrained": f"PATH_OF_{known}", "revision": None}  # a folder of the exporter's machine


def _attribution(loader: dict[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return whose work the data of a loader are, by part, as their manifests say; and the manifests that are not here."""
    found, missing = dict[str, dict[str, str]](), list[str]()
    for part in data_sets(loader).values():
        manifest = Path(part["path"]) / part.get("split", "train") / MANIFEST
        try:
            found |= Manifest.read(manifest.parent).attribution
        except (OSError, ValueError, KeyError):
            missing.append(f"{manifest.parent.parent.name}/{manifest.parent.name}/{manifest.name}")
    return found, missing


def pipeline_call(trained: Trained, folder: Path, guidance: float) -> dict[str, Any] | None:
    """Return what the pipeline that `write_own_class` wrote is told to draw as here, beside prompt, size, steps and seed.

    Args:
        folder: with the export.
        guidance: scale of classifier-free guidance.

    Returns:
        Names and values; None if there is no pipeline, or it doesn't read prompts as the text encoders do.
    """
    (encoders, places), signature = parts_of(trained.model.text_encoder), cast("Any", trained.model.backbone).signature
    index = folder / "model_index.json"
    if not index.exists() or not signature.pipeline_reads([one.how for one in encoders], places):
        return None
    longest = cast("HuggingFaceTextEncoder", encoders[-1]).max_tokens
    return signature.pipeline_options(encoders[0].how, guidance) | {"negative_prompt": "", "max_sequence_length": longest}


def write_adapter_card(trained: Trained, folder: Path, title: str, licence: str | None, base: str, of_hub: bool) -> None:
    """Write README.md beside the adapters of a LoRA run.

    Args:
        title, licence: of the card.
        base: name of what the run began with.
        of_hub: whether that is an id of the hub.
    """
    backbone: Any = trained.model.backbone
    signature = getattr(backbone, "signature", None)  # of a class of diffusers
    own: Any = PRXTransformer2DModel if signature is None else backbone.model
    tags = [*(["prx"] if signature is None else []), "prx-composer", "lora"]
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-to-image", "tags": tags}
    head |= ({"base_model": base} if of_hub else {}) | ({} if licence is None else {"license": licence})
    pipeline = "PRXPixelPipeline" if isinstance(trained.model.autoencoder, Pixels) else "PRXPipeline"
    write_readme(
        folder,
        "adapters.md.jinja",
        trained=trained,
        title=title,
        head=head,
        base=base,
        of_hub=of_hub,
        rank=backbone.peft_config["default"].r,
        pipeline=pipeline,
        opener=pipeline if signature is None else backbone.class_name,
        owner="the PRX backbone" if signature is None else f"diffusers' {backbone.class_name}",
        part="transformer" if signature is None else signature.part,
        adapters=ADAPTERS,
        readable=hasattr(own, "load_lora_adapter"),
        diffusers_version=diffusers.__version__,
    )


def write_readme(folder: Path, template: str, **values: Any) -> None:
    """Write README.md from a template of this folder as the hub reads it: facts as YAML, then Markdown."""

    def as_yaml(value: Any) -> str:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)

    def cell(value: Any) -> str:
        return inline(str(value)).replace("|", "/")

    helpers = dict(yaml=as_yaml, inline=inline, cell=cell, fenced=fenced, repr=repr)
    content = render("prx_composer.commands.export", template, **helpers, **values)
    (folder / "README.md").write_text(content.rstrip("\n") + "\n", encoding="utf-8")


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
