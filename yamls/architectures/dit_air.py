"""DiT-Air (arXiv:2503.10618), written anew after the paper: text and image are one sequence for one stream of weights.

One modulation serves all blocks. DiT-Air/Lite, in which one attention does too, isn't here.

Shape suffixes: B batch, S tokens of text, then of the image, D width, C channels of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.models.layers import MLPEmbedder, RMSNorm, apply_rope, cached_rotation, patchify, sinusoid, unpatchify
from prx_composer.models.signatures import BlockList, Inputs, Signature

FREQUENCIES, PERIOD = 256, 10000.0  # of the time, and of positions


class Attention(nn.Module):
    """Of all tokens to all that are no padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = (RMSNorm(width // heads, eps=1e-6) for _ in range(2))

    def forward(self, x_BSD: Tensor, rotation: Tensor, mask_BS: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BSD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (apply_rope(part, rotation[:, None]).type_as(v) for part in (self.norm_q(q), self.norm_k(k)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BS[:, None, None])
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, int(mlp_ratio * width)), nn.Linear(int(mlp_ratio * width), width)

    def forward(self, hidden_states: Tensor, modulation: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)
        normed = torch.addcmul(shift, 1 + scale, self.norm1(hidden_states))
        x = torch.addcmul(hidden_states, gate, self.attention(normed, rotation, mask))
        normed = torch.addcmul(mlp_shift, 1 + mlp_scale, self.norm2(x))
        return torch.addcmul(x, mlp_gate, self.down(F.gelu(self.up(normed), approximate="tanh")))


class DiTAirTransformer2DModel(ModelMixin, ConfigMixin):
    """DiT-Air.

    The paper's vector also has a pooled caption; here it is the time's alone. Positions are rotary; those of the text are its
    encoder's.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 18,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int = 16,
        num_layers: int = 18,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        caption_channels: int = 2048,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.patch_in, self.caption_in = nn.Linear(in_channels * patch_size**2, width), nn.Linear(caption_channels, width)
        self.time_in = MLPEmbedder(FREQUENCIES, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm_out_modulation = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, out_channels * patch_size**2)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, return_dict: bool = True) -> Any:
        """Predict: images (B, C, H, W), times (B,) in [0, 1000], texts (B, T, C), masks bool (B, T), True = a token."""
        patch, (height, width), head = self.config["patch_size"], hidden_states.shape[-2:], self.config["attention_head_dim"]
        tokens, batch = text.shape[1], text.shape[0]
        grid = height // patch, width // patch
        of_image = cached_rotation(*grid, (head // 2, head // 2), PERIOD, text.device)
        rotation = F.pad(of_image, (0, 0, 0, 0, tokens, 0))  # as sines, 0 …
        rotation[:tokens, :, 0] = 1.0  # … and as cosines 1 leave the text where it is
        rotation = rotation.expand(batch, -1, -1, -1)
        mask = F.pad(mask, (0, grid[0] * grid[1]), value=True)
        vec = F.silu(self.time_in(sinusoid(timestep, FREQUENCIES, PERIOD).to(text.dtype)))[:, None]
        x_BSD = torch.cat([self.caption_in(text), self.patch_in(patchify(hidden_states, patch))], dim=1)
        modulation = self.modulation(vec)
        for block in self.blocks:
            x_BSD = block(x_BSD, modulation, rotation, mask)
        shift, scale = self.norm_out_modulation(vec).chunk(2, dim=-1)
        made = self.proj_out(torch.addcmul(shift, 1 + scale, self.norm_out(x_BSD[:, tokens:])))
        return (unpatchify(made, patch, height, width),)


@registry.signatures.register("DiTAirTransformer2DModel")
class DiTAir(Signature):
    model = DiTAirTransformer2DModel
    blocks = (BlockList("blocks", joint=True, positions=("rotation", "mask")),)
    text_width = "caption_channels"
    time_vector = "time_in", None
    zeros = ("modulation", "norm_out_modulation", "proj_out")

    def inputs(self, x: Inputs) -> dict[str, Any]:
        return dict(hidden_states=x.image, timestep=1000 * x.t, text=x.text, mask=x.mask)
