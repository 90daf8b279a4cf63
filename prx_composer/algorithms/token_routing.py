"""Token routing: in training a random share of the image tokens skips some blocks (TREAD, SPRINT, deferred masking).

Shapes: B images, N image tokens, K ≤ N of them that are kept, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Algorithm
from torch import Tensor, nn

from prx_composer.algorithms.base import LossTrick, Trick, unsuited
from prx_composer.common.errors import UserError
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.flow import Guidance, RoutedSelfGuidance
from prx_composer.models.randomness import seeded_initialisation
from prx_composer.models.routing import RandomRouter, TokenFusion, merge_tokens
from prx_composer.optim import add_parameters
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.evidence import PRX_PART_2, Evidence


class TokenRouting(Trick):
    """Fill `backbone.router` with a `RandomRouter` that draws inside of a window.

    Args:
        start_block: first routed block, counted from 0.
        end_block: last routed block, itself routed; the last but one by default.
        rate: share of image tokens that skip these blocks.
        start, end: window, as time strings; outside of it every block sees every token.

    Attributes:
        discard: see `Route`; by default `end_block` is then the last block.

    Raises:
        ValueError: a rate or blocks out of range.
    """

    saves_memory = True
    discard = False
    router: RandomRouter

    def __init__(
        self,
        start_block: int = 2,
        end_block: int | None = None,
        rate: float = 0.75,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(start, end)
        if not 0 < rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, the share of tokens that skip blocks; it is {rate}.")
        if start_block < 0 or (end_block is not None and end_block < start_block):
            raise ValueError(f"0 ≤ start_block ≤ end_block must hold, not {start_block} and {end_block}.")
        self.start_block, self.end_block, self.rate = start_block, end_block, rate

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        if backbone is not None:
            self._last_routed(backbone)

    def _last_routed(self, backbone: Any) -> int:
        """Return the number of the last routed block. Raise UserError for a backbone through which these cannot be routed."""
        if not isinstance(backbone, PRXBackbone | DiffusersBackbone):
            raise unsuited(self.name, backbone, "tokens are routed through the backbones prx and diffusers alone")
        if isinstance(backbone, DiffusersBackbone) and backbone.signature.unroutable is not None:
            raise unsuited(self.name, backbone, backbone.signature.unroutable)
        last = backbone.depth - 1
        end_block = last - (0 if self.discard else 1) if self.end_block is None else self.end_block
        if not self.start_block <= end_block <= last:
            raise UserError(
                f"algorithms.{self.name}: blocks {self.start_block} to {end_block} cannot be routed; model.backbone has "
                f"{backbone.depth} blocks, counted from 0 to {last}."
            )
        return end_block

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        backbone: Any = getattr(model, "backbone", model)
        end_block = self._last_routed(backbone)
        if backbone.router is not None:
            owner = getattr(backbone.router, "name", "another")
            raise UserError(f"algorithms.{self.name} and algorithms.{owner} both route tokens; keep one of them.")
        self.router = RandomRouter(self.name, self.start_block, end_block + 1, self.rate, self.discard)
        backbone.router = self.router

    def set_active(self, model: Any, active: bool) -> None:
        self.router.active = active


class TREAD(TokenRouting):
    """Send a random share of the tokens past blocks `start_block` … `end_block`, from where they come back unchanged.

    TREAD, arXiv:2501.04765.

    Args:
        start_block, end_block, rate, start, end: see `TokenRouting`. Outside of the window the guidance is what it was, too.
        self_guidance: sample with `RoutedSelfGuidance` instead of classifier-free guidance. A model trained on sparse tokens
            answers weakly to the latter (arXiv:2601.01608), but only the latter strengthens the caption.
    """

    name = "tread"
    shapes_sampling = True
    evidence = (
        Evidence(
            image_size=32,
            measure="accuracy of the quickstart",
            without=0.951,
            having=0.958,
            higher_is_better=True,
            speed=1.2,
            source="one seed, benchmarks/results/2026-11-24_epyc_ablate-quickstart.md",
        ),
        Evidence(image_size=256, measure="FID in latents", without=18.2, having=21.61, source=PRX_PART_2),
        Evidence(image_size=1024, measure="FID in pixels", without=17.42, having=14.1, speed=1.23, source=PRX_PART_2),
    )

    def __init__(
        self,
        start_block: int = 2,
        end_block: int | None = None,
        rate: float = 0.5,
        self_guidance: bool = False,
        start: str = "0ba",
        end: str | None = None,
    ):
        super().__init__(start_block, end_block, rate, start, end)
        self.self_guidance = self_guidance
        self._before: Guidance | None = None  # what the model had before the window

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        super().attach(model, optimizer)
        self._guidance = RoutedSelfGuidance(self.router)

    def set_active(self, model: Any, active: bool) -> None:
        super().set_active(model, active)
        if self.self_guidance and active and self._before is None:
            self._before, model.guidance = model.guidance, self._guidance
        elif not active and self._before is not None:
            self._before, model.guidance = None, self._before


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


class SPRINT(TokenRouting):
    """Fuse a dense shallow path with sparse deep blocks (arXiv:2510.21986).

    Blocks before `start_block` see every token; the deep ones, to `end_block`, a random share; their outputs are fused. The
    fusion is part of the model from the first step to the last, in and out of the window and in sampling: diffusers' PRX has no
    place for it, so that such a model cannot be exported to it.

    The arguments are those of `TokenRouting`. The paper ends with a short dense phase, outside of the window.
    """

    name = "sprint"
    shapes_sampling = True
    experimental = True
    evidence = (
        Evidence(image_size=256, measure="FID in latents", without=18.2, having=22.56, source=PRX_PART_2),
        Evidence(image_size=1024, measure="FID in pixels", without=17.42, having=16.9, speed=1.42, source=PRX_PART_2),
    )

    def attach(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        super().attach(model, optimizer)
        with seeded_initialisation(model.random.seed, self.name):
            fusion = SprintFusion(self.router.start, self.router.end, model.backbone.hidden_size)
        model.backbone.fusion = fusion
        add_parameters(optimizer, fusion)


class DeferredMasking(TokenRouting):
    """Mix all patches in the first blocks, then discard a random share, and take the loss on the rest alone.

    MicroDiT, arXiv:2407.15811. The backbone's own first blocks are the patch mixer, so that the model stays one that diffusers
    knows.

    Args:
        mixer_blocks: blocks that see every patch.
        rate: share of patches that are discarded after them.
        start, end: window. The paper ends with an unmasked phase, which a model needs before it can draw whole images:
            end: 0.9dur, say.

    Raises:
        ValueError: a rate or number of blocks out of range.
    """

    name = "deferred_masking"
    experimental = True
    discard = True

    def __init__(self, mixer_blocks: int = 4, rate: float = 0.75, start: str = "0ba", end: str | None = None):
        if mixer_blocks < 1:
            raise ValueError(f"mixer_blocks must be at least 1, not {mixer_blocks}.")
        super().__init__(mixer_blocks, None, rate, start, end)

    def check(self, recipe: Recipe | None, others: list[Algorithm], backbone: Any = None) -> None:
        super().check(recipe, others, backbone)
        for other in others:
            if not isinstance(other, LossTrick) or not other.needs_whole_image:
                continue
            if not other.window.is_disjoint_from(self.window):
                raise UserError(
                    f"algorithms.{other.name} needs whole images, but algorithms.deferred_masking leaves most patches without a "
                    f"prediction. Leave one out, or let {other.name} start when deferred_masking ends (in the same unit of time)."
                )
