"""What lies between a block's matrix products, with backward passes written by hand for eager mode.

Autograd's own backward passes make more trips through memory than are needed. Inductor fuses plain arithmetic better than it
could fuse these functions, so a compiled graph gets plain arithmetic.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _AddScaled(torch.autograd.Function):
    """`torch.addcmul`, whose own backward first makes a copy of `value` times 1."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, factor: Tensor, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(factor, value)
        ctx.base_shape, ctx.base_dtype = base.shape, base.dtype
        return torch.addcmul(base, factor, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor, value = ctx.saved_tensors
        for_base, for_factor, for_value = ctx.needs_input_grad
        return (
            grad.sum_to_size(ctx.base_shape).to(ctx.base_dtype) if for_base else None,
            (grad * value).sum_to_size(factor.shape).to(factor.dtype) if for_factor else None,
            (grad * factor).sum_to_size(value.shape).to(value.dtype) if for_value else None,
        )


def add_scaled(base: Tensor, factor: Tensor, value: Tensor) -> Tensor:
    """base + factor · value, each broadcast to the others: AdaLN's modulation and its gated residual."""
    if torch.compiler.is_compiling():
        return torch.addcmul(base, factor, value)
    return _AddScaled.apply(base, factor, value)  # pyright: ignore[reportReturnType]


class _GatedGelu(torch.autograd.Function):
    """Two allocations of an MLP's width fewer in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        activated = F.gelu(gate, approximate="tanh")
        ctx.save_for_backward(gate, up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up, activated = ctx.saved_tensors
        grad_gate = grad * up
        gelu_backward: Any = torch.ops.aten.gelu_backward
        gelu_backward.grad_input(grad_gate, gate, approximate="tanh", grad_input=grad_gate)
        return grad_gate, grad * activated


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, with the tanh approximation of gelu (GEGLU, arXiv:2002.05202)."""
    if torch.compiler.is_compiling():  # tanh(u) = 2 sigmoid(2u) − 1: one exponential instead of inductor's slow tanh
        inner = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        return gate * torch.sigmoid(inner) * up
    return _GatedGelu.apply(gate, up)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number per row, where autograd keeps the normalised input too."""

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
