"""Backends of a conversion: where work units run (processes of this machine, Ray), and where what they make is kept.

Both engines call the same function on the same units. They are given its name, so that the process that leads imports nothing
heavy and says what is wrong at once. On disk or in an object store, nothing half-done is ever taken for done:

<output>/.<split>.work/plan.json        settings and work units, written first
<output>/.<split>.work/units/000012     of a unit that is done: its shards and unit.json (remote: unit.json alone)
<output>/.<split>.work/hashes/000012    of a unit that was hashed
<output>/<split>/…                      what data/format.py describes; on disk it appears under its name only when it is whole,
                                        in an object store its manifest, without which nobody reads it, is written last
<output>/heldout/…                      with --heldout: likewise, put in place just before <output>/<split>
"""

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import pkgutil
import shutil
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from prx_composer.commands.convert.records import Unit
from prx_composer.common.errors import UserError
from prx_composer.common.files import sync, write_whole
from prx_composer.common.installation import adding
from prx_composer.data.format import HELDOUT, MANIFEST
from prx_composer.data.storage import fetched, is_remote, join, remote_keys, upload

log = logging.getLogger(__name__)

ENGINES = ("local", "ray")
UNITS = "prx_composer.commands.convert.units"
CRASHES = 3  # of the same units, before a conversion gives up
POLLED = 0.3  # seconds
SLOTS = 1024  # of processes
STATS = "conversion.json"
RESULT = "unit.json"  # beside the shards of a unit

Task = tuple[Any, ...]
Listener = Callable[[int], None]


