"""Image tokens attend to the valid text tokens and to each other, in PyTorch's own kernels or in FlexAttention's.

A mask, even one broadcast over heads and queries, keeps PyTorch from its fastest kernels, which compute padding besides.
FlexAttention (Dong et al. 2024, arXiv:2412.05496) makes a kernel for the mask and skips blocks of keys that are padding alone.

Shape suffixes: B batch, H heads, N queries (image tokens), T text tokens, S = T + N keys, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

KeyMask = Tensor | BlockMask | None  # bool (B, 1, 1, S), or a `key_blocks`; None: every key is valid

_BLOCK = 128  # keys and queries, FlexAttention's default


def attend(q_BHNC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: KeyMask) -> Tensor:
    """softmax(q·kᵀ/√C)·v over the keys of `mask`: (B, H, N, C)."""
    if isinstance(mask, BlockMask):
        out = flex_attention(q_BHNC, k_BHSC, v_BHSC, block_mask=mask)
        assert isinstance(out, Tensor)  # and no logarithms of sums beside it
        return out
    return F.scaled_dot_product_attention(q_BHNC, k_BHSC, v_BHSC, attn_mask=mask)


def key_mask(text_mask_BT: Tensor, num_image_tokens: int) -> Tensor:
    """bool (B, 1, 1, S), broadcast over heads and queries: no (B, H, N, S) mask is ever made."""
    return F.pad(text_mask_BT.bool(), (0, num_image_tokens), value=True)[:, None, None, :]


def key_blocks(text_mask_BT: Tensor, num_image_tokens: int) -> BlockMask:
    """The same for FlexAttention, made without a (B, N, S) mask and without waiting for the device."""
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
    """bool (B, 1, rows, n) → how many of a row are chosen, int32 (B, 1, rows), and which, int32, the chosen ones first."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), order
