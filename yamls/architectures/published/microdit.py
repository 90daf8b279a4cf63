"""MicroDiT's transformer (arXiv:2407.15811), written anew after the paper and models/dit.py of SonyResearch/micro_diffusion.

A narrow patch mixer sees every patch; the blocks behind it may see some. Both attend to the text, and every second block has
experts, which choose their tokens. `interpolation_scale` and `sample_size` are as of diffusers' PixArt.

Shape suffixes: B batch, N image tokens, T text tokens, D width, K tokens of an expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PatchEmbed, Timesteps
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.models.signatures import BlockList, Inputs, Signature

HEAD, MULTIPLE, FREQUENCIES = 64, 256, 512  # channels of a head; of which an MLP's width is a multiple; of time


def rounded(width: float, multiple: int) -> int:
    return -(-int(width) // multiple) * multiple


def norm(width: int, affine: bool = True) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine, bias=False)


def two_layers(inside: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, width), nn.GELU("tanh"), norm(width), nn.Linear(width, width))


class Attention(nn.Module):
    """Of image tokens to themselves or to the text; queries and keys are normed over all heads at once."""

    def __init__(self, width: int, inner: int, head: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width, bias=False)
        self.norm_q, self.norm_k, self.head = norm(inner, False), norm(inner, False), head

    def forward(self, x_BND: Tensor, context: Tensor) -> Tensor:
        made = self.norm_q(self.q(x_BND)), self.norm_k(self.k(context)), self.v(context)
        q, k, v = (part.unflatten(2, (-1, self.head)).transpose(1, 2).type_as(made[2]) for part in made)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU of two thirds of a width."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        hidden = rounded(int(2 * hidden / 3), MULTIPLE)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Every expert takes the capacity · N / experts of an image's tokens that want it most (arXiv:2202.09368)."""

    def __init__(self, width: int, hidden: int, experts: int, capacity: float):
        super().__init__()
        hidden, self.capacity = rounded(hidden, MULTIPLE), capacity
        self.choice = nn.Linear(width, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(experts))

    def forward(self, x_BND: Tensor) -> Tensor:
        kept = max(1, int(self.capacity * x_BND.shape[1] / len(self.up)))
        share_BKE, place_BKE = self.choice(x_BND).float().softmax(-1).topk(kept, dim=1)
        sums = torch.zeros_like(x_BND)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):  # one after another: sums to the bit
            place = place_BKE[..., expert, None].expand(-1, -1, x_BND.shape[2])
            made = down(F.gelu(up(x_BND.gather(1, place)))) * share_BKE[..., expert, None]
            sums = sums.scatter_add(1, place, made.type_as(sums))
        return sums


