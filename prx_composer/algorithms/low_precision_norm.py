"""Normalisation layers computed in the autocast dtype instead of fp32."""

import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Precision, State
from torch import Tensor, nn

from prx_composer.algorithms.base import Trick
from prx_composer.models.layers import RMSNorm

log = logging.getLogger(__name__)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class LowPrecisionLayerNorm(nn.LayerNorm):
    """LayerNorm whose input, weight and output are of the autocast dtype (statistics stay fp32 inside the kernel)."""

    active = True

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        dtype = _compute_dtype(input)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = _cast(self.weight, dtype), _cast(self.bias, dtype)
            return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


class LowPrecisionRMSNorm(nn.RMSNorm):
    """RMSNorm whose input, weight and output are of the autocast dtype."""

    active = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return super().forward(x)
        dtype = _compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x.to(dtype), list(self.normalized_shape), _cast(self.weight, dtype), self.eps)


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LowPrecisionLayerNorm,
    nn.RMSNorm: LowPrecisionRMSNorm,
    RMSNorm: LowPrecisionRMSNorm,
}


def apply_low_precision_norm(model: nn.Module) -> int:
    """Replaces every nn.LayerNorm and nn.RMSNorm, affine or not, in place; returns how many.

    Subclasses but our own are left alone, since their own forward would be lost. Parameters stay the same objects, so optimizers
    and state dicts don't notice.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            replacement = _REPLACEMENTS.get(type(child))
            if replacement is None:
                continue
            low: Any = replacement.__new__(replacement)
            low.__dict__.update(child.__dict__)  # same parameters, shape, eps, hooks: only the forward is another
            setattr(parent, name, low)
            replaced += 1
    return replaced


class LowPrecisionNorm(Trick):
    """Applies `apply_low_precision_norm` when training runs under bf16 or fp16 autocast.

    Args:
        start, end: window; outside of it the norms compute in fp32 as before. Opening or closing it recompiles a compiled model.
    """

    name = "low_precision_norm"

    def __init__(self, start: str = "0ba", end: str | None = None):
        super().__init__(start, end)
        self._norms: list[LowPrecisionLayerNorm | LowPrecisionRMSNorm] = []

    def attach_to(self, state: State) -> None:
        if state.precision in (Precision.AMP_BF16, Precision.AMP_FP16):
            super().attach_to(state)
        else:
            message = f"{self.name} does nothing under precision: {state.precision.value}; it needs amp_bf16 or amp_fp16."
            warnings.warn(NoEffectWarning(message), stacklevel=2)

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        replaced = apply_low_precision_norm(model)
        if replaced == 0:
            warnings.warn(NoEffectWarning("low_precision_norm found no LayerNorm or RMSNorm to replace."), stacklevel=2)
        self._norms = [m for m in model.modules() if isinstance(m, LowPrecisionLayerNorm | LowPrecisionRMSNorm)]
        log.info("low_precision_norm: %d layers", replaced)

    def set_active(self, model: Any, active: bool) -> None:
        for norm in self._norms:
            norm.active = active
