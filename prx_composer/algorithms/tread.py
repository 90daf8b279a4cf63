"""TREAD: some image tokens skip the middle blocks in training (arXiv:2501.04765)."""

from typing import Any

from composer.core import Event, State
from composer.loggers import Logger

from prx_composer.algorithms.token_routing import TokenRoutingAlgorithm
from prx_composer.models.sampling import Guidance, RoutedSelfGuidance


class TREAD(TokenRoutingAlgorithm):
    """Sends a random share of the image tokens past blocks `start_block` … `end_block`, where they come back unchanged.

    Args:
        start_block: first routed block, counted from 0.
        end_block: last routed block, itself routed; the last but one by default.
        rate: share of image tokens that skip these blocks.
        self_guidance: sample with `RoutedSelfGuidance` instead of classifier-free guidance. A model trained on sparse tokens
            answers weakly to the latter (arXiv:2601.01608), but only the latter strengthens the caption.
        start, end: window; outside of it every block sees every token and the guidance is what it was.

    Raises:
        ValueError: a rate or blocks out of range.
    """

    name = "tread"
    shapes_sampling = True

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
        self._guidance: Guidance | None = None  # what the model had before

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        super().apply(event, state, logger)
        if self.self_guidance and event == Event.BATCH_START:
            assert self.router is not None
            model: Any = getattr(state.model, "module", state.model)
            if self.router.active and self._guidance is None:
                self._guidance, model.guidance = model.guidance, RoutedSelfGuidance(self.router)
            elif not self.router.active and self._guidance is not None:
                self._guidance, model.guidance = None, self._guidance
