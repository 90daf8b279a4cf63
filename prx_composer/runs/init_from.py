"""`model.init_from`: training begins with the weights of a diffusers folder, a file of safetensors, a run or a checkpoint."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from prx_composer.common.distributed import clean_name
from prx_composer.common.errors import UserError
from prx_composer.common.files import write_whole
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.consistency import strings
from prx_composer.runs import diffusers_folder as pipeline_folder
from prx_composer.runs.weights import Located, locate, nonfinite, read_checkpoint, read_safetensors, safetensors_shapes

log = logging.getLogger(__name__)

PATH = "model.init_from"
BACKBONE, ENCODER = "backbone.", "text_encoder.encoder."


def initialise(model: TextToImage, source: str) -> None:
    """Gives a new model the backbone of `source`, and its text encoder too where that is trained along.

    Of a run, the averaged weights, if it has them. Every rank reads the same files, before anything is sharded.

    Args:
        model: as built from the recipe, before any algorithm has attached to it.
        source: diffusers folder, *.safetensors, run folder or checkpoint.

    Raises:
        UserError: nothing there, or names or shapes that are not the model's, by parameter.
    """
    located = _located(source)
    backbone, encoder = _read(located, model.text_encoder.trainable)
    own: Mapping[str, Tensor] = model.backbone.state_dict()
    _compare(_shapes(backbone), _shapes(own), source, "model.backbone")
    if wrong := nonfinite(backbone | {f"{ENCODER}{name}": tensor for name, tensor in encoder.items()}):
        raise UserError(f"{PATH}: {source} is no beginning: {wrong}. Name an older checkpoint of that run, or another model.")
    model.backbone.load_state_dict(backbone)
    model.knows_empty_caption = True  # what it was trained with is not known here
    begun = f"the backbone ({len(backbone)} tensors)"
    if model.text_encoder.trainable:
        if encoder:
            _load_encoder(model.text_encoder.network, encoder, source)
            begun += f" and the text encoder ({len(encoder)})"
        else:
            log.warning("%s: %s has no text encoder; the one that is trained begins as model.text_encoder says.", PATH, source)
    log.info("%s: %s gives %s its first weights.", PATH, source, begun)


def _located(source: str) -> Located:
    try:
        return locate(source)
    except UserError as error:
        raise UserError(f"{PATH}: {error}") from error


def _read(located: Located, with_encoder: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the backbone and of the text encoder, by their own names; the latter may have none."""
    if located.kind == "diffusers":
        text = located.path / "text_encoder"
        return read_safetensors(located.path / "transformer"), read_safetensors(text) if with_encoder and text.is_dir() else {}
    if located.checkpoint is not None:
        state = read_checkpoint(located.checkpoint)
        return _split({clean_name(name): tensor for name, tensor in (state.model | state.average).items()})
    return _split(read_safetensors(located.path))


def _split(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if any(".lora_A." in name for name in tensors):
        raise UserError(
            f"{PATH}: these weights have LoRA adapters beside them. Merge them with `prx export RUN --output DIR`, and name "
            "that folder."
        )
    if not any(name.startswith(BACKBONE) for name in tensors):  # a file of the backbone alone, such as diffusers writes
        return tensors, {}
    parts = [
        {name.removeprefix(p): tensor for name, tensor in tensors.items() if name.startswith(p)} for p in (BACKBONE, ENCODER)
    ]
    return parts[0], parts[1]


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
        more = f"; and {len(said) - 5} more" if len(said) > 5 else ""
        raise UserError(
            f"{PATH}: {source} does not fit {what}: {'; '.join(said[:5])}{more}. "
            "`prx import` writes the sizes of a diffusers folder."
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
    """What `initialise` will find, from the headers of the files alone, in a few words.

    Args:
        backbone: of the recipe, maybe on the meta device; None if it could not be built.

    Raises:
        UserError: as `initialise`, as far as that is known without reading weights.
    """
    located = _located(source)
    if located.checkpoint is not None:
        return f"{located.path} is a checkpoint"
    path = located.path / "transformer" if located.kind == "diffusers" else located.path
    shapes, _ = _split(safetensors_shapes(path))
    if backbone is not None:
        _compare(shapes, _shapes(backbone.state_dict()), source, "model.backbone")
    return f"{source} has its {len(shapes)} tensors"


def write_fragment(folder: str, target: Path) -> None:
    """Writes the part of a recipe that a diffusers PRX folder decides: sizes, text encoder, flow, and `init_from`.

    Raises:
        UserError: the folder is no such, lacks a part, or its weights are not those of its configuration.
    """
    located = locate(folder)
    if located.kind != "diffusers":
        raise UserError(
            f"{folder} is not a folder that diffusers opens; a run or *.safetensors is named in model.init_from itself."
        )
    path = located.path.resolve()
    backbone = pipeline_folder.backbone_arguments(path)
    with torch.device("meta"):
        check_init_from(str(path), PRXBackbone(**backbone))
    nothing_else = {"config": None, "revision": None}  # what a recipe below may have said instead
    autoencoder: dict[str, Any] = {"name": "pixels"}
    if not pipeline_folder.is_pixel(path):
        autoencoder = {"name": "diffusers", **nothing_else, "pretrained": str(path), "subfolder": "vae"}
    model = {
        "backbone": {"name": "prx", **backbone},
        "text_encoder": {"name": "huggingface", **nothing_else, **pipeline_folder.text_encoder_arguments(path)},
        "flow": pipeline_folder.flow_arguments(path),
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
