"""Analytic counts of matrix-product FLOPs per image, held against `torch.utils.flop_counter` in the tests.

A multiply and an add are two.
"""

from typing import TYPE_CHECKING, Any

from prx_composer.models.perceptual_nets import feature_maps

if TYPE_CHECKING:
    from prx_composer.models.encoder_sizes import VisionSize  # it imports transformers, which a count doesn't need


def backbone_flops(
    config: dict[str, Any],
    image_tokens: int,
    text_tokens: int,
    *,
    training: bool,
    tokens_per_block: list[int] | None = None,
    predicted_tokens: int | None = None,
    frozen: bool = False,
) -> int:
    """Of one image.

    Args:
        config: `PRXBackbone.config`.
        image_tokens, text_tokens: sequence lengths, padding included.
        training: forward and backward. Backward costs twice the forward, but only once for the first layer on each
            input (patches, text, sinusoids), whose input gradient nobody asks for.
        tokens_per_block: image tokens each block sees, if they are routed.
        predicted_tokens: image tokens that come to the final layer, if some were discarded.
        frozen: of the weights none are trained, but gradients go through all blocks on their way to adapters, whose own FLOPs
            are not counted here.
    """
    d, depth = config["hidden_size"], config["depth"]
    mlp = int(d * config["mlp_ratio"])
    patch_dim = config["in_channels"] * config["patch_size"] ** 2
    n, s = image_tokens, text_tokens

    seen = tokens_per_block or [n] * depth

    inner = sum(_block_flops(d, mlp, kept, s) for kept in seen)
    inner += 2 * (
        d * d + (predicted_tokens or n) * d * patch_dim + 2 * d * d
    )  # time MLP's second layer, final layer and its modulation
    first = 2 * (s * config["context_in_dim"] * d + 256 * d)
    if bottleneck := config["bottleneck_size"]:
        first += 2 * n * patch_dim * bottleneck
        inner += 2 * n * bottleneck * d
    else:
        first += 2 * n * patch_dim * d
    if config["resolution_embeds"]:
        first += 2 * 256 * d
        inner += 2 * d * d
    if training and frozen:
        backward = 2 * (predicted_tokens or n) * d * patch_dim
        for kept in seen:  # the attention's products have two inputs with gradients, the layers of image tokens one
            backward += 2 * kept * (4 * d * d + 3 * d * mlp) + 8 * kept * (kept + s) * d
        return inner + first + backward
    return 3 * inner + 2 * first if training else inner + first


def _block_flops(d: int, mlp: int, kept: int, s: int) -> int:
    """Forward FLOPs of a PRX block of width d on `kept` image and s text tokens."""
    projections = kept * d * 3 * d + s * d * 2 * d + kept * d * d
    attention = 2 * kept * (kept + s) * d
    return 2 * (projections + attention + 3 * kept * d * mlp + d * 6 * d)


def text_adapter_flops(config: dict[str, Any], text_tokens: int) -> int:
    """Forward FLOPs of one text adapter block on one caption, padding included."""
    d, s = config["hidden_size"], text_tokens
    return 2 * (4 * s * d * d + 2 * s * s * d + 2 * s * d * int(d * config["mlp_ratio"]))


def adapter_head_flops(config: dict[str, Any], depth: int, kept_tokens: int, text_tokens: int, width: int) -> int:
    """Training FLOPs of PixelREPA's head, `depth` PRX blocks with time and text embeddings of their own, to `width` channels.

    Nobody asks for the gradients of its sinusoids and text embeddings.
    """
    d, s = config["hidden_size"], text_tokens
    blocks = depth * _block_flops(d, int(d * config["mlp_ratio"]), kept_tokens, s)
    first = 2 * (s * config["context_in_dim"] * d + 256 * d)
    return 3 * (blocks + 2 * (d * d + kept_tokens * d * width)) + 2 * first


def vision_flops(size: "VisionSize", patches: int) -> int:
    """Forward FLOPs of a vision transformer on an image of so many patches."""
    tokens = patches + size.prefix_tokens
    attention = 4 * size.layers * tokens**2 * size.hidden_size
    return 2 * tokens * size.token_matrices + attention + 2 * patches * size.patch_matrix


def lpips_flops(net: str, height: int, width: int) -> int:
    """Forward FLOPs of an LPIPS network on one image; its heads, one weight per channel, are left out."""
    return sum(layer.flops for layer in feature_maps(net, height, width))


def newton_schulz_flops(rows: int, columns: int, steps: int = 5) -> int:
    """Of orthogonalising one matrix, once per optimizer step; see `optim.muon.newton_schulz`."""
    short, long = sorted((rows, columns))
    return steps * (4 * short**2 * long + 2 * short**3)
