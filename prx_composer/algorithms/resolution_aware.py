"""Conditioning on the image's height and width, as PRX-7B does."""

import warnings
from typing import Any

from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import nn

from prx_composer.common.errors import UserError
from prx_composer.models.backbone import PRXBackbone, ResolutionEmbedder
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.optim.groups import add_parameters
from prx_composer.schedule.moments import ScheduleWindow


def add_resolution_embedder(backbone: PRXBackbone) -> ResolutionEmbedder:
    """Gives a backbone diffusers' `resolution_embeds` without changing what it computes: the last layer starts at zero."""
    embedder = ResolutionEmbedder(backbone.hidden_size, backbone.time_max_period)
    nn.init.normal_(embedder.mlp.in_layer.weight, std=0.02)
    nn.init.zeros_(embedder.mlp.in_layer.bias)
    nn.init.zeros_(embedder.mlp.out_layer.weight)
    nn.init.zeros_(embedder.mlp.out_layer.bias)
    backbone.resolution_embedder = embedder
    backbone.config["resolution_embeds"] = True
    return embedder


class ResolutionAware(Algorithm):
    """Adds an embedding of height and width, in the pixels that the backbone sees, to the time vector.

    Args:
        start, end: window; outside of it nothing is added, in training or sampling.
    """

    shapes_sampling = True

    def __init__(self, start: str = "0ba", end: str | None = None):
        self.window = ScheduleWindow(start, end)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT or (event == Event.BATCH_START and not self.window.is_open_throughout())

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model: Any = getattr(state.model, "module", state.model)
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, PRXBackbone):
            raise UserError("algorithms.resolution_aware needs a model with a PRX backbone, such as text_to_image.")
        if event == Event.INIT:
            if backbone.resolution_embedder is not None:
                message = "resolution_aware adds nothing to a backbone with resolution_embeds: true."
                warnings.warn(NoEffectWarning(message), stacklevel=2)
                return
            with seeded_initialisation(model.random.seed, "resolution_aware"):
                embedder = add_resolution_embedder(backbone)
            add_parameters(state.optimizers[0], embedder)
        elif backbone.resolution_embedder is not None:
            backbone.resolution_embedder.active = self.window.contains(state)
