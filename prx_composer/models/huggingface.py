"""Pretrained networks: configurations and weights from transformers and diffusers, with errors that say what to do.

Folders and repositories are others' data: none of them makes anything run that is not in transformers itself. A network that is
used but not trained is held by `Frozen`, which keeps it out of the state dict, the optimizer, DDP and FSDP. The sizes of
well-known encoders are at the end, for plans on machines that have neither their folder nor the hub's cache.
"""

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from prx_composer.common.files import inside

_ATTENTION = "sdpa_with_every_mask"  # a name in transformers' registries
_ATTENTIONS = (None, "eager", "sdpa", "flex_attention", _ATTENTION)  # others may be kernels, which are downloaded and run


@contextmanager
def says_how_to_get(name: str) -> Iterator[None]:
    """Give the hub's many errors one form: which weights, why not, and what to do."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} is defined by Python code of its own (auto_map in its configuration), which is not executed. Only "
            "architectures and tokenizers that transformers has itself are opened."
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{name} cannot be loaded: {reason} If it is gated, accept its licence and run `hf auth login`; without a network, "
            "download it elsewhere and give its folder instead of the hub id."
        ) from error


def makes_no_storage() -> bool:
    """Return whether tensors are made on the meta device here: then networks are made from their configuration alone."""
    return torch.empty(0).is_meta


def load_config(name: str, revision: str | None = None, **options: Any) -> Any:
    """Return a transformers configuration by hub id or folder.

    Raises:
        OSError: it cannot be had.
        ValueError: it would have code executed that is not in transformers.
    """
    refuse_outside(name)
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **options)
    _check_attention(config, name)
    return config


def _check_attention(config: PretrainedConfig, name: str) -> None:
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))):
        if (attention := getattr(part, "_attn_implementation", None)) not in _ATTENTIONS:
            raise ValueError(
                f"{name}: its configuration asks for the attention {attention!r}, for which transformers may download code and "
                "run it. Delete _attn_implementation from its config.json."
            )


def refuse_outside(name: str, subfolder: str | None = None) -> None:
    """Raise ValueError if an index of weights in a local folder names a file outside of it."""
    folder = Path(name).expanduser() / (subfolder or "")
    for index in sorted(folder.glob("*.index.json")) if folder.is_dir() else []:
        for file in json.loads(index.read_text()).get("weight_map", {}).values():
            inside(folder, str(file))


def random_config(arguments: dict[str, Any], **defaults: Any) -> Any:
    """Return a transformers configuration of `model_type` and its settings, for a network with random weights.

    Args:
        arguments: `model_type` and any of its settings.
        defaults: settings used where `arguments` gives neither them nor a nested configuration.

    Raises:
        ValueError: no or an unknown `model_type`, or a setting that it doesn't have.
    """
    arguments = dict(arguments)
    if "model_type" not in arguments:
        raise ValueError("config needs `model_type`, a transformers model type such as t5, qwen3_vl_text or dinov2.")
    model_type = arguments.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"config.model_type: transformers has no model type {model_type!r}.")
    if not arguments.keys() & {"encoder", "text_config"}:
        arguments = defaults | arguments
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *CONFIG_MAPPING[model_type].attribute_map, "decoder", "encoder"}
    if "rope_parameters" in known:
        known.add("rope_scaling")  # its name before transformers 5, which takes it still
    if unknown := sorted(arguments.keys() - known):  # transformers would keep it and go on with its default
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"config.{unknown[0]}: {model_type} has no such setting." + (f" Did you mean {close[0]!r}?" if close else "")
        )
    config = AutoConfig.for_model(model_type, **arguments)
    _check_attention(config, "config")
    return config


def _every_mask(*arguments: Any, **options: Any) -> Any:
    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return AttentionMaskInterface()["sdpa"](*arguments, **options | always)


AttentionMaskInterface.register(_ATTENTION, _every_mask)
AttentionInterface.register(_ATTENTION, AttentionInterface()["sdpa"])


def attend_without_reading(network: nn.Module) -> None:
    """Let a network of transformers that attends by SDPA hand on every mask, for which it need not read it.

    By default it leaves out a mask without padding. It looks for padding on the host, which on a GPU waits in every microbatch
    until all that was asked of it is done.
    """
    for module in network.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(_ATTENTION)


# -------------------------------------------------------------------------------------------------------- text encoders


# Encoder-only classes, so that a decoder's weights are never loaded only to be thrown away.
_ENCODER_CLASSES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "t5gemma": "T5GemmaEncoderModel", "clip": "CLIPTextModel"}
Pooled = Literal["mean", "end", "projected"]


def _encoder_class(model_type: str, pooled: Pooled | None) -> Any:
    """Return the class of transformers that reads text, None for the one that `AutoModel` knows."""
    if pooled in ("end", "projected") and model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"pooled: {pooled} is of CLIP's text encoders, not of {model_type}; pooled: mean is of all.")
    if pooled == "projected":
        return transformers.CLIPTextModelWithProjection
    return getattr(transformers, _ENCODER_CLASSES.get(model_type, ""), None)


def _text_tower(model: nn.Module) -> nn.Module:
    """Return the part of a multimodal or encoder-decoder model that reads text."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    if hasattr(model, "vision_model") or hasattr(model, "visual"):
        return getattr(model, "language_model", None) or model.text_model  # pyright: ignore[reportReturnType]
    return model