class Progress:
    """How many records this process has looked at, told to whoever shows it: in this process, or in the one that leads."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, seen: Listener | None = None, shared: Any = None) -> None:
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
        """Tell the number now."""
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


def run(
    engine: str, workers: int, function: str, tasks: list[Task], address: str | None = None, seen: Listener | None = None
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
            yield _call(function, *task)
            progress.tell()
    else:
        yield from _run_in_processes(workers, function, tasks, seen or (lambda _: None))


def _call(function: str, *arguments: Any) -> Any:
    return pkgutil.resolve_name(function)(*arguments)


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
    _set_threads()


def _set_threads() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_processes(workers: int, function: str, tasks: list[Task], seen: Listener) -> Iterator[Any]:
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
                        running[pool.submit(_call, function, *left[number])] = number
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
                named = ", ".join(str(task[2:3] or task) for task in list(left.values())[: 2 * workers])
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
        raise UserError(f"--engine ray needs Ray on every node: {adding('cluster')}") from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=1, max_retries=CRASHES)(_call_with_one_thread)
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting, running = list(tasks), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(remote.remote(function, *waiting.pop(0)))
        done, running = ray.wait(running)
        yield from ray.get(done)


def _call_with_one_thread(function: str, *arguments: Any) -> Any:
    _set_threads()
    return _call(function, *arguments)


# --------------------------------------------------------------------------------------------------------- outputs


class LocalOutput:
    """The state of one conversion on a disk that every worker sees."""

    def __init__(self, output: str, split: str):
        self._final, self._heldout, self._work = (Path(output, name) for name in (split, HELDOUT, f".{split}.work"))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the one process that leads a conversion."""
        self._work.parent.mkdir(parents=True, exist_ok=True)
        with (self._work.parent / f"{self._work.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"--output: another conversion is writing {self._final}.") from error
            for leftover in self._work.glob("units/.*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield

    def put(self, name: str, content: bytes) -> None:
        """Write a file of the work folder, all or nothing."""
        path = self._work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def get(self, name: str) -> bytes | None:
        """Return a file of the work folder; None if it is not there."""
        path = self._work / name
        return path.read_bytes() if path.exists() else None

    def names(self, folder: str) -> set[str]:
        """Return the names of the units that are done in a folder of the work folder: `units` or `hashes`."""
        return {path.name for path in (self._work / folder).glob("[!.]*")}

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make an empty folder to write a unit in."""
        folder = self._work / "units" / f".{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, unit: Unit, folder: Path, result: dict[str, Any]) -> None:
        """Make a whole unit count as done. Doing so twice is harmless: both are the same."""
        with contextlib.suppress(OSError):  # another process was faster
            folder.rename(self._work / "units" / unit.name)
        if not (self._work / "units" / unit.name).is_dir():
            raise OSError(f"{self._work / 'units' / unit.name} cannot be written.")
        sync(self._work / "units")

    def result(self, unit: Unit) -> dict[str, Any]:
        """Return the result with which a unit was committed."""
        return json.loads((self._work / "units" / unit.name / RESULT).read_text())

    def finished(self) -> dict[str, Any] | None:
        """Return the statistics of a conversion that is whole; None if it is not."""
        if not self._final.exists():
            return None
        if not (self._final / STATS).exists() or not (self._final / MANIFEST).exists():
            raise UserError(f"--output: {self._final} is there and was not written by `prx data convert`; name a new folder.")
        return json.loads((self._final / STATS).read_text())

    def has_heldout(self) -> bool:
        """Return whether there is a split of what is held out."""
        return self._heldout.exists()

    def finish(self, units: list[Unit], buckets: list[str], files: dict[str, bytes]) -> None:
        """Put the shards of all units in place, then these files in this order, the split HELDOUT first. Take away the work."""
        whole, about = self._work / "whole", files.get(f"{HELDOUT}/{STATS}")
        if about is not None and self._heldout.exists():  # put in place before a kill
            if not (self._heldout / STATS).exists() or (self._heldout / STATS).read_bytes() != about:
                raise UserError(f"--output: something else has made {self._heldout} meanwhile; delete it, or name a new folder.")
            buckets, about = [bucket for bucket in buckets if not bucket.startswith(f"{HELDOUT}/")], None
            files = {name: content for name, content in files.items() if not name.startswith(f"{HELDOUT}/")}
        for bucket in buckets:
            (whole / bucket).mkdir(parents=True, exist_ok=True)
            for unit in units:
                source = self._work / "units" / unit.name / bucket
                if source.is_dir():  # not, if it was moved before a kill
                    source.rename(whole / bucket / unit.name)
            sync(whole / bucket)
        for leftover in whole.rglob(".*"):  # of a file that was being written when a kill came
            leftover.unlink()
        for name, content in files.items():
            write_whole(whole / name, content)
        if about is not None:
            sync(whole / HELDOUT)
            (whole / HELDOUT).rename(self._heldout)
            sync(self._heldout.parent)
        sync(whole)
        whole.rename(self._final)
        sync(self._final.parent)
        self.clean()

    def clean(self) -> str:
        """Take the work folder away, where that can be done. Return what to do where it cannot."""
        shutil.rmtree(self._work, ignore_errors=True)
        return ""


class RemoteOutput:
    """The same in an object store.

    Shards go to their final names at once: whoever writes a unit again writes the same bytes there.
    """

    def __init__(self, output: str, split: str):
        self._final, self._heldout, self._work = (join(output, name) for name in (split, HELDOUT, f".{split}.work"))

    def lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # object stores have none; two conversions of the same settings write the same bytes

    def put(self, name: str, content: bytes) -> None:
        _upload_contents(self._work, {name: content})

    def get(self, name: str) -> bytes | None:
        return _download_content(join(self._work, name)) if name in _keys_below(self._work) else None

    def names(self, folder: str) -> set[str]:
        return _keys_below(join(self._work, folder))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
            yield Path(folder)

    def commit(self, unit: Unit, folder: Path, result: dict[str, Any]) -> None:
        for bucket, shards in result["shards"].items():
            place = join(self._final if bucket.count("/") == 0 else self._heldout, bucket.rpartition("/")[2], unit.name)
            upload(folder / bucket, place, [shard["raw_data"]["basename"] for shard in shards])
        self.put(f"units/{unit.name}", json.dumps(result).encode())

    def result(self, unit: Unit) -> dict[str, Any]:
        return json.loads(_download_content(join(self._work, "units", unit.name)))

    def finished(self) -> dict[str, Any] | None:
        keys = _keys_below(self._final)
        if MANIFEST not in keys:
            return None
        if STATS not in keys:
            raise UserError(f"--output: {self._final} is there and was not written by `prx data convert`; name a new folder.")
        return json.loads(_download_content(join(self._final, STATS)))

    def has_heldout(self) -> bool:
        return MANIFEST in _keys_below(self._heldout)

    def finish(self, units: list[Unit], buckets: list[str], files: dict[str, bytes]) -> None:
        held_out = {name: content for name, content in files.items() if name.startswith(f"{HELDOUT}/")}
        if held_out:
            _upload_contents(self._heldout, {name.removeprefix(f"{HELDOUT}/"): content for name, content in held_out.items()})
        _upload_contents(self._final, {name: content for name, content in files.items() if name not in held_out})

    def clean(self) -> str:
        return f" Name a new --output for the next try, or delete {self._work}: mosaicml-streaming has no way to."


Output = LocalOutput | RemoteOutput


def open_output(output: str, split: str) -> Output:
    """Return the state of the conversion that writes this split."""
    return RemoteOutput(output, split) if is_remote(output) else LocalOutput(output, split)


def _keys_below(folder: str) -> set[str]:
    prefix = urlparse(folder).path.strip("/") + "/"
    return {key.removeprefix(prefix) for key in remote_keys(folder) if key.startswith(prefix)}


def _download_content(path: str) -> bytes:
    with fetched(path) as file:
        return file.read_bytes()


def _upload_contents(remote: str, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        upload(Path(folder), remote, list(files))
