"""One analytic count of a backbone's matrix-product FLOPs, held against `torch.utils.flop_counter` in the tests."""

from typing import Any

__all__ = ["backbone_flops", "text_adapter_flops"]


def backbone_flops(
    config: dict[str, Any],
    image_tokens: int,
    text_tokens: int,
    *,
    training: bool,
    tokens_per_block: list[int] | None = None,
    predicted_tokens: int | None = None,
) -> int:
    """FLOPs of one image; a multiply and an add are two.

    Args:
        config: `PRXBackbone.config`.
        image_tokens, text_tokens: sequence lengths, padding included.
        training: forward and backward. Backward costs twice the forward, but only once for the first layer on each
            input (patches, text, sinusoids), whose input gradient nobody asks for.
        tokens_per_block: image tokens each block sees, if they are routed.
        predicted_tokens: image tokens that come to the final layer, if some were discarded.
    """
    d, depth = config["hidden_size"], config["depth"]
    mlp = int(d * config["mlp_ratio"])
    patch_dim = config["in_channels"] * config["patch_size"] ** 2
    n, s = image_tokens, text_tokens

    def block(kept: int) -> int:
        projections = kept * d * 3 * d + s * d * 2 * d + kept * d * d
        attention = 2 * kept * (kept + s) * d
        return 2 * (projections + attention + 3 * kept * d * mlp + d * 6 * d)

    inner = sum(block(kept) for kept in tokens_per_block or [n] * depth)
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
    return 3 * inner + 2 * first if training else inner + first


def text_adapter_flops(config: dict[str, Any], text_tokens: int) -> int:
    """Forward FLOPs of one text adapter block on one caption, padding included."""
    d, s = config["hidden_size"], text_tokens
    return 2 * (4 * s * d * d + 2 * s * s * d + 2 * s * d * int(d * config["mlp_ratio"]))
