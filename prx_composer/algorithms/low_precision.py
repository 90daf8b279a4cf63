"""Work in fewer bits: norms in the autocast dtype instead of fp32, and the blocks' matrix products in float8 (torchao).

Float8 formats: e4m3 and e5m2 of Micikevicius et al. 2022 (arXiv:2209.05433).
"""

import dataclasses
import importlib.util
import logging
import re
import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Precision, State
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from torch import Tensor, nn

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.installation import adding
from prx_composer.models.counting import blocks_of
from prx_composer.models.layers import BLOCK_LAYERS, RMSNorm, is_adapted

log = logging.getLogger(__name__)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _InLowPrecision(nn.Module):
    """Before a class of norm: its input, weight and output are of the autocast dtype (statistics stay fp32 inside the kernel)."""

    active = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return super().forward(x)
        norm: Any = self
        dtype, is_layer = _compute_dtype(x), isinstance(norm, nn.LayerNorm)
        with torch.autocast(x.device.type, enabled=False):
            shape = list(norm.dim if isinstance(norm, DiffusersRMSNorm) else norm.normalized_shape)
            weight, bias = _cast(norm.weight, dtype), _cast(getattr(norm, "bias", None), dtype)
            if is_layer:
                return F.layer_norm(x.to(dtype), shape, weight, bias, norm.eps)
            normed = F.rms_norm(x.to(dtype), shape, weight, norm.eps)
            return normed if bias is None else normed + bias


_NORMS = (nn.LayerNorm, FP32LayerNorm, nn.RMSNorm, RMSNorm, DiffusersRMSNorm)
_REPLACEMENTS: dict[type[nn.Module], Any] = {kind: type(f"Low{kind.__name__}", (_InLowPrecision, kind), {}) for kind in _NORMS}


def apply_low_precision_norm(model: nn.Module) -> int:
    """Replace every LayerNorm and RMSNorm of PyTorch, diffusers or ours, affine or not, in place; return how many.

    Other subclasses are left alone, since their own forward would be lost. Parameters stay the same objects, so optimizers and
    state dicts don't notice.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            replacement = _REPLACEMENTS.get(type(child))
            if replacement is None:
                continue
            low = replacement.__new__(replacement)
            low.__dict__.update(child.__dict__)  # same parameters, shape, eps, hooks: only the forward is another
            setattr(parent, name, low)
            replaced += 1
    return replaced


class LowPrecisionNorm(Trick):
    """Apply `apply_low_precision_norm` when training runs under bf16 or fp16 autocast.

    Args:
        start, end: window; outside of it the norms compute in fp32 as before. Opening or closing it recompiles a compiled model.
    """

    name = "low_precision_norm"

    def __init__(self, start: str = "0ba", end: str | None = None):
        super().__init__(start, end)
        self._norms: list[_InLowPrecision] = []

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
        self._norms = [m for m in model.modules() if isinstance(m, _InLowPrecision)]
        log.info("low_precision_norm: %d layers", replaced)

    def set_active(self, model: Any, active: bool) -> None:
        for norm in self._norms:
            norm.active = active


Recipe = Literal["tensorwise", "rowwise"]

MULTIPLE = 16  # of which both sizes of a weight must be: torch._scaled_mm
CAPABILITY = (8, 9)  # the first with float8 matrix products: Ada; Hopper is 9.0
_PLACE = re.compile(r"^.*?\.\d+\.")  # of a block, before its layers' names
_WITH_LORA = "algorithms.float8 cannot be combined with algorithms.lora, whose frozen weights it would round; leave one out."


def hardware_problem() -> str | None:
    """Return why the GPU that this process uses computes no float8 products, in words; None if it does."""
    if not torch.cuda.is_available():
        found = "there is no CUDA device here"
    elif (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        found = f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    else:
        return None
    return (
        f"algorithms.float8 needs a CUDA device of capability {CAPABILITY[0]}.{CAPABILITY[1]} or more (Ada, Hopper, newer), and "
        f"{found}; leave it out, or set algorithms.float8.emulate=true, which rounds alike and is slower than without float8."
    )


def float8_layers(backbone: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear layers that float8 takes: every matrix of a block but its modulation.

    They are nearly all of the FLOPs, over thousands of tokens. What is left out costs little and says much: modulation, time and
    resolution embedders see one vector per image; img_in, txt_in and final_layer touch pixels, text and prediction themselves.

    Args:
        exclude: ends of names of layers that stay as they are, such as "attention.txt_kv_proj" or "blocks.0.up_proj".

    Raises:
        ValueError: a layer's size is no multiple of 16; no layers; a name in `exclude` that is none of theirs.
    """
    ends = getattr(backbone, "block_layers", BLOCK_LAYERS)
    inside = {module for block in blocks_of(backbone) for module in block.modules()}
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and module in inside and _ends(name, ends)
    }
    for end in exclude:
        if not any(_ends(name, (end,)) for name in layers):
            raise ValueError(f"exclude: {end!r} ends the name of no layer of float8's; the blocks have {', '.join(ends)}.")
    layers = {name: module for name, module in layers.items() if not _ends(name, exclude)}
    if not layers:
        none = f"the blocks of model.backbone have none of {', '.join(ends)}"
        raise ValueError(f"there is no layer to compute in float8: {'exclude names all of them' if exclude else none}.")
    for name, module in layers.items():
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            raise ValueError(
                f"model.backbone.{name} has {module.in_features} inputs and {module.out_features} outputs, which must be "
                f"multiples of {MULTIPLE} for float8; change hidden_size or mlp_ratio, or exclude {_PLACE.sub('', name)}."
            )
    return list(layers)