class Modulation(nn.Module):
    def __init__(self, vector: int, width: int):
        super().__init__()
        self.linear = nn.Linear(vector, width)

    def forward(self, vec_BD: Tensor, parts: int) -> Any:
        return self.linear(F.gelu(vec_BD, approximate="tanh"))[:, None].chunk(parts, dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, head: int, vector: int, ratio: float, inner: int, experts: int, capacity: float):
        super().__init__()
        self.norm = Modulation(vector, 6 * width)
        self.norm1, self.norm2, self.norm3 = norm(width), norm(width), norm(width)
        self.attention, self.text_attention = Attention(width, inner, head), Attention(width, width, head)
        hidden = int(width * ratio)
        self.mlp = Experts(width, hidden, experts, capacity) if experts else MLP(width, hidden)

    def forward(self, hidden_states: Tensor, text: Tensor, vec: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm(vec, 6)
        normed = torch.addcmul(shift, 1 + scale, self.norm1(hidden_states))
        x = hidden_states + gate * self.attention(normed, normed)
        x = x + self.text_attention(self.norm2(x), text)
        return x + mlp_gate * self.mlp(torch.addcmul(mlp_shift, 1 + mlp_scale, self.norm3(x)))


class Conditioning(nn.Module):
    """The vector of a time and of a text's mean."""

    def __init__(self, width: int):
        super().__init__()
        self.frequencies = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.text = two_layers(width, width)

    def forward(self, t: Tensor, text_BTD: Tensor) -> Tensor:
        return self.time(self.frequencies(t)) + self.text(text_BTD.mean(1))


class MicroDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """MicroDiT_XL_2 by its defaults.

    Args:
        mixer_layers, mixer_width: of the patch mixer.
        smallest_mlp, largest_mlp: MLP width / width of the first and the last block, even between; smallest_attention: of the
            inner width of attention, which ends at 1.
        num_experts, expert_capacity: of every second block but the last; 0 = no experts. A token meets `expert_capacity` of them
            on average.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = HEAD,
        in_channels: int = 4,
        out_channels: int = 4,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        interpolation_scale: float = 1.0,
        caption_channels: int = 1024,
        mixer_layers: int = 6,
        mixer_width: int = 768,
        smallest_attention: float = 0.5,
        smallest_mlp: float = 0.5,
        largest_mlp: float = 4.0,
        num_experts: int = 8,
        expert_capacity: float = 2.0,
    ):
        super().__init__()
        head, width = attention_head_dim, num_attention_heads * attention_head_dim
        self.patches = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, width, interpolation_scale=interpolation_scale
        )
        self.caption = two_layers(caption_channels, width)
        self.caption_norm1, self.caption_norm2 = norm(width), norm(width)
        self.caption_attention, self.caption_mlp = Attention(width, width, head), MLP(width, 4 * width)
        self.conditioning = Conditioning(width)
        self.mixer_in, self.mixer_text = (nn.Sequential(norm(width), nn.Linear(width, mixer_width, bias=False)) for _ in range(2))
        self.mixer = nn.ModuleList(
            Block(mixer_width, head, width, 4.0, mixer_width, num_experts * (index % 2), expert_capacity)
            for index in range(mixer_layers)
        )
        self.mixer_out = nn.Sequential(norm(mixer_width), nn.Linear(mixer_width, width, bias=False))
        self.blocks = nn.ModuleList()
        for index in range(num_layers):
            part = index / max(1, num_layers - 1)
            inner = rounded(width * (smallest_attention + part * (1 - smallest_attention)), 2 * head)
            ratio = smallest_mlp + part * (largest_mlp - smallest_mlp)
            experts = num_experts * (index % 2) if index < num_layers - 1 else 0
            self.blocks.append(Block(width, head, width, ratio, min(inner, width), experts, expert_capacity))
        self.final_norm, self.norm_out = norm(width), Modulation(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True) -> Any:
        """Predict: images (B, C, H, W), times (B,) as the process has them, texts (B, T, C), all of whose tokens are read."""
        patch, (height, width) = self.config["patch_size"], hidden_states.shape[-2:]
        text = self.caption(encoder_hidden_states)
        normed = self.caption_norm1(text)
        text = text + self.caption_attention(normed, normed)
        text = text + self.caption_mlp(self.caption_norm2(text))
        vec = self.conditioning(timestep, text)
        x_BND = self.mixer_in(self.patches(hidden_states))
        mixer_text = self.mixer_text(text)
        for block in self.mixer:
            x_BND = block(x_BND, mixer_text, vec)
        x_BND = self.mixer_out(x_BND)
        for block in self.blocks:
            x_BND = block(x_BND, text, vec)
        shift, scale = self.norm_out(vec, 2)
        made = self.proj_out(torch.addcmul(shift, 1 + scale, self.final_norm(x_BND)))
        grid = made.unflatten(1, (height // patch, width // patch)).unflatten(3, (patch, patch, -1))
        return (grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)


@registry.signatures.register("MicroDiTTransformer2DModel")
class MicroDiT(Signature):
    """Its text is not masked: padding is attended to, as zero unless it is read."""

    model = MicroDiTTransformer2DModel
    blocks = (BlockList("mixer"), BlockList("blocks"))
    text_width = "caption_channels"
    time_vector = "conditioning", None
    zeros = ("norm.linear", "norm_out.linear", "proj_out", "caption_attention.out", "caption_mlp.down")

    def inputs(self, x: Inputs) -> dict[str, Any]:
        return dict(hidden_states=x.image, timestep=x.t, encoder_hidden_states=x.text)
