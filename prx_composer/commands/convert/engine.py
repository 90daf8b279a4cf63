"""Where work units run: in processes of this machine, or on a Ray cluster. Both call the same function on the same units.

Engines are given a function's name, so that the process that leads imports nothing heavy and says what is wrong at once.
"""

import importlib
import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from prx_composer.common.errors import UserError

log = logging.getLogger(__name__)

ENGINES = ("local", "ray")
UNITS = "prx_composer.commands.convert.units"
CRASHES = 3  # of the same units, before a conversion gives up

POLLED = 0.3  # seconds
SLOTS = 1024  # of processes

Task = tuple[Any, ...]
Seen = Callable[[int], None]


class Progress:
    """How many records this process has looked at, told to whoever shows it: in this process, or in the one that leads."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, seen: Seen | None = None, shared: Any = None) -> None:
        """Count anew.

        Args:
            seen: is told the number, from time to time.
            shared: one number for each process, in memory that all see. No locks: a process that is killed would keep its lock.
        """
        self._seen, self._shared, self._count, self._told = seen, shared, 0, time.monotonic()

    def step(self) -> None:
        """Count one more record."""
        self._count += 1
        if self._shared is not None:
            self._shared[os.getpid() % SLOTS] = self._count
        elif time.monotonic() - self._told > POLLED:
            self.tell()

    def tell(self) -> None:
        self._told = time.monotonic()
        if self._seen is not None:
            self._seen(self._count)


progress = Progress()  # of this process: units call `step` for every record, so that the bar moves inside of them


def prepare(engine: str, workers: int) -> None:
    """Begin to start what takes long, while others check the settings."""
    if engine == "local" and workers > 0:
        from multiprocessing import forkserver

        multiprocessing.set_forkserver_preload([UNITS])
        forkserver.ensure_running()


def call(function: str, *arguments: Any) -> Any:
    """Call a function by its name, `module:function`."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments)


def run(
    engine: str, workers: int, function: str, tasks: list[Task], address: str | None = None, seen: Seen | None = None
) -> Iterator[Any]:
    """Yield results of `function(*task)` as they come, in any order.

    Args:
        function: `module:function`.
        workers: processes; 0 runs everything in this one. With Ray: units at a time, 0 for all CPUs of the cluster.
        address: of the Ray cluster; None for one on this machine.
        seen: told how many records were looked at, also inside of a unit; not with Ray.

    Raises:
        UserError: there is no such engine here, or a unit cannot be done.
    """
    if engine == "ray":
        yield from _run_on_ray(workers, function, tasks, address)
    elif workers == 0:
        progress.begin(seen)
        for task in tasks:
            yield call(function, *task)
            progress.tell()
    else:
        yield from _run_in_processes(workers, function, tasks, seen or (lambda _: None))


def _start_worker(environment: dict[str, str], shared: Any) -> None:
    """Give every process one thread, and let none outlive the process that leads, however that dies.

    Args:
        environment: of the process that leads. That of the server which forks workers is from when it was started, perhaps before
            an object store's credentials were set.
        shared: see `Progress.begin`.
    """
    progress.begin(shared=shared)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    set_threads()


def set_threads() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_processes(workers: int, function: str, tasks: list[Task], seen: Seen) -> Iterator[Any]:
    left, crashes, finished = dict(enumerate(tasks)), 0, 0
    context = multiprocessing.get_context("forkserver")
    while left:
        before, shared = finished, context.RawArray("q", SLOTS)
        with ProcessPoolExecutor(
            min(workers, len(left)), context, initializer=_start_worker, initargs=(dict(os.environ), shared)
        ) as pool:
            waiting, running = list(left), dict[Future[Any], int]()
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        number = waiting.pop(0)
                        running[pool.submit(call, function, *left[number])] = number
                    ready = wait(running, POLLED, return_when=FIRST_COMPLETED).done
                    seen(before + sum(shared))
                    for done in ready:
                        number = running.pop(done)
                        result = done.result()
                        del left[number]
                        finished += result if isinstance(result, int) else 0
                        yield result
            except BrokenProcessPool as error:
                crashes += 1
                named = ", ".join(str(task[1:2] or task) for task in list(left.values())[: 2 * workers])
                if crashes == CRASHES:
                    raise UserError(
                        f"A worker was killed {CRASHES} times, for want of memory or by a crash, in one of: {named}. "
                        "Give fewer --workers, or leave that file out with --include."
                    ) from error
                log.warning("A worker was killed; its units are done again.")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _run_on_ray(workers: int, function: str, tasks: list[Task], address: str | None) -> Iterator[Any]:
    # Under `uv run` Ray would have every worker make an environment anew, without Ray in it; every node has ours.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports] -- the dependency group `cluster`
    except ImportError as error:
        raise UserError("--engine ray needs Ray: uv sync --group cluster, on every node.") from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=1, max_retries=CRASHES)(_call_alone)
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting, running = list(tasks), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(remote.remote(function, *waiting.pop(0)))
        done, running = ray.wait(running)
        yield from ray.get(done)


def _call_alone(function: str, *arguments: Any) -> Any:
    set_threads()
    return call(function, *arguments)
