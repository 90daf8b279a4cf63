"""Models that were trained elsewhere: folders that diffusers opens, as models of this package, and `model.init_from`.

With it, training begins with the weights of such a folder, of a file of safetensors, of a run or of a checkpoint.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from prx_composer.common.errors import UserError, at_path, listed
from prx_composer.common.files import read_text, write_whole
from prx_composer.models.autoencoder import DiffusersAutoencoder, Pixels
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.caption_format import cleaner, cleaning_of
from prx_composer.models.diffusion import DDPM
from prx_composer.models.encoders import HuggingFaceTextEncoder, load_tokenizer
from prx_composer.models.processes import PIXEL_MIN_TIMESTEP
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.arguments import split
from prx_composer.recipe.consistency import strings
from prx_composer.registry import UNNAMED, processes
from prx_composer.runs.weights import locate, read_json, read_parts, read_safetensors, safetensors_shapes, split_parts

log = logging.getLogger(__name__)

REFERENCE = "text_encoder_reference.json"
RECIPE = "recipe.yaml"  # of the run that it was exported from
_DEFAULTS = {"PRXPixelPipeline": (1024, 256), "PRXPipeline": (512, None)}  # default_sample_size, prompt tokens
PATH = "model.init_from"


def pipeline_prompt(prompt: str) -> str:
    """Return what diffusers' PRXPixelPipeline, and PRXPipeline with `skip_text_cleaning=True`, read instead of a prompt."""
    return cleaner("basic")(prompt)


def mends_prompts(model: TextToImage) -> bool:
    """Return whether diffusers' pipeline cleans prompts so, and the model itself does no cleaning of its own."""
    return cleaning_of(model.text_encoder.tokenizer) == "none"


def is_pixel(folder: Path) -> bool:
    return read_json(folder / "model_index.json")["_class_name"] == "PRXPixelPipeline"


def backbone_arguments(folder: Path) -> dict[str, Any]:
    """Return the backbone's constructor arguments, from `transformer/config.json`.

    Raises:
        UserError: it isn't there, or is of another network.
    """
    settings = read_json(folder / "transformer" / "config.json")
    if settings.get("_class_name") != "PRXTransformer2DModel":
        raise UserError(f"{folder}/transformer is a {settings.get('_class_name')}, not a PRXTransformer2DModel.")
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def flow_arguments(folder: Path) -> dict[str, Any]:
    """Return what the pipeline, and the recipe of an export, know of `model.flow`: prediction, shift, noise scale, clamps, betas.

    Raises:
        UserError: a scheduler that doesn't take these steps.
    """
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
    noise_scale = float(read_json(folder / "model_index.json").get("noise_scale", 2.0))
    arguments: dict[str, Any] = {"prediction": "x", "timestep_shift": shift, "noise_scale": noise_scale}
    arguments["min_timestep"] = PIXEL_MIN_TIMESTEP
    own = (_trained_as(folder) or {}).get("flow")  # for which the pipeline has no place
    if isinstance(own, dict):
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


def image_size(folder: Path) -> int:
    index = read_json(folder / "model_index.json")
    return int(index.get("default_sample_size") or _DEFAULTS[index["_class_name"]][0])


def text_encoder_arguments(folder: Path) -> dict[str, Any]:
    """Return `pretrained` (the folder's own, or the hub id it refers to), `revision`, `tokenizer`, `max_tokens` and `clean`.

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
    """Return how a model's prompts are cleaned: as the recipe beside it says, if there is one; else as its pipeline does."""
    model = _trained_as(folder)
    if model is None:
        return "basic" if is_pixel(folder) else "prx"
    encoder = model.get("text_encoder")
    return encoder.get("clean", "none") if isinstance(encoder, dict) else "none"


