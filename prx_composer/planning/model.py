"""A recipe's model without storage: what is trained, by its real name, and what the parts beside the denoiser cost.

Nothing is downloaded: encoders that are not on this machine are sized by the table in `models.encoder_sizes`.
"""

import dataclasses
import inspect
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.algorithms.alignment import AlignmentAlgorithm
from prx_composer.algorithms.contrastive_flow_matching import ContrastiveFlowMatching
from prx_composer.algorithms.ema import EMA
from prx_composer.algorithms.float8 import Float8
from prx_composer.algorithms.gradient_clipping import GradientClipping
from prx_composer.algorithms.lora import LoRA
from prx_composer.algorithms.low_precision_norm import LowPrecisionNorm
from prx_composer.algorithms.lpips import LPIPS
from prx_composer.algorithms.perceptual_dino import PerceptualDINO
from prx_composer.algorithms.progressive_resolution import ProgressiveResolution
from prx_composer.algorithms.resolution_aware import ResolutionAware, add_resolution_embedder
from prx_composer.algorithms.skip_nonfinite import SkipNonfinite
from prx_composer.algorithms.token_routing import TokenRoutingAlgorithm
from prx_composer.config import Recipe, build, entries, split
from prx_composer.errors import UserError
from prx_composer.models.activations import linear_activations
from prx_composer.models.adapters import add_adapters
from prx_composer.models.autoencoder import Pixels
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.encoder_sizes import known_config
from prx_composer.models.routing import RandomRouter
from prx_composer.models.text_encoder import HuggingFaceTextEncoder, load_tokenizer
from prx_composer.models.text_to_image import TextToImage
from prx_composer.planning.parts import BYTES, ImageShape, Part, loss_part
from prx_composer.run_folder import TOKENIZER

__all__ = ["PlannedModel", "plan_model"]

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


def plan_model(recipe: Recipe, stored_text: bool = False) -> PlannedModel:
    """Builds the recipe's model on the meta device and attaches what its algorithms would.

    Args:
        stored_text: text embeddings come with the data, so that no text encoder runs.

    Raises:
        UserError: parts that don't fit together, or a model that isn't `text_to_image`.
    """
    name, arguments = split(recipe.model, "model")
    if registry.models.get(name, "model") is not TextToImage or "backbone" not in arguments:
        raise UserError(f"model: prx plan counts text_to_image with a backbone, not {name!r}.")
    backbone_name, backbone_arguments = split(arguments["backbone"], "model.backbone")
    with torch.device("meta"):
        backbone = build(registry.backbones, backbone_name, backbone_arguments, "model.backbone")
    if not isinstance(backbone, PRXBackbone):
        raise UserError(f"model.backbone: prx plan counts PRX backbones, not {backbone_name!r}.")

    unknown: list[str] = []
    stored_latents = bool(recipe.train_loader.get("latent"))
    autoencoder = _autoencoder(arguments.get("autoencoder"), backbone, stored_latents, unknown)
    text_encoder, text, text_parts = _text_encoder(arguments.get("text_encoder"), backbone, recipe, stored_text, unknown)
    try:
        model = TextToImage(backbone, text_encoder, autoencoder=autoencoder, seed=recipe.seed)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    amp = recipe.precision.startswith("amp")
    planned = PlannedModel(model, autoencoder.downsampling, amp, text, text_parts, unknown=unknown)
    for name, arguments in entries(recipe.algorithms, "algorithms"):
        _attach(planned, name, arguments)
    return planned


# ----------------------------------------------------------------------------------------------------- encoders


def _autoencoder(spec: Any, backbone: PRXBackbone, stored: bool, unknown: list[str]) -> Any:
    name, arguments = ("pixels", {}) if spec is None else split(spec, "model.autoencoder")
    if name == "pixels":
        return Pixels()
    if not stored:
        unknown.append("model.autoencoder: FLOPs and memory of encoding images into latents are not counted")
    if "config" in arguments:
        with torch.device("meta"):
            return build(registry.autoencoders, name, arguments, "model.autoencoder")
    named = re.search(r"f(\d+)c\d+", str(arguments.get("pretrained")))  # as DC-AEs are called
    downsampling = int(named[1]) if named else 8
    unknown.append(f"model.autoencoder: taken to divide an image's sides by {downsampling}")
    return SimpleNamespace(channels=backbone.in_channels, downsampling=downsampling)


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
    spec: Any, backbone: PRXBackbone, recipe: Recipe, stored: bool, unknown: list[str]
) -> tuple[Any, str, list[Part]]:
    path = "model.text_encoder"
    name, arguments = split(spec, path)
    cls = registry.text_encoders.get(name, path)
    default = inspect.signature(cls).parameters.get("max_tokens")
    max_tokens = int(arguments.get("max_tokens", default.default if default else 256))
    title, config = arguments.get("pretrained") or name, arguments.get("config")
    if cls is HuggingFaceTextEncoder and arguments.get("pretrained"):
        config = known_config(arguments["pretrained"], arguments.get("revision"))
    if cls is not HuggingFaceTextEncoder or config is None:
        if not stored:
            unknown.append(f"{path}: {title} is not on this machine and not in the table of known encoders; it is not counted")
        return _UnknownTextEncoder(backbone.context_in_dim, max_tokens), f"{title}, not counted", []

    vocabulary = config.get("vocab_size") or _vocabulary_size(arguments.get("tokenizer"), recipe, unknown)
    # Built as if trained, which registers its parameters; frozen ones then don't require gradients.
    given = dict(config=config, max_tokens=max_tokens, trainable=True)
    with torch.device("meta"):
        encoder = build(registry.text_encoders, name, given, path, tokenizer=_Vocabulary(vocabulary))
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
    flops = encoder.flops(1, training=True)
    amp = recipe.precision.startswith("amp")
    kept = linear_activations(encoder, max_tokens, amp=amp) if encoder.trainable else 0
    part = Part("text encoder", lambda shape: flops, lambda shape: kept, frozen)
    return encoder, f"{title}, {'trained along' if encoder.trainable else 'run online'}", [part]


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


def _attach(planned: PlannedModel, name: str, arguments: dict[str, Any]) -> None:
    path = f"algorithms.{name}"
    cls = registry.algorithms.get(name, path)
    if not inspect.isclass(cls) or not issubclass(
        cls, (*_FREE, LoRA, ResolutionAware, TokenRoutingAlgorithm, AlignmentAlgorithm, LPIPS, PerceptualDINO)
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
    if isinstance(algorithm, ResolutionAware):
        if model.backbone.resolution_embedder is None:
            with torch.device("meta"):
                add_resolution_embedder(model.backbone)
    elif isinstance(algorithm, LoRA):
        with torch.device("meta"):
            add_adapters(model.backbone, algorithm.rank, algorithm.alpha, algorithm.targets)
    elif isinstance(algorithm, TokenRoutingAlgorithm):
        nothing = torch.optim.SGD([nn.Parameter(torch.empty(0, device="meta"))], lr=0.0)  # takes what SPRINT trains
        state: Any = SimpleNamespace(model=model, optimizers=[nothing])
        with torch.device("meta"):
            algorithm.attach(state)
        planned.routing = (path, start, end)
    else:
        part = loss_part(algorithm, path, model, planned.amp, planned.unknown)
        if part is not None:
            planned.parts.append(dataclasses.replace(part, path=path, start=start, end=end))
