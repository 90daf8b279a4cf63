"""A recipe's model without storage: what is trained, by its real name, and what the parts beside the denoiser cost.

Nothing is downloaded: networks are counted from their configuration, which is in the recipe, in a folder, in the hub's cache, or
in the table of `models.encoder_sizes`.
"""

import dataclasses
import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.algorithms.contrastive_flow_matching import ContrastiveFlowMatching
from prx_composer.algorithms.ema import EMA
from prx_composer.algorithms.float8 import Float8
from prx_composer.algorithms.gradient_clipping import GradientClipping
from prx_composer.algorithms.lora import LoRA
from prx_composer.algorithms.low_precision_norm import LowPrecisionNorm
from prx_composer.algorithms.lpips import LPIPS
from prx_composer.algorithms.perceptual_dino import PerceptualDINO
from prx_composer.algorithms.progressive_resolution import ProgressiveResolution
from prx_composer.algorithms.repa import Alignment
from prx_composer.algorithms.resolution_aware import ResolutionAware
from prx_composer.algorithms.skip_nonfinite import SkipNonfinite
from prx_composer.algorithms.token_routing import TokenRouting
from prx_composer.commands.plan.cost_parts import BYTES, ImageShape, Part, loss_part
from prx_composer.commands.plan.uncounted import Uncounted, how_to_know
from prx_composer.common.errors import UserError
from prx_composer.models.activations import linear_activations
from prx_composer.models.autoencoder import DiffusersAutoencoder, Pixels, stored_config
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.encoder_sizes import autoencoder_flops, known_config, text_flops
from prx_composer.models.routing import RandomRouter
from prx_composer.models.text_encoder import HuggingFaceTextEncoder, load_tokenizer
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.arguments import entries, split
from prx_composer.recipe.config import Recipe, build
from prx_composer.runs.folder import TOKENIZER

_FREE = (EMA, Float8, GradientClipping, LowPrecisionNorm, ProgressiveResolution, ContrastiveFlowMatching, SkipNonfinite)


@dataclass
class PlannedModel:
    """A model on the meta device, with what the recipe's algorithms attach to it.

    Args:
        model: its parameters that require gradients are those that will be trained.
        downsampling: image side / side of what the backbone sees.
        amp: bf16 or fp16 autocast.
        text: how the text embeddings come about, in words.
        parts: see `Part`.
        routing: the window of the backbone's router: path, start, end.
        unknown: what could not be counted, in words.
    """

    model: TextToImage
    downsampling: int
    amp: bool
    text: str = ""
    parts: list[Part] = field(default_factory=list)
    routing: tuple[str, str, str | None] = ("", "0ba", None)
    unknown: list[str] = field(default_factory=list)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def shape(self, image_size: int, routed: bool, path: str) -> ImageShape:
        """Of an image of that size, with the router on or off; raises UserError, at `path`, if it isn't cut into patches."""
        backbone, side = self.model.backbone, image_size // self.downsampling
        try:
            tokens = backbone.num_tokens(side, side)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        self._route(routed)
        router = backbone.router
        blocks = [tokens] * backbone.depth if router is None else router.tokens_per_block(tokens, backbone.depth)
        return ImageShape(image_size, tokens, self.model.text_encoder.max_tokens, tuple(blocks), routed)

    def _route(self, active: bool) -> None:
        if isinstance(self.model.backbone.router, RandomRouter):
            self.model.backbone.router.active = active

    def denoiser_flops(self, shape: ImageShape) -> int:
        """Training FLOPs per image of the backbone, with what the algorithms put into it."""
        self._route(shape.routed)
        flops = self.model.backbone.flops(shape.image_tokens, shape.text_tokens, training=True)
        if self.model.text_encoder.trainable:  # then the text projection needs its input's gradient too
            flops += 2 * shape.text_tokens * self.model.backbone.context_in_dim * self.model.backbone.hidden_size
        return flops


