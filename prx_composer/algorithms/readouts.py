"""Readouts: small heads on middle blocks predict the clean image too, and so teach the blocks below them more directly.

P-JiT's (Linum-AI/pyramid-jit), which predict it smaller, in training alone; and internal guidance's (arXiv:2512.24176), which
predicts it whole and guides sampling as well.

Shapes: B images, C channels, N tokens of the backbone's grid, K ≤ N of them that the block saw, D hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Algorithm
from torch import Tensor, nn

from prx_composer.algorithms.base import LossTrick, no_block, unsuited
from prx_composer.common.errors import Problems, UserError, raise_all
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.flow import FlowOutput, Guidance, InternalGuidance, TextConditioning
from prx_composer.models.layers import patchify, unpatchify
from prx_composer.models.processes import Process
from prx_composer.models.routing import select_tokens
from prx_composer.recipe.config import Recipe

_BLOCKS = 22  # of P-JiT …
_PLACES = ((10, 4), (16, 2))  # … whose readouts come after so many of them, of the image at a quarter and at half of its sides


@dataclass(frozen=True)
class Readout:
    """Where a head reads, and what a token tells it.

    Args:
        block: whose output it reads, counted from 0.
        patch_size: side of what a token predicts, in pixels (or latent pixels) of the image that is downsized by the backbone's
            patch size over this one.

    Raises:
        ValueError: a block or a patch size that there cannot be.
    """

    block: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ValueError(f"block must not be negative, but is {self.block}.")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, not {self.patch_size}.")


class ReadoutHead(nn.Module):
    """The backbone's final layer, with zero weights: W·(norm(x)·(1 + scale(vec)) + shift(vec)) + b, (B, K, D) → (B, K, width)."""

    def __init__(self, hidden_size: int, time_size: int, width: int):
        super().__init__()
        self.modulation = nn.Linear(time_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BKD: Tensor, vec_BD: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(vec_BD))[:, None, :].chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, 1 + scale, F.layer_norm(x_BKD, x_BKD.shape[-1:], eps=1e-6)))


