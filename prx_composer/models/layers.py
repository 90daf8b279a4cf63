"""The parts of a PRX block, named and shaped as in `diffusers.PRXTransformer2DModel`.

Shape suffixes: B batch, N image tokens, T text tokens, D hidden size, H heads, C head width (D / H), S = T + N keys.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from prx_composer.common.errors import UserError
from prx_composer.common.installation import adding

# ------------------------------------------------------------------------------------------------ patches and positions


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut an image into flattened patches: (B, C, H, W) → (B, H/p · W/p, C·p·p), row-major, channels outermost."""
    b, c, h, w = image.shape
    p = patch_size
    patches = image.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put patches together again, as the inverse of `patchify`: (B, N, C·p·p) → (B, C, height, width)."""
    b, _, width_of_patch = tokens.shape
    p = patch_size
    c = width_of_patch // (p * p)
    grid = tokens.reshape(b, height // p, width // p, c, p, p).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(b, c, height, width)


def sinusoid(position: Tensor, dim: int, max_period: float, scale: float = 1.0) -> Tensor:
    """Return sinusoidal features [cos, sin] of real positions (B,): fp32 (B, dim) (Vaswani et al. 2017, §3.5)."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=position.device) / half)
    angle = scale * (position.float()[:, None] * frequency[None, :])
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def cached_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function made for its last 256 arguments, but nothing that it makes while a step is counted.

    Then tensors have no content (see models/counting.py), and the next real step would be given them.
    """
    kept = functools.lru_cache(256)(make)

    @functools.wraps(make)
    def cached(*arguments: Any) -> Tensor:
        return (kept if active_fake_mode() is None else make)(*arguments)

    cached.cache_clear = kept.cache_clear  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    return cached


@torch.compiler.assume_constant_result
@cached_tensor
def cached_rotation(rows: int, columns: int, axes_dim: tuple[int, int], theta: float, device: torch.device) -> Tensor:
    """Return how every patch of a grid is rotated (RoFormer, arXiv:2104.09864, with one axis per part of the head).

    It is computed in fp64, once per grid and device, and is a constant to the compiler.

    Returns:
        fp32 (N, C/2, 2), cosine and sine; the first `axes_dim[0] / 2` pairs of channels turn with the row, the others with the
        column.
    """
    with torch.inference_mode(False):
        row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
        column = torch.arange(columns, dtype=torch.float64).repeat(rows)
        angles = []
        for position, dim in zip((row, column), axes_dim, strict=True):
            omega = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles.append(position[:, None] * omega[None, :])
        angle = torch.cat(angles, dim=-1)
        rotation = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        return torch.view_as_real(rotation).to(device)


def apply_rope(x_BHNC: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels by a `cached_rotation` (..., N, C/2, 2)."""
    pairs = x_BHNC.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses real arithmetic but has no complex kernels
        cos, sin = rotation.unbind(-1)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one kernel instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).type_as(x_BHNC)


# ------------------------------------------------------------------------------------------------------------ attention


KeyMask = Tensor | BlockMask | None  # bool (B, 1, 1, S), or a `key_blocks`; None: every key is valid

_BLOCK = 128  # keys and queries, FlexAttention's default


def attend(q_BHNC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: KeyMask) -> Tensor:
    """Return softmax(q·kᵀ/√C)·v over the keys of `mask`: (B, H, N, C).

    A mask, even one broadcast over heads and queries, keeps PyTorch from its fastest kernels, and those it has compute padding
    besides. FlexAttention (Dong et al. 2024, arXiv:2412.05496) makes a kernel for the mask and skips blocks of keys that are
    padding alone.
    """
    if isinstance(mask, BlockMask):
        out = flex_attention(q_BHNC, k_BHSC, v_BHSC, block_mask=mask)
        assert isinstance(out, Tensor)  # and no logarithms of sums beside it
        return out
    return F.scaled_dot_product_attention(q_BHNC, k_BHSC, v_BHSC, attn_mask=mask)


def key_mask(text_mask_BT: Tensor, num_image_tokens: int) -> Tensor:
    """Return bool (B, 1, 1, S), which is broadcast over heads and queries: no (B, H, N, S) mask is ever made."""
    return F.pad(text_mask_BT.bool(), (0, num_image_tokens), value=True)[:, None, None, :]