def pretrained_encoder(name: str, revision: str | None, pooled: Pooled | None = None) -> nn.Module:
    """Return the part of a network that reads text, by hub id or folder, with what a pooled text of it needs."""
    with says_how_to_get(name):
        hf_config = load_config(name, revision)
        cls = _encoder_class(hf_config.model_type, pooled) or AutoModel
        extra: dict[str, Any] = {"trust_remote_code": False}
        if hf_config.model_type == "t5gemma":  # diffusers' own PRX folders have the inner encoder's names
            extra |= {"is_encoder_decoder": False, "key_mapping": {r"^(embed_tokens|layers|norm)\.": r"encoder.\1."}}
        return _text_tower(cls.from_pretrained(name, revision=revision, dtype=torch.float32, **extra))


def random_encoder(hf_config: Any, pooled: Pooled | None = None) -> nn.Module:
    """Return the part of a network that reads text, with random weights, by the configuration of the whole network."""
    cls = _encoder_class(hf_config.model_type, pooled)
    if hf_config.model_type == "t5gemma":
        hf_config.is_encoder_decoder = False
    if cls is None:
        return _text_tower(AutoModel.from_config(hf_config, trust_remote_code=False))
    if not isinstance(hf_config, cls.config_class):  # of a network that also sees
        hf_config = hf_config.get_text_config()
    return _text_tower(cls(hf_config))


def check_clip(config: Any, tokenizer: Any, tokens: int, pooled: Pooled | None) -> None:
    """Check that CLIP's text encoder can read so many tokens, and knows where a caption ends if it pools; others pass.

    Raises:
        ValueError: it has fewer positions, or looks for another end token than the tokenizer's.
    """
    if not config.model_type.startswith("clip"):
        return
    if tokens > config.max_position_embeddings:
        raise ValueError(f"max_tokens: {tokens} are more than the {config.max_position_embeddings} that CLIP has positions for.")
    known, end = config.eos_token_id, getattr(tokenizer, "eos_token_id", None)
    is_last = known == 2 and end == len(tokenizer) - 1  # CLIP's first configurations say 2, and transformers takes the last one
    if pooled in ("end", "projected") and end not in (None, known) and not is_last:
        raise ValueError(
            f"pooled: {pooled} is taken at token {known}, and the tokenizer's end is {end}: config.eos_token_id: {end}."
        )


# ------------------------------------------------------------------------------------------------------ frozen networks


_moves: "list[list[tuple[Frozen, torch.device | None]]]" = []  # one list per open `returned_afterwards`


@contextmanager
def returned_afterwards() -> Iterator[None]:
    """Move modules that first come to a device inside of this context back after it."""
    _moves.append([])
    try:
        yield
    finally:
        for frozen, device in reversed(_moves.pop()):
            frozen.move(device)


_made: "list[list[Frozen]]" = []  # one list per open `frozen_inside`


@contextmanager
def frozen_inside() -> Iterator["list[Frozen]"]:
    """List what is frozen inside of this context."""
    _made.append([])
    try:
        yield _made[-1]
    finally:
        _made.pop()


