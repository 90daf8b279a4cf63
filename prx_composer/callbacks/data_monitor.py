"""Says in the log how many samples could not be decoded, and how many captions were cut."""

import logging

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

log = logging.getLogger(__name__)

FIRST_LOOK = 1000  # captions after which it is said how many of them were cut


class DataMonitor(Callback):
    """Logs `data/undecodable` (of this rank, so far) whenever it has grown; and says once what the captions lose, if they do:
    after a thousand of them or as soon as they lose anything later, at the latest at the end.
    """

    def __init__(self) -> None:
        self._last = 0
        self._look_at: float = FIRST_LOOK

    def batch_end(self, state: State, logger: Logger) -> None:
        count = getattr(getattr(state.train_dataloader, "dataset", None), "undecodable", 0)
        if count != self._last:
            self._last = count
            logger.log_metrics({"data/undecodable": count})
        self._say_what_captions_lose(state, self._look_at)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._say_what_captions_lose(state, 1)

    def _say_what_captions_lose(self, state: State, at: float) -> None:
        collator = getattr(state.train_dataloader, "collate_fn", None)
        counts = getattr(collator, "counts", None)  # in the host's memory: nothing waits for the device
        if counts is None or self._look_at == float("inf") or counts.captions < at:
            return
        self._look_at *= 2
        lost = counts.told(collator.max_tokens)  # pyright: ignore[reportOptionalMemberAccess]
        if lost is None:
            return
        self._look_at = float("inf")
        if dist.get_global_rank() == 0:
            log.warning("train_loader: so far, %s.", lost)
