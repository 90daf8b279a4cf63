"""Several trainings in turns: exactly one of them computes at a time, so that what slows the machine down slows all alike.

`Turns` is a Composer callback on the side of the training, `take_turns` the side that gives the turns. Between them is a socket:
a training says that it waits, and is told to go. A training that exits, by finishing or dying, gives its turns away for good.
`Run` is a training that takes part, by train.py in a process of its own.
"""

import contextlib
import json
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from common import MEGABYTE, as_json, environment, peak_memory, say, train_command, write
from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.runs.checkpoints import newest_checkpoint
from prx_composer.runs.folder import read_metrics

WAITING, GO = b"w", b"g"
POLL_SECONDS = 0.2
REFUSED = "error: "  # how train.py begins what it says of a recipe that it doesn't train
TRAINED = "has already been trained for"  # what it says of a run without a step left
INTERRUPTED = 128 + signal.SIGTERM  # its exit code if a signal asked it to stop


# --------------------------------------------------------------------------------------------------- giving turns


@dataclass(frozen=True)
class Player:
    """A training that takes part."""

    name: str
    link: socket.socket  # whose other end its `Turns` callback has
    exited: Callable[[], bool]


def turn_order(players: int, round: int) -> list[int]:
    """Return who plays when: rotated every second round, backwards in between (AB BA BA AB for two)."""
    shift = round // 2 % players
    order = [(index + shift) % players for index in range(players)]
    return order[::-1] if round % 2 else order


def take_turns(starts: list[Callable[[], Player]]) -> Iterator[tuple[int, list[Player]]]:
    """Start players, wait until every one is ready, then let one after the other go, round after round, until all have exited.

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
    """Block until the player waits for its (next) turn, True, or has exited, False."""
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

    The first line of the file has `trained_parameters` and `memory_mb` (before the first step). Then there is one per step:
    `batch`, `turn`, `start`, `loader_ms` (waiting for the batch), `step_ms` (forward, backward, optimizer, and all that
    algorithms do) and `memory_mb`, the peak so far: allocated on the GPU if there is one, else resident memory of this process
    without its data workers. Evaluation, sampling, logging, checkpoints and the change from one pass over the data to the next
    are in no step. A run that goes on adds such lines; a step that it makes again has two, of which the later one holds.

    Args:
        path: JSON-lines file to write.
        link: file descriptor of the socket over which turns are given.
        steps: how long a turn is.
        start: which start of the comparison this is, from 0. Steps of one turn and start were made under the same conditions.
    """

    def __init__(self, path: str, link: int, steps: int = 25, start: int = 0):
        self._path, self._steps, self._start = Path(path), steps, start
        self._link = socket.socket(fileno=link)
        self._file: IO[str] | None = None
        self._left = 0
        self._asked = self._loaded = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", buffering=1)  # by lines: a checkpoint holds no step that isn't in the file
        if self._file.tell():
            self._file.write("\n")  # after what a kill cut short
        trained = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
        self._write({"trained_parameters": trained, "memory_mb": round(peak_memory() / MEGABYTE, 1)})

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
                "turn": (int(state.timestamp.batch) - 1) // self._steps,
                "start": self._start,
                "loader_ms": round(1000 * (self._loaded - self._asked), 3),
                "step_ms": round(1000 * (ended - self._loaded), 3),
                "memory_mb": round(peak_memory() / MEGABYTE, 1),
            }
        )
        self._left -= 1

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
        # The turn itself ends with the process.

    def _wait(self) -> None:
        self._link.send(WAITING)
        if self._link.recv(1) != GO:
            raise RuntimeError("The benchmark that gave the turns is gone.")
        self._left = self._steps

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")


def _now() -> float:
    """Return the seconds of a clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Stack:
    """A recipe's tricks, and what differs from the recipe."""

    name: str  # such as base+muon-ema
    changes: tuple[str, ...]  # files and `algorithms.x=false`, in order

    @property
    def files(self) -> list[str]:
        return [change for change in self.changes if "=" not in change]

    @property
    def left_out(self) -> list[str]:
        return [change.removeprefix("algorithms.").removesuffix("=false") for change in self.changes if "=" in change]


