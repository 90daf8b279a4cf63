"""Processes that stop or wait: a report of where a stalled run stands, and garbage collection at the same step on all ranks."""

import faulthandler
import gc
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.util import register_after_fork
from pathlib import Path

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from prx_composer.schedule.moments import parse_duration

log = logging.getLogger(__name__)

STALLED_EXIT_CODE = 75  # EX_TEMPFAIL: the same command may well succeed
_GRACE = 5.0  # seconds between a report and the end: the launcher ends the other ranks, which are writing theirs


@dataclass
class _Watch:
    """What the thread looks at. It knows neither the callback nor the trainer, which must be free to go."""

    timeout: float  # seconds
    abort: bool
    folder: Path
    rank: int
    done: threading.Event = field(default_factory=threading.Event)
    last: tuple[float, str, int] = (0.0, "", 0)  # time.monotonic(), event, batch; replaced as a whole

    def run(self) -> None:
        reported = 0.0
        while not self.done.is_set():
            last = self.last
            due = max(last[0], reported) + self.timeout
            if (left := due - time.monotonic()) > 0:
                self.done.wait(left)
                continue
            self.report()
            reported = time.monotonic()
            if self.abort and not self.done.wait(min(_GRACE, self.timeout)) and self.last is last:
                os._exit(STALLED_EXIT_CODE)

    def report(self) -> None:
        at, event, batch = self.last
        said = f"nothing for {time.monotonic() - at:.0f} s after {event} of batch {batch}"
        path = self.folder / f"rank{self.rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{said}\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            log.error("Rank %d: %s. Its stacks cannot be written to %s: %s", self.rank, said, path, error)
            return
        end = f" The process ends with code {STALLED_EXIT_CODE}." if self.abort else ""
        log.error("Rank %d: %s. The stacks of its threads are in %s.%s", self.rank, said, path, end)


class Watchdog(Callback):
    """Watch for training that has stopped without an error: a collective that a rank never joins, a data loader that hangs.

    Every event of Composer is a sign of life, those of evaluation too. When none has come for `timeout`, each process writes the
    stacks of its threads to `<run folder>/stacks/rank<rank>-<time>.txt`, says so in the log, and again after every further
    `timeout`. Compare the ranks: most wait in a collective, and the one that doesn't is the one to look at.

    What happens inside of one event must fit into `timeout`: the first step's compilation, a checkpoint, images being drawn. One
    thread per process, asleep; a C library that hangs without letting go of Python's lock cannot be seen.

    Args:
        folder: of the run.
        timeout: seconds, or a duration such as "10m" or "90m".
        abort: end the process with code 75 a few seconds after the first report, so that a scheduler restarts the run.

    Raises:
        ValueError: a timeout that isn't a positive duration.
    """

    def __init__(self, folder: str, timeout: float | str = 600, abort: bool = False):
        self._folder, self._abort = Path(folder) / "stacks", abort
        self.timeout = parse_duration(timeout) if isinstance(timeout, str) else float(timeout)
        if not 0 < self.timeout < threading.TIMEOUT_MAX:
            raise ValueError(f"timeout must be positive, in seconds or as a duration such as 10m, not {timeout}.")
        self._watch: _Watch | None = None
        self._thread: threading.Thread | None = None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if self._watch is not None:
            self._watch.last = (time.monotonic(), event.value, int(state.timestamp.batch))
        super().run_event(event, state, logger)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._stop()
        self._watch = _Watch(self.timeout, self._abort, self._folder, dist.get_global_rank())
        self._watch.last = (time.monotonic(), Event.FIT_START.value, int(state.timestamp.batch))
        self._thread = threading.Thread(target=self._watch.run, name="prx-watchdog", daemon=True)
        self._thread.start()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._stop()

    def close(self, state: State, logger: Logger) -> None:  # also when fit raised
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None and self._thread is not None:
            self._watch.done.set()
            self._thread.join(timeout=10)  # it may be writing a report
        self._watch = self._thread = None


class GarbageCollection(Callback):
    """Turn Python's automatic garbage collection off while training, and collect every so many batches.

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
