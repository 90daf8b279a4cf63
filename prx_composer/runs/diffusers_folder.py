"""A folder of diffusers: what its files say of the model in it, and that model.

A pipeline of PRX or of a class with a signature, written by `prx export` or by diffusers; beside an export lies its recipe.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from torch import nn

from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import read_text
from prx_composer.models.autoencoder import DiffusersAutoencoder, Pixels
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.caption_format import FORMAT, cleaner, cleaning_of
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.diffusion import DDPM
from prx_composer.models.encoders import load_tokenizer
from prx_composer.models.processes import PIXEL_MIN_TIMESTEP, FlowMatching
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.arguments import check_component, split
from prx_composer.recipe.consistency import stages_of
from prx_composer.registry import UNNAMED, backbones, processes, signatures, text_encoders
from prx_composer.runs.model_parts import ModelParts
from prx_composer.runs.weights import backbone_folder, read_json, read_safetensors

REFERENCE = "text_encoder_reference.json"
RECIPE = "recipe.yaml"  # of the run that it was exported from
PRX_CLASS = "PRXTransformer2DModel"
# How training draws times, which no pipeline says.
_DRAWN = ("logit_mean", "logit_std", "uniform_fraction", "shift_uniform", "sampled_min", "sampled_max")
_DEFAULTS = {"PRXPixelPipeline": (1024, 256), "PRXPipeline": (512, None)}  # default_sample_size, prompt tokens


def pipeline_prompt(prompt: str) -> str:
    """Return what diffusers' PRXPixelPipeline, and PRXPipeline with `skip_text_cleaning=True`, read instead of a prompt."""
    return cleaner("basic")(prompt)


def mends_prompts(model: TextToImage) -> bool:
    """Return whether diffusers' pipeline cleans prompts so, and the model itself does no cleaning of its own."""
    return cleaning_of(model.text_encoder.tokenizer) == "none"


def _index(folder: Path) -> dict[str, Any]:
    """Return `model_index.json`; nothing of a folder without a pipeline, which has a recipe instead."""
    path = folder / "model_index.json"
    return read_json(path) if path.exists() else {}


def _pipeline(folder: Path) -> str:
    return str(_index(folder).get("_class_name"))


def is_pixel(folder: Path) -> bool:
    """Return whether the model in a folder is of pixels. Raise UserError if an autoencoder is in its recipe alone."""
    if _pipeline(folder).startswith("PRX"):
        return _pipeline(folder) == "PRXPixelPipeline"
    trained, has_own = _part_of_recipe(folder, "autoencoder").get("name", "pixels"), (folder / "vae").is_dir()
    if trained != "pixels" and not has_own:
        raise UserError(f"{folder} has no vae, and was trained on what model.autoencoder {trained} makes of images.")
    return not has_own


def backbone_arguments(folder: Path) -> dict[str, Any]:
    """Return `model.backbone` of a recipe, from `transformer/config.json`, or `prior/`.

    Raises:
        UserError: it isn't there, is of a class that nothing is known of, or has arguments that the class hasn't.
    """
    path = backbone_folder(folder)
    if not path.is_dir():
        raise UserError(f"{folder} is a {_pipeline(folder)} without a transformer, and only transformers are known here.")
    settings = read_json(path / "config.json")
    class_name = settings.get("_class_name")
    arguments = {key: value for key, value in settings.items() if not key.startswith("_")}
    if class_name == PRX_CLASS:
        return {"name": "prx", **arguments}
    arguments = {"class": class_name, **arguments}
    check_component(backbones, "diffusers", arguments, f"{path}/config.json")
    return {"name": "diffusers", **arguments}


def built(folder: Path) -> Any:
    """Return the backbone of a folder, without its weights."""
    name, arguments = split(backbone_arguments(folder), "transformer")
    with at_path(f"{backbone_folder(folder)}/config.json", TypeError):
        return backbones.get(name, "model.backbone.name")(**arguments)


