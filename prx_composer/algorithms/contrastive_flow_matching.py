"""Contrastive flow matching (ΔFM, arXiv:2506.05350): predicted velocities keep away from those of other captions' images."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prx_composer.algorithms.base import LossTrick
from prx_composer.common.errors import UserError
from prx_composer.models.flow import FlowOutput
from prx_composer.models.processes import FlowMatching, Process
from prx_composer.recipe.evidence import PRX_PART_2, Evidence


def contrastive_error(flow: FlowMatching, outputs: FlowOutput) -> Tensor:
    """Return ‖v̂ − ṽ‖² per image, (B,) fp32, averaged over its elements, with ṽ = s·ε̃ − x̃0 of its neighbour in the microbatch.

    It is the flow-matching error against another line through the same x_t: the one with velocity ṽ, from the clean end
    x_t − t·ṽ to the noisy end x_t + (1 − t)·ṽ. So x-prediction sees it through the clamp of the error that it is subtracted
    from: below `min_timestep` both velocities shrink by t / min_timestep, as the positive ones do. There ‖v̂ − ṽ‖² with an
    unshrunk ṽ would push x̂0 away from an x0 that x_t already shows.
    """
    clean, noise = outputs.clean.roll(1, 0), outputs.noise.roll(1, 0)
    velocity = flow.velocity(clean, noise)
    t = outputs.timestep[:, None, None, None]
    clean_end, noisy_end = outputs.noised - t * velocity, outputs.noised + (1 - t) * velocity
    return flow.squared_error(outputs.prediction, clean_end, noisy_end / flow.noise_scale, outputs.timestep, outputs.counted)


class ContrastiveFlowMatching(LossTrick):
    """−(1/B) · Σ `contrastive_error`, over the images whose negative has another caption.

    Together with the flow-matching error it has one minimum, v̂ = (E[v | x_t, caption] − λ·E[ṽ]) / (1 − λ): the true velocity,
    away from the mean of all. At λ ≥ 1 there is none.

    Args:
        weight: λ, in [0, 1).
        skip_same_caption: leave out the images whose negative has the same caption, from which nothing should be told apart.
        start, end: window.

    Raises:
        ValueError: a weight outside of [0, 1).
        UserError: of another process.
    """

    name = "contrastive_flow_matching"
    evidence = (Evidence(image_size=256, measure="FID in latents", without=18.2, having=20.03, speed=0.95, source=PRX_PART_2),)

    def __init__(self, weight: float = 0.05, skip_same_caption: bool = True, start: str = "0ba", end: str | None = None):
        super().__init__(weight, start, end)
        if weight >= 1:
            raise ValueError(f"weight must be less than 1, where the loss has no minimum, but is {weight}.")
        self.skip_same_caption = skip_same_caption

    def check_flow(self, flow: Process) -> None:
        if not isinstance(flow, FlowMatching):
            raise UserError(
                f"algorithms.{self.name} keeps velocities of straight paths apart, and {type(flow).__name__} has none: "
                "leave it out, or set model.flow.name to flow_matching."
            )

    def loss(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> Tensor:
        if len(outputs.clean) < 2:
            raise UserError(
                "algorithms.contrastive_flow_matching: a microbatch of one image has no other to keep away from; "
                "set device_train_microbatch_size to at least 2."
            )
        error = contrastive_error(self.flow, outputs)
        if self.skip_same_caption:
            input_ids: Tensor = batch["input_ids"]
            error = error * torch.any(input_ids != input_ids.roll(1, 0), dim=1)
        return -error.mean()
