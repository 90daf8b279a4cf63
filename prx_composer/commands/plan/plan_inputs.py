"""What a plan reads from disk: the data set's manifest, and speeds that were measured."""

import json
from pathlib import Path
from typing import Any

from prx_composer.commands.plan.conditions import Measured
from prx_composer.commands.plan.hardware import GPU, GPUS, find_gpu
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import read_text
from prx_composer.data.format import MANIFEST, Manifest
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.data_sets import data_sets

JPEG_BYTES_PER_PIXEL = 0.25  # at about quality 90; only used where the data isn't here to look at


def read_manifests(recipe: Recipe) -> dict[Path, Manifest] | None:
    """Folder → manifest of the recipe's training data, if all of it is on this machine; raises UserError if it is not right."""
    if "path" not in recipe.train_loader and "mix" not in recipe.train_loader:
        return None
    with at_path("train_loader"):
        folders = [Path(part["path"]) / str(part.get("split", "train")) for part in data_sets(recipe.train_loader).values()]
    if not all((folder / MANIFEST).is_file() for folder in folders):
        return None
    manifests = {}
    for folder in folders:
        try:
            manifests[folder] = Manifest.read(folder)
        except (ValueError, KeyError) as error:
            raise UserError(f"train_loader.path: {folder / MANIFEST} is no manifest of a data set: {error}") from error
    return manifests


def stored_bytes(manifests: dict[Path, Manifest] | None, largest: int) -> tuple[float, str]:
    """Bytes on disk per image, and how that is known."""
    total = samples = 0
    for folder, manifest in (manifests or {}).items():
        samples += sum(manifest.buckets.values())
        for bucket in manifest.buckets:
            index = folder / str(bucket) / "index.json"
            for shard in json.loads(index.read_text())["shards"] if index.is_file() else ():
                total += (shard.get("zip_data") or shard["raw_data"])["bytes"]
    if total:
        size = total / samples
        return size, f"read from disk: {size / 1e3:,.1f} kB per image, the mean of the data in train_loader.path"
    size = JPEG_BYTES_PER_PIXEL * largest**2
    return size, f"read from disk: {size / 1e3:,.1f} kB per image, {JPEG_BYTES_PER_PIXEL} bytes a pixel (JPEG) at {largest} px"


def read_throughput(path: str) -> tuple[GPU, dict[int, Measured]]:
    """What `benchmarks/throughput.py` measured: the GPU, and the speed by image size.

    The file is JSON: `{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0, …}, …]}`; `gpus` and
    `batch_per_gpu` of a stage may be there. Of a sweep the point on most GPUs is taken, of several such the fastest.

    Raises:
        UserError: no such file, another content, or a device that no plan is made for.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"--throughput: {path} cannot be read: {error.strerror}.") from error
    try:
        content = json.loads(text)
        found = [(int(stage["image_size"]), _measured(stage)) for stage in content["stages"] if "error" not in stage]
        name = str(content["gpu"])
    except (ValueError, KeyError, TypeError) as error:
        form = '{"gpu": "h200", "stages": [{"image_size": 512, "images_per_second_per_gpu": 190.0}]}'
        raise UserError(f"--throughput: {path} is no file of the form {form} ({error!r}).") from error
    if not found or min(speed.images_per_second for _, speed in found) <= 0:
        raise UserError(f"--throughput: {path} has no stage with a positive images_per_second_per_gpu.")
    found.sort(key=lambda one: (one[1].gpus or 0, one[1].images_per_second))
    return _gpu(path, name), dict(found)  # the last of each size


def _gpu(path: str, name: str) -> GPU:
    try:
        return find_gpu(name)
    except UserError as error:
        raise UserError(
            f"--throughput: {path} was measured on {name!r}, which is none of the GPUs that a plan is made for: "
            f"{', '.join(sorted(GPUS))}. Measure on one of them; or leave --throughput out and give --mfu."
        ) from error


def _measured(stage: dict[str, Any]) -> Measured:
    counts = [None if stage.get(key) is None else int(stage[key]) for key in ("gpus", "batch_per_gpu")]
    if any(count is not None and count < 1 for count in counts):
        raise ValueError("gpus and batch_per_gpu must be at least 1")
    return Measured(float(stage["images_per_second_per_gpu"]), *counts)