class Frozen:
    """Holds a module without registering it, so that no checkpoint carries a teacher's or an encoder's weights.

    Being invisible to `model.to(...)`, it moves itself to the device of its first call.

    Args:
        module: any module; put into eval mode, gradients off.
        dtype: storage dtype of its floating-point weights, or None to keep it.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None):
        self.module = module.requires_grad_(False).eval()
        if dtype is not None:
            self.module.to(dtype)
        self._device: torch.device | None = None
        for made in _made:
            made.append(self)

    def on(self, device: torch.device) -> Any:
        """Return the module, on `device`."""
        if self._device != device:
            for moves in _moves:
                moves.append((self, self._device))
            self.move(device)
        return self.module

    def move(self, device: torch.device | None) -> None:
        """Move to a device; None: to the CPU, as if it had never been used."""
        self.module.to(device or "cpu")
        self._device = device


# ------------------------------------------------------------------------------------------------- known configurations


class UnknownConfiguration(OSError):
    """Nothing is known here of a network but its name, a hub id."""

    def __init__(self, name: str):
        super().__init__(f"the sizes of {name} are not known here; give a folder with its config.json.")
        self.name = name


def _sizes(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, **more)


def _vit(model_type: str, width: int, layers: int, heads: int, patch_size: int, image_size: int, **more: Any) -> dict[str, Any]:
    return dict(model_type=model_type, patch_size=patch_size, image_size=image_size, **_sizes(width, layers, heads, **more))


def _t5gemma(width: int, mlp_width: int, layers: int, heads: int, key_value_heads: int) -> dict[str, Any]:
    of_heads = dict(num_key_value_heads=key_value_heads, head_dim=256)
    half = _sizes(width, layers, heads, intermediate_size=mlp_width, vocab_size=256_000, **of_heads)
    return dict(model_type="t5gemma", encoder=half, decoder=half, vocab_size=256_000)


def _t5(d_model: int, d_ff: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = dict(d_model=d_model, d_kv=64, d_ff=d_ff, num_layers=layers, num_heads=heads, vocab_size=32_128)
    return dict(model_type="t5", feed_forward_proj="gated-gelu", **sizes)


def _qwen3_vl_text(width: int, mlp_width: int, layers: int, heads: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20]}
    of_heads = dict(num_key_value_heads=8, head_dim=128, rope_scaling=rope)
    sizes = _sizes(width, layers, heads, intermediate_size=mlp_width, vocab_size=151_936, **of_heads)
    return dict(model_type="qwen3_vl_text", **sizes)


_SMALL, _BASE, _LARGE = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
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
            "dinov3_vit", *sizes, 16, 224, intermediate_size=4 * sizes[0], num_register_tokens=4
        )
        for name, sizes in (("vits16", _SMALL), ("vitb16", _BASE), ("vitl16", _LARGE))
    },
    **{
        f"google/siglip-{name}-patch16-{image_size}": _vit(
            "siglip_vision_model", *sizes, 16, image_size, intermediate_size=4 * sizes[0]
        )
        for name, sizes, image_sizes in (("base", _BASE, (224, 256, 384, 512)), ("large", _LARGE, (256, 384)))
        for image_size in image_sizes
    },
    "google/siglip-so400m-patch14-384": _vit("siglip_vision_model", 1152, 27, 16, 14, 384, intermediate_size=4304),
    "openai/clip-vit-base-patch16": _vit("clip_vision_model", *_BASE, 16, 224, intermediate_size=3072),
    "openai/clip-vit-large-patch14": _vit("clip_vision_model", *_LARGE, 14, 224, intermediate_size=4096),
}


_TEXT: dict[str, dict[str, Any]] = {  # the part that reads text, of networks that also see, and of language models
    "openai/clip-vit-large-patch14": dict(
        model_type="clip_text_model", projection_dim=768, vocab_size=49_408, **_sizes(768, 12, 12, intermediate_size=3072)
    ),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": dict(
        model_type="clip_text_model", projection_dim=1280, vocab_size=49_408, **_sizes(1280, 32, 20, intermediate_size=5120)
    ),
    "google/gemma-2-2b": dict(
        model_type="gemma2",
        vocab_size=256_000,
        num_key_value_heads=4,
        head_dim=256,
        **_sizes(2304, 26, 8, intermediate_size=9216),
    ),
}


def known_config(name: str, revision: str | None = None, reads_text: bool = False) -> dict[str, Any] | None:
    """Return the configuration of an encoder by folder or hub id, if it is here: on disk, in the cache, or in the table above.

    Args:
        reads_text: whether it is the part that reads text which is wanted: of some networks the table knows the other part alone.

    Returns:
        `model_type` and settings, as `random_config` takes them; None if nothing is known without asking the network.
    """
    try:
        config = load_config(name, revision, local_files_only=True)
    except (OSError, ValueError):
        known = _ENCODERS.get(name)
        return _TEXT.get(name) if reads_text and (known is None or "patch_size" in known) else known
    defaults = type(config)().to_dict()
    return {"model_type": config.model_type} | {k: v for k, v in config.to_diff_dict().items() if k in defaults}
