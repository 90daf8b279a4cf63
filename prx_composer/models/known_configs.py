"""Configurations of frozen networks by hub id, where neither a folder nor the hub's cache has them."""

from typing import Any

from prx_composer.models.huggingface import load_config


class UnknownConfiguration(OSError):
    """Nothing is known here of a network but its name.

    Args:
        name: its hub id.
    """

    def __init__(self, name: str):
        super().__init__(f"the sizes of {name} are not known here; give a folder with its config.json.")
        self.name = name


def _vit(
    model_type: str, hidden_size: int, layers: int, heads: int, patch_size: int, image_size: int, **more: Any
) -> dict[str, Any]:
    sizes = dict(hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads)
    return dict(model_type=model_type, **sizes, patch_size=patch_size, image_size=image_size, **more)


def _t5gemma(hidden_size: int, mlp_size: int, layers: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    module = dict(
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=256,
        vocab_size=256_000,
    )
    return dict(model_type="t5gemma", encoder=module, decoder=module, vocab_size=256_000)


def _t5(d_model: int, d_ff: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = dict(d_model=d_model, d_kv=64, d_ff=d_ff, num_layers=layers, num_heads=heads, vocab_size=32_128)
    return dict(model_type="t5", feed_forward_proj="gated-gelu", **sizes)


def _qwen3_vl_text(hidden_size: int, mlp_size: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = dict(hidden_size=hidden_size, intermediate_size=mlp_size, num_hidden_layers=layers, num_attention_heads=heads)
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20]}
    return dict(model_type="qwen3_vl_text", **sizes, num_key_value_heads=8, head_dim=128, vocab_size=151_936, rope_scaling=rope)


_SMALL, _BASE, _LARGE = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
_MLP = {384: 1536, 768: 3072, 1024: 4096}
# Architecture numbers from the encoders' config.json on the Hugging Face hub; those that only matter to weights are left out.
_ENCODERS: dict[str, dict[str, Any]] = {
    "google/t5gemma-2b-2b-ul2": _t5gemma(2304, 9216, 26, 8, 4),
    "google/t5gemma-2b-2b-prefixlm": _t5gemma(2304, 9216, 26, 8, 4),
    "google/t5gemma-9b-9b-ul2": _t5gemma(3584, 14_336, 42, 16, 8),
    "google/t5gemma-9b-2b-ul2": _t5gemma(3584, 14_336, 42, 16, 8),
    **{
        f"google/{family}-{name}": _t5(*sizes)
        for family in ("flan-t5", "t5-v1_1")
        for name, sizes in (
            ("small", (512, 1024, 8, 6)),
            ("base", (768, 2048, 12, 12)),
            ("large", (1024, 2816, 24, 16)),
            ("xl", (2048, 5120, 24, 32)),
            ("xxl", (4096, 10_240, 24, 64)),
        )
    },
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl_text(2048, 6144, 28, 16),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl_text(2560, 9728, 36, 32),
    **{
        f"facebook/dinov2-{infix}{name}": _vit(model_type, *sizes, 14, 518)
        for infix, model_type in (("", "dinov2"), ("with-registers-", "dinov2_with_registers"))
        for name, sizes in (("small", _SMALL), ("base", _BASE), ("large", _LARGE))
    },
    **{
        f"facebook/dinov3-{name}-pretrain-lvd1689m": _vit(
            "dinov3_vit", *sizes, 16, 224, intermediate_size=_MLP[sizes[0]], num_register_tokens=4
        )
        for name, sizes in (("vits16", _SMALL), ("vitb16", _BASE), ("vitl16", _LARGE))
    },
    **{
        f"google/siglip-{name}-patch16-{image_size}": _vit(
            "siglip_vision_model", *sizes, 16, image_size, intermediate_size=_MLP[sizes[0]]
        )
        for name, sizes, image_sizes in (("base", _BASE, (224, 256, 384, 512)), ("large", _LARGE, (256, 384)))
        for image_size in image_sizes
    },
    "google/siglip-so400m-patch14-384": _vit("siglip_vision_model", 1152, 27, 16, 14, 384, intermediate_size=4304),
    "openai/clip-vit-base-patch16": _vit("clip_vision_model", *_BASE, 16, 224, intermediate_size=3072),
    "openai/clip-vit-large-patch14": _vit("clip_vision_model", *_LARGE, 14, 224, intermediate_size=4096),
}


def known_config(name: str, revision: str | None = None, reads_text: bool = False) -> dict[str, Any] | None:
    """The configuration of an encoder by folder or hub id, if it is here: on disk, in the cache, or in the table above.

    Args:
        reads_text: what reads text is wanted, where the table knows the images' side of a network only.

    Returns:
        `model_type` and settings, as `random_config` takes them; None if nothing is known without asking the network.
    """
    try:
        config = load_config(name, revision, local_files_only=True)
    except (OSError, ValueError):
        known = _ENCODERS.get(name)
        return None if reads_text and known is not None and "patch_size" in known else known
    defaults = type(config)().to_dict()
    return {"model_type": config.model_type} | {k: v for k, v in config.to_diff_dict().items() if k in defaults}
