"""What training waits for while checkpoints are begun; a recipe of `distributed.py checkpoints` names it in `code_paths`."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from prx_composer import registry
from prx_composer.algorithms.gradients import FiniteGuard
from prx_composer.runs import checkpoints

PARTS = {"looking": "is all of it finite", "taking": "the state, where it is", "copying": "of it into memory of its own"}


@registry.callbacks.register("stalls")
class Stalls(Callback):
    """Writes `rank-<n>.json`: of every checkpoint the seconds in which training waited, by part, and those of its write.

    Where the one before is still being written, or the run ends, training waits for a write too: that is `for_a_write`.
    """

    def __init__(self, folder: str):
        self._path = Path(folder) / f"rank-{dist.get_global_rank()}.json"
        self._parts: dict[str, float] = defaultdict(float)  # of what is done at this step
        self._begin = self._begin_processor = 0.0
        self._rows: list[dict[str, Any]] = []
        for owner, name, part in (
            (FiniteGuard, "check_state", "looking"),
            (checkpoints, "content_of", "taking"),
            (checkpoints, "staged", "copying"),
            (checkpoints.CheckpointWriter, "finish", "for_a_write"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        depth = 0  # `staged` calls itself

        def timed(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            begin, depth = time.monotonic(), depth + 1
            try:
                return function(*arguments, **options)
            finally:
                depth -= 1
                if not depth:
                    self._parts[part] += time.monotonic() - begin

        return timed

    def batch_checkpoint(self, state: State, logger: Logger) -> None:  # before the run's own, which does it
        self._parts.clear()
        self._begin, self._begin_processor = time.monotonic(), time.thread_time()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if "copying" in self._parts:
            self._rows.append({"batch": int(state.timestamp.batch), "stalled": time.monotonic() - self._begin, **self._parts})
            self._rows[-1]["processor"] = time.thread_time() - self._begin_processor
        self._parts.clear()

    def close(self, state: State, logger: Logger) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._rows))
