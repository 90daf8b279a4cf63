"""A run that kills itself, and the ranks beside it, at one moment of a checkpoint; a recipe of kills.py names it in `code_paths`.

KILL_POINT says where: "staging", "writing", "sealing", "publishing", "deleting", or nothing. KILL_SEED decides how far in.
"""

import io
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from prx_composer import registry
from prx_composer.runs import checkpoints

POINTS = ("staging", "writing", "sealing", "publishing", "deleting")
MARK = Path(os.environ.get("KILL_MARK", "kill-mark"))  # written just before, for whoever counts


@registry.callbacks.register("samples")
class Samples(Callback):
    """Writes the samples of every batch, of all ranks, to samples.jsonl in the run folder."""

    def __init__(self, folder: str):
        self._path = Path(folder) / "samples.jsonl"

    def batch_start(self, state: State, logger: Logger) -> None:
        samples = sorted(itertools.chain(*dist.all_gather_object(state.batch["sample_id"].tolist())))
        if dist.get_global_rank() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps({"batch": int(state.timestamp.batch), "samples": samples}) + "\n")


class Points:
    """Counts how often one function is called from the second checkpoint of a process on, and kills at one of the calls."""

    def __init__(self, point: str, seed: int):
        self._point, self._random, self._checkpoints = point, random.Random(seed), 0
        self._at: int | None = None
        self._calls = 0
        self._longest = {"staging": 600, "writing": 200, "sealing": 2, "publishing": 3, "deleting": 1}

    def new_checkpoint(self) -> None:
        self._checkpoints += 1
        if self._checkpoints == 2:
            self._at = self._random.randrange(self._longest.get(self._point, 1))

    def is_due(self, point: str) -> bool:
        """Return whether this is the call that was drawn; if there are fewer calls, the first of the next checkpoint."""
        if point != self._point or self._at is None:
            return False
        self._calls += 1
        return self._calls > self._at or self._checkpoints > 2

    def die(self) -> None:
        MARK.write_text(f"{self._point} {self._calls}")
        os.kill(os.getpid(), signal.SIGKILL)

    def passed(self, point: str) -> None:
        if self.is_due(point):
            self.die()


class CutShort:
    """A file of which half of what is written first is written, before the end."""

    def __init__(self, file: Any, points: Points):
        self._file, self._points = file, points

    def write(self, content: Any) -> int:
        self._file.write(bytes(content)[: len(content) // 2])
        self._file.flush()
        self._points.die()
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def around(module: Any, name: str, before: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
    """Call something before and after a function of a module."""
    function = getattr(module, name)

    def called(*arguments: Any, **options: Any) -> Any:
        before()
        result = function(*arguments, **options)
        after()
        return result

    setattr(module, name, called)


def install(points: Points) -> None:
    begin = checkpoints.CheckpointWriter.begin

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        points.new_checkpoint()
        begin(self, *arguments, **options)

    checkpoints.CheckpointWriter.begin = counted
    around(checkpoints, "staged", lambda: points.passed("staging"))
    save = torch.save

    def saved(content: Any, file: Any, *arguments: Any, **options: Any) -> None:  # of every tensor of a sharded state
        on_disk = hasattr(file, "write") and not isinstance(file, io.BytesIO)  # torch wraps the file that shards go to
        stream: Any = CutShort(file, points) if on_disk and points.is_due("writing") else file
        save(content, stream, *arguments, **options)

    torch.save = saved
    around(checkpoints, "_sealed", lambda: points.passed("sealing"))
    publish, sync = checkpoints._publish, checkpoints.sync

    def published(*arguments: Any) -> None:
        around(
            checkpoints, "sync", lambda: points.passed("publishing")
        )  # before the index, the folder and its parent are flushed
        try:
            publish(*arguments)
        finally:
            checkpoints.sync = sync

    checkpoints._publish = published
    delete = checkpoints._delete

    def deleted(path: Path) -> None:
        remove = shutil.rmtree

        def removed(folder: Any, **options: Any) -> None:
            if Path(folder).exists():
                points.passed("deleting")
            remove(folder, **options)

        shutil.rmtree = removed
        try:
            delete(path)
        finally:
            shutil.rmtree = remove

    checkpoints._delete = deleted


if os.environ.get("KILL_POINT"):
    install(Points(os.environ["KILL_POINT"], int(os.environ.get("KILL_SEED", "0"))))
