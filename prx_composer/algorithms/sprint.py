"""SPRINT: sparse deep blocks beside a dense shallow path, fused (arXiv:2510.21986)."""

from typing import Any

import torch
import torch.nn.functional as F
from composer.core import State
from torch import Tensor, nn

from prx_composer.algorithms.token_routing import TokenRoutingAlgorithm
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.models.routing import TokenFusion, merge_tokens
from prx_composer.optim.groups import add_parameters


class SprintFusion(TokenFusion):
    """W·[early; deep] + b, with a learned mask token where a token was not among the deep ones.

    It starts as the mean of the two.

    Args:
        start, end: the deep blocks are `start` ≤ i < `end`.
        hidden_size: width of a token.
    """

    def __init__(self, start: int, end: int, hidden_size: int):
        super().__init__(start, end)
        self.mask_token = nn.Parameter(torch.zeros(hidden_size))
        self.project = nn.Linear(2 * hidden_size, hidden_size)
        with torch.no_grad():
            self.project.weight.copy_(torch.eye(hidden_size).repeat(1, 2) / 2)
            self.project.bias.zero_()

    def forward(self, early_BND: Tensor, deep: Tensor, kept_indices: Tensor | None) -> Tensor:
        bias = self.project.bias
        if kept_indices is None:
            bias = bias + 0.0 * self.mask_token  # has a gradient, of zero: DDP waits for every parameter
        else:
            deep = merge_tokens(self.mask_token.to(deep.dtype).expand(early_BND.shape), deep, kept_indices)
        return F.linear(torch.cat((early_BND, deep.type_as(early_BND)), dim=-1), self.project.weight, bias)


class SPRINT(TokenRoutingAlgorithm):
    """Blocks before `start_block` see every token; the deep ones, to `end_block`, a random share; their outputs are fused.

    The fusion is part of the model from the first step to the last, in and out of the window and in sampling: diffusers'
    PRX has no place for it, so that such a model cannot be exported to it.

    Args:
        start_block: first deep block, counted from 0.
        end_block: last deep block, itself deep; the last but one by default.
        rate: share of image tokens that skip the deep blocks.
        start, end: window; outside of it the deep blocks see every token. The paper ends with a short dense phase.

    Raises:
        ValueError: a rate or blocks out of range.
    """

    name = "sprint"
    shapes_sampling = True

    def __init__(
        self,
        start_block: int = 2,
        end_block: int | None = None,
        rate: float = 0.75,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(start_block, end_block, rate, start, end)

    def attach(self, state: State) -> None:
        super().attach(state)
        model: Any = state.model
        assert self.router is not None
        with seeded_initialisation(model.random.seed, self.name):
            fusion = SprintFusion(self.router.start, self.router.end, model.backbone.hidden_size)
        model.backbone.fusion = fusion
        add_parameters(state.optimizers[0], fusion)
