"""The adapters of a LoRA run, alone: a folder that peft opens, with the file that diffusers reads adapters from."""

import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from safetensors.torch import save_file

from prx_composer.commands.export.card import fenced, inline, public_name, write_readme
from prx_composer.common.errors import UserError
from prx_composer.models.autoencoder import Pixels
from prx_composer.models.layers import is_adapted
from prx_composer.runs.opening import Trained

PEFT, DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PREFIX = "transformer"  # of a pipeline's part, as diffusers names it in its own files


def write_adapters(trained: Trained, folder: Path, title: str, licence: str | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors (peft), pytorch_lora_weights.safetensors (diffusers), README.md.

    Args:
        folder: empty.
        title, licence: of the card; a licence of None is left open.

    Raises:
        UserError: the model has no adapters.
    """
    if not is_adapted(trained.model.backbone):
        raise UserError(f"--format lora: {trained.source} is not of a run with algorithms.lora; leave the option out.")
    from peft import get_peft_model_state_dict

    base, of_hub = public_name(str(((trained.recipe or {}).get("model") or {}).get("init_from") or "its base"))
    backbone: Any = trained.model.backbone
    config = backbone.peft_config["default"]
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(backbone).items()}
    kept = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base, True
    try:
        config.save_pretrained(str(folder))
        facts = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    finally:
        config.base_model_name_or_path, config.inference_mode = kept
    save_file({f"base_model.model.{name}": tensor for name, tensor in state.items()}, folder / PEFT, {"format": "pt"})
    settings = json.dumps({f"{_PREFIX}.{key}": value for key, value in facts.items()}, indent=2, sort_keys=True, default=str)
    save_file(
        {f"{_PREFIX}.{name}": tensor for name, tensor in state.items()},
        folder / DIFFUSERS,
        {"format": "pt", "lora_adapter_metadata": settings},
    )
    _write_card(trained, folder, title, licence, base, of_hub)


def _write_card(trained: Trained, folder: Path, title: str, licence: str | None, base: str, of_hub: bool) -> None:
    """Write README.md.

    Args:
        base: name of what the run began with.
        of_hub: whether that is an id of the hub.
    """
    pipeline = "PRXPixelPipeline" if isinstance(trained.model.autoencoder, Pixels) else "PRXPipeline"
    backbone: Any = trained.model.backbone
    rank = backbone.peft_config["default"].r
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-to-image", "tags": ["prx", "prx-composer", "lora"]}
    head |= ({"base_model": base} if of_hub else {}) | ({} if licence is None else {"license": licence})
    code = f"""from diffusers import {pipeline}
from peft import PeftModel

pipe = {pipeline}.from_pretrained({base if of_hub else f"PATH_OR_HUB_ID_OF_{base}"!r})
pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "THIS_FOLDER").merge_and_unload()
"""
    about = (
        f"LoRA adapters of rank {rank} ({trained.weights} weights, batch {trained.batch}) for the PRX backbone of "
        f"`{inline(base)}`, which training began with. diffusers opens it, or what `prx export` makes of it if it is a run."
    )
    reader = (
        f"`pipe.transformer.load_lora_adapter(THIS_FOLDER, weight_name={DIFFUSERS!r})` reads them."
        if hasattr(PRXTransformer2DModel, "load_lora_adapter")
        else f"diffusers {diffusers.__version__} reads no adapters of PRX itself."
    )
    names = f"`{DIFFUSERS}` holds the same weights by the names that diffusers gives adapters. {reader}"
    write_readme(folder, head, title, [about, fenced(code, "python"), names])
