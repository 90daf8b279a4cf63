"""A split of a data set on a disk or in an object store: what its indexes and manifests say, and what is stored beside it."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError
from prx_composer.data.format import ENCODED, MANIFEST, Bucket, Manifest
from prx_composer.data.storage import INDEX, download, fetched, is_remote, join, remote_keys

CONVERSION = "conversion.json"
_FACTS = (
    "kind",
    "encoder",
    "revision",
    "storage",
    "width",
    "max_tokens",
    "image_size",
    "cut",
    "prompt",
    "empty",
    "undecodable",
)  # of a stored column


@dataclass(frozen=True)
class Split:
    """Where a split lies and what it holds.

    Args:
        path: of the data set, local or remote. name: of the split.
    """

    path: str
    name: str
    manifest: Manifest

    @property
    def folder(self) -> str:
        return join(self.path, self.name)

    @cached_property
    def shards(self) -> dict[Bucket, list[dict[str, Any]]]:
        """Return the shards of every bucket as its index lists them. Raise UserError for an index that cannot be read."""
        return {bucket: self.listed(str(bucket)) for bucket in sorted(self.manifest.buckets)}

    def listed(self, below: str) -> list[dict[str, Any]]:
        """Return the shards of a folder below the split as its index lists them. Raise UserError as `shards`."""
        name = join(self.folder, below, INDEX)
        content = _json(name)
        try:
            shards = content["shards"]
            for shard in shards:
                _ = shard["raw_data"]["bytes"], shard["samples"], shard["column_names"], shard["column_encodings"]
        except (TypeError, KeyError) as error:
            raise UserError(f"{name} is missing or is no index of shards; copy or convert the data again.") from error
        return shards

    def conversion(self) -> dict[str, Any] | None:
        """Return the statistics that `prx data convert` leaves beside the data, if it made them."""
        found = _json(join(self.folder, CONVERSION))
        if not isinstance(found, dict) or "counts" not in found:
            return None
        return {key: found.get(key) for key in ("settings", "counts", "dropped")}

    def stored(self) -> Iterator[dict[str, Any]]:
        """Yield what lies beside the shards: facts, samples and bytes of each column, or that it is only begun."""
        if is_remote(self.path):
            keys = remote_keys(join(self.folder, ENCODED))
            names = [key.partition(f"/{self.name}/{ENCODED}/")[2] for key in keys]
        else:
            root = Path(self.folder, ENCODED)
            names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        columns: dict[tuple[str, str], list[str]] = {}  # files by name and source of a column
        for parts in (name.split("/", 2) for name in names if "/." not in f"/{name}"):
            if len(parts) == 3:
                columns.setdefault((parts[0], parts[1]), []).append(parts[2])
        for (name, source), files in sorted(columns.items()):
            about = {"name": name, "source": source}
            manifest = _json(join(self.folder, ENCODED, name, source, MANIFEST)) if MANIFEST in files else None
            if manifest is None:
                done = sum(file.endswith(".json") and "/part." in file for file in files)
                yield about | {"whole": False, "parts": done}
                continue
            buckets = manifest["buckets"]
            shards = [shard for bucket in buckets for shard in self.listed(join(ENCODED, name, source, bucket))]
            yield {
                **about,
                "whole": True,
                **{key: manifest.get(key) for key in _FACTS},
                "samples": sum(buckets.values()),
                "of_this_data": buckets == {str(bucket): count for bucket, count in self.manifest.buckets.items()},
                "bytes": sum(int(shard["raw_data"]["bytes"]) for shard in shards),
            }


def open_split(path: str, name: str) -> Split:
    """Open the split `name` of the data set in `path`.

    Raises:
        UserError: there is none; says what is there instead, and what to do.
    """
    manifest = join(path, name, MANIFEST)
    with tempfile.TemporaryDirectory(prefix="prx-look.") as cache:
        folder = Path(cache) if is_remote(path) else Path(path, name)
        try:
            if is_remote(path):
                download(manifest, folder / MANIFEST)
        except (UserError, ImportError):
            raise
        except Exception as error:  # every store's SDK has its own
            raise UserError(
                f"{manifest} cannot be fetched ({_first_line(error)}); check the address, --split and credentials."
            ) from error
        if not (folder / MANIFEST).is_file():
            raise UserError(_what_is_there(Path(path), name))
        try:
            return Split(path.rstrip("/") or "/", name, Manifest.read(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            read = isinstance(error, OSError | ValueError)
            what = str(error).replace(cache, join(path, name)) if read else f"it lacks {error}"
            raise UserError(f"{manifest} is no manifest of a data set that can be read: {what}") from error


def _what_is_there(path: Path, name: str) -> str:
    """Say why there is no such split, to a person who has named something else."""
    if path.is_file():
        return f"{path} is a file; name the folder of a data set, or a recipe (.yaml)."
    if not path.is_dir():
        return f"There is no folder {path}."
    if (path / MANIFEST).is_file():
        whole = path.absolute()
        return (
            f"{path} is a split of a data set. Name the folder above it, and the split with an option: "
            f"{whole.parent} --split {whole.name}"
        )
    if (path / INDEX).is_file():
        return f"{path} holds shards of one bucket. Name the folder of the data set: {path.absolute().parents[1]}"
    splits = sorted(child.parent.name for child in path.glob(f"*/{MANIFEST}"))
    if splits:
        return f"{path} has no split {name!r}; it has {', '.join(splits)}. Choose with --split."
    if list(path.glob(f".{name}.work*")) or list(path.glob(f".{name}.partial")):
        return f"The data set in {path} is not finished; give the command that was making it again."
    if deeper := sorted({str(child.parents[1]) for child in path.glob(f"*/*/{MANIFEST}")}):
        return f"{path} is no data set but holds some: {', '.join(deeper)}. Name one of them."
    hint = "Make one from images with captions with `prx data convert` (recipes/data/README.md)."
    what = "is empty" if not any(path.iterdir()) else f"holds no data set: no folder in it has a {MANIFEST}"
    return f"{path} {what}. {hint}"


def _json(path: str) -> Any:
    """Return the content of a small file, None if it is not there or no JSON."""
    try:
        with fetched(path) as file:
            return json.loads(file.read_text())
    except (UserError, ImportError):
        raise
    except Exception as error:  # every store's SDK has its own
        if isinstance(error, OSError | ValueError) or "not found" in str(error).lower():
            return None
        raise UserError(f"{path} cannot be fetched ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