def plan_model(recipe: Recipe, stored_text: bool = False, leave_out: Collection[str] | None = None) -> PlannedModel:
    """Builds the recipe's model on the meta device and attaches what its algorithms would.

    Args:
        stored_text: text embeddings come with the data, so that no text encoder runs.
        leave_out: names of networks that are not to be counted; see `Uncounted`.

    Raises:
        UserError: parts that don't fit together, a model that isn't `text_to_image`, or a network that cannot be counted.
    """
    name, arguments = split(recipe.model, "model")
    if registry.models.get(name, "model") is not TextToImage or "backbone" not in arguments:
        raise UserError(f"model: prx plan counts text_to_image with a backbone, not {name!r}.")
    backbone_name, backbone_arguments = split(arguments["backbone"], "model.backbone")
    with torch.device("meta"):
        backbone = build(registry.backbones, backbone_name, backbone_arguments, "model.backbone")
    if not isinstance(backbone, PRXBackbone):
        raise UserError(f"model.backbone: prx plan counts PRX backbones, not {backbone_name!r}.")

    uncounted = Uncounted(leave_out)
    uncounted.check(["text_encoder", "autoencoder", *(name for name, _ in entries(recipe.algorithms, "algorithms"))])
    autoencoder, image_parts = _autoencoder(arguments.get("autoencoder"), backbone, recipe, uncounted)
    text_encoder, text, text_parts = _text_encoder(arguments.get("text_encoder"), backbone, recipe, stored_text, uncounted)
    try:
        model = TextToImage(backbone, text_encoder, autoencoder=autoencoder, seed=recipe.seed)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    amp = recipe.precision.startswith("amp")
    planned = PlannedModel(model, autoencoder.downsampling, amp, text, text_parts + image_parts, unknown=uncounted.told)
    for name, arguments in entries(recipe.algorithms, "algorithms"):
        if not uncounted.leaves(name, f"algorithms.{name}"):
            _attach(planned, name, arguments, uncounted)
    return planned


# ----------------------------------------------------------------------------------------------------- encoders


def _autoencoder(spec: Any, backbone: PRXBackbone, recipe: Recipe, uncounted: Uncounted) -> tuple[Any, list[Part]]:
    """It, and what encoding an image costs unless latents are stored."""
    path, stored = "model.autoencoder", bool(recipe.train_loader.get("latent"))
    name, arguments = ("pixels", {}) if spec is None else split(spec, path)
    if name == "pixels":
        return Pixels(), []
    config = arguments.get("config") or (stored_config(arguments) if name == "diffusers" else None)
    if config is None:
        named = re.search(r"f(\d+)c\d+", str(arguments.get("pretrained")))  # as DC-AEs are called
        downsampling = int(named[1]) if named else 8
        if not stored and not uncounted.leaves("autoencoder", path):
            uncounted.refuse("autoencoder", path, *how_to_know(str(arguments.get("pretrained") or name)))
        uncounted.told.append(f"{path}: taken to divide an image's sides by {downsampling}")
        return SimpleNamespace(channels=backbone.in_channels, downsampling=downsampling), []
    given = {key: value for key, value in arguments.items() if key not in ("pretrained", "subfolder", "revision")}
    with torch.device("meta"):
        autoencoder: Any = build(registry.autoencoders, name, given | {"config": config}, path)
    if stored or uncounted.leaves("autoencoder", path):
        return autoencoder, []
    if not isinstance(autoencoder, DiffusersAutoencoder):
        uncounted.refuse("autoencoder", path, f"{name} is an autoencoder of one's own")
        return autoencoder, []
    frozen = sum(p.numel() for p in autoencoder.module.parameters()) * BYTES[arguments.get("dtype", "float32")]
    try:
        if uncounted.leave_out is not None:
            autoencoder_flops(config, recipe.image_size)
    except ValueError as error:
        uncounted.refuse("autoencoder", path, str(error).removesuffix("."))
        return autoencoder, []
    return autoencoder, [Part("autoencoder", lambda shape: autoencoder_flops(config, shape.image_size), frozen=frozen)]


