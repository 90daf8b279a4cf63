"""What wandb wrote offline, read back with wandb's own reader."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OfflineRun:
    """One start of a run; `history` has one row per step, `artifacts` (type, name, aliases, files) each.

    Of a process that was killed there is only what filled blocks of 32 KB: wandb keeps the rest in memory.
    """

    folder: Path
    id: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[tuple[str, str, list[str], dict[str, Path]]] = field(default_factory=list)

    def named(self, kind: str) -> list[tuple[str, str, list[str], dict[str, Path]]]:
        return [artifact for artifact in self.artifacts if artifact[0] == kind]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """In the order in which they were started."""
    files = sorted(
        (folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: (file.parent.name[:27], file.stat().st_mtime)
    )
    return [_read(file) for file in files]


def _read(file: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, run = DataStore(), OfflineRun(file.parent, file.stem.removeprefix("run-"))
    if not file.stat().st_size:
        return run
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            assert record.run.run_id == run.id
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "artifact":
            sent = record.artifact
            files = {entry.path: Path(entry.local_path) for entry in sent.manifest.contents}
            run.artifacts.append((sent.type, sent.name, list(sent.aliases), files))
    return run


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = json.loads(item.value_json)
    return found