def flow_arguments(folder: Path) -> dict[str, Any]:
    """Return what the pipeline, and the recipe of an export, know of `model.flow`: prediction, shift, noise scale, clamps, betas.

    Raises:
        UserError: a scheduler that doesn't take these steps.
    """
    own, is_prx = _part_of_recipe(folder, "flow"), _pipeline(folder).startswith("PRX")
    if recipe_beside(folder) is not None and not is_prx:
        path, (name, arguments) = f"{folder / RECIPE}: model.flow", split(own, "flow", UNNAMED["flow"])
        check_component(processes, name, arguments, path)
        with at_path(path):  # defaults too: a fragment is merged over a recipe that may have other values
            return {"name": name, **dataclasses.asdict(processes.get(name, path)(**arguments))}
    if not is_prx and (is_pixel(folder) or not _index(folder)):
        raise UserError(f"{folder}: nothing says what its transformer predicts; there is no {RECIPE}, as `prx export` writes it.")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("_class_name") == "DPMSolverMultistepScheduler" and not is_pixel(folder):
        return _ddpm_arguments(folder, scheduler)
    if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or scheduler.get("use_dynamic_shifting"):
        raise UserError(
            f"{folder}/scheduler: only a FlowMatchEulerDiscreteScheduler with a fixed shift takes the steps that are taken here."
        )
    shift = float(scheduler.get("shift", 1.0))
    unsaid = {} if recipe_beside(folder) is None else {key: own.get(key, getattr(FlowMatching, key)) for key in _DRAWN}
    if not is_pixel(folder):
        return {"prediction": "v", "timestep_shift": shift} | unsaid
    noise_scale = float(_index(folder).get("noise_scale", 2.0))
    arguments: dict[str, Any] = {"prediction": "x", "timestep_shift": shift, "noise_scale": noise_scale}
    arguments["min_timestep"] = PIXEL_MIN_TIMESTEP
    if own:  # for which the pipeline has no place
        with at_path(f"{folder / RECIPE}: model.flow", TypeError):
            arguments["min_timestep"] = float(own.get("min_timestep", PIXEL_MIN_TIMESTEP))
            if own.get("clamp_sampling", False):
                arguments["clamp_sampling"] = True
    return arguments | unsaid