def _trained_as(folder: Path) -> dict[str, Any] | None:
    """Return `model` of the recipe that lies beside an export, if there is one."""
    if not (folder / RECIPE).exists():
        return None
    with at_path(f"{folder / RECIPE} is no recipe of a run; mend or delete it", yaml.YAMLError, TypeError):
        model = yaml.safe_load(read_text(folder / RECIPE))["model"]
        if not isinstance(model, dict):
            raise TypeError(f"model is {model!r}")
        return model


def open_pipeline(folder: Path) -> tuple[TextToImage, int]:
    """Return the model in a folder that diffusers opens, and its image size.

    Raises:
        UserError: a part that is missing, damaged or of another kind.
    """
    backbone = PRXBackbone(**backbone_arguments(folder))
    try:
        backbone.load_state_dict(read_safetensors(folder / "transformer"))
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{folder}/transformer: its weights don't fit its config.json: {first}") from error
    with at_path(str(folder)):
        arguments = text_encoder_arguments(folder)
        tokenizer = load_tokenizer(arguments.pop("tokenizer"))
        encoder = HuggingFaceTextEncoder(tokenizer, **arguments)
        autoencoder = Pixels() if is_pixel(folder) else DiffusersAutoencoder(str(folder), subfolder="vae")
        process, values = split(flow_arguments(folder), "flow", UNNAMED["flow"])
        model = TextToImage(backbone, encoder, processes.get(process, "flow")(**values), autoencoder)
        if mends_prompts(model):
            model.clean_prompt = pipeline_prompt
        spec = _trained_as(folder)  # without a recipe it is another's, and those were trained without captions too
        model.knows_empty_caption = spec is None or spec.get("caption_dropout") != 0 or spec.get("init_from") is not None
        return model, image_size(folder)


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
        found = read_parts(source, model.text_encoder.trainable)
    own: Mapping[str, Tensor] = model.backbone.state_dict()
    _compare(_shapes(found.backbone), _shapes(own), source, "model.backbone")
    if found.wrong is not None:
        raise UserError(
            f"{PATH}: {source} is no beginning: {found.wrong}. Name an older checkpoint of that run, or another model."
        )
    model.backbone.load_state_dict(found.backbone)
    model.knows_empty_caption = True  # what it was trained with is not known here
    begun = f"the backbone ({len(found.backbone)} tensors)"
    if model.text_encoder.trainable:
        if found.encoder:
            _load_encoder(model.text_encoder.network, found.encoder, source)
            begun += f" and the text encoder ({len(found.encoder)})"
        else:
            log.warning("%s: %s has no text encoder; the one that is trained begins as model.text_encoder says.", PATH, source)
    log.info("%s: %s gives %s its first weights.", PATH, source, begun)


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
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}  # of several, some may be
    for name, tensor in network.state_dict().items():
        if name in frozen:
            continue
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
        _compare(shapes, _shapes(backbone.state_dict()), source, "model.backbone")
    return f"{source} has its {len(shapes)} tensors"


def write_fragment(folder: str, target: Path) -> None:
    """Write the part of a recipe that a diffusers PRX folder decides: sizes, text encoder, flow, and `init_from`.

    Raises:
        UserError: the folder is no such, lacks a part, or its weights are not those of its configuration.
    """
    located = locate(folder)
    if located.kind != "diffusers":
        raise UserError(
            f"{folder} is not a folder that diffusers opens; a run or *.safetensors is named in model.init_from itself."
        )
    path = located.path.resolve()
    backbone = backbone_arguments(path)
    with torch.device("meta"):
        check_init_from(str(path), PRXBackbone(**backbone))
    nothing_else = {"config": None, "revision": None}  # what a recipe below may have said instead
    autoencoder: dict[str, Any] = {"name": "pixels"}
    if not is_pixel(path):
        autoencoder = {"name": "diffusers", **nothing_else, "pretrained": str(path), "subfolder": "vae"}
    model = {
        "backbone": {"name": "prx", **backbone},
        "text_encoder": {"name": "huggingface", **nothing_else, **text_encoder_arguments(path)},
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
