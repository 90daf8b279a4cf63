"""Several trainings in turns: exactly one of them computes at a time, so that what slows the machine down slows all alike.

`Turns` is a Composer callback on the side of the training, `take_turns` the side that gives the turns. Between them is a socket:
a training says that it waits, and is told to go. Who exits, by finishing or dying, gives its turns away for good.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer import registry

__all__ = ["Player", "Turns", "take_turns", "turn_order"]

WAITING, GO = b"w", b"g"
POLL_SECONDS = 0.2
MEGABYTE = 2**20


# --------------------------------------------------------------------------------------------------- giving turns


@dataclass(frozen=True)
class Player:
    """A training that takes part."""

    name: str
    link: socket.socket  # whose other end its `Turns` callback has
    exited: Callable[[], bool]


def turn_order(players: int, round: int) -> list[int]:
    """Who comes after whom changes every round: rotated every second round, backwards in between (AB BA BA AB for two)."""
    shift = round // 2 % players
    order = [(index + shift) % players for index in range(players)]
    return order[::-1] if round % 2 else order


def take_turns(starts: list[Callable[[], Player]]) -> Iterator[tuple[int, list[Player]]]:
    """Starts players, waits until every one is ready, then lets one after the other go, round after round, until all have exited.

    The first is ready before the others are started, so that data or weights which all need are made or downloaded once.

    Yields:
        after every round, the number of rounds so far and the players that are still there.
    """
    players, playing = [starts[0]()], set[int]()
    if _is_waiting(players[0]):
        playing.add(0)
    players += [start() for start in starts[1:]]
    playing |= {index for index, player in enumerate(players) if index > 0 and _is_waiting(player)}
    round = 0
    while playing:
        for index in turn_order(len(players), round):
            if index in playing and not _one_turn(players[index]):
                playing.remove(index)
        round += 1
        yield round, [players[index] for index in sorted(playing)]


def _one_turn(player: Player) -> bool:
    with contextlib.suppress(OSError):  # it died while it waited
        player.link.send(GO)
    return _is_waiting(player)


def _is_waiting(player: Player) -> bool:
    """Blocks until the player waits for its (next) turn, True, or has exited, False."""
    while True:
        readable = select.select([player.link], [], [], POLL_SECONDS)[0]
        if readable and _receive(player.link) == WAITING:
            return True
        if player.exited():
            return False
        if readable:  # closed, and not yet gone
            time.sleep(POLL_SECONDS)


def _receive(link: socket.socket) -> bytes:
    try:
        return link.recv(1)
    except OSError:
        return b""


# --------------------------------------------------------------------------------------------------- taking turns


@registry.callbacks.register("turns")
class Turns(Callback):
    """Waits for a turn of some steps, and records how long each step took, without the waiting.

    The first line of the file has `trained_parameters` and `memory_mb` (before the first step); then there is one per step:
    `batch`, `turn`, `loader_ms` (waiting for the batch), `step_ms` (forward, backward, optimizer, and all that algorithms do) and
    `memory_mb`, the peak so far: allocated on the GPU if there is one, else resident memory of this process (its data workers not
    counted). Evaluation, sampling, logging, checkpoints and the change from one pass over the data to the next are in no step.

    Args:
        path: JSON-lines file to write.
        link: file descriptor of the socket over which turns are given.
        steps: how long a turn is.
    """

    def __init__(self, path: str, link: int, steps: int = 25):
        self._path, self._steps = Path(path), steps
        self._link = socket.socket(fileno=link)
        self._file: IO[str] | None = None
        self._turn, self._left = -1, 0
        self._asked = self._loaded = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        trained = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
        self._write({"trained_parameters": trained, "memory_mb": _peak_memory()})

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._left == 0:
            self._wait()
        self._asked = _now()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._loaded = _now()

    def batch_end(self, state: State, logger: Logger) -> None:
        ended = _now()
        self._write(
            {
                "batch": int(state.timestamp.batch),
                "turn": self._turn,
                "loader_ms": round(1000 * (self._loaded - self._asked), 3),
                "step_ms": round(1000 * (ended - self._loaded), 3),
                "memory_mb": _peak_memory(),
            }
        )
        self._left -= 1

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
        # The turn itself ends with the process.

    def _wait(self) -> None:
        if self._file is not None:
            self._file.flush()
        self._link.send(WAITING)
        if self._link.recv(1) != GO:
            raise RuntimeError("The benchmark that gave the turns is gone.")
        self._turn, self._left = self._turn + 1, self._steps

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")


def _now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / MEGABYTE, 1)
    status = Path("/proc/self/status")
    if status.exists():  # rather than ru_maxrss, which begins with what the parent had
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    import resource

    unit = 1 if torch.backends.mps.is_available() else 1024  # bytes on macOS, else KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE, 1)
