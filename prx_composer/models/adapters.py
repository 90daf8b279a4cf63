"""Low-rank adapters on a frozen backbone (LoRA, Hu et al. 2021, arXiv:2106.09685), made and read by peft.

W·x becomes W·x + (α / r)·B·A·x with A (r, in) and B (out, r). B begins at zero: so does the difference.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prx_composer.common.errors import UserError

if TYPE_CHECKING:
    from prx_composer.models.backbone import PRXBackbone


BLOCK_LAYERS = (
    *("attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0"),
    *("gate_proj", "up_proj", "down_proj"),
)


def add_adapters(backbone: "PRXBackbone", rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freezes the backbone and gives its linear layers trained adapters; the outputs stay what they are.

    Args:
        rank: r.
        alpha: α; the adapters' part is scaled by α / r.
        targets: ends of the names of layers, such as "attention.img_qkv_proj".

    Raises:
        UserError: peft isn't installed; the backbone has adapters already.
        ValueError: a target that is the end of no linear layer's name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError('LoRA needs peft: pip install "prx-composer[lora]" (or: pip install peft).') from error
    if is_adapted(backbone):
        raise UserError("The backbone has adapters already.")
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(f"targets: {target!r} ends no linear layer's name; the blocks have {', '.join(BLOCK_LAYERS)}.")
    module: Any = backbone
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), module)  # pyright: ignore[reportArgumentType]


def is_adapted(backbone: nn.Module) -> bool:
    return hasattr(backbone, "peft_config")


def adapter_config(backbone: Any) -> Any:
    """peft's LoraConfig of an adapted backbone."""
    return backbone.peft_config["default"]


def adapter_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights by peft's names: `blocks.0.attention.img_qkv_proj.lora_A.weight` …"""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(backbone)


def merge_adapters(backbone: "PRXBackbone") -> None:
    """Adds the adapters' products to the weights that they adapt, and takes them away: a backbone as it was without them."""
    if not is_adapted(backbone):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, module.get_base_layer())
    del backbone.peft_config
