"""The adapters of a LoRA run, alone: a folder that peft opens, with the file that diffusers reads adapters from."""

import json
from pathlib import Path

from safetensors.torch import save_file

from prx_composer.errors import UserError
from prx_composer.models.adapters import adapter_config, adapter_state, is_adapted
from prx_composer.models.autoencoder import Pixels
from prx_composer.trained.loading import Trained

__all__ = ["write_adapters"]

PEFT, DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PREFIX = "transformer"  # of a pipeline's part, as diffusers names it in its own files


def write_adapters(trained: Trained, folder: Path, title: str, licence: str | None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (peft), pytorch_lora_weights.safetensors (diffusers), README.md.

    Args:
        folder: empty.
        title, licence: of the card; a licence of None is left open.

    Raises:
        UserError: the model has no adapters.
    """
    if not is_adapted(trained.model.backbone):
        raise UserError(f"--format lora: {trained.source} is not of a run with algorithms.lora; leave the option out.")
    base = str(((trained.recipe or {}).get("model") or {}).get("init_from") or "the model that this run began with")
    backbone = trained.model.backbone
    config = adapter_config(backbone)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(backbone).items()}
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
    (folder / "README.md").write_text(_card(trained, title, licence, base), encoding="utf-8")


def _card(trained: Trained, title: str, licence: str | None, base: str) -> str:
    pipeline = "PRXPixelPipeline" if isinstance(trained.model.autoencoder, Pixels) else "PRXPipeline"
    rank = adapter_config(trained.model.backbone).r
    head = (
        f"---\nlibrary_name: peft\npipeline_tag: text-to-image\ntags: [prx, prx-composer, lora]\nbase_model: {json.dumps(base)}\n"
    )
    return f"""{head}{"" if licence is None else f"license: {licence}" + chr(10)}---

# {title}

LoRA adapters of rank {rank} ({trained.weights} weights, batch {trained.batch}) for the PRX backbone of `{base}`.

```python
from diffusers import {pipeline}
from peft import PeftModel

pipe = {pipeline}.from_pretrained({base!r})
pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "THIS_FOLDER").merge_and_unload()
```

`{DIFFUSERS}` holds the same weights as diffusers names them, for what reads such files (`load_lora_adapter`).
"""
