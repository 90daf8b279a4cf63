"""The Composer side of every algorithm that routes tokens: claim the backbone's router, open and close it with a window."""

from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from prx_composer.common.errors import UserError
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.routing import RandomRouter
from prx_composer.schedule.moments import ScheduleWindow


class TokenRoutingAlgorithm(Algorithm):
    """Fills `backbone.router` with a `RandomRouter` that draws inside of a window.

    Args:
        start_block: first routed block.
        end_block: last routed block, itself routed; None for the last but one.
        rate: share of image tokens that skip these blocks.
        start, end: window, as time strings; outside of it every block sees every token.
        discard: see `Route`; `end_block` is then the last block.

    Raises:
        ValueError: a rate or blocks out of range.
    """

    name: str  # in the recipe

    def __init__(self, start_block: int, end_block: int | None, rate: float, start: str, end: str | None, discard: bool = False):
        if not 0 < rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, the share of tokens that skip blocks; it is {rate}.")
        if start_block < 0 or (end_block is not None and end_block < start_block):
            raise ValueError(f"0 ≤ start_block ≤ end_block must hold, not {start_block} and {end_block}.")
        self.start_block, self.end_block, self.rate, self.discard = start_block, end_block, rate, discard
        self.window = ScheduleWindow(start, end)
        self.router: RandomRouter | None = None

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self.attach(state)
        elif event == Event.BATCH_START:
            assert self.router is not None
            self.router.active = self.window.contains(state)

    def attach(self, state: State) -> None:
        """Claims the router, or raises UserError naming whose it is, or which blocks there are."""
        model: Any = state.model
        backbone: PRXBackbone | None = getattr(model, "backbone", None)
        if not isinstance(backbone, PRXBackbone):
            raise UserError(f"algorithms.{self.name} needs a model with a PRX backbone, such as text_to_image.")
        if backbone.router is not None:
            owner = getattr(backbone.router, "name", "another")
            raise UserError(f"algorithms.{self.name} and algorithms.{owner} both route tokens; keep one of them.")
        last = backbone.depth - 1
        end_block = last - (0 if self.discard else 1) if self.end_block is None else self.end_block
        if not self.start_block <= end_block <= last:
            raise UserError(
                f"algorithms.{self.name}: blocks {self.start_block} to {end_block} cannot be routed; model.backbone has "
                f"{backbone.depth} blocks, counted from 0 to {last}."
            )
        self.router = RandomRouter(self.name, self.start_block, end_block + 1, self.rate, self.discard)
        self.router.active = False
        backbone.router = self.router