def _ends(name: str, ends: Collection[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def apply_float8(
    backbone: nn.Module, recipe: Recipe = "tensorwise", emulate: bool = False, exclude: Sequence[str] = ()
) -> list[str]:
    """Put torchao's Float8Linear in the place of the blocks' linear layers; return their names.

    The weights stay the same parameters under the same names, so that optimizers, averages and state dicts don't notice. Every
    product scales its operands anew by their greatest magnitude (dynamic scaling): no state is kept between steps.

    Args:
        backbone: see `float8_layers`.
        recipe: tensorwise: one scale per tensor, gradients of outputs in e5m2. rowwise: one per row and column, a power of two,
            everything in e4m3.
        emulate: compute the rounded operands' product in fp32, on any device.
        exclude: see `float8_layers`.

    Raises:
        UserError: torchao isn't installed or doesn't go with this torch; the backbone has LoRA adapters.
        ValueError: as `float8_layers`.
    """
    if is_adapted(backbone):
        raise UserError(_WITH_LORA)
    names = float8_layers(backbone, exclude)
    try:  # it takes seconds, and few runs need it
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        what = f"cannot be imported with torch {torch.__version__} ({error})" if _is_installed() else "isn't installed"
        raise UserError(f"algorithms.float8: torchao {what}: {adding('float8')}") from error
    settings: Any = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        # A weight's gradient sums over the tokens of a microbatch, whose number buckets and routing choose: no multiple of 16.
        pad_inner_dim=not emulate,
    )
    convert_to_float8_training(backbone, module_filter_fn=lambda _, name: name in names, config=settings)
    return names


def _is_installed() -> bool:
    return importlib.util.find_spec("torchao") is not None


class Float8(Trick):
    """Apply `apply_float8` to the backbone, before weights are sharded and graphs compiled.

    Weights stay fp32 and are rounded for every product. What the trained model draws outside of the run has no float8 in it.

    Args:
        recipe, emulate, exclude: see `apply_float8`.

    Raises:
        ValueError: another recipe; torchao isn't installed.
        UserError: see `check`, `hardware_problem` and `apply_float8`.
    """

    name = "float8"
    not_counted = "what it saves is not known to the plan: time and memory are those of a run without it"
    experimental = True

    def __init__(self, recipe: Recipe = "tensorwise", emulate: bool = False, exclude: list[str] | None = None):
        super().__init__()
        if recipe not in ("tensorwise", "rowwise"):
            raise ValueError(f"recipe: {recipe!r} is neither tensorwise nor rowwise.")
        if not _is_installed():
            raise ValueError(f"torchao isn't installed: {adding('float8')}")
        self.recipe: Recipe = recipe
        self.emulate, self.exclude = emulate, tuple(exclude or ())

    def check(self, recipe: Any, others: list[Algorithm], backbone: Any = None) -> None:
        if any(getattr(algorithm, "name", None) == "lora" for algorithm in others):
            raise UserError(_WITH_LORA)
        if backbone is not None:
            with at_path("algorithms.float8"):
                float8_layers(backbone, self.exclude)

    def hardware_problem(self) -> str | None:
        return None if self.emulate else hardware_problem()

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        if not hasattr(model, "backbone"):
            raise UserError("algorithms.float8 needs a model with a `backbone`, such as text_to_image.")
        if next(model.backbone.parameters()).is_meta:  # to be counted: the work is the same, and the machine another
            return
        if (problem := self.hardware_problem()) is not None:
            raise UserError(problem)
        names = apply_float8(model.backbone, self.recipe, self.emulate, self.exclude)
        log.info("float8: %d linear layers, %s%s", len(names), self.recipe, ", emulated" if self.emulate else "")
