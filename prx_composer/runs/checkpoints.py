"""Checkpoints that are whole or not there: written aside, renamed when complete, and verified before they are read.

<run folder>/checkpoints/ba2000/checkpoint.json     batch, ranks, recipe, finite, and size and CRC-32 of every file
                                rank0.pt             full state of the run; or, when it is sharded,
                                .metadata __0_0.distcp …
<run folder>/checkpoints/.ba4000.partial/            being written; what a kill left of it is deleted
"""

import copy
import datetime
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from composer.core import State
from composer.utils import dist, reproducibility
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from prx_composer.common.errors import UserError
from prx_composer.common.files import crc32, inside, sync
from prx_composer.recipe.config import NEEDS_CODE, needs_code

log = logging.getLogger(__name__)

INDEX = "checkpoint.json"
MONOLITH = "rank0.pt"
MERGED = "merged"  # in the index of weights that were averaged and not trained: of which checkpoints
_NAME = re.compile(r"ba(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint's folder."""

    path: Path
    batch: int

    @property
    def load_path(self) -> str:
        """What Composer's Trainer takes as `load_path`: the file, or the folder of a sharded one."""
        monolith = self.path / MONOLITH
        return str(monolith if monolith.exists() else self.path)

    def index(self) -> dict[str, Any]:
        """Return `batch`, `ranks`, `recipe` and `files`. Raise ValueError or OSError if they can't be read."""
        index = json.loads((self.path / INDEX).read_text())
        if not isinstance(index, dict) or not isinstance(index.get("files"), dict):
            raise ValueError(f"{self.path / INDEX} is not a checkpoint's index.")
        return index


# ------------------------------------------------------------------------------------------------------- reading


def all_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints in `<run folder>/checkpoints`, oldest first, unverified."""
    named = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("ba*")]
    found = [Checkpoint(path, int(match[1])) for path, match in named if match and path.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.batch)


_in_hand: dict[Path, Future[Checkpoint]] = {}  # by folder: what this process writes, or has written


def newest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a run, unverified: for messages. If this process is writing one, wait for it."""
    if (written := _in_hand.get((run_folder / "checkpoints").resolve())) is not None:
        wait([written])
    found = all_checkpoints(run_folder / "checkpoints")
    return found[-1] if found else None


def damage(checkpoint: Checkpoint) -> str | None:
    """Say what is wrong with a checkpoint, by its index: a file missing, cut short or changed; None if it is whole."""
    try:
        files = checkpoint.index()["files"]
    except (OSError, ValueError) as error:
        return f"{INDEX} cannot be read ({error})"
    for name, expected in files.items():
        try:
            path = inside(checkpoint.path, name)
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if crc32(path) != expected["crc32"]:
                return f"{name} was changed: its CRC-32 is another"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except ValueError as error:
            return str(error)
    return None


def newest_whole_checkpoint(
    folder: Path, unfit: Callable[[Checkpoint], str | None] = lambda checkpoint: None
) -> Checkpoint | None:
    """Return the newest checkpoint that is whole; name damaged ones before it in the log and rename them `ba<n>.damaged`.

    Args:
        unfit: says what else is wrong with one, if anything is.

    Raises:
        UserError: there are checkpoints, and none is whole: going on from nothing would silently lose the run.
    """
    for checkpoint in reversed(all_checkpoints(folder)):
        wrong = damage(checkpoint) or unfit(checkpoint)
        if wrong is None and checkpoint.index().get(MERGED):
            raise UserError(
                f"autoresume: {checkpoint.path} holds averaged weights alone, from which no run goes on. Begin another run with "
                f"them: run_name=<another name> model.init_from={folder.parent}"
            )
        if wrong is None:
            log.info("Going on from %s", checkpoint.path)
            return checkpoint
        aside = checkpoint.path.with_name(f"{checkpoint.path.name}.damaged")
        log.warning("Checkpoint %s is damaged: %s. It is kept as %s.", checkpoint.path, wrong, aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.path.rename(aside)
    if damaged := sorted(folder.glob("ba*.damaged")):
        raise UserError(
            f"autoresume: no checkpoint in {folder} is whole: {', '.join(path.name for path in damaged)}. Delete these to train "
            "from the beginning, or start another run with run_name=<another name>."
        )
    if folder.is_dir():
        log.info("There is no checkpoint in %s yet: the run begins.", folder)
    return None


def without_new_callbacks(load_path: str) -> Callable[[dict[str, Any]], None]:
    """Return what Composer's `load_ignore_keys` takes: it removes callbacks that are new to the run from the state to be read.

    A sharded checkpoint is read key by key, and has none of theirs. Everything else must be there.
    """

    def forget(content: dict[str, Any]) -> None:
        if not Path(load_path).is_dir():
            return
        saved = FileSystemReader(load_path).read_metadata().planner_data.values()
        known = {path[2] for path in saved if path[:2] == ("state", "callbacks")}
        callbacks = content["state"].get("callbacks", {})
        for name in [name for name, state in callbacks.items() if state and name not in known]:
            log.info("%s begins anew: the checkpoint has none.", name)
            del callbacks[name]

    return forget


# ------------------------------------------------------------------------------------------------------- writing


class CheckpointWriter:
    """Writes the full state of a run in the background, one checkpoint at a time; each is there under its name when it is whole.

    `begin` copies the state into host memory, on all ranks at the same step, and training goes on; a thread writes it. A sharded
    state (FSDP2) is written shard by shard, each rank its own; otherwise rank 0 writes all. Files are flushed to the disk before
    the rename, so that a machine that loses power leaves the checkpoint before this one. Older ones are deleted after that.

    Args:
        folder: `<run folder>/checkpoints`, on a file system that all ranks share.
        keep: how many of the newest; −1 = all.
        timeout: seconds that the thread of one rank waits for those of the others.
    """

    def __init__(self, folder: Path, keep: int = -1, timeout: float = 600.0):
        self._folder, self._keep = folder, keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.written: Future[Checkpoint] | None = None
        self.batch, self.seconds = 0, 0.0
        """Of the last one begun: its batch, and how long it took once it is whole."""
        # Of its own: a thread's collectives must not come between those of training, whose order is the same on all ranks.
        limit = datetime.timedelta(seconds=timeout)
        self._group = torch_dist.new_group(backend="gloo", timeout=limit) if torch_dist.is_initialized() else None

    @property
    def is_writing(self) -> bool:
        """Whether one was begun that `finish` has not been asked for."""
        return self.written is not None

    @property
    def is_done(self) -> bool:
        """Whether `finish` has something to tell and needn't wait for it."""
        return self.written is not None and self.written.done()

    def begin(self, state: State, recipe: dict[str, Any], finite: bool = False) -> None:
        """Copy the state and have it written, after `finish` of the one before; on all ranks at once.

        Args:
            state: Composer's.
            recipe: of the run, kept beside it.
            finite: the state was looked at, and all of it is.
        """
        assert self.written is None
        start, self.batch = time.monotonic(), int(state.timestamp.batch)
        sharded = state.fsdp_sharded_state_dict_enabled
        content: dict[str, Any] = {"state": content_of(state), "rng": reproducibility.get_rng_state()}
        if dist.get_global_rank() != 0:
            content = {"state": content["state"]} if sharded else {}  # Composer reads rank 0's random state, which has all
        content = staged(content)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        index = {"version": 1, "batch": self.batch, "ranks": dist.get_world_size(), "torch": torch.__version__}
        index |= {"finite": finite, NEEDS_CODE: needs_code(recipe), "recipe": recipe}

        def write() -> Checkpoint:
            try:
                return self._write(content, sharded, index)
            finally:
                content.clear()
                self.seconds = time.monotonic() - start

        self.written = _in_hand[self._folder.resolve()] = self.thread.submit(write)

    def finish(self) -> Checkpoint:
        """Wait for the one that was begun, and return it.

        Raises:
            OSError: on all ranks, if one of them could not write. What was written is deleted.
        """
        assert self.written is not None
        written, self.written = self.written, None
        return written.result()

    def close(self) -> None:
        """Wait for the one that was begun, and end the thread."""
        self.thread.shutdown()
        _in_hand.pop(self._folder.resolve(), None)
        if self._group is not None:
            torch_dist.destroy_process_group(self._group)
            self._group = None
        if self.written is not None and (error := self.written.exception()) is not None:
            log.error("The checkpoint of batch %d could not be written: %s", self.batch, error)

    def _write(self, content: dict[str, Any], sharded: bool, index: dict[str, Any]) -> Checkpoint:
        rank, name = dist.get_global_rank(), f"ba{index['batch']}"
        path, partial = self._folder / name, self._folder / f".{name}.partial"

        def make_anew() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        self._together(lambda: make_anew() if rank == 0 else None)
        try:
            if sharded:
                _save_sharded(content, partial, self._group)
            else:
                self._together(lambda: _save(content, partial / MONOLITH) if rank == 0 else None)
            mine = self._together(lambda: {file.name: _sealed(file) for file in _files_of(rank, partial)})
            index["files"] = {name: facts for part in mine for name, facts in part.items()}
            self._together(lambda: _publish(partial, path, index) if rank == 0 else None)
        except OSError:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if rank == 0:
            keep_newest(self._folder, self._keep)
        return Checkpoint(path, index["batch"])

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Call `work` on every rank and gather what it returns; if it fails on one, raise OSError on all."""
        result, failure = None, None
        try:
            result = work()
        except OSError as error:
            failure = f"rank {dist.get_global_rank()}: {error}"
        results: list[Any] = [(result, failure)]
        if dist.get_world_size() > 1:
            results *= dist.get_world_size()
            torch_dist.all_gather_object(results, (result, failure), group=self._group)
        if failures := [failed for _, failed in results if failed is not None]:
            raise OSError("; ".join(failures))
        return [done for done, _ in results]


def content_of(state: State) -> dict[str, Any]:
    """Return `state.state_dict()` with all tensors where they are, whereof a sharded one has no copies either.

    Composer's own copies sharded weights and moments to pageable memory first, for each of which the device is waited for.
    """
    if not state.fsdp_sharded_state_dict_enabled:
        return state.state_dict()
    names = state.serialized_attributes
    state.serialized_attributes = [name for name in names if name not in ("model", "optimizers")]
    try:
        content = state.state_dict()
    finally:
        state.serialized_attributes = names
    (optimizer,) = state.optimizers
    moments = {type(optimizer).__qualname__: get_optimizer_state_dict(state.model, optimizer)}
    return content | {"model": get_model_state_dict(state.model), "optimizers": moments}


def staged(value: Any) -> Any:
    """Return a copy of a nested state in host memory, which nothing that trains changes any more.

    What lies on a GPU goes to pinned memory, which PyTorch keeps for the next time; it is there once the device was waited for.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its own kind, with the attributes that a module's state has
        copied.update({key: staged(item) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        return [staged(item) for item in value]
    if type(value) is tuple:
        return tuple(staged(item) for item in value)
    return copy.deepcopy(value)


def write_merged(folder: Path, state: dict[str, Any], index: dict[str, Any]) -> Checkpoint:
    """Write a checkpoint of weights alone, in this process alone, into a folder that is not in use yet.

    Args:
        folder: `<run folder>/checkpoints`.
        state: as Composer's has it: `model`, `timestamp` and what else sampling needs.
        index: of the checkpoint that it stands for, and `merged`.

    Raises:
        OSError: it could not be written.
    """
    path = folder / f"ba{int(index['batch'])}"
    path.mkdir(parents=True)
    _save({"state": state}, path / MONOLITH)
    files = {MONOLITH: _sealed(path / MONOLITH)}
    (path / INDEX).write_text(json.dumps(index | {"ranks": 1, "finite": True, "files": files}, indent=1, default=str) + "\n")
    return Checkpoint(path, int(index["batch"]))


def _save_sharded(content: dict[str, Any], folder: Path, group: Any) -> None:
    try:
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        save_sharded(content, storage_writer=FileSystemWriter(folder), planner=planner, process_group=group)
    except CheckpointException as error:  # raised on all ranks
        raise OSError("; ".join(str(failure[0]) for failure in error.failures.values())) from error


def _save(content: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's word for a write that the system refused
        raise OSError(str(error).strip().partition("\n")[0]) from error


def _files_of(rank: int, folder: Path) -> list[Path]:
    """Return the files that this rank wrote."""
    mine = sorted(folder.glob(f"__{rank}_*.distcp"))
    return [*mine, *(folder / name for name in (MONOLITH, ".metadata") if (folder / name).exists())] if rank == 0 else mine


def _sealed(path: Path) -> dict[str, int]:
    """Flush a file to the disk; return what it is recognised by."""
    sync(path)
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


def _publish(partial: Path, path: Path, index: dict[str, Any]) -> None:
    (partial / INDEX).write_text(json.dumps(index, indent=1, default=str) + "\n")
    sync(partial / INDEX)
    sync(partial)
    if path.exists():  # of a run that went on from an older one
        _delete(path)
    partial.rename(path)
    sync(path.parent)


# ------------------------------------------------------------------------------------------------------ deleting


def keep_newest(folder: Path, count: int) -> None:
    """Delete all checkpoints but the newest `count`; −1 keeps all. On one rank."""
    found = all_checkpoints(folder)
    for checkpoint in found[: max(len(found) - count, 0)] if count >= 0 else []:
        _delete(checkpoint.path)


def clean_up(folder: Path) -> None:
    """Delete what a kill left half-written or half-deleted. On one rank, while nobody writes."""
    for path in [*folder.glob(".ba[0-9]*.partial"), *folder.glob(".ba[0-9]*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a checkpoint at once by name, so that a kill leaves no half of it under a checkpoint's name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)
