"""What a forward pass keeps for the backward one, in bytes per image: eager PyTorch's count, an upper bound for compiled code.

The tests hold it against the tensors that autograd really saves. D hidden size, M MLP width, H heads, b bytes of a value:
4, or 2 under bf16 autocast, where a few intermediate results stay fp32.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from prx_composer.models.perceptual_nets import feature_maps

if TYPE_CHECKING:
    from prx_composer.models.encoder_sizes import VisionSize


FP32 = 4


def block_activations(config: dict[str, Any], kept_tokens: int, text_tokens: int, *, amp: bool) -> int:
    """Of one PRX block on `kept_tokens` image tokens, but for the text embeddings that all blocks share.

    Per image token: the residual stream, its norm and its modulation, twice (6 D); queries, keys and values as projected (3 D),
    normalised and rotated (4 D with the values joined to the text's); the outputs of attention, of its projection and of the
    MLP (3 D; the last norm's input is the next residual); four tensors of the MLP's width. RMSNorm works in fp32, so that
    under autocast 4 D of these stay fp32 and the projections, cast copies of which it keeps, don't count.
    Per text token: keys and values as projected (2 D), the keys' norm (D), both joined to the image's (2 D).
    """
    d, m, h = config["hidden_size"], int(config["hidden_size"] * config["mlp_ratio"]), config["num_heads"]
    if amp:
        image_token, text_token = 2 * (12 * d + 4 * m) + FP32 * 4 * d, 2 * 2 * d + FP32 * 2 * d
    else:
        image_token, text_token = FP32 * (17 * d + 4 * m), FP32 * 5 * d
    statistics = FP32 * ((4 + 3 * h) * kept_tokens + h * text_tokens)
    return kept_tokens * image_token + text_tokens * text_token + statistics + (2 if amp else FP32) * 6 * d


def backbone_activations(
    config: dict[str, Any],
    image_tokens: int,
    text_tokens: int,
    *,
    amp: bool,
    tokens_per_block: list[int] | None = None,
    checkpointing: bool = False,
) -> int:
    """Of the backbone and the flow-matching loss, with the images at their two ends.

    Args:
        config: `PRXBackbone.config`.
        image_tokens, text_tokens: sequence lengths, padding included.
        amp: bf16 autocast.
        tokens_per_block: image tokens each block sees, if they are routed.
        checkpointing: a block keeps its input alone and computes the rest again, one block at a time.
    """
    d, n, s, b = config["hidden_size"], image_tokens, text_tokens, 2 if amp else FP32
    patch_dim = config["in_channels"] * config["patch_size"] ** 2
    tokens = tokens_per_block or [n] * config["depth"]
    blocks = [block_activations(config, kept, s, amp=amp) for kept in tokens]
    kept_for_backward = sum(b * d * kept for kept in tokens) + max(blocks) if checkpointing else sum(blocks)
    text = s * (b * d + config["context_in_dim"] * (FP32 + b if amp else FP32))
    ends = n * b * (patch_dim + (config["bottleneck_size"] or 0) + 3 * d)
    images = 5 * FP32 * n * patch_dim  # clean, noise, noised, prediction, error
    return kept_for_backward + text + ends + images


def linear_activations(module: nn.Module, tokens: int, *, amp: bool) -> int:
    """Of the linear layers (1×1 ones of a convolution too) inside of a trained module that sees so many tokens: what goes in
    and what comes out of each."""
    widths = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            widths += layer.in_features + layer.out_features
        elif isinstance(layer, nn.Conv2d):
            widths += layer.in_channels + layer.out_channels
    return tokens * widths * (2 if amp else FP32)


def vision_activations(size: "VisionSize", patches: int, bytes_per_value: int) -> int:
    """Of a frozen vision transformer through which a gradient goes to the image.

    Since no weight asks for a gradient, a layer keeps the inputs of its two norms, queries, keys, values, attention's output
    and the MLP's middle, but not what it multiplies by weights. The patch features are compared in fp32.
    """
    tokens = patches + size.prefix_tokens
    layer = tokens * (6 * size.hidden_size + size.mlp_size) * bytes_per_value
    return size.layers * layer + tokens * size.hidden_size * bytes_per_value + 2 * patches * size.hidden_size * FP32


def lpips_activations(net: str, height: int, width: int, *, amp: bool) -> int:
    """Of an LPIPS network on the predicted image: every feature map, the indices (int64) of the pooled ones, and the
    differences, in fp32, of the compared ones."""
    total = 3 * height * width * (2 if amp else FP32)
    for layer in feature_maps(net, height, width):
        total += layer.elements * ((2 if amp else FP32) + 8 * layer.pooled + FP32 * layer.tapped)
    return total
