"""Folders that diffusers' PRXPixelPipeline and PRXPipeline open, as models of this package."""

from pathlib import Path
from typing import Any

import yaml
from torch import nn

from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import read_text
from prx_composer.models.autoencoder import Autoencoder, DiffusersAutoencoder, Pixels
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.encoders import HuggingFaceTextEncoder, load_tokenizer
from prx_composer.models.flow import FlowMatching
from prx_composer.models.prompts import cleaner, cleaning_of
from prx_composer.models.text_to_image import TextToImage
from prx_composer.runs.weights import read_json, read_safetensors

REFERENCE = "text_encoder_reference.json"
RECIPE = "recipe.yaml"  # of the run that it was exported from
PIXEL_MIN_TIMESTEP = 0.05  # written into PRXPixelPipeline
_DEFAULTS = {"PRXPixelPipeline": (1024, 256), "PRXPipeline": (512, None)}  # default_sample_size, prompt tokens


def pipeline_prompt(prompt: str) -> str:
    """Return what diffusers' PRXPixelPipeline, and PRXPipeline with `skip_text_cleaning=True`, read instead of a prompt."""
    return cleaner("basic")(prompt)


def mends_prompts(model: TextToImage) -> bool:
    """Return whether diffusers' pipeline does that, and the model itself no cleaning of its own."""
    return cleaning_of(model.text_encoder.tokenizer) == "none"


def is_pixel(folder: Path) -> bool:
    return read_json(folder / "model_index.json")["_class_name"] == "PRXPixelPipeline"


def backbone_arguments(folder: Path) -> dict[str, Any]:
    """The backbone's constructor arguments, from `transformer/config.json`.

    Raises:
        UserError: it isn't there, or is of another network.
    """
    settings = read_json(folder / "transformer" / "config.json")
    if settings.get("_class_name") != "PRXTransformer2DModel":
        raise UserError(f"{folder}/transformer is a {settings.get('_class_name')}, not a PRXTransformer2DModel.")
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def flow_arguments(folder: Path) -> dict[str, Any]:
    """What the pipeline knows of the flow: prediction, shift, noise scale.

    Raises:
        UserError: a scheduler that doesn't take these steps.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or scheduler.get("use_dynamic_shifting"):
        raise UserError(
            f"{folder}/scheduler: only a FlowMatchEulerDiscreteScheduler with a fixed shift takes the steps that are taken here."
        )
    shift = float(scheduler.get("shift", 1.0))
    if not is_pixel(folder):
        return {"prediction": "v", "timestep_shift": shift}
    noise_scale = float(read_json(folder / "model_index.json").get("noise_scale", 2.0))
    return {"prediction": "x", "timestep_shift": shift, "min_timestep": PIXEL_MIN_TIMESTEP, "noise_scale": noise_scale}


def image_size(folder: Path) -> int:
    index = read_json(folder / "model_index.json")
    return int(index.get("default_sample_size") or _DEFAULTS[index["_class_name"]][0])


def text_encoder_arguments(folder: Path) -> dict[str, Any]:
    """`pretrained` (the folder's own, or the hub id that it refers to), `revision`, `tokenizer`, `max_tokens` and `clean`.

    Raises:
        UserError: neither is there.
    """
    index = read_json(folder / "model_index.json")
    reference = folder / REFERENCE
    if (folder / "text_encoder" / "config.json").exists():
        arguments: dict[str, Any] = {"pretrained": str(folder / "text_encoder")}
    elif reference.exists():
        named = read_json(reference)
        arguments = {key: named[key] for key in ("pretrained", "revision") if named.get(key) is not None}
    else:
        raise UserError(f"{folder} has no text_encoder, and no {REFERENCE} that says which it is.")
    max_tokens = index.get("prompt_max_tokens") or _DEFAULTS[index["_class_name"]][1]
    if max_tokens is None:
        max_tokens = int(read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length") or 256)
    return arguments | {"tokenizer": str(folder / "tokenizer"), "max_tokens": max_tokens, "clean": _cleaning(folder)}


def _cleaning(folder: Path) -> str:
    """How a model's prompts are cleaned: as the recipe beside it says, if there is one; else as its pipeline does."""
    model = _trained_as(folder)
    if model is None:
        return "basic" if is_pixel(folder) else "prx"
    encoder = model.get("text_encoder")
    return encoder.get("clean", "none") if isinstance(encoder, dict) else "none"


def _trained_as(folder: Path) -> dict[str, Any] | None:
    """The recipe's `model` that lies beside an export, if there is one."""
    if not (folder / RECIPE).exists():
        return None
    try:
        model = yaml.safe_load(read_text(folder / RECIPE))["model"]
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        raise UserError(f"{folder / RECIPE} is no recipe of a run; mend or delete it. ({error})") from error
    if not isinstance(model, dict):
        raise UserError(f"{folder / RECIPE} is no recipe of a run; mend or delete it. (model is {model!r})")
    return model


def open_pipeline(folder: Path) -> tuple[TextToImage, int]:
    """The model and its image size.

    Raises:
        UserError: a part that is missing, damaged or of another kind.
    """
    backbone = PRXBackbone(**backbone_arguments(folder))
    load_backbone(backbone, folder)
    with at_path(str(folder)):
        arguments = text_encoder_arguments(folder)
        tokenizer = load_tokenizer(arguments.pop("tokenizer"))
        encoder = HuggingFaceTextEncoder(tokenizer, **arguments)
        autoencoder: Autoencoder = Pixels()
        if not is_pixel(folder):
            autoencoder = DiffusersAutoencoder(str(folder), subfolder="vae")
        flow = FlowMatching(**flow_arguments(folder))
        model = TextToImage(backbone, encoder, flow, autoencoder)
        if mends_prompts(model):
            model.clean_prompt = pipeline_prompt
        model.knows_empty_caption = _knows_empty_caption(folder)
        return model, image_size(folder)


def _knows_empty_caption(folder: Path) -> bool:
    """Whether the model was trained without captions too, as far as the recipe beside it says; others' models were."""
    model = _trained_as(folder)
    return model is None or model.get("caption_dropout") != 0 or model.get("init_from") is not None


def load_backbone(backbone: nn.Module, folder: Path) -> None:
    weights = read_safetensors(folder / "transformer")
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{folder}/transformer: its weights don't fit its config.json: {first}") from error
