"""Models that were trained elsewhere: folders that diffusers opens, as models of this package, and `model.init_from`.

With it, training begins with the weights of such a folder, of a file of safetensors, of a run or of a checkpoint.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from prx_composer.common.errors import UserError, at_path, listed
from prx_composer.common.files import read_text, write_whole
from prx_composer.models.autoencoder import DiffusersAutoencoder, Pixels
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.diffusion import DDPM
from prx_composer.models.encoders import load_tokenizer
from prx_composer.models.processes import PIXEL_MIN_TIMESTEP
from prx_composer.models.prompts import cleaner, cleaning_of
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.arguments import check_component, split
from prx_composer.recipe.consistency import stages_of, strings
from prx_composer.registry import UNNAMED, backbones, processes, signatures, text_encoders
from prx_composer.runs.weights import locate, read_json, read_parts, read_safetensors, safetensors_shapes, split_parts

log = logging.getLogger(__name__)

REFERENCE = "text_encoder_reference.json"
RECIPE = "recipe.yaml"  # of the run that it was exported from
_DEFAULTS = {"PRXPixelPipeline": (1024, 256), "PRXPipeline": (512, None)}  # default_sample_size, prompt tokens
PATH = "model.init_from"
PRX_CLASS = "PRXTransformer2DModel"
_OF_IMAGE_SIZE = ("sample_size", "interpolation_scale")  # of a class's arguments: what another image size may change


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
    """Return `model.backbone` of a recipe, from `transformer/config.json`.

    Raises:
        UserError: it isn't there, is of a class that nothing is known of, or has arguments that the class hasn't.
    """
    path = folder / "transformer"
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


def _built(folder: Path) -> Any:
    """Return the backbone of a folder, without its weights."""
    name, arguments = split(backbone_arguments(folder), "transformer")
    with at_path(f"{folder}/transformer/config.json", TypeError):
        return backbones.get(name, "model.backbone.name")(**arguments)


def flow_arguments(folder: Path) -> dict[str, Any]:
    """Return what the pipeline, and the recipe of an export, know of `model.flow`: prediction, shift, noise scale, clamps, betas.

    Raises:
        UserError: a scheduler that doesn't take these steps.
    """
    own, is_prx = _part_of_recipe(folder, "flow"), _pipeline(folder).startswith("PRX")
    if own and not is_prx:
        check_component(processes, *split(own, "flow", UNNAMED["flow"]), f"{folder / RECIPE}: model.flow")
        return own
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
    if not is_pixel(folder):
        return {"prediction": "v", "timestep_shift": shift}
    noise_scale = float(_index(folder).get("noise_scale", 2.0))
    arguments: dict[str, Any] = {"prediction": "x", "timestep_shift": shift, "noise_scale": noise_scale}
    arguments["min_timestep"] = PIXEL_MIN_TIMESTEP
    if own:  # for which the pipeline has no place
        with at_path(f"{folder / RECIPE}: model.flow", TypeError):
            arguments["min_timestep"] = float(own.get("min_timestep", PIXEL_MIN_TIMESTEP))
            if own.get("clamp_sampling", False):
                arguments["clamp_sampling"] = True
    return arguments


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
    recipe, backbone = _recipe(folder), cast("Any", model.backbone)
    if size := _index(folder).get("default_sample_size"):
        return int(size)
    if recipe is not None:
        with at_path(f"{folder / RECIPE}: image_size", TypeError):
            return int(stages_of(recipe)[-1][1].get("image_size", recipe["image_size"]))
    known = _DEFAULTS.get(_pipeline(folder))
    return known[0] if known else int(backbone.config.get("sample_size", 128)) * model.autoencoder.downsampling


def _read_otherwise(folder: Path) -> bool:
    """Return whether a folder has another's pipeline that doesn't read prompts as its class is given them here."""
    class_name = str(read_json(folder / "transformer" / "config.json").get("_class_name"))
    if class_name == PRX_CLASS or _recipe(folder) is not None:
        return False
    signature = signatures.get(class_name, str(folder))
    return signature.pipeline is not None and not signature.pipeline_reads


def text_encoder_arguments(folder: Path) -> dict[str, Any]:
    """Return `model.text_encoder`: `pretrained` (the folder's own, or the hub id it refers to), `tokenizer`, `max_tokens` …

    Raises:
        UserError: neither is there, or the pipeline reads prompts in another way.
    """
    reference, tokenizer = folder / REFERENCE, str(folder / "tokenizer")
    if _part_of_recipe(folder, "text_encoder").get("name") == "labels":
        return {"name": "labels", "tokenizer": tokenizer}
    if _read_otherwise(folder):
        raise UserError(
            f"{folder}: {_pipeline(folder)} reads prompts otherwise than by one text encoder's last layer. Name it in {PATH} of "
            "a recipe whose model.backbone and model.text_encoder you write by yourself."
        )
    if (folder / "text_encoder" / "config.json").exists():
        arguments: dict[str, Any] = {"pretrained": str(folder / "text_encoder")}
    elif reference.exists():
        named = read_json(reference)
        arguments = {key: named[key] for key in ("pretrained", "revision") if named.get(key) is not None}
    else:
        raise UserError(f"{folder} has no text_encoder, and no {REFERENCE} that says which it is.")
    max_tokens = _index(folder).get("prompt_max_tokens") or _DEFAULTS.get(_pipeline(folder), (0, None))[1]
    if max_tokens is None:
        max_tokens = int(read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length") or 256)
    return {"name": "huggingface"} | arguments | {"tokenizer": tokenizer, "max_tokens": max_tokens, "clean": _cleaning(folder)}


def _cleaning(folder: Path) -> str:
    """Return how a model's prompts are cleaned: as the recipe beside it says, if there is one; else as its pipeline does."""
    if _recipe(folder) is None:
        return {"PRXPixelPipeline": "basic", "PRXPipeline": "prx"}.get(_pipeline(folder), "none")
    return _part_of_recipe(folder, "text_encoder").get("clean", "none")


def _recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe that lies beside an export, if there is one."""
    if not (folder / RECIPE).exists():
        return None
    with at_path(f"{folder / RECIPE} is no recipe of a run; mend or delete it", yaml.YAMLError, TypeError):
        recipe = yaml.safe_load(read_text(folder / RECIPE))
        if not isinstance(recipe["model"], dict):
            raise TypeError(f"model is {recipe['model']!r}")
        return recipe


def _trained_as(folder: Path) -> dict[str, Any] | None:
    return (_recipe(folder) or {}).get("model")


def _part_of_recipe(folder: Path, name: str) -> dict[str, Any]:
    part = (_trained_as(folder) or {}).get(name)
    return part if isinstance(part, dict) else {}


def open_pipeline(folder: Path) -> tuple[TextToImage, int]:
    """Return the model in a folder that diffusers opens, and its image size.

    Raises:
        UserError: a part that is missing, damaged or of another kind.
    """
    backbone = _built(folder)
    try:
        backbone.load_state_dict(_of(backbone, read_safetensors(folder / "transformer")))
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{folder}/transformer: its weights don't fit its config.json: {first}") from error
    with at_path(str(folder)):
        kind, arguments = split(text_encoder_arguments(folder), "text_encoder")
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


# ------------------------------------------------------------------------------------------------------- init_from


def initialise(model: TextToImage, source: str) -> None:
    """Give a new model the backbone of `source`, and its text encoder too where that is trained along.

    Of a run, the averaged weights, if it has them. Every rank reads the same files, before anything is sharded.

    Args:
        model: as built from the recipe, before any algorithm has attached to it.
        source: diffusers folder, *.safetensors, run folder or checkpoint.

    Raises:
        UserError: nothing there, or names or shapes that are not the model's, by parameter.
    """
    with _named():
        _check_class(source, model.backbone)
        found = read_parts(source, model.text_encoder.trainable)
    own: Mapping[str, Tensor] = model.backbone.state_dict()
    weights = _of(model.backbone, found.backbone)
    _compare(_shapes(weights), _shapes(own), source, "model.backbone")
    if found.wrong is not None:
        raise UserError(
            f"{PATH}: {source} is no beginning: {found.wrong}. Name an older checkpoint of that run, or another model."
        )
    model.backbone.load_state_dict(weights)
    model.knows_empty_caption = True  # what it was trained with is not known here
    begun = f"the backbone ({len(found.backbone)} tensors)"
    if model.text_encoder.trainable:
        if found.encoder:
            _load_encoder(model.text_encoder.network, found.encoder, source)
            begun += f" and the text encoder ({len(found.encoder)})"
        else:
            log.warning("%s: %s has no text encoder; the one that is trained begins as model.text_encoder says.", PATH, source)
    log.info("%s: %s gives %s its first weights.", PATH, source, begun)


def _of(backbone: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors by the names that a backbone has for them: a class of diffusers is inside of ours, and saved without it."""
    inside = isinstance(backbone, DiffusersBackbone) and not any(name.startswith("model.") for name in tensors)
    return {f"model.{name}": tensor for name, tensor in tensors.items()} if inside else dict(tensors)


def _check_class(source: str, backbone: nn.Module) -> None:
    """Raise UserError if a folder's transformer is of another class, or computes otherwise than its weights' shapes tell."""
    located = locate(source)
    if located.kind != "diffusers" or not isinstance(backbone, DiffusersBackbone):
        return
    theirs = read_json(located.path / "transformer" / "config.json")
    ours = json.loads(json.dumps(backbone.config)) | {"_class_name": backbone.class_name}
    different = [key for key in ours if key in theirs and key not in _OF_IMAGE_SIZE and theirs[key] != ours[key]]
    if said := [f"{key.strip('_')} is {theirs[key]} there and {ours[key]} here" for key in different]:
        raise UserError(f"{source} does not fit model.backbone: {listed(said)}. `prx import` writes what the folder says.")


@contextmanager
def _named() -> Iterator[None]:
    """Say of what is wrong with a source that `model.init_from` names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{PATH}: {error}") from error


Shapes = dict[str, tuple[int, ...]]


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _compare(theirs: Shapes, ours: Shapes, source: str, what: str) -> None:
    said = [
        f"{name} is {theirs[name]} there and {ours[name]} here" for name in ours if name in theirs and theirs[name] != ours[name]
    ]
    said += [f"{name} is only there" for name in theirs if name not in ours]
    said += [f"{name} is only here" for name in ours if name not in theirs]
    if said:
        raise UserError(
            f"{PATH}: {source} does not fit {what}: {listed(said)}. `prx import` writes the sizes of a diffusers folder."
        )


def _load_encoder(network: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    first: dict[int, str] = {}  # of tied tensors, which may be saved under one name or several: the first, which is averaged
    own, given = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in network.state_dict().items():
        kept = first.setdefault(tensor.data_ptr(), name)
        own[kept] = tensor
        if name in weights:
            given.setdefault(kept, weights[name])
    strange = {name: tensor for name, tensor in weights.items() if name not in network.state_dict()}
    _compare(_shapes(given | strange), _shapes(own), source, "model.text_encoder")
    network.load_state_dict(given, strict=False)


def check_init_from(source: str, backbone: nn.Module | None) -> str:
    """Say what `initialise` will find, from the headers of the files alone, in a few words.

    Args:
        backbone: of the recipe, maybe on the meta device; None if it could not be built.

    Raises:
        UserError: as `initialise`, as far as that is known without reading weights.
    """
    with _named():
        located = locate(source)
        if located.checkpoint is not None:
            return f"{located.path} is a checkpoint"
        path = located.path / "transformer" if located.kind == "diffusers" else located.path
        shapes, _ = split_parts(safetensors_shapes(path))
        if backbone is not None:
            _check_class(source, backbone)
    if backbone is not None:
        _compare(_of(backbone, shapes), _shapes(backbone.state_dict()), source, "model.backbone")
    return f"{source} has its {len(shapes)} tensors"


def write_fragment(folder: str, target: Path) -> None:
    """Write the part of a recipe that a folder of diffusers decides: sizes, text encoder, flow, and `init_from`.

    Raises:
        UserError: the folder is no such, lacks a part, or its weights are not those of its configuration.
    """
    located = locate(folder)
    if located.kind != "diffusers":
        raise UserError(
            f"{folder} is not a folder that diffusers opens; a run or *.safetensors is named in model.init_from itself."
        )
    path = located.path.resolve()
    with torch.device("meta"):
        check_init_from(str(path), _built(path))
    nothing_else = {"config": None, "revision": None}  # what a recipe below may have said instead
    autoencoder: dict[str, Any] = {"name": "pixels"}
    if not is_pixel(path):
        autoencoder = {"name": "diffusers", **nothing_else, "pretrained": str(path), "subfolder": "vae"}
    encoder = text_encoder_arguments(path)
    model = {
        "backbone": backbone_arguments(path),
        "text_encoder": (nothing_else if encoder["name"] == "huggingface" else {}) | encoder,
        "flow": flow_arguments(path),
        "autoencoder": autoencoder,
        "init_from": str(path),
    }
    for place, text in strings(model, "model"):
        if "${" in text:
            raise UserError(
                f"{folder}: {place} would be {text!r}, which a recipe looks up where it is read, in the environment for example. "
                "Nothing that a folder says is looked up; write the value itself into the folder."
            )
    head = f"# Trains on from {path}: merge it over a recipe.\n"
    if not target.parent.is_dir():
        raise UserError(f"--output: there is no folder {target.parent}.")
    write_whole(target, (head + yaml.safe_dump({"model": model}, sort_keys=False, allow_unicode=True)).encode())
