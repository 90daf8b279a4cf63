"""What the scripts that kill a command again and again share: its processes, who of them is killed, and what it has written."""

import contextlib
import hashlib
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["Killable", "children", "contents", "counted", "differences", "processor_time", "session_of"]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(first: dict[str, str], second: dict[str, str]) -> set[str]:
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def counted(kills: list[dict[str, Any]], by: str) -> dict[str, int]:
    return dict(sorted(Counter(kill[by] for kill in kills).items()))


def _fields(pid: int) -> list[str]:
    """Of /proc/<pid>/stat, from the state on: parent is the second, session the fourth."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def session_of(leader: int) -> dict[int, int]:
    """Every process of the leader's session: id → its parent's."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = _fields(int(entry.name))
                if int(fields[3]) == leader:
                    found[int(entry.name)] = int(fields[1])
    return found


def children(parent: int) -> list[int]:
    return sorted(pid for pid, its in session_of(parent).items() if its == parent)


def processor_time(pid: int) -> int:
    """In ticks, 0 for one that is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = _fields(pid)
        return int(fields[11]) + int(fields[12])
    return 0


class Killable:
    """A command that can be started, killed and started again, in a session of its own.

    Args:
        command: what is run; its output goes to `log`.
    """

    def __init__(self, command: list[str], log: Path):
        self.command, self.log = command, log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def leader(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | ENVIRONMENT
            )

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill_one(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def kill_leader(self) -> None:
        self.kill_one(self.leader)
        self.finish()

    def kill_everything(self) -> None:
        """The leader first, as nobody shall see the others go."""
        for pid in sorted(session_of(self.leader), key=lambda pid: pid != self.leader):
            self.kill_one(pid)
        self.finish()

    def finish(self) -> int:
        """Waits for the leader; its exit code."""
        assert self.process is not None
        return self.process.wait()
