"""`model.init_from`: training begins with the weights of a folder of diffusers, of safetensors, of a run or of a checkpoint."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from prx_composer.common.errors import UserError, listed
from prx_composer.common.files import write_whole
from prx_composer.data.stored import text_fingerprint
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.processes import Process
from prx_composer.models.several_encoders import parts_of
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.arguments import text_encoders
from prx_composer.recipe.consistency import strings
from prx_composer.runs import diffusers_folder
from prx_composer.runs.model_parts import ModelParts, tokenizer_folder
from prx_composer.runs.weights import Located, backbone_folder, locate, read_json, read_parts, safetensors_shapes, split_parts

log = logging.getLogger(__name__)

PATH = "model.init_from"
_OF_IMAGE_SIZE = ("sample_size", "interpolation_scale")  # of a class's arguments: what another image size may change


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
        located = locate(source)
        _check_class(source, located, model.backbone)
        found = read_parts(located, model.text_encoder.trainable)
    own: Mapping[str, Tensor] = model.backbone.state_dict()
    weights = diffusers_folder.of_backbone(model.backbone, found.backbone)
    _compare(_shapes(weights), _shapes(own), source, "model.backbone", _remedy(located))
    if found.wrong is not None:
        raise UserError(
            f"{PATH}: {source} is no beginning: {found.wrong}. Name an older checkpoint of that run, or another model."
        )
    model.backbone.load_state_dict(weights)
    model.knows_empty_caption = True  # what it was trained with is not known here
    begun = f"the backbone ({len(found.backbone)} tensors)"
    if model.text_encoder.trainable:
        if found.encoder:
            _load_encoder(model.text_encoder.network, found.encoder, source, _remedy(located))
            begun += f" and the text encoder ({len(found.encoder)})"
        else:
            log.warning("%s: %s has no text encoder; the one that is trained begins as model.text_encoder says.", PATH, source)
    log.info("%s: %s gives %s its first weights.", PATH, source, begun)
    for said in _learned_otherwise(model, located):
        log.warning("%s: %s %s", PATH, source, said)


def _learned_otherwise(model: TextToImage, located: Located) -> Iterator[str]:
    """Yield what weights of a run, or of its export, mean that they don't mean in this model.

    That is what its layers compute of them, its target, and its words unless they are a hub's.
    """
    recipe = _recipe_of(located)
    if recipe is None:
        return
    folder = located.path if located.checkpoint is None else located.run_folder
    parts = ModelParts(recipe["model"], recipe.get("seed", 0), folder)
    try:
        own, theirs = (json.loads(json.dumps(config)) for config in (_config(model.backbone), _config(_on_meta(recipe).backbone)))
        if changed := [key for key in own if key in theirs and key not in _OF_IMAGE_SIZE and theirs[key] != own[key]]:
            said = listed([f"{key} was {theirs[key]} and is {own[key]}" for key in changed])
            yield f"computes otherwise in this model.backbone, with weights of the same sizes: {said}."
        if _task(parts.flow) != _task(model.flow):
            given = recipe["model"].get("flow") or "as it is by default"
            yield f"was trained with model.flow {given}, and not this one: it has to learn anew what it predicts."
        if any(spec.get("pretrained") for spec in text_encoders(recipe["model"]).values()):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.get("seed", 0))  # of which random words are
            theirs, ours = parts.text_encoder, model.text_encoder
    except (UserError, OSError, ValueError, TypeError) as error:  # a part of theirs that isn't here, or was renamed
        log.debug("%s: %s is not compared: %s", PATH, located.path, error)
        return
    same_words = text_fingerprint(theirs) == text_fingerprint(ours) and not theirs.trainable
    if ours.trainable:  # whose weights are theirs
        same_words = _vocabularies(theirs) == _vocabularies(ours)
    if not same_words:
        kept = _words_of(located, recipe["model"])
        kept += ["model.text_encoder.trainable=true"] if theirs.trainable else [f"seed={recipe.get('seed', 0)}"]
        yield (
            "was trained with other words than model.text_encoder makes of captions: it has to learn anew what they mean. To "
            f"keep its own, add  {shlex.join(kept)}"
        )


def _recipe_of(located: Located) -> dict[str, Any] | None:
    """Return the recipe that weights were trained by; None of another's pipeline, and of a file of weights."""
    if located.checkpoint is not None:
        return located.checkpoint.index()["recipe"]
    return diffusers_folder.recipe_beside(located.path) if located.kind == "diffusers" else None