class _Vocabulary:
    """All that a text encoder without storage needs of a tokenizer."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, Tensor]:
        return dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(len(texts), max_length, dtype=torch.int64))


class _UnknownTextEncoder(nn.Module):
    """Stands for one that cannot be sized."""

    def __init__(self, hidden_size: int, max_tokens: int):
        super().__init__()
        self.hidden_size, self.max_tokens, self.trainable = hidden_size, max_tokens, False


def _text_encoder(
    spec: Any, backbone: PRXBackbone, recipe: Recipe, stored: bool, uncounted: Uncounted
) -> tuple[Any, str, list[Part]]:
    path = "model.text_encoder"
    name, arguments = split(spec, path)
    cls = registry.text_encoders.get(name, path)
    default = inspect.signature(cls).parameters.get("max_tokens")
    max_tokens = int(arguments.get("max_tokens", default.default if default else 256))
    title, config = arguments.get("pretrained") or name, arguments.get("config")
    if cls is HuggingFaceTextEncoder and arguments.get("pretrained"):
        config = known_config(arguments["pretrained"], arguments.get("revision"), reads_text=True)
    not_counted = _UnknownTextEncoder(backbone.context_in_dim, max_tokens), f"{title}, not counted", []
    if not stored and uncounted.leaves("text_encoder", path):
        return not_counted
    if cls is not HuggingFaceTextEncoder or config is None:
        if not stored and cls is HuggingFaceTextEncoder:
            uncounted.refuse("text_encoder", path, *how_to_know(title, " and not in the table of known encoders"))
        elif not stored:
            uncounted.refuse("text_encoder", path, f"{title} is a text encoder of one's own")
        return not_counted
    vocabulary = config.get("vocab_size") or _vocabulary_size(arguments.get("tokenizer"), recipe, uncounted.told)
    try:
        encoder = _stored_nowhere(config, max_tokens, vocabulary)
        if uncounted.leave_out is not None:
            text_flops(config, max_tokens)
    except ValueError as error:
        if not stored:
            uncounted.refuse("text_encoder", path, f"{title}: {str(error).removesuffix('.')}")
        return not_counted
    encoder.trainable = bool(arguments.get("trainable", False))
    encoder.requires_grad_(encoder.trainable)
    if stored and encoder.trainable:
        raise UserError(f"--stored-text: {path} is trained along, so that its embeddings cannot be stored.")
    title = arguments.get("pretrained") or f"random {config['model_type']}"
    if stored:
        return encoder, f"embeddings of {title} stored with the data", []
    frozen = 0
    if not encoder.trainable:
        frozen = sum(p.numel() for p in encoder.parameters()) * BYTES[arguments.get("dtype", "float32")]
    amp = recipe.precision.startswith("amp")
    kept = linear_activations(encoder, max_tokens, amp=amp) if encoder.trainable else 0
    times = 3 if encoder.trainable else 1
    part = Part("text encoder", lambda shape: times * text_flops(config, max_tokens), lambda shape: kept, frozen)
    return encoder, f"{title}, {'trained along' if encoder.trainable else 'run online'}", [part]


def _stored_nowhere(config: dict[str, Any], max_tokens: int, vocabulary: int) -> Any:
    """A text encoder without storage, built as if trained, which registers its parameters; raises ValueError if it can't be."""
    given = dict(config=config, max_tokens=max_tokens, trainable=True)
    try:
        with torch.device("meta"):
            return HuggingFaceTextEncoder(_Vocabulary(vocabulary), **given)  # pyright: ignore[reportArgumentType]
    except ValueError:
        raise
    except Exception as error:  # whatever that network's code raises, such as for a configuration of images
        raise ValueError(f"{config['model_type']} cannot be built as a text encoder ({type(error).__name__}: {error})") from error


def _vocabulary_size(spec: Any, recipe: Recipe, unknown: list[str]) -> int:
    """Of the tokenizer that the run has or will train."""
    folder = f"{recipe.run_folder}/{TOKENIZER}"
    try:
        return len(load_tokenizer(folder))
    except (OSError, ValueError):
        largest = int(spec.get("vocab_size", 4096)) if isinstance(spec, dict) else 4096
        unknown.append(f"model.text_encoder.tokenizer: not trained yet; taken to know {largest:,} words, which is the most")
        return largest


# --------------------------------------------------------------------------------------------------- algorithms


def _attach(planned: PlannedModel, name: str, arguments: dict[str, Any], uncounted: Uncounted) -> None:
    path = f"algorithms.{name}"
    cls = registry.algorithms.get(name, path)
    if not inspect.isclass(cls) or not issubclass(
        cls, (*_FREE, LoRA, ResolutionAware, TokenRouting, Alignment, LPIPS, PerceptualDINO)
    ):
        planned.unknown.append(f"{path}: what it costs is not known to the plan, and not counted")
        return
    if issubclass(cls, Float8):
        planned.unknown.append(f"{path}: what it saves is not known to the plan: time and memory are those of a run without it")
    if issubclass(cls, _FREE):
        return
    # Times are read from the recipe: the plan knows more ways to write them than it needs objects for.
    start, end = str(arguments.get("start", "0ba")), arguments.get("end")
    untimed = {key: value for key, value in arguments.items() if key not in ("start", "end")}
    algorithm: Any = build(registry.algorithms, name, untimed, path)
    model = planned.model
    if isinstance(algorithm, ResolutionAware | LoRA | TokenRouting):
        with torch.device("meta"):
            algorithm.attach(model, None)
        algorithm.set_active(model, True)
        if isinstance(algorithm, TokenRouting):
            planned.routing = (path, start, end)
    else:
        part = loss_part(algorithm, path, model, planned.amp, uncounted)
        if part is not None:
            planned.parts.append(dataclasses.replace(part, path=path, start=start, end=end))
