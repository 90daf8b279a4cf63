"""By what a data set is recognised again, wherever it lies: its buckets, the sizes of its shards, and bytes of some of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prx_composer.common.errors import UserError
from prx_composer.data.schema import MANIFEST
from prx_composer.recipe.data_sets import data_sets

_SHARDS = 64  # that are looked into, evenly spaced
_BYTES = 1 << 16  # at the beginning and at the end of each


def loader_identity(spec: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a loader of this package reads, by data set: `samples`, `layout` and `content`; None if it isn't known (yet).

    Args:
        spec: as a recipe has it under `train_loader`.
    """
    if not spec or spec.get("name") != "image_caption":
        return None
    try:
        parts = data_sets(spec)
    except UserError:
        return None
    found = {
        where.removeprefix("mix."): split_identity(Path(p["path"]) / (p.get("split") or "train")) for where, p in parts.items()
    }
    return None if None in found.values() else found


def split_identity(folder: Path) -> dict[str, Any] | None:
    """Return what tells a split from others, or None if there is none or not all of it.

    `layout` is of captions, buckets, and the samples and bytes of every shard. `content` is of the first and last 64 KiB of up to
    64 shards; it is null where shards are still to be fetched or unpacked. A folder that was moved or copied keeps both.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = sorted(name for name, count in manifest["buckets"].items() if count)
        shards = [(name, shard) for name in names for shard in json.loads((folder / name / "index.json").read_text())["shards"]]
        sizes = [(name, shard["samples"], shard["raw_data"]["bytes"]) for name, shard in shards]
        files = [folder / name / shard["raw_data"]["basename"] for name, shard in shards]
        layout = [manifest["image_size"], list(manifest["captions"]), sizes]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    digest = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
    return {"samples": sum(count for _, count, _ in sizes), "layout": digest[:16], "content": _content(files)}


def _content(files: list[Path]) -> str | None:
    digest = hashlib.sha256()
    for file in files[:: max(-(-len(files) // _SHARDS), 1)]:
        try:
            with file.open("rb") as opened:
                digest.update(opened.read(_BYTES))
                opened.seek(max(file.stat().st_size - _BYTES, 0))
                digest.update(opened.read(_BYTES))
        except OSError:
            return None
    return digest.hexdigest()[:16]


def same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two identities of loaders are of the same data; what one of them doesn't know makes no difference."""
    return before.keys() == now.keys() and all(_same_split(before[name], now[name]) for name in now)


def _same_split(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    contents = {before.get("content"), now.get("content")} - {None}
    return before.get("layout") == now.get("layout") and len(contents) <= 1


def told(identity: Mapping[str, Any]) -> str:
    """Return an identity as people read it."""
    parts = []
    for name, part in identity.items():
        fingerprint = f"{part['layout'][:6]}-{(part['content'] or 'unread')[:6]}"
        parts.append(f"{name + ': ' if name else ''}{part['samples']:,} samples, fingerprint {fingerprint}")
    return "; ".join(parts)
