"""The files of an export: a folder that diffusers' pipelines open and that draws what this package draws, or weights alone."""

import copy
import inspect
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
import yaml
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from safetensors.torch import save_file

from prx_composer.commands.export.card import ADAPTERS, public_name, without_places, write_adapter_card
from prx_composer.common.errors import UserError, raise_all, redacted
from prx_composer.common.files import sync
from prx_composer.models.autoencoder import DiffusersAutoencoder, Pixels
from prx_composer.models.diffusion import DDPM
from prx_composer.models.encoders import HuggingFaceTextEncoder
from prx_composer.models.layers import is_adapted
from prx_composer.models.processes import FlowMatching
from prx_composer.models.several_encoders import parts_of
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.consistency import stages_of
from prx_composer.runs.diffusers_folder import RECIPE, REFERENCE
from prx_composer.runs.opening import Trained

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"  # of a model that diffusers has no class for
_EXPORTS = ("model_index.json", "adapter_config.json", "transformer", "prior", WEIGHTS)  # of which each has one


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError for a place where no export can be written."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; give a folder.")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(f"--output: {output} is not empty; give another folder, or --overwrite to replace an export.")
        if not any((output / name).exists() for name in _EXPORTS):
            raise UserError(f"--output: {output} holds something else than an export (no model_index.json); give another folder.")


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """Give a folder to write in, which gets its name `output` when all that is done inside of this context has succeeded.

    What was there goes only then.
    """
    partial = output.with_name(f".{output.name}.partial.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        old = output.with_name(f".{output.name}.old.{os.getpid()}")
        if output.exists():
            output.rename(old)
        partial.rename(output)
        sync(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_pipeline(trained: Trained, folder: Path, reference: bool = False) -> None:
    """Write a pipeline that diffusers opens.

    Args:
        folder: empty, such as `written_aside` gives.
        reference: name the text encoder instead of copying it.

    Raises:
        UserError: diffusers has no place for a part of the model, or the encoder cannot be referred to.
    """
    model = trained.model
    check_exportable(model)
    pixels = isinstance(model.autoencoder, Pixels)
    noise_scale = getattr(model.flow, "noise_scale", 1.0)
    scale = 1.0 if pixels else noise_scale  # PRXPipeline begins with unit noise: the scale goes into the weights
    index: dict[str, Any] = {
        "_class_name": "PRXPixelPipeline" if pixels else "PRXPipeline",
        "_diffusers_version": diffusers.__version__,
        "default_sample_size": trained.image_size,
        "transformer": ["diffusers", "PRXTransformer2DModel"],
    }
    if pixels:
        index |= {"prompt_max_tokens": model.text_encoder.max_tokens, "noise_scale": noise_scale}
    _write_transformer(model, folder / "transformer", scale)
    index |= _write_parts(trained, folder, scale, reference)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    _write_recipe(trained, folder)


def _write_parts(trained: Trained, folder: Path, scale: float, reference: bool) -> dict[str, list[str]]:
    """Write what is beside the transformer; return how an index names it."""
    model, scheduler = cast("Any", trained.model), trained.model.flow.scheduler()
    index = {"scheduler": ["diffusers", type(scheduler).__name__]}
    if reference:
        (folder / REFERENCE).write_text(json.dumps(_reference(trained), indent=2) + "\n")
    for number, encoder in enumerate(parts_of(model.text_encoder)[0], start=1):
        ending = f"_{number}" if number > 1 else ""
        index[f"tokenizer{ending}"] = ["transformers", type(encoder.tokenizer).__name__]
        index[f"text_encoder{ending}"] = ["transformers", type(encoder.network).__name__]
        if not reference:
            encoder.network.save_pretrained(str(folder / f"text_encoder{ending}"))
        tokenizer = copy.copy(encoder.tokenizer)
        tokenizer.model_max_length = encoder.max_tokens  # to which pipelines pad
        tokenizer.save_pretrained(str(folder / f"tokenizer{ending}"))
    scheduler.save_pretrained(folder / "scheduler")
    if isinstance(model.autoencoder, DiffusersAutoencoder):
        _write_autoencoder(model.autoencoder, folder / "vae", scale)
        index["vae"] = ["diffusers", type(model.autoencoder.module).__name__]
    return index


def write_own_class(trained: Trained, folder: Path, reference: bool = False) -> str:
    """Write a model whose backbone is a class of diffusers, with a pipeline of diffusers around it where one draws the same.

    Args:
        folder: empty, such as `written_aside` gives.
        reference: name the text encoder instead of copying it.

    Returns:
        How diffusers opens it, for the user.

    Raises:
        UserError: an algorithm has changed what the class computes, or the text encoder cannot be referred to.
    """
    model, backbone = trained.model, cast("Any", trained.model.backbone)
    if backbone.fusion is not None:
        raise UserError(f"algorithms.{backbone.router.name}: diffusers' {backbone.class_name} has no place for its fusion.")
    signature, flow = backbone.signature, model.flow
    backbone.model.save_pretrained(str(folder / signature.part))
    package = "diffusers." if signature.model is None else ""  # else the class is in the run's own code
    opened = f"{package}{backbone.class_name}.from_pretrained(DIR, subfolder='{signature.part}') opens the {signature.part}"
    _write_recipe(trained, folder)
    encoders, places = parts_of(model.text_encoder)
    if not all(isinstance(one, HuggingFaceTextEncoder) for one in encoders):
        cast("Any", model.text_encoder).tokenizer.save_pretrained(str(folder / "tokenizer"))
        return f"{opened}. Its labels are the tokens of tokenizer/."
    index = _write_parts(trained, folder, 1.0, reference)
    if not (signature.pipeline and signature.pipeline_draws(flow, isinstance(model.autoencoder, DiffusersAutoencoder))):
        return f"{opened}. A pipeline is written for {signature.drawn}, if a class has one."
    taken = {*inspect.signature(getattr(diffusers, signature.pipeline).__init__).parameters}  # of Stable Cascade's, no vae
    index = {name: part for name, part in index.items() if name in taken} | {signature.part: ["diffusers", backbone.class_name]}
    reads = signature.pipeline_reads([one.how for one in encoders], places)
    if not reads and not signature.asks_encoder:
        index = {name: part for name, part in index.items() if not name.startswith(("tokenizer", "text_encoder"))}
    index |= {"_class_name": signature.pipeline, "_diffusers_version": diffusers.__version__}  # pyright: ignore[reportArgumentType]
    index |= signature.pipeline_settings(model.autoencoder.downsampling)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if not reads and signature.asks_encoder:
        return f"diffusers.{signature.pipeline}.from_pretrained(DIR) draws the same of embeddings, and reads prompts otherwise."
    none = "" if reads else ", with None for its text parts: it takes embeddings"
    return f"diffusers.{signature.pipeline}.from_pretrained(DIR{none}) draws the same."


def check_exportable(model: TextToImage) -> None:
    """Check that diffusers' pipelines can draw what the model draws.

    Raises:
        UserError: naming everything that they have no place for.
    """
    backbone, flow, problems = model.backbone, model.flow, []
    if len(backbone.text_adapter):
        problems.append("model.backbone.text_adapter_depth: diffusers' PRX has no text adapter.")
    if backbone.fusion is not None:
        owner = getattr(backbone.router, "name", type(backbone.fusion).__name__)
        problems.append(f"algorithms.{owner}: diffusers' PRX has no place for its fusion.")
    if len(backbone.conditioners):
        problems.append(f"backbone.conditioners: diffusers' PRX has no place for {', '.join(backbone.conditioners)}.")
    pixels = isinstance(model.autoencoder, Pixels)
    if not isinstance(flow, FlowMatching) and (pixels or not isinstance(flow, DDPM)):
        why = "PRXPixelPipeline takes flow matching's steps" if pixels else "PRXPipeline has no place for c_in and c_noise"
        problems.append(f"model.flow is {type(flow).__name__}: diffusers' {why}.")
    elif pixels and flow.prediction != "x":
        problems.append("model.flow.prediction: v on pixels: diffusers' PRXPixelPipeline takes predictions for x.")
    elif isinstance(flow, FlowMatching) and not pixels and flow.prediction != "v":
        problems.append("model.flow.prediction: x on latents: diffusers' PRXPipeline takes predictions for v.")
    if not pixels and not isinstance(model.autoencoder, DiffusersAutoencoder):
        problems.append("model.autoencoder: only pixels and diffusers autoencoders are known to diffusers.")
    how: dict[str, Any] = getattr(model.text_encoder, "how", {})
    if own := sorted(key for key, value in how.items() if value not in ("prx", "basic")):
        problems.append(f"model.text_encoder: diffusers' PRX has no place for {', '.join(own)}.")
    network = type(model.text_encoder.network).__name__
    if not own and getattr(transformers, network, None) is not type(model.text_encoder.network):
        problems.append(f"model.text_encoder: transformers has no class {network} by that name, by which diffusers loads it.")
    raise_all(problems)


def _write_transformer(model: TextToImage, folder: Path, scale: float) -> None:
    """Write the backbone in units of the noise: x = s·x′ enters, and v′ = v / s comes out of the same velocity field."""
    config = dict(model.backbone.config)
    weights = {name: tensor.detach().cpu() for name, tensor in model.backbone.state_dict().items()}
    embedder = model.backbone.resolution_embedder
    if embedder is not None and not embedder.active:
        config["resolution_embeds"] = False
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("resolution_embedder.")}
    if scale != 1.0:
        first = "img_in.weight" if config["bottleneck_size"] is None else "img_in.0.weight"
        factors = {first: scale, "final_layer.linear.weight": 1 / scale, "final_layer.linear.bias": 1 / scale}
        weights |= {name: weights[name] * factor for name, factor in factors.items() if name in weights}
    with torch.device("meta"):
        transformer = PRXTransformer2DModel(**config)
    transformer.load_state_dict(weights, assign=True)
    transformer.save_pretrained(folder)


def _write_autoencoder(autoencoder: DiffusersAutoencoder, folder: Path, scale: float) -> None:
    """Write the autoencoder, with numbers where its configuration has none: PRXPipeline computes with them."""
    network: Any = autoencoder.module
    network.save_pretrained(str(folder))
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["scaling_factor"] = autoencoder.scaling / scale
    if "shift_factor" in settings or autoencoder.shift:
        settings["shift_factor"] = autoencoder.shift
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _reference(trained: Trained) -> dict[str, Any]:
    encoder = (trained.recipe or {}).get("model", {}).get("text_encoder", {})
    pretrained = encoder.get("pretrained")
    if trained.model.text_encoder.trainable:
        raise UserError(
            "--text-encoder reference: the text encoder was trained with the model; there is nothing else to refer to."
        )
    if not pretrained:
        raise UserError("--text-encoder reference: the recipe's text encoder is none from the hub; leave the option out.")
    if Path(pretrained).expanduser().exists():
        log.warning("The text encoder is the folder %s, which only this machine has.", pretrained)
    return {"pretrained": pretrained, "revision": encoder.get("revision")}


def _write_recipe(trained: Trained, folder: Path) -> None:
    if trained.recipe is not None:
        recipe = without_places(redacted(trained.recipe))
        head = "# Paths of the machine that trained it are cut to their last names.\n"
        if stages := _stages_so_far(recipe, trained.image_size):
            recipe["algorithms"]["progressive_resolution"]["stages"] = stages
            head += "# Of a checkpoint before the last stage of progressive_resolution: the stages behind it are left out.\n"
        (folder / RECIPE).write_text(head + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _stages_so_far(recipe: Mapping[str, Any], image_size: int) -> list[Any] | None:
    """Return the stages of a recipe up to the last of an image size; None if that is the last of all, or none is of it."""
    stages = [stage for path, stage in stages_of(recipe) if path]
    until = [index for index, stage in enumerate(stages) if stage.get("image_size") == image_size]
    return stages[: until[-1] + 1] if until and until[-1] + 1 < len(stages) else None


def write_weights(trained: Trained, folder: Path) -> None:
    """Write the weights of a model that diffusers has no class for, under its own names, with tokenizer and recipe."""
    weights = {name: tensor.detach().cpu().clone() for name, tensor in trained.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    trained.model.text_encoder.tokenizer.save_pretrained(str(folder / "tokenizer"))
    _write_recipe(trained, folder)


def write_adapters(trained: Trained, folder: Path, title: str, licence: str | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors (peft), pytorch_lora_weights.safetensors (diffusers), README.md.

    Args:
        folder: empty.
        title, licence: of the card; a licence of None is left open.

    Raises:
        UserError: the model has no adapters, or was trained in more than them.
    """
    backbone: Any = trained.model.backbone
    if not is_adapted(backbone):
        raise UserError(f"--format lora: {trained.source} is not of a run with algorithms.lora; leave the option out.")
    trained_too = (name for name, weight in backbone.named_parameters() if weight.requires_grad and ".lora_" not in name)
    if beside := dict.fromkeys(name.partition(".")[0] for name in trained_too):
        raise UserError(
            f"--format lora: {trained.source} trained {', '.join(beside)} of the backbone beside its adapters, whose files have "
            "no place for that. Leave the option out, or train without the algorithm that adds it."
        )
    from peft import get_peft_model_state_dict

    base, of_hub = public_name(str(((trained.recipe or {}).get("model") or {}).get("init_from") or "its base"))
    inside = "model." if hasattr(backbone, "signature") else ""  # diffusers' class is a part of ours
    config = copy.copy(backbone.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = {name.removeprefix(inside) for name in config.target_modules}
    config.save_pretrained(str(folder))
    facts = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    adapters = get_peft_model_state_dict(backbone).items()
    state = {name.removeprefix(inside): tensor.detach().cpu().contiguous() for name, tensor in adapters}
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    prefix = backbone.signature.part if inside else "transformer"  # of a pipeline's part, as diffusers names it in its files
    settings = json.dumps({f"{prefix}.{key}": value for key, value in facts.items()}, indent=2, sort_keys=True, default=str)
    save_file(
        {f"{prefix}.{name}": tensor for name, tensor in state.items()},
        folder / ADAPTERS,
        {"format": "pt", "lora_adapter_metadata": settings},
    )
    write_adapter_card(trained, folder, title, licence, base, of_hub)


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder to the hub; return its address.

    Raises:
        UserError: no permission, no network, or no such namespace.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Exported from prx-composer")
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--push {repository}: {reason} The export itself is in {folder}. Log in with `hf auth login`, and push again with "
            f"`hf upload {repository} {folder}`."
        ) from error
    return f"{api.endpoint}/{repository}"


# ------------------------------------------- text that leaves this machine: nobody's markup, and none of its paths
