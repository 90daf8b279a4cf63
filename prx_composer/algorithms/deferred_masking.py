"""Deferred masking: mix the patches first, then train on a few of them (MicroDiT, arXiv:2407.15811)."""

from typing import Any

from composer.core import Event, State
from composer.loggers import Logger

from prx_composer.algorithms.auxiliary_loss import AuxiliaryLossAlgorithm
from prx_composer.algorithms.token_routing import TokenRoutingAlgorithm
from prx_composer.common.errors import UserError


class DeferredMasking(TokenRoutingAlgorithm):
    """The first blocks mix all patches; after them a random share is discarded, and the loss is taken on the rest alone.

    The backbone's own first blocks are the patch mixer, so that the model stays one that diffusers knows.

    Args:
        mixer_blocks: blocks that see every patch.
        rate: share of patches that are discarded after them.
        start, end: window. The paper ends with an unmasked phase, which a model needs before it can draw whole images:
            end: 0.9dur, say.

    Raises:
        ValueError: a rate or number of blocks out of range.
    """

    name = "deferred_masking"

    def __init__(self, mixer_blocks: int = 4, rate: float = 0.75, start: str = "0ba", end: str | None = None):
        if mixer_blocks < 1:
            raise ValueError(f"mixer_blocks must be at least 1, not {mixer_blocks}.")
        super().__init__(mixer_blocks, None, rate, start, end, discard=True)

    def match(self, event: Event, state: State) -> bool:
        return super().match(event, state) or event == Event.BEFORE_LOAD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        super().apply(event, state, logger)
        if event == Event.BEFORE_LOAD:  # every algorithm has attached what it attaches
            self._refuse_losses_of_whole_images(state)

    def _refuse_losses_of_whole_images(self, state: State) -> None:
        model: Any = state.model
        windows = {a.name: a.window for a in state.algorithms if isinstance(a, AuxiliaryLossAlgorithm)}
        for name, loss in model.auxiliary_losses.named().items():
            if loss.needs_whole_image and not (name in windows and windows[name].is_disjoint_from(self.window)):
                raise UserError(
                    f"algorithms.{name} needs whole images, but algorithms.deferred_masking leaves most patches without a "
                    f"prediction. Leave one out, or let {name} start when deferred_masking ends (in the same unit of time)."
                )