@dataclass
class Run:
    """One stack with one seed.

    Args:
        arguments: of train.py.
        keeps: it may be killed and go on: checkpoints are kept, and how it ended is written beside its folder.
        start_number: which start of the comparison this is, from 0.
        lock: a file descriptor that it keeps open as long as it lives.
    """

    stack: Stack
    seed: int
    folder: Path
    arguments: list[str]
    code_paths: list[str]
    keeps: bool = False
    start_number: int = 0
    lock: int | None = None
    process: "subprocess.Popen[str] | None" = None
    log_begins: int = 0  # bytes of the log that earlier starts wrote

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def end_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.end.json")

    @property
    def steps_file(self) -> Path:
        return self.folder / "turns.jsonl"

    def start(self, steps: int) -> Player:
        """Start the training, or go on with it; it goes up to its first step and waits."""
        ours, theirs = socket.socketpair()
        turns = {"path": str(self.steps_file), "link": theirs.fileno(), "steps": steps, "start": self.start_number}
        own = [f"run_name={self.folder.name}", f"run_folder={self.folder}", f"seed={self.seed}"]
        own += [f"autoresume={str(self.keeps).lower()}", f"code_paths={json.dumps([*self.code_paths, __file__])}"]
        own += [f"callbacks.turns={json.dumps(turns)}"]
        command = train_command([*self.arguments, *own])  # without a launcher, which would need a port
        passed = [theirs.fileno(), *([] if self.lock is None else [self.lock])]
        self.end_file.unlink(missing_ok=True)
        self.log_begins = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log, theirs:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, pass_fds=passed, env=environment(), text=True
            )
        self.process = process
        return Player(self.folder.name, ours, self.has_exited)

    def has_exited(self) -> bool:
        """Return whether the process is gone; if so, keep how it ended."""
        if self.process is None or self.process.poll() is None:
            return False
        if self.keeps and not self.end_file.exists() and not self._found_itself_trained():
            self.end_file.write_text(json.dumps({"code": self.process.returncode, "failed": self._said()}) + "\n")
        return True

    @property
    def end(self) -> dict[str, Any] | None:
        """Return how the run ended, `code` and `failed`, now or in an earlier start; None if it is still to be trained."""
        if self.end_file.exists():
            return read_metrics(self.end_file)[0]
        if self.process is None or self.process.returncode is None:
            return None
        return {"code": self.process.returncode, "failed": self._said()}

    @property
    def was_interrupted(self) -> bool:
        """Return whether it was ended from outside, by a signal, and may well go on."""
        return self.end is not None and (self.end["code"] < 0 or self.end["code"] == INTERRUPTED)

    def rows(self) -> list[dict[str, Any]]:
        """Return what `Turns` wrote: a header, then a line per step; nothing if the run didn't come that far."""
        found = read_metrics(self.steps_file) if self.steps_file.exists() else []
        headers = [row for row in found if "batch" not in row]
        steps = {row["batch"]: row for row in found if "batch" in row}  # the later line of a step that was made twice
        return [headers[0], *(steps[batch] for batch in sorted(steps))] if headers else []

    def failure(self) -> str | None:
        """Return what a run that failed said: of a recipe that is refused all of the message, else the last line of the log."""
        return None if self.end is None else self.end["failed"]

    def own_log(self) -> str:
        """Return what this start of the run wrote into its log."""
        return self.log.read_bytes()[self.log_begins :].decode(errors="replace")

    def _said(self) -> str | None:
        assert self.process is not None
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = [line.strip() for line in self.own_log().splitlines() if line.strip()]
        refused = [index for index, line in enumerate(lines) if line.startswith(REFUSED)]
        if refused:
            return " ".join(lines[refused[-1] :])
        return lines[-1].removeprefix("[rank0]: ") if lines else f"exit code {code}"

    def _found_itself_trained(self) -> bool:
        return self.process is not None and self.process.returncode == 0 and TRAINED in self.own_log()

    def draws_its_end_again(self) -> bool:
        """Take the last checkpoint away from a run that found itself trained: it was killed before its end was scored."""
        if not self._found_itself_trained():
            return False
        newest = newest_checkpoint(self.folder)
        if newest is not None:
            shutil.rmtree(newest.path)
        return True


def train(runs: list[Run], steps: int) -> None:
    """Train all of them in turns of so many steps."""
    try:
        for rounds, playing in take_turns([partial(run.start, steps) for run in runs]):
            if playing and (rounds % 10 == 0 or len(playing) < len(runs)):
                say(f"{rounds * steps} steps each; still training: {', '.join(player.name for player in playing)}")
    finally:
        for run in runs:
            if run.process is not None and run.process.poll() is None:
                run.process.terminate()
    for run in runs:
        if (failure := run.failure()) is not None:
            say(f"{run.folder.name} failed: {failure} (see {run.log})")
    if again := [run for run in runs if run.keeps and run.draws_its_end_again()]:
        train(again, steps)


def outputs(path: Path) -> list[Path]:
    """Return where the numbers, the table and the picture of a comparison go."""
    return [path.with_name(path.name + suffix) for suffix in (".json", ".md", ".png")]


def fresh_folder(output: Path, overwrite: bool) -> Path:
    """Make the empty folder in which the runs of a comparison lie, beside nothing of the same name.

    Raises:
        UserError: there are runs or results already, and they may not be overwritten.
    """
    folder = Path("runs", output.name if output.name.startswith("ablate-") else f"ablate-{output.name}")
    existing = [path for path in (folder, *outputs(output)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} is there already; give --overwrite to delete it, or another --output.")
    for path in existing:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True)
    return folder


def publish(output: Path, result: dict[str, Any], report: str, draw: Callable[[Path], None], table: str) -> None:
    """Write the numbers, the report and the picture of a comparison, and print its table."""
    data, text, picture = outputs(output)
    write(data, as_json(result))
    write(text, report)
    draw(picture)
    say(f"\n{table}\n{data} · {text} · {picture}")
