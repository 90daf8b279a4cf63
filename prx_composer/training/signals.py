"""A run that is asked to stop stops well: after the step in hand, with a checkpoint."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil

from prx_composer.schedule.clock import TrainingClock

log = logging.getLogger(__name__)

INTERRUPTED_EXIT_CODE = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1


@contextmanager
def stop_on_signals(clock: TrainingClock) -> Iterator[None]:
    """Inside, SIGTERM, SIGUSR1 (a cluster's warning) and Ctrl-C ask the run to stop; a second Ctrl-C stops at once."""
    owner = os.getpid()
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data worker that inherited the handler: it ends as it would without
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and clock.asked:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        clock.request_stop(signal.Signals(number).name)

    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller's business
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_launcher() -> None:
    """Asks the kernel for SIGTERM when Composer's launcher dies, which would leave its ranks training on alone (Linux)."""
    if sys.platform != "linux" or "LOCAL_RANK" not in os.environ:
        return
    try:
        parent = psutil.Process().parent()
        if parent is not None and any(os.path.basename(part) in ("composer", "composer.cli") for part in parent.cmdline()[:3]):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (psutil.Error, OSError, AttributeError):
        log.debug("The launcher could not be watched", exc_info=True)
