"""A split of a data set that training can read, found from what a person names, on a disk or in an object store."""

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError
from prx_composer.data.buckets import Bucket
from prx_composer.data.format import MANIFEST, Manifest
from prx_composer.data.storage import fetch, fetched, is_remote, join, remote_keys
from prx_composer.data.stored import ENCODED

INDEX, CONVERSION = "index.json", "conversion.json"


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
        """The shards of every bucket, as its index lists them. Raise UserError for an index that cannot be read."""
        return {bucket: self._listed(str(bucket)) for bucket in sorted(self.manifest.buckets)}

    def _listed(self, below: str) -> list[dict[str, Any]]:
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
        return found if isinstance(found, dict) and "counts" in found else None

    def encoded(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return stored columns by name and source: `manifest`, None if it was only begun; `files`, named from its folder."""
        if is_remote(self.path):
            keys = remote_keys(join(self.folder, ENCODED))
            names = [key.partition(f"/{self.name}/{ENCODED}/")[2] for key in keys]
        else:
            root = Path(self.folder, ENCODED)
            names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name in names:
            parts = name.split("/", 2)
            if len(parts) == 3 and not any(part.startswith(".") for part in name.split("/")):
                column = found.setdefault((parts[0], parts[1]), {"manifest": None, "files": []})
                column["files"].append(parts[2])
                if parts[2] == MANIFEST:
                    column["manifest"] = _json(join(self.folder, ENCODED, name))
        return found

    def stored_bytes(self, name: str, source: str, bucket: str) -> int:
        """Return the bytes of a bucket of a stored column."""
        return sum(int(shard["raw_data"]["bytes"]) for shard in self._listed(join(ENCODED, name, source, bucket)))


def open_split(path: str, name: str) -> Split:
    """Open the split `name` of the data set in `path`.

    Raises:
        UserError: there is none; says what is there instead, and what to do.
    """
    manifest = join(path, name, MANIFEST)
    with tempfile.TemporaryDirectory(prefix="prx-look.") as cache:
        try:
            local = fetch(manifest, Path(cache))
            if not local.is_file():
                raise FileNotFoundError(manifest)
            content = local.read_text()
        except (UserError, ImportError):
            raise
        except Exception as error:  # every store's SDK has its own
            if is_remote(path):
                raise UserError(
                    f"{manifest} cannot be fetched ({_first_line(error)}); check the address, --split and credentials."
                ) from error
            raise UserError(_what_is_there(Path(path), name)) from error
        (Path(cache) / MANIFEST).write_text(content)
        try:
            return Split(path.rstrip("/") or "/", name, Manifest.read(Path(cache)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = str(error).replace(cache, join(path, name)) if isinstance(error, ValueError) else f"it lacks {error}"
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
    except (OSError, ValueError):
        return None
    except Exception as error:
        if "not found" in str(error).lower():
            return None
        raise UserError(f"{path} cannot be fetched ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
