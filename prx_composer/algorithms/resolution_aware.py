"""Conditioning on the image's height and width, as PRX-7B does."""

import warnings
from typing import Any

import torch
from composer.algorithms.warnings import NoEffectWarning
from torch import nn

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError
from prx_composer.models.backbone import PRXBackbone, ResolutionEmbedder
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.optim import add_parameters


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


class ResolutionAware(Trick):
    """Adds an embedding of height and width, in the pixels that the backbone sees, to the time vector.

    Args:
        start, end: window; outside of it nothing is added, in training or sampling.
    """

    name = "resolution_aware"
    shapes_sampling = True
    experimental = True

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        if not isinstance(getattr(model, "backbone", None), PRXBackbone):
            raise UserError("algorithms.resolution_aware needs a model with a PRX backbone, such as text_to_image.")
        if model.backbone.resolution_embedder is not None:
            message = "resolution_aware adds nothing to a backbone with resolution_embeds: true."
            warnings.warn(NoEffectWarning(message), stacklevel=2)
            return
        with seeded_initialisation(model.random.seed, self.name):
            embedder = add_resolution_embedder(model.backbone)
        add_parameters(optimizer, embedder)

    def set_active(self, model: Any, active: bool) -> None:
        model.backbone.resolution_embedder.active = active
