"""U-ViT (arXiv:2209.12152), written anew after the paper: time, text and patches are tokens, and early blocks reach late ones.

Shape suffixes: B batch, S tokens: the time, the text, then the image; D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PatchEmbed, Timesteps
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.models.layers import unpatchify
from prx_composer.models.signatures import BlockList, Inputs, Signature


class Block(nn.Module):
    """A pre-norm transformer block; one of the second half joins what one of the first half gave, by a linear layer (table 1)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, joins: bool):
        super().__init__()
        self.heads = heads
        self.join = nn.Linear(2 * width, width) if joins else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, int(mlp_ratio * width)), nn.Linear(int(mlp_ratio * width), width)

    def forward(self, hidden_states: Tensor, mask: Tensor, early: Tensor | None = None) -> Tensor:
        x = hidden_states if self.join is None else self.join(torch.cat([hidden_states, early], dim=-1))  # pyright: ignore[reportArgumentType, reportCallIssue]
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class UViTTransformer2DModel(ModelMixin, ConfigMixin):
    """U-ViT.

    Positions of patches are sinusoids, as PixArt's, and not learnt as the paper's, so that images may have any size. The text's
    are its encoder's.

    Args:
        num_layers: half of them early, half late; of an odd number one stands between.
        sample_size: side of the image for which the sinusoids are made, in the pixels that the backbone sees.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        num_layers: int = 17,
        sample_size: int = 32,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        caption_channels: int = 768,
    ):
        super().__init__()
        width, half = num_attention_heads * attention_head_dim, num_layers // 2

        def blocks(count: int, joins: bool) -> nn.ModuleList:
            return nn.ModuleList(Block(width, num_attention_heads, mlp_ratio, joins) for _ in range(count))

        self.patches = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.frequencies, self.caption_in = Timesteps(width, True, 0), nn.Linear(caption_channels, width)
        self.early, self.middle, self.late = blocks(half, False), blocks(num_layers % 2, False), blocks(half, True)
        self.norm_out, self.proj_out = nn.LayerNorm(width), nn.Linear(width, out_channels * patch_size**2)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1)  # over the edges of patches

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, return_dict: bool = True) -> Any:
        """Predict: images (B, C, H, W), times (B,) in [0, 1000], texts (B, T, C), masks bool (B, T), True = a token."""
        patches, context = self.patches(hidden_states), self.caption_in(text)
        time = self.frequencies(timestep).to(context.dtype)[:, None]
        x_BSD, others = torch.cat([time, context, patches.to(context.dtype)], dim=1), 1 + text.shape[1]
        mask = F.pad(F.pad(mask, (1, 0), value=True), (0, patches.shape[1]), value=True)[:, None, None]
        early = []
        for block in self.early:
            early.append(x_BSD := block(x_BSD, mask))
        for block in self.middle:
            x_BSD = block(x_BSD, mask)
        for block in self.late:
            x_BSD = block(x_BSD, mask, early.pop())
        made = self.proj_out(self.norm_out(x_BSD[:, others:]))
        return (self.smooth(unpatchify(made, self.config["patch_size"], *hidden_states.shape[-2:])),)


@registry.signatures.register("UViTTransformer2DModel")
class UViT(Signature):
    model = UViTTransformer2DModel
    blocks = (BlockList("early", joint=True), BlockList("middle", joint=True), BlockList("late", joint=True))
    text_width = "caption_channels"
    time_vector = "its time is a token"
    unroutable = "its late blocks join the tokens of early ones, all of them"

    def inputs(self, x: Inputs) -> dict[str, Any]:
        return dict(hidden_states=x.image, timestep=1000 * x.t, text=x.text, mask=x.mask)