def _on_meta(recipe: Mapping[str, Any]) -> ModelParts:
    return ModelParts(recipe["model"], recipe.get("seed", 0), meta=True)


def _config(backbone: Any) -> dict[str, Any]:
    """Return a backbone's arguments, if it says them."""
    config = getattr(backbone, "config", {})
    return config if isinstance(config, dict) else {}


def _task(flow: Process) -> list[float]:
    """Return what a network of a process is told and should predict of some number, in some noise."""
    t, clean, noise = flow.time_at(torch.tensor([0.3])), torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -0.7)
    return [value.item() for value in (t, flow.interpolate(clean, noise, t), flow.target(clean, noise, t))]


def _vocabularies(encoder: Any) -> list[dict[str, int]]:
    return [one.tokenizer.get_vocab() for one in parts_of(encoder)[0]]


def _check_class(source: str, located: Located, backbone: nn.Module) -> None:
    """Raise UserError if a folder's transformer is of another class, or computes otherwise than its weights' shapes tell."""
    if located.kind != "diffusers" or not isinstance(backbone, DiffusersBackbone):
        return
    theirs = read_json(backbone_folder(located.path) / "config.json")
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


def _remedy(located: Located) -> str:
    """Return what has the sizes of a source, in a sentence."""
    if located.checkpoint is None:
        return "`prx import` writes the sizes of a diffusers folder."
    words = shlex.join(_words_of(located, located.checkpoint.index()["recipe"]["model"]))
    return f"{located.run_folder}/config.yaml has its sizes, and  {words}  its words."


def _words_of(located: Located, spec: Mapping[str, Any]) -> list[str]:
    """Return what gives another run the words of a run of this `model`, or of its export."""
    if located.checkpoint is None:
        folders = (f"tokenizer_{number}" if number > 1 else "tokenizer" for number in count(1))  # as `prx export` numbers them
        return [f"{path}.tokenizer={located.path / folder}" for path, folder in zip(text_encoders(spec), folders, strict=False)]
    return [f"{path}.tokenizer={tokenizer_folder(located.run_folder, path)}" for path in text_encoders(spec)]


def _compare(theirs: Shapes, ours: Shapes, source: str, what: str, remedy: str) -> None:
    said = [
        f"{name} is {theirs[name]} there and {ours[name]} here" for name in ours if name in theirs and theirs[name] != ours[name]
    ]
    said += [f"{name} is only there" for name in theirs if name not in ours]
    said += [f"{name} is only here" for name in ours if name not in theirs]
    if any(name.startswith("resolution_embedder.") for name in theirs.keys() - ours.keys()):
        remedy = "It was trained with resolution_aware: set model.backbone.resolution_embeds=true, and leave the algorithm out."
    elif any(name.startswith("fusion.") for name in theirs.keys() - ours.keys()):
        remedy = "It was trained with sprint, and its fusion is of that run alone: no other can begin with these weights."
    if said:
        raise UserError(f"{PATH}: {source} does not fit {what}: {listed(said)}. {remedy}")


def _load_encoder(network: nn.Module, weights: dict[str, Tensor], source: str, remedy: str) -> None:
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
    _compare(_shapes(given | strange), _shapes(own), source, "model.text_encoder", remedy)
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
        path = backbone_folder(located.path) if located.kind == "diffusers" else located.path
        shapes, _ = split_parts(safetensors_shapes(path))
        if backbone is not None:
            _check_class(source, located, backbone)
    if backbone is not None:
        theirs, ours = diffusers_folder.of_backbone(backbone, shapes), _shapes(backbone.state_dict())
        _compare(theirs, ours, source, "model.backbone", _remedy(located))
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
        check_init_from(str(path), diffusers_folder.built(path))
    nothing_else = {"config": None, "revision": None}  # what a recipe below may have said instead
    autoencoder: dict[str, Any] = {"name": "pixels"}
    if not diffusers_folder.is_pixel(path):
        autoencoder = {"name": "diffusers", **nothing_else, "pretrained": str(path), "subfolder": "vae"}
    encoder = diffusers_folder.text_encoder_arguments(path)
    for one in text_encoders({"text_encoder": encoder}).values():
        if one["name"] == "huggingface":
            one |= {key: one.get(key) for key in nothing_else}
    model = {
        "backbone": diffusers_folder.backbone_arguments(path),
        "text_encoder": encoder,
        "flow": diffusers_folder.flow_arguments(path),
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