def key_blocks(text_mask_BT: Tensor, num_image_tokens: int) -> BlockMask:
    """Return the same for FlexAttention, made without a (B, N, S) mask and without waiting for the device."""
    valid_BS = F.pad(text_mask_BT.bool(), (0, num_image_tokens), value=True)
    blocks = F.pad(valid_BS, (0, -valid_BS.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    some, every = (chosen[:, None, None, :] for chosen in (blocks.any(-1), blocks.all(-1)))
    rows = torch.arange(-(-num_image_tokens // _BLOCK), device=valid_BS.device)[:, None]
    full = every & (rows < num_image_tokens // _BLOCK)  # not in the last row of queries, if that is incomplete

    def is_valid(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return valid_BS[b, kv]

    return BlockMask.from_kv_blocks(
        *_listed(some & ~full),
        *_listed(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=is_valid,
        seq_lengths=(num_image_tokens, valid_BS.shape[1]),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of a row of bool (B, 1, rows, n) are chosen, int32 (B, 1, rows), and which, the chosen ones first."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), order


@contextmanager
def cudnn_first() -> Iterator[None]:
    """Have PyTorch take cuDNN's attention before others inside of this context, in the whole process; the others stay allowed.

    cuDNN takes a mask, flash doesn't, and PyTorch's own order ends at a memory-efficient kernel of older GPUs. It belongs around
    a whole run: torch 2.7 forgets a priority that is set inside of a compiled function.
    """
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def cudnn_problem(num_heads: int, head_dim: int, image_tokens: int, text_tokens: int, device: Any, dtype: Any) -> str | None:
    """Return why cuDNN doesn't attend with a mask of the text, forward and backward, in PyTorch's words; None if it does."""
    sizes = (1, num_heads, image_tokens, head_dim), (1, num_heads, text_tokens + image_tokens, head_dim)
    q, k = (torch.zeros(size, device=device, dtype=dtype, requires_grad=True) for size in sizes)
    mask = key_mask(torch.ones(1, text_tokens, device=device), image_tokens)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            attend(q, k, k, mask).sum().backward()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return None


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number per row for the backward pass; autograd keeps the normalised input too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        product = grad * normed
        grad_weight = product.sum_to_size(weight.shape)
        mean = (product @ weight).unsqueeze(-1).div_(x.shape[-1])  # of (grad · weight) · normed
        return (grad * weight).addcmul_(normed, mean, value=-1).mul_(inverse), grad_weight, None


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension (arXiv:1910.07467), with that backward pass in eager fp32."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class Attention(nn.Module):
    """Image tokens attend to text and image tokens; text tokens give keys and values only."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.img_qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.txt_kv_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.norm_q = RMSNorm(head_dim, eps=1e-6)
        self.norm_k = RMSNorm(head_dim, eps=1e-6)
        self.norm_added_k = RMSNorm(head_dim, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=False)])

    def forward(self, image_BND: Tensor, text_BTD: Tensor, rotation: Tensor, key_mask: KeyMask) -> Tensor:
        q, k, v = self.img_qkv_proj(image_BND).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        text_k, text_v = self.txt_kv_proj(text_BTD).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = apply_rope(self.norm_q(q), rotation)
        k = apply_rope(self.norm_k(k), rotation)
        k_BHSC = torch.cat((self.norm_added_k(text_k), k), dim=2)
        v_BHSC = torch.cat((text_v, v), dim=2)
        out_BHNC = attend(q, k_BHSC.type_as(q), v_BHSC.type_as(q), key_mask)
        return self.to_out[0](out_BHNC.transpose(1, 2).flatten(2))


# --------------------------------------------------------------------------------------------------------------- blocks


class MLPEmbedder(nn.Module):
    """Two-layer MLP over sinusoidal features: (B, in_dim) → (B, hidden_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(features)))


class Modulation(nn.Module):
    """AdaLN-zero (DiT, arXiv:2212.09748): activated time vector (B, D) → six (B, 1, D), shift, scale, gate, twice."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, activated_BD: Tensor) -> tuple[Tensor, ...]:
        return self.lin(activated_BD)[:, None, :].chunk(6, dim=-1)


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) · up, with the tanh approximation of gelu (GEGLU, arXiv:2002.05202)."""
    if torch.compiler.is_compiling():  # tanh(u) = 2 sigmoid(2u) − 1: one exponential instead of inductor's slow tanh
        inner = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        return gate * torch.sigmoid(inner) * up
    return F.gelu(gate, approximate="tanh") * up


class PRXBlock(nn.Module):
    """Modulated attention, then a modulated gated MLP, both on image tokens: (B, N, D) → (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        mlp_size = int(hidden_size * mlp_ratio)
        self.img_pre_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(hidden_size, num_heads)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)
        self.modulation = Modulation(hidden_size)

    def forward(self, x_BND: Tensor, text_BTD: Tensor, activated_BD: Tensor, rotation: Tensor, key_mask: KeyMask) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(activated_BD)
        modulated = torch.addcmul(shift1, 1 + scale1, self.img_pre_norm(x_BND))
        x_BND = torch.addcmul(x_BND, gate1, self.attention(modulated, text_BTD, rotation, key_mask))
        modulated = torch.addcmul(shift2, 1 + scale2, self.post_attention_layernorm(x_BND))
        mlp_out = self.down_proj(gated_gelu(self.gate_proj(modulated), self.up_proj(modulated)))
        return torch.addcmul(x_BND, gate2, mlp_out)


class TextAdapterBlock(nn.Module):
    """A pre-norm transformer block over text tokens, (B, T, D) → (B, T, D); it starts as the identity.

    It lets a trained network adapt a frozen language model's embeddings (i1, arXiv:2606.11289). Positions are the encoder's.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        mlp_size = int(hidden_size * mlp_ratio)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.to_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, text_BTD: Tensor, key_mask_B11T: Tensor | None) -> Tensor:
        qkv = self.qkv_proj(self.attention_norm(text_BTD)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended_BHTC = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask_B11T)
        text_BTD = text_BTD + self.to_out(attended_BHTC.transpose(1, 2).flatten(2))
        return text_BTD + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(text_BTD)), approximate="tanh"))


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches: (B, N, D) → (B, N, patch_dim)."""

    def __init__(self, hidden_size: int, patch_dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_dim)
        # A Sequential only so that the parameters are called adaLN_modulation.1.*, as in diffusers.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BND: Tensor, vec_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec_BD)[:, None, :].chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, 1 + scale, self.norm_final(x_BND)))


# --------------------------------------------------------------------------------------------- low-rank adapters (LoRA)


BLOCK_LAYERS = (
    *("attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0"),
    *("gate_proj", "up_proj", "down_proj"),
)


def add_adapters(backbone: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze a backbone and give its linear layers trained low-rank adapters (Hu et al. 2021, arXiv:2106.09685), made by peft.

    W·x becomes W·x + (α / r)·B·A·x with A (r, in) and B (out, r). B begins at zero: the outputs stay what they are.

    Args:
        rank, alpha: r and α.
        targets: ends of the names of layers, such as "attention.img_qkv_proj".

    Raises:
        UserError: peft isn't installed; the backbone has adapters already.
        ValueError: a target that is the end of no linear layer's name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"LoRA needs peft: {adding('lora')}") from error
    if is_adapted(backbone):
        raise UserError("The backbone has adapters already.")
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    known = getattr(backbone, "block_layers", BLOCK_LAYERS)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(f"targets: {target!r} ends no linear layer's name; the blocks have {', '.join(known)}.")
    if (inside := getattr(backbone, "is_block", None)) is not None and tuple(targets) == tuple(known):
        blocks = tuple(f"{name}." for name, module in backbone.named_modules() if inside(module))
        targets = _ends_of(targets, [name for name in linear if name.startswith(blocks)], linear)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(config, backbone)


def _ends_of(ends: Sequence[str], wanted: Sequence[str], of: Sequence[str]) -> list[str]:
    """Return ends of names that only those wanted have: such an end, or in its place the whole names of those that have it."""
    found = list[str]()
    for end in ends:
        having = [name for name in of if f".{name}".endswith(f".{end}")]
        found += [end] if set(having) <= set(wanted) else [name for name in having if name in wanted]
    return found


def is_adapted(backbone: nn.Module) -> bool:
    return hasattr(backbone, "peft_config")


def merge_adapters(backbone: nn.Module) -> None:
    """Add the adapters' products to the weights that they adapt, and take the adapters away."""
    if not is_adapted(backbone):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, module.get_base_layer())
    del backbone.peft_config