def downsized(image: Tensor, factor: int) -> Tensor:
    """Return an image (B, C, H, W) at 1/factor of its sides: bilinear, antialiased, as P-JiT's targets are made."""
    if factor == 1:
        return image
    height, width = image.shape[-2:]
    return F.interpolate(image, (height // factor, width // factor), mode="bilinear", antialias=True)


def readout_error(
    flow: Process,
    predicted_BKE: Tensor,
    outputs: FlowOutput,
    model_patch: int,
    patch: int,
    kept_indices: Tensor | None = None,
) -> Tensor:
    """Return the loss of every image's readout, fp32 (B,): that of the network, on a smaller image.

    The path of the smaller image is the smaller path, since downsizing is linear. So a readout predicts what the network does,
    downsized, and its error is weighted as the network's is: that of x0 is divided by max(t, min_timestep).

    Args:
        flow: that the network learns.
        predicted_BKE: (B, K, C·patch²), laid out as by `patchify`.
        outputs: of the forward pass.
        model_patch: side of the network's patches; a multiple of `patch`.
        patch: side of what a token predicts, in pixels of the smaller image.
        kept_indices: (B, K), the tokens that have a prediction; None = the whole grid. The rest of the image doesn't count.
    """

    def tokens(image: Tensor) -> Tensor:
        patches = patchify(downsized(image, model_patch // patch), patch)
        return (patches if kept_indices is None else select_tokens(patches, kept_indices))[:, None]

    clean = tokens(outputs.clean)
    predicts_x0 = getattr(flow, "prediction", None) == "x"
    noise = clean if predicts_x0 else tokens(outputs.noise)  # which the error of x0 doesn't look at
    return flow.squared_error(predicted_BKE[:, None], clean, noise, outputs.timestep)


def default_readouts(depth: int, patch_size: int) -> tuple[Readout, ...]:
    """Return P-JiT's readouts in a backbone of another depth and patch size; without those whose patch would be no integer."""
    return tuple(
        Readout(max(1, round(after / _BLOCKS * depth)) - 1, patch_size // factor)
        for after, factor in _PLACES
        if patch_size % factor == 0
    )


class Readouts(LossTrick):
    """The sum of the heads' `readout_error`, averaged over the images. The heads are in no exported model.

    Args:
        heads: where they read and what they predict; by default `default_readouts`, 8 px after 45% of the blocks and 16 px after
            73% for patches of 32.
        weight: of each head's error beside the network's own.
        start, end: window.

    Attributes:
        readouts: of the heads, once attached.
        heads: the trained part, in the same order, once attached.

    Raises:
        ValueError: no head, a negative weight.
        UserError: when it is attached, for all blocks that aren't there and patches that don't divide the model's.
    """

    name = "readouts"
    experimental = True

    def __init__(
        self, heads: list[Readout] | None = None, weight: float = 1.0, start: str = "0ba", end: str | None = None
    ) -> None:
        super().__init__(weight, start, end)
        if heads is not None and not heads:
            raise ValueError("heads must name at least one; leave it out for those of the model's depth and patch size.")
        self.asked_for = heads
        self.readouts: Sequence[Readout] = ()
        self.heads: Any = None

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        if hasattr(backbone, "depth"):
            self._check_time(backbone)
            self.choose(backbone)

    def _check_time(self, backbone: Any) -> None:
        if not getattr(backbone, "time_size", 0):
            why = getattr(getattr(backbone, "signature", None), "time_vector", "it has no time vector (time_size)")
            raise unsuited(self.name, backbone, why)

    def build(self, model: Any) -> Mapping[str, nn.Module | nn.Parameter]:
        backbone: Any = getattr(model, "backbone", model)
        self._check_time(backbone)
        self.patch_size = backbone.patch_size
        self.readouts = self.choose(backbone)
        self.taps = (TIME_VECTOR, *sorted({readout.block for readout in self.readouts}))
        widths = [backbone.in_channels * readout.patch_size**2 for readout in self.readouts]
        self.heads = nn.ModuleList(ReadoutHead(backbone.hidden_size, backbone.time_size, width) for width in widths)
        return {"heads": self.heads}

    def choose(self, backbone: Any) -> Sequence[Readout]:
        """Return the readouts of a backbone, which are those of the recipe or else follow from its sizes. Raise UserError."""
        depth, patch = backbone.depth, backbone.patch_size
        if self.asked_for is None:
            found = default_readouts(depth, patch)
            if not found:
                raise UserError(
                    f"algorithms.readouts: model.backbone.patch_size is {patch}, which cannot be halved; give `heads` with a "
                    "patch_size that divides it."
                )
            return found
        problems, divisors = [], [size for size in range(1, patch + 1) if patch % size == 0]
        for index, readout in enumerate(self.asked_for):
            path = f"algorithms.readouts.heads[{index}]"
            if readout.block >= depth:
                problems.append(no_block(f"{path}.block", readout.block, depth))
            if readout.patch_size not in divisors:
                sizes = ", ".join(map(str, divisors))
                problems.append(
                    f"{path}.patch_size: {readout.patch_size} doesn't divide model.backbone.patch_size, which is {patch}; give "
                    f"one of {sizes}."
                )
            if readout in self.asked_for[:index]:
                problems.append(f"{path} is heads[{self.asked_for.index(readout)}] again; one of them is enough.")
        raise_all(problems)
        return tuple(self.asked_for)

    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        errors, route = [], outputs.route
        for readout, head in zip(self.readouts, self.heads, strict=True):
            kept = route.kept_indices if route is not None and route.start <= readout.block < route.end else None
            predicted = head(outputs.taps[readout.block], outputs.taps[TIME_VECTOR])
            errors.append(readout_error(self.flow, predicted, outputs, self.patch_size, readout.patch_size, kept).mean())
        return torch.stack(errors).sum()


# -------------------------------------------------------------------------------------------------- internal guidance


class GuidingReadout(Readouts):
    """A readout of the whole image in a middle block, in training a loss, in sampling what `InternalGuidance` leads away from.

    Args:
        block: whose output it reads, counted from 0; by default after 8 of 28 blocks, as the authors' SiT-XL.
        weight: of its error beside the network's own.
        scale: s of the guidance; 1 = none.
        interval: lowest and highest share of noise at which it guides: of flow matching the timestep, 1 = noise.
        start, end: window. Outside of it the guidance is what it was, too.

    Attributes:
        guidance: what the model has inside of the window, once attached.

    Raises:
        ValueError: an argument out of range.
    """

    name = "internal_guidance"
    shapes_sampling = True

    def __init__(
        self,
        block: int | None = None,
        weight: float = 0.5,
        scale: float = 1.4,
        interval: tuple[float, float] = (0.0, 1.0),
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(None, weight, start, end)
        if block is not None and block < 0:
            raise ValueError(f"block must not be negative, but is {block}.")
        if not (math.isfinite(scale) and scale >= 1):
            raise ValueError(f"scale must be a number from 1 on (1 = none), not {scale}.")
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(f"interval must be two timesteps, the lower one first, both in [0, 1], not {list(interval)}.")
        self.block, self.scale, self.interval = block, scale, (interval[0], interval[1])
        self._before: Guidance | None = None  # what the model had before the window

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        problems = Problems()
        with problems.noted():
            super().check(recipe, others, backbone)
        for other in others:
            if getattr(other, "self_guidance", False):
                owner = getattr(other, "name", type(other).__name__)
                problems.found.append(
                    f"algorithms.internal_guidance and algorithms.{owner}.self_guidance both guide sampling; keep one of them. "
                    f"With self_guidance: false, {owner} goes with internal_guidance."
                )
        problems.raise_any()

    def choose(self, backbone: Any) -> Sequence[Readout]:
        block = max(1, round(8 / 28 * backbone.depth)) - 1 if self.block is None else self.block
        if block >= backbone.depth:
            raise UserError(no_block("algorithms.internal_guidance.block", block, backbone.depth))
        return (Readout(block, backbone.patch_size),)

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        super().attach(model, optimizer)
        self.backbone, self.losses = model.backbone, model.auxiliary_losses
        self.guidance = InternalGuidance(self.predict_both, self.scale, self.interval, model.flow.noise_share)

    def predict_both(self, x_t: Tensor, t: Tensor, text: TextConditioning) -> tuple[Tensor, Tensor]:
        """Return what the network and the readout predict, (B, C, H, W) fp32 each, from one forward pass."""
        final, taps = self.backbone(x_t, t, text.embedding, **text.beside(), return_taps=True)
        tapped, vec = taps[self.readouts[0].block], taps[TIME_VECTOR]
        patches = self.losses.with_parameters(lambda: self.heads[0](tapped, vec))
        return final.float(), unpatchify(patches, self.patch_size, *x_t.shape[-2:]).float()

    def set_active(self, model: Any, active: bool) -> None:
        super().set_active(model, active)
        if active and self._before is None:
            self._before, model.guidance = model.guidance, self.guidance
        elif not active and self._before is not None:
            self._before, model.guidance = None, self._before
