"""Where a conversion keeps its state and its shards, on disk or in an object store: nothing half-done is ever taken for done.

<output>/.<split>.work/plan.json        settings and work units, written first
<output>/.<split>.work/units/000012     of a unit that is done: its shards and unit.json (remote: unit.json alone)
<output>/.<split>.work/hashes/000012    of a unit that was hashed
<output>/<split>/…                      what data/format.py describes; on disk it appears under its name only when it is whole,
                                        in an object store its manifest, without which nobody reads it, is written last
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from prx_composer.commands.convert.records import Unit
from prx_composer.common.errors import UserError
from prx_composer.common.files import sync, write_whole
from prx_composer.data.format import MANIFEST
from prx_composer.data.storage import fetched, is_remote, join, remote_keys, upload

STATS = "conversion.json"
RESULT = "unit.json"  # beside the shards of a unit


class Output(Protocol):
    """The state of one conversion."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of the one process that leads a conversion."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write a file of the work folder, all or nothing."""
        ...

    def get(self, name: str) -> bytes | None: ...

    def names(self, folder: str) -> set[str]:
        """Return the names of the units that are done in a folder of the work folder: `units` or `hashes`."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Make an empty folder to write a unit in."""
        ...

    def commit(self, unit: Unit, folder: Path, result: dict[str, Any]) -> None:
        """Make a whole unit count as done. Doing so twice is harmless: both are the same."""
        ...

    def result(self, unit: Unit) -> dict[str, Any]: ...

    def finished(self) -> dict[str, Any] | None:
        """Return the statistics of a conversion that is whole; None if it is not."""
        ...

    def clean(self) -> str:
        """Take the work folder away, where that can be done. Return what to do where it cannot."""
        ...

    def finish(self, units: list[Unit], buckets: list[str], files: dict[str, bytes]) -> None:
        """Put the shards of all units in place, then these files in this order, and take the work folder away."""
        ...


def open_output(output: str, split: str) -> Output:
    return RemoteOutput(output, split) if is_remote(output) else LocalOutput(output, split)


class LocalOutput:
    """On a disk that every worker sees."""

    def __init__(self, output: str, split: str):
        self._final, self._work = Path(output) / split, Path(output) / f".{split}.work"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
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
        path = self._work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)

    def get(self, name: str) -> bytes | None:
        path = self._work / name
        return path.read_bytes() if path.exists() else None

    def names(self, folder: str) -> set[str]:
        path = self._work / folder
        return {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} if path.is_dir() else set()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        units = self._work / "units"
        units.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=units, prefix="."))
        folder.chmod(0o777 & ~_umask())
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, unit: Unit, folder: Path, result: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # another process was faster
            folder.rename(self._work / "units" / unit.name)
        if not (self._work / "units" / unit.name).is_dir():
            raise OSError(f"{self._work / 'units' / unit.name} cannot be written.")
        sync(self._work / "units")

    def result(self, unit: Unit) -> dict[str, Any]:
        return json.loads((self._work / "units" / unit.name / RESULT).read_text())

    def finished(self) -> dict[str, Any] | None:
        if not self._final.exists():
            return None
        stats = self._final / STATS
        if not stats.exists() or not (self._final / MANIFEST).exists():
            raise UserError(f"--output: {self._final} is there and was not written by `prx data convert`; name a new folder.")
        return json.loads(stats.read_text())

    def finish(self, units: list[Unit], buckets: list[str], files: dict[str, bytes]) -> None:
        whole = self._work / "whole"
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
        sync(whole)
        whole.rename(self._final)
        sync(self._final.parent)
        self.clean()

    def clean(self) -> str:
        shutil.rmtree(self._work, ignore_errors=True)
        return ""


class RemoteOutput:
    """In an object store. Shards go to their final names at once: whoever writes a unit again writes the same bytes there."""

    def __init__(self, output: str, split: str):
        self._final, self._work = join(output, split), join(output, f".{split}.work")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield  # object stores have none; two conversions of the same settings write the same bytes

    def put(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            upload(Path(folder), self._work, [name])

    def get(self, name: str) -> bytes | None:
        if name not in self._keys(self._work):
            return None
        return self._fetch(join(self._work, name))

    def names(self, folder: str) -> set[str]:
        return {key.removeprefix(f"{folder}/") for key in self._keys(self._work) if key.startswith(f"{folder}/")}

    def _keys(self, folder: str) -> set[str]:
        prefix = urlparse(folder).path.strip("/") + "/"
        return {key.removeprefix(prefix) for key in remote_keys(folder) if key.startswith(prefix)}

    def _fetch(self, path: str) -> bytes:
        with fetched(path) as file:
            return file.read_bytes()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as folder:
            yield Path(folder)

    def commit(self, unit: Unit, folder: Path, result: dict[str, Any]) -> None:
        for bucket, shards in result["shards"].items():
            (folder / bucket).rename(folder / f"{bucket}.unit")
            (folder / bucket).mkdir()
            (folder / f"{bucket}.unit").rename(folder / bucket / unit.name)
            names = [f"{bucket}/{unit.name}/{shard['raw_data']['basename']}" for shard in shards]
            upload(folder, self._final, names)
        self.put(f"units/{unit.name}", json.dumps(result).encode())

    def result(self, unit: Unit) -> dict[str, Any]:
        return json.loads(self._fetch(join(self._work, "units", unit.name)))

    def finished(self) -> dict[str, Any] | None:
        keys = self._keys(self._final)
        if MANIFEST not in keys:
            return None
        if STATS not in keys:
            raise UserError(f"--output: {self._final} is there and was not written by `prx data convert`; name a new folder.")
        return json.loads(self._fetch(join(self._final, STATS)))

    def finish(self, units: list[Unit], buckets: list[str], files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="prx-convert.") as name:
            folder = Path(name)
            for file, content in files.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            upload(folder, self._final, list(files))

    def clean(self) -> str:
        return f" Name a new --output for the next try, or delete {self._work}: mosaicml-streaming has no way to."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
