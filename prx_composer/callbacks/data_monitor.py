"""Says in the log how many samples could not be decoded."""

from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ["DataMonitor"]


class DataMonitor(Callback):
    """Logs `data/undecodable` (of this rank, so far) whenever it has grown."""

    def __init__(self) -> None:
        self._last = 0

    def batch_end(self, state: State, logger: Logger) -> None:
        count = getattr(getattr(state.train_dataloader, "dataset", None), "undecodable", 0)
        if count != self._last:
            self._last = count
            logger.log_metrics({"data/undecodable": count})