def _ddpm_arguments(folder: Path, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the DDPM that draws by this scheduler."""
    of_betas = ("beta_start", "beta_end") if scheduler.get("beta_schedule") != "squaredcos_cap_v2" else ()
    arguments: dict[str, Any] = {key: scheduler.get(key) for key in ("beta_schedule", *of_betas, "solver_order")}
    arguments["prediction"] = {"epsilon": "eps", "v_prediction": "v"}.get(str(scheduler.get("prediction_type")))
    with at_path(f"{folder}/scheduler", TypeError, NotImplementedError):
        ours = dict(DDPM(**arguments).scheduler().config)
    others = sorted(key for key, value in scheduler.items() if not key.startswith("_") and value != ours.get(key))
    if others:
        raise UserError(f"{folder}/scheduler: it takes other steps than are taken here, by its {', '.join(others)}.")
    return {"name": "ddpm", **arguments}


def image_size(folder: Path, model: TextToImage) -> int:
    """Return the side of the images that were trained last, as the index or the recipe says, or else the transformer."""
    recipe, backbone = recipe_beside(folder), cast("Any", model.backbone)
    if size := _index(folder).get("default_sample_size"):
        return int(size)
    if recipe is not None:
        with at_path(f"{folder / RECIPE}: image_size", TypeError):
            return int(stages_of(recipe)[-1][1].get("image_size", recipe["image_size"]))
    known = _DEFAULTS.get(_pipeline(folder))
    return known[0] if known else int(backbone.config.get("sample_size", 128)) * model.autoencoder.downsampling


def text_encoder_arguments(folder: Path) -> dict[str, Any]:
    """Return `model.text_encoder`: `pretrained` (the folder's own, or the hub id it refers to), `tokenizer`, `max_tokens` …

    Raises:
        UserError: neither is there, or the pipeline reads prompts in another way.
    """
    trained = _part_of_recipe(folder, "text_encoder")
    if trained.get("name") == "labels":
        return {"name": "labels", "tokenizer": str(folder / "tokenizer")}
    if trained.get("name") != "several":
        return _encoder(folder, trained)
    with at_path(f"{folder / RECIPE}: model.text_encoder", AttributeError, TypeError):
        given = enumerate(trained["encoders"].items(), start=1)
        encoders = {name: _encoder(folder, own, f"_{number}" if number > 1 else "") for number, (name, own) in given}
    return {"name": "several", "tokens": trained.get("tokens"), "encoders": encoders}


def _encoder(folder: Path, trained: Mapping[str, Any], ending: str = "") -> dict[str, Any]:
    """Return the arguments of one text encoder, with what a recipe said of how it reads."""
    reference, tokenizer = folder / REFERENCE, folder / f"tokenizer{ending}"
    if (cleaning := _cleaning(folder)) is None:
        raise UserError(
            f"{folder}: {_pipeline(folder)} reads prompts otherwise than by one text encoder's last layer. Name it in "
            "model.init_from of a recipe whose model.backbone and model.text_encoder you write by yourself."
        )
    if (folder / f"text_encoder{ending}" / "config.json").exists():
        arguments: dict[str, Any] = {"pretrained": str(folder / f"text_encoder{ending}")}
    elif reference.exists() and not ending:
        named = read_json(reference)
        arguments = {key: named[key] for key in ("pretrained", "revision") if named.get(key) is not None}
    else:
        raise UserError(f"{folder} has no text_encoder{ending}, and no {REFERENCE} that says which it is.")
    max_tokens = _index(folder).get("prompt_max_tokens") or _DEFAULTS.get(_pipeline(folder), (0, None))[1]
    if max_tokens is None:
        max_tokens = int(read_json(tokenizer / "tokenizer_config.json").get("model_max_length") or 256)
    arguments |= {"tokenizer": str(tokenizer), "max_tokens": max_tokens, "clean": cleaning}
    return {"name": "huggingface"} | arguments | {key: trained[key] for key in ("layer", "pooled", *FORMAT) if key in trained}


def _cleaning(folder: Path) -> str | None:
    """Return how one encoder's prompts are cleaned, without a recipe as the pipeline does; None if that reads otherwise."""
    if recipe_beside(folder) is not None:
        return "none"  # if it doesn't say
    class_name = str(read_json(backbone_folder(folder) / "config.json").get("_class_name"))
    if class_name == PRX_CLASS:
        return {"PRXPixelPipeline": "basic", "PRXPipeline": "prx"}.get(_pipeline(folder), "none")
    signature = signatures.get(class_name, str(folder))()
    ways: dict[str, dict[str, Any]] = {"none": {}, "lower": {"cleaning": "lower"}}
    read = [clean for clean, how in ways.items() if signature.pipeline is None or signature.pipeline_reads([how], [[0]])]
    return read[0] if read else None


def recipe_beside(folder: Path) -> dict[str, Any] | None:
    """Return the recipe that lies beside an export, if there is one."""
    if not (folder / RECIPE).exists():
        return None
    with at_path(f"{folder / RECIPE} is no recipe of a run; mend or delete it", yaml.YAMLError, TypeError):
        recipe = yaml.safe_load(read_text(folder / RECIPE))
        if not isinstance(recipe["model"], dict):
            raise TypeError(f"model is {recipe['model']!r}")
        return recipe


def _trained_as(folder: Path) -> dict[str, Any] | None:
    return (recipe_beside(folder) or {}).get("model")


def _part_of_recipe(folder: Path, name: str) -> dict[str, Any]:
    part = (_trained_as(folder) or {}).get(name)
    return part if isinstance(part, dict) else {}


def open_pipeline(folder: Path) -> tuple[TextToImage, int]:
    """Return the model in a folder that diffusers opens, and its image size.

    Raises:
        UserError: a part that is missing, damaged or of another kind.
    """
    backbone, path = built(folder), backbone_folder(folder)
    try:
        backbone.load_state_dict(of_backbone(backbone, read_safetensors(path)))
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{path}: its weights don't fit its config.json: {first}") from error
    with at_path(str(folder)):
        kind, arguments = split(text_encoder_arguments(folder), "text_encoder")
        if kind == "several":
            encoder = ModelParts({"name": "text_to_image", "text_encoder": {"name": kind, **arguments}}, 0).text_encoder
        else:
            tokenizer = load_tokenizer(arguments.pop("tokenizer"))
            encoder = text_encoders.get(kind, "text_encoder")(tokenizer=tokenizer, **arguments)
        autoencoder = Pixels() if is_pixel(folder) else DiffusersAutoencoder(str(folder), subfolder="vae")
        process, values = split(flow_arguments(folder), "flow", UNNAMED["flow"])
        model = TextToImage(backbone, encoder, processes.get(process, "flow")(**values), autoencoder)
        if isinstance(backbone, PRXBackbone) and mends_prompts(model):
            model.clean_prompt = pipeline_prompt
        spec = _trained_as(folder)  # without a recipe it is another's, and those were trained without captions too
        model.knows_empty_caption = spec is None or spec.get("caption_dropout") != 0 or spec.get("init_from") is not None
        return model, image_size(folder, model)


def of_backbone(backbone: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors by the names that a backbone has for them: a class of diffusers is inside of ours, and saved without it."""
    inside = isinstance(backbone, DiffusersBackbone) and not any(name.startswith("model.") for name in tensors)
    return {f"model.{name}": tensor for name, tensor in tensors.items()} if inside else dict(tensors)
