"""Python's garbage collection at the same step on all ranks, instead of whenever each of them comes to it."""

import gc
from multiprocessing.util import register_after_fork

from composer.core import Callback, State
from composer.loggers import Logger


class GarbageCollection(Callback):
    """Turns the automatic collection off while training, and collects every so many batches.

    A full collection stops a process for tens to hundreds of milliseconds. When ranks come to it at different steps, all wait for
    each in turn at the next collective; at the same step they pay once. Only cycles of Python objects wait for it:
    tensors are freed as soon as nothing refers to them. Data-loader workers keep their automatic collection.

    Args:
        interval: in batches.

    Raises:
        ValueError: an interval below 1.
    """

    def __init__(self, interval: int = 1000):
        if interval < 1:
            raise ValueError(f"interval must be a number of batches, at least 1, not {interval}.")
        self.interval = interval
        self._turned_off = False
        register_after_fork(self, GarbageCollection._turn_on)  # in workers; forgotten together with this object

    def fit_start(self, state: State, logger: Logger) -> None:
        if gc.isenabled():
            gc.disable()
            self._turned_off = True
        gc.collect()

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) % self.interval == 0:
            gc.collect()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._turn_on()

    def close(self, state: State, logger: Logger) -> None:  # also when fit raised
        self._turn_on()

    def _turn_on(self) -> None:
        if self._turned_off:
            gc.enable()
            self._turned_off = False
