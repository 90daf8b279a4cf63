"""What a plan reads from disk: the data set's manifest, and speeds that were measured."""

import json
from pathlib import Path
from typing import Any

from prx_composer.config import Recipe
from prx_composer.data.schema import MANIFEST, Manifest
from prx_composer.errors import UserError
from prx_composer.planning.conditions import Measured

__all__ = ["dataset", "read_throughput", "stored_bytes"]

JPEG_BYTES_PER_PIXEL = 0.25  # at about quality 90; only used where the data isn't here to look at


def dataset(recipe: Recipe) -> Manifest | None:
    """The manifest of the recipe's training data, if it is on this machine; raises UserError if it is not right."""
    loader = recipe.train_loader
    folder = Path(str(loader.get("path", ""))) / str(loader.get("split", "train"))
    if "path" not in loader or not (folder / MANIFEST).is_file():
        return None
    try:
        return Manifest.read(folder)
    except (ValueError, KeyError) as error:
        raise UserError(f"train_loader.path: {folder / MANIFEST} is no manifest of a data set: {error}") from error


def stored_bytes(recipe: Recipe, manifest: Manifest | None, largest: int) -> tuple[float, str]:
    """Bytes on disk per image, and how that is known."""
    if manifest is not None:
        folder = Path(recipe.train_loader["path"]) / str(recipe.train_loader.get("split", "train"))
        total = 0
        for bucket in manifest.buckets:
            index = folder / str(bucket) / "index.json"
            for shard in json.loads(index.read_text())["shards"] if index.is_file() else ():
                total += (shard.get("zip_data") or shard["raw_data"])["bytes"]
        if total:
            size = total / sum(manifest.buckets.values())
            return size, f"read from disk: {size / 1e3:,.1f} kB per image, the mean of the data in train_loader.path"
    size = JPEG_BYTES_PER_PIXEL * largest**2
    return size, f"read from disk: {size / 1e3:,.1f} kB per image, {JPEG_BYTES_PER_PIXEL} bytes a pixel (JPEG) at {largest} px"


def read_throughput(path: str) -> tuple[str, dict[int, Measured]]:
    """What `benchmarks/throughput.py` measured: the GPU's name, and the speed by image size.

    The file is JSON: `{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0, …}, …]}`; `gpus` and
    `batch_per_gpu` of a stage may be there. Of a sweep the point on most GPUs is taken, of several such the fastest.

    Raises:
        UserError: no such file, or another content.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"--throughput: {path} cannot be read: {error.strerror}.") from error
    try:
        content = json.loads(text)
        found = [(int(stage["image_size"]), _measured(stage)) for stage in content["stages"] if "error" not in stage]
        gpu = str(content["gpu"])
    except (ValueError, KeyError, TypeError) as error:
        form = '{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0}]}'
        raise UserError(f"--throughput: {path} is no file of the form {form} ({error!r}).") from error
    if not found or min(speed.images_per_second for _, speed in found) <= 0:
        raise UserError(f"--throughput: {path} has no stage with a positive images_per_second_per_gpu.")
    found.sort(key=lambda one: (one[1].gpus or 0, one[1].images_per_second))
    return gpu, dict(found)  # the last of each size


def _measured(stage: dict[str, Any]) -> Measured:
    counts = [None if stage.get(key) is None else int(stage[key]) for key in ("gpus", "batch_per_gpu")]
    if any(count is not None and count < 1 for count in counts):
        raise ValueError("gpus and batch_per_gpu must be at least 1")
    return Measured(float(stage["images_per_second_per_gpu"]), *counts)
