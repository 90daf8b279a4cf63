"""A copy of a run in an object store: its newest whole checkpoint, and what else a machine needs to go on with the run.

<save_folder>/checkpoints/ba2000/…    every file, and checkpoint.json as the last: without it, it is no checkpoint
<save_folder>/config.yaml  metrics.jsonl  tokenizer/…  frozen/…    and the other files of the run folder, but no images
"""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prx_composer.common.errors import UserError
from prx_composer.common.files import inside
from prx_composer.data.storage import delete, download, join, relative_name, survey, upload

if TYPE_CHECKING:  # the process that copies imports neither Composer nor, but for the store's SDK, PyTorch
    from prx_composer.runs.checkpoints import Checkpoint

log = logging.getLogger(__name__)

CHECKPOINTS, INDEX = "checkpoints", "checkpoint.json"
_KEPT = ("tokenizer", "frozen")  # folders that never change


class Copier:
    """Copies the newest whole checkpoint to `save_folder` in a process of its own, one after the other, while training goes on.

    A process, since a Python thread that sends many gigabytes would take its time from the thread that trains. A copy that fails,
    after five tries of every file, is an error in the log; the next one is tried with the next checkpoint. On one rank.

    Args:
        run_folder: of the run.
        remote: `save_folder`.
    """

    def __init__(self, run_folder: Path, remote: str):
        self._folder, self.remote = run_folder, remote
        self._process: subprocess.Popen[str] | None = None
        self._waiting: Checkpoint | None = None
        self._copying: Checkpoint | None = None

    def copy(self, checkpoint: "Checkpoint") -> None:
        """Have a checkpoint copied once the copy before it is done, unless a newer one comes until then."""
        self._waiting = checkpoint
        self.poll()

    def poll(self) -> None:
        """Say what became of a copy that is done, and begin the next."""
        if self._process is not None and self._process.poll() is not None:
            assert self._copying is not None and self._process.stdout is not None
            said = self._process.stdout.read().strip()
            if self._process.returncode:
                log.error(
                    "%s could not be copied to %s: %s. Training goes on; the copy is tried again with the next checkpoint.",
                    self._copying.path, self.remote, said.rpartition("\n")[2] or f"exit code {self._process.returncode}",
                )  # fmt: skip
            else:
                log.info("%s is copied to %s.", self._copying.path, self.remote)
            self._process = self._copying = None
        if self._process is None and self._waiting is not None:
            self._copying, self._waiting = self._waiting, None
            command = [sys.executable, "-m", "prx_composer.runs.copies", str(self._folder), self._copying.path.name, self.remote]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finish(self) -> None:
        """Wait for what is being copied, and for what is still to be copied."""
        self.poll()
        while self._process is not None:
            log.info("Waiting for the copy of %s to %s.", self._copying and self._copying.path, self.remote)
            self._process.wait()
            self.poll()

    def stop(self) -> None:
        """End a copy that isn't done: the one before it is still there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def copy_run(folder: Path, name: str, remote: str) -> None:
    """Upload a checkpoint and what goes with it, the checkpoint's index last; then delete the other checkpoints there.

    Args:
        name: of the checkpoint, such as `ba2000`.

    Raises:
        OSError: the checkpoint is not there any more.
        UserError: the store cannot be reached.
    """
    chosen, there = f"{CHECKPOINTS}/{name}", _names(remote)
    files = [f"{chosen}/{path.name}" for path in sorted((folder / chosen).iterdir()) if path.name != INDEX]
    if f"{chosen}/{INDEX}" in there:  # of the same batch, before the run lost its way back here
        delete([join(remote, chosen, INDEX)])
    upload(folder, remote, [*_beside(folder, there), *files, f"{chosen}/{INDEX}"], keep=True)
    old = [file for file in there if file.startswith(f"{CHECKPOINTS}/") and not file.startswith(f"{chosen}/")]
    delete([join(remote, file) for file in sorted(old, key=lambda file: not _is_index(file))])


def _beside(folder: Path, there: list[str]) -> Iterator[str]:
    """Yield what goes with a checkpoint; what never changes only if it isn't there yet."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".partial":
            yield path.name
    for path in (path for kept in _KEPT for path in sorted((folder / kept).rglob("*"))):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in there and "/." not in name:
            yield name


def fetch_run(remote: str, folder: Path) -> "Checkpoint | None":
    """Download the newest checkpoint of a run, and what goes with it, into a run folder that has none; on one rank.

    Raises:
        UserError: the store cannot be reached, or a file in it is not what the checkpoint's index says.
    """
    from prx_composer.runs.checkpoints import Checkpoint, damage

    names = _names(remote)
    batches = [int(name.split("/")[1].removeprefix("ba")) for name in names if _is_index(name)]
    if not batches:
        return None
    chosen = f"{CHECKPOINTS}/ba{max(batches)}"
    partial = folder / CHECKPOINTS / f".ba{max(batches)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    log.info("Fetching %s from %s.", chosen, remote)
    for name in names:
        if name.startswith(f"{chosen}/"):
            download(join(remote, name), inside(partial, name.removeprefix(f"{chosen}/")))
        elif not name.startswith(f"{CHECKPOINTS}/"):
            download(join(remote, name), inside(folder, name))
    if (wrong := damage(Checkpoint(partial, max(batches)))) is not None:
        raise UserError(f"save_folder: {join(remote, chosen)} is damaged: {wrong}. Delete it, or give another save_folder.")
    return Checkpoint(partial.rename(folder / chosen), max(batches))


def take_up(remote: str, folder: Path, autoresume: bool) -> None:
    """Make a run that is in the store alone go on here; on one rank, before anything is written.

    Raises:
        UserError: another run is in the store, or it cannot be reached.
    """
    if any((folder / CHECKPOINTS).glob("ba*")):
        return
    if autoresume:
        fetch_run(remote, folder)
    elif any(map(_is_index, _names(remote))):
        raise UserError(
            f"save_folder: {remote} already has a run. Go on with that run with autoresume=true, or give another folder."
        )


def _names(remote: str) -> list[str]:
    """Return every file that is there, hidden ones too: a sharded checkpoint has one."""
    return [relative_name(entry.path, remote) for entry in survey(remote)]


def _is_index(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == CHECKPOINTS and parts[1].removeprefix("ba").isdigit() and parts[2] == INDEX


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        copy_run(Path(sys.argv[1]), *sys.argv[2:])
    except Exception as error:  # every SDK has its own
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
