"""A callback for code_paths: a machine that others use too, so that steps and evaluation are held up at random."""

import json
import math
import random
import time
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer import registry


@registry.callbacks.register("slow_machine")
class SlowMachine(Callback):
    """Sleeps in every step: a random walk between a fifth of `seconds` and five times that; now and then three times as long.

    Args:
        folder: where `slow_machine-<n>.json` says how long the longest step of the process took, with the sleep.
        seed: of the sleeps; a resumed process draws others.
        seconds: of the typical sleep.
    """

    def __init__(self, folder: str, seed: int = 0, seconds: float = 0.1):
        self._folder, self._seed, self._seconds = Path(folder), seed, seconds
        self._level = 0.0
        self._asked_for = 0.0
        self._longest = 0.0
        self._steps = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._draw = random.Random(self._seed * 1_000_003 + int(state.timestamp.batch))

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked_for = time.monotonic()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._level = min(max(self._level + self._draw.gauss(0, 0.15), -math.log(5)), math.log(5))
        time.sleep(self._seconds * math.exp(self._level) * (3 if self._draw.random() < 0.02 else 1))

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        time.sleep(self._seconds * self._draw.uniform(0.5, 1.5))

    def batch_end(self, state: State, logger: Logger) -> None:
        self._longest = max(self._longest, time.monotonic() - self._asked_for)
        self._steps += 1

    def close(self, state: State, logger: Logger) -> None:
        if self._steps:
            number = len(list(self._folder.glob("slow_machine-*.json")))
            facts = {"longest_step": self._longest, "steps": self._steps}
            (self._folder / f"slow_machine-{number}.json").write_text(json.dumps(facts))
