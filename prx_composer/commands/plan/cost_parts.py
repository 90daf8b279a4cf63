"""What an auxiliary loss costs: its teacher's FLOPs, its head's, and what it keeps in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prx_composer.algorithms.lpips import LPIPS
from prx_composer.algorithms.perceptual_dino import PerceptualDINO, fit_size
from prx_composer.algorithms.pixel_prediction import PixelLoss
from prx_composer.algorithms.repa import Alignment, MaskedTransformerAdapter
from prx_composer.commands.plan.uncounted import Uncounted, how_to_know
from prx_composer.common.errors import UserError
from prx_composer.models.activations import block_activations, linear_activations, lpips_activations, vision_activations
from prx_composer.models.encoder_sizes import VisionSize, known_config, vision_size
from prx_composer.models.flops import adapter_head_flops, lpips_flops, vision_flops
from prx_composer.models.perceptual_nets import feature_maps
from prx_composer.models.text_to_image import TextToImage
from prx_composer.models.vision_encoder import TeacherSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ImageShape:
    """What one image is to the model, at one time of the run.

    Args:
        image_size: side in pixels.
        image_tokens, text_tokens: sequence lengths, padding included.
        tokens_per_block: image tokens each block sees.
        routed: whether the router, if there is one, is at work.
    """

    image_size: int
    image_tokens: int
    text_tokens: int
    tokens_per_block: tuple[int, ...]
    routed: bool


@dataclass(frozen=True)
class Part:
    """Something beside the denoiser that costs FLOPs or memory, inside of its window.

    Args:
        name: for the table.
        flops: training FLOPs per image.
        activations: bytes per image that it keeps for the backward pass.
        frozen: bytes of frozen weights on every GPU.
        path: where in the recipe its window is.
        start, end: its window, as the recipe has it.
    """

    name: str
    flops: Callable[[ImageShape], int]
    activations: Callable[[ImageShape], int] = lambda shape: 0
    frozen: int = 0
    path: str = ""
    start: str = "0ba"
    end: str | None = None


def loss_part(algorithm: Any, path: str, model: TextToImage, amp: bool, uncounted: Uncounted) -> Part | None:
    """Of an alignment (whose head joins the model), LPIPS or perceptual DINO; None if its teacher's size cannot be known.

    Args:
        algorithm: as the recipe builds it.
        path: of it in the recipe.
        model: on the meta device.
        amp: autocast to 16 bits.
        uncounted: told what cannot be counted.

    Raises:
        UserError: an algorithm that doesn't fit the model.
    """
    if isinstance(algorithm, Alignment):
        return _alignment(algorithm, path, model, amp, uncounted)
    PixelLoss.build(algorithm, model)  # raises for a model of latents
    if isinstance(algorithm, LPIPS):
        return _lpips(algorithm, amp)
    return _perceptual_dino(algorithm, path, uncounted)


def _lpips(algorithm: LPIPS, amp: bool) -> Part:
    net, scale = algorithm.net, algorithm.scale

    def sides(shape: ImageShape) -> tuple[int, int]:
        return round(scale * shape.image_size), round(scale * shape.image_size)

    return Part(
        algorithm.name,
        lambda shape: 3 * lpips_flops(net, *sides(shape)),  # the prediction forwards and backwards, the target forwards
        lambda shape: lpips_activations(net, *sides(shape), amp=amp),
        4 * sum(layer.parameters for layer in feature_maps(net, 64, 64)),
    )


def _perceptual_dino(algorithm: PerceptualDINO, path: str, uncounted: Uncounted) -> Part | None:
    known = _teacher(algorithm.teacher, f"{path}.teacher", uncounted)
    if known is None:
        return None
    size, bytes_per_value = known

    def patches(shape: ImageShape) -> int:
        height, width = fit_size(shape.image_size, shape.image_size, algorithm.image_size, size.patch_size)
        return (height // size.patch_size) * (width // size.patch_size)

    return Part(
        algorithm.name,
        lambda shape: 3 * vision_flops(size, patches(shape)),
        lambda shape: vision_activations(size, patches(shape), bytes_per_value),
        size.parameters * bytes_per_value,
    )


def _alignment(algorithm: Alignment, path: str, model: TextToImage, amp: bool, uncounted: Uncounted) -> Part | None:
    config, block = model.backbone.config, algorithm.block
    size, frozen = None, 0
    if algorithm.features is not None:
        width = algorithm.features.width
    else:
        assert algorithm.teacher is not None
        known = _teacher(algorithm.teacher, f"{path}.teacher", uncounted)
        if known is None:
            return None
        size, bytes_per_value = known
        frozen, width = size.parameters * bytes_per_value, size.hidden_size
    with torch.device("meta"):
        algorithm.attach(model, None)
    head: Any = algorithm.head
    blocks = len(head.blocks) if isinstance(head, MaskedTransformerAdapter) else 0
    matrices = sum(m.weight.numel() for m in head.modules() if isinstance(m, nn.Linear))
    kernels = sum(m.weight.numel() for m in head.modules() if isinstance(m, nn.Conv2d))

    def flops(shape: ImageShape) -> int:
        kept = shape.tokens_per_block[block]
        teacher = vision_flops(size, shape.image_tokens) if size is not None else 0  # its patches are the backbone's tokens
        if blocks:
            return teacher + adapter_head_flops(config, blocks, kept, shape.text_tokens, width)
        return teacher + 3 * 2 * (kept * matrices + shape.image_tokens * kernels)

    def activations(shape: ImageShape) -> int:
        kept = shape.tokens_per_block[block]
        cosine = 3 * 4 * kept * width
        if blocks:
            return cosine + blocks * block_activations(config, kept, shape.text_tokens, amp=amp)
        return cosine + linear_activations(head, kept, amp=amp)

    return Part(algorithm.name, flops, activations, frozen)


def _teacher(teacher: str | TeacherSpec, path: str, uncounted: Uncounted) -> tuple[VisionSize, int] | None:
    """Its numbers and the bytes of one of its weights, or None if they cannot be known."""
    spec = TeacherSpec(pretrained=teacher) if isinstance(teacher, str) else teacher
    config = spec.config if spec.pretrained is None else known_config(spec.pretrained, spec.revision)
    if config is None:
        name = path.removeprefix("algorithms.").removesuffix(".teacher")
        uncounted.refuse(name, path, *how_to_know(str(spec.pretrained), " and not in the table of known encoders"))
        return None
    try:
        return vision_size(config), BYTES[spec.dtype]
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
