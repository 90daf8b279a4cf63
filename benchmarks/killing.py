"""Commands that are killed again and again, and what comes out in the end; for kills.py."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import say

LONGEST = 900.0  # seconds that a command may take to its moment
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# ------------------------------------------------------------------------------------------------------ processes


def fields(pid: int) -> list[str]:
    """Return what /proc/<pid>/stat says, from the state on: parent is the second, session the fourth."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def session_of(leader: int) -> dict[int, int]:
    """Return every process of the leader's session, ranks in process groups of their own among them: id → its parent's."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state = fields(int(entry.name))
                if int(state[3]) == leader:
                    found[int(entry.name)] = int(state[1])
    return found


def processor_time(pid: int) -> int:
    """Return the ticks that a process has computed, 0 for one that is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        state = fields(pid)
        return int(state[11]) + int(state[12])
    return 0


class Killable(ABC):
    """A command that can be started, killed and started again, in a session of its own.

    Args:
        output: the folder that it writes.
        command: what is run; its output goes to a log beside the folder.
    """

    TURNS: ClassVar[tuple[str, ...]] = ("everything",)  # who is killed
    MOMENTS: ClassVar[dict[str, float]] = {}  # when: the most seconds that the kill comes after the moment
    ORDER: ClassVar[tuple[str, ...]] = ()  # of the moments
    OUTLIVES_WORKERS = False  # whether it goes on when one of its processes is killed

    def __init__(self, output: Path, command: list[str]):
        self.output, self.command = output, command
        self.log = output.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, turn: int = 0) -> None:
        """Start it, the so many-th turn of `TURNS`."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ENVIRONMENT
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )

    @property
    def leader(self) -> int:
        assert self.process is not None
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def finish(self) -> int:
        """Wait for the leader; return its exit code."""
        assert self.process is not None
        return self.process.wait()

    def kill_one(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def workers(self) -> list[int]:
        """Return the processes of which one may be killed alone."""
        return []

    def kill(self, victim: str, rng: random.Random) -> str:
        """Kill everything, the leader or a worker; return who was killed."""
        workers = self.workers()
        if victim == "worker" and workers:
            self.kill_one(rng.choice(workers))
            if not self.OUTLIVES_WORKERS:
                self.finish()
            return victim
        if victim == "leader" and workers:
            self.kill_one(self.leader)
        else:
            victim = "everything"  # the leader first, as nobody shall see the others go
            for pid in sorted(session_of(self.leader), key=lambda pid: pid != self.leader):
                self.kill_one(pid)
        self.finish()
        return victim

    def wait_for(self, moment: str, rng: random.Random) -> bool:
        """Wait until a random time after the moment; False if the command ended first."""
        has_come, deadline = self.watch(moment, rng), time.monotonic() + LONGEST
        while self.is_alive() and time.monotonic() < deadline:
            if moment == "start-up" or has_come():
                time.sleep(rng.uniform(0, self.MOMENTS[moment]))
                return self.is_alive()
            time.sleep(0.001)
        return False

    # What a kind of command has to say.

    @abstractmethod
    def watch(self, moment: str, rng: random.Random) -> Callable[[], bool]:
        """Return what says whether a moment has come, from now on."""

    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """Return where it is; `moment` is its name."""

    def clear(self) -> None:
        """Delete all that it has written."""
        shutil.rmtree(self.output, ignore_errors=True)

    def outcome(self) -> dict[str, Any]:
        """Return what must be equal in the end."""
        return contents(self.output)


def contents(folder: Path) -> dict[str, Any]:
    """Return the hash of every file below a folder, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested states are not the same to the bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [path]
    if isinstance(first, dict) and isinstance(second, dict):
        return [d for key in first.keys() | second.keys() for d in differences(first.get(key), second.get(key), f"{path}/{key}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [d for i, (a, b) in enumerate(zip(first, second, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    return [] if type(first) is type(second) and first == second else [path]


def kill_again_and_again(whole: Killable, killed: Killable, kills: int, minutes: float, seed: int) -> dict[str, Any]:
    """Run one to its end undisturbed, kill the other, and compare every time that it comes to its end; then begin it anew."""
    whole.clear()  # both may have been here before
    killed.clear()
    rng, began = random.Random(seed), time.monotonic()
    whole.start(-1)
    if whole.finish() != 0:
        sys.exit(f"The undisturbed one failed:\n{whole.log.read_text()[-3000:]}")
    undisturbed, expected = time.monotonic() - began, whole.outcome()
    log: list[dict[str, Any]] = []
    unequal: set[str] = set()
    compared = failures = 0
    kills_end = time.monotonic() + 60 * minutes
    while failures <= 3:
        more = len(log) < kills and time.monotonic() < kills_end
        if not killed.is_alive():
            killed.start(len(log) if more else -1)
        if more and killed.wait_for(killed.ORDER[len(log) % len(killed.ORDER)], rng):
            before = killed.progress()
            log.append(before | {"victim": killed.kill(killed.TURNS[len(log) % len(killed.TURNS)], rng)})
            say(json.dumps(log[-1]))
        elif killed.finish() == 0:
            unequal |= set(differences(expected, killed.outcome()))
            compared += 1
            if not more:
                break
            killed.clear()
        else:
            failures += 1
            say(f"It failed, not killed:\n{killed.log.read_text()[-3000:]}")
    return {
        "kills": len(log),
        "kills_by_moment": dict(sorted(Counter(kill["moment"] for kill in log).items())),
        "kills_by_victim": dict(sorted(Counter(kill["victim"] for kill in log).items())),
        "compared": compared,
        "failures": failures,
        "equal": bool(expected) and compared > 0 and not unequal,
        "unequal": sorted(unequal)[:20],
        "seconds_undisturbed": round(undisturbed, 1),
        "failed": bool(unequal or failures or not expected or not compared),
        "log": log,
    }
