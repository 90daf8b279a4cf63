"""From a recipe to the columns that it could train on."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, get_device

from prx_composer.commands.encode.encoding import CaptionEncoder, ImageEncoder, encode_split, features_of, text_column
from prx_composer.common.errors import UserError, at_path
from prx_composer.data.buckets import Bucket
from prx_composer.data.dataset import read_manifest
from prx_composer.data.format import Manifest
from prx_composer.data.stored import IMAGE, StoredColumn, encoded_folder, fingerprint, latent_column
from prx_composer.models.vision_encoder import TeacherSpec, VisionEncoder
from prx_composer.recipe import config
from prx_composer.recipe.arguments import data_sets
from prx_composer.recipe.config import Recipe
from prx_composer.runs.model_parts import ModelParts

STORAGE = ("bfloat16", "float16", "float32")


def encode_text(arguments: list[str], name: str, split: str, storage: str, batch_size: int, part_size: int) -> Iterator[str]:
    """Stores embeddings of every caption column of `train_loader.captions`; yields a line about each.

    Raises:
        UserError: an encoder that is trained along, no data, or something begun with other settings.
    """
    recipe, device = _start(arguments, storage, (*STORAGE, "int8"))
    sets = _data(recipe, split)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, str(dist.get_global_rank()))
        parts = ModelParts(recipe.model, recipe.seed, folder, loader=recipe.train_loader)
        encoder, given = parts.text_encoder, parts.arguments("text_encoder")
    title = str(given.get("pretrained") or f"random {(given.get('config') or {}).get('model_type')}")
    column = text_column(encoder, title, given.get("revision"), storage)
    for part in sets:
        for caption in part.captions:
            target = encoded_folder(part.path, split, name, caption)
            work = CaptionEncoder(encoder, caption, storage, batch_size, device)
            made = encode_split(part.split, target, column, work, part_size, batch_size=batch_size)
            error = "" if made.error is None else f", relative error of a token {made.error:.2%}"
            count = sum(made.buckets.values())
            if made.cut and made.lost:
                error += f"; {made.cut:,} ({made.cut / count:.1%}) were cut to model.text_encoder.max_tokens: {made.max_tokens}"
                error += f" and lost {made.lost / made.cut:.1f} tokens on average"
            yield f"{target}: {count:,} captions by {title}, {storage}{error}"


def encode_features(
    arguments: list[str], teacher: str, name: str, split: str, image_size: int, storage: str, batch_size: int, part_size: int
) -> Iterator[str]:
    """Stores a teacher's patch features on the backbone's grid; yields a line about each data set.

    Raises:
        UserError: no teacher at that path, and as `encode_text`.
    """
    recipe, device = _start(arguments, storage, STORAGE)
    sets = _data(recipe, split)
    spec: Any = {"algorithms": recipe.algorithms}
    for key in teacher.split("."):
        spec = spec.get(key) if isinstance(spec, dict) else None
    if not isinstance(spec, dict | str):
        raise UserError(f"--teacher: the recipe has nothing at {teacher}; name one such as algorithms.repa.teacher.")
    with at_path(teacher, TypeError):
        network = VisionEncoder(TeacherSpec(**spec) if isinstance(spec, dict) else spec)
    patch = int(recipe.model["backbone"]["patch_size"]) * int(ModelParts(recipe.model, recipe.seed).autoencoder.downsampling)
    revision = spec.get("revision") if isinstance(spec, dict) else None
    image_size = image_size or recipe.image_size
    column = StoredColumn(
        "features", network.name, revision, fingerprint(network.module), network.hidden_size, storage, image_size=image_size
    )
    for part in sets:
        target = encoded_folder(part.path, split, name, IMAGE)
        work = ImageEncoder(features_of(network, patch), part.size_of(image_size, patch), storage, batch_size, device)
        made = encode_split(part.split, target, column, work, part_size, batch_size=batch_size, patch=patch)
        yield f"{target}: features of {sum(made.buckets.values()):,} images by {network.name}, {storage}"


def encode_latents(
    arguments: list[str], name: str, split: str, image_size: int, storage: str, batch_size: int, part_size: int
) -> Iterator[str]:
    """Stores what the recipe's autoencoder makes of every image; yields a line about each data set.

    Raises:
        UserError: no autoencoder, an image size that doesn't divide into patches, and as `encode_text`.
    """
    recipe, device = _start(arguments, storage, STORAGE)
    sets = _data(recipe, split)
    autoencoder, given = ModelParts(recipe.model, recipe.seed).autoencoder, recipe.model.get("autoencoder") or {}
    image_size = image_size or recipe.image_size
    multiple = int(recipe.model["backbone"]["patch_size"]) * int(autoencoder.downsampling)
    title = str(given.get("pretrained") or f"random {(given.get('config') or {}).get('_class_name', 'AutoencoderKL')}")
    column = latent_column(autoencoder, title, given.get("revision"), storage, image_size, multiple)
    sizes = [(image_size, image_size)]
    sizes += [part.size_of(image_size, multiple)(bucket) for part in sets for bucket in part.manifest.buckets]
    if uneven := [size for size in sizes if any(side % multiple for side in size)]:
        raise UserError(
            f"--image-size {image_size}: images of {uneven[0][0]}x{uneven[0][1]} cannot be cut into patches of {multiple} "
            "(model.backbone.patch_size × autoencoder downsampling)."
        )
    for part in sets:
        target = encoded_folder(part.path, split, name, IMAGE)
        work = ImageEncoder(autoencoder.encode, part.size_of(image_size, multiple), storage, batch_size, device)
        made = encode_split(part.split, target, column, work, part_size, batch_size=batch_size)
        yield f"{target}: latents of {sum(made.buckets.values()):,} images of {image_size} px by {title}, {storage}"


def _start(arguments: list[str], storage: str, allowed: tuple[str, ...]) -> tuple[Recipe, torch.device]:
    if storage not in allowed:
        raise UserError(f"--storage: {storage!r} must be {', '.join(allowed[:-1])} or {allowed[-1]}.")
    recipe = config.load(arguments)
    config.import_code(recipe.code_paths)
    config.check(recipe)
    device = get_device(None)
    dist.initialize_dist(device, timeout=recipe.dist_timeout)
    return recipe, torch.device("cuda", torch.cuda.current_device()) if device.name == "gpu" else torch.device("cpu")


@dataclass(frozen=True)
class _DataSet:
    """A data set of the recipe: its folder, the split's folder, its manifest, and the caption columns that are trained on."""

    path: Path
    split: Path
    manifest: Manifest
    captions: list[str]

    def size_of(self, image_size: int, multiple: int) -> Callable[[Bucket], tuple[int, int]]:
        return lambda bucket: bucket.at(image_size, self.manifest.image_size, multiple)


def _data(recipe: Recipe, split: str) -> list[_DataSet]:
    with at_path("train_loader"):
        found = data_sets(recipe.train_loader)
    sets = []
    for where, spec in found.items():
        path = f"train_loader.{where}" if where else "train_loader"
        if spec.get("remote"):
            raise UserError(f"{path}.remote: encode where the data lies on a disk; then upload the folder `encoded` beside it.")
        with at_path(path):
            manifest = read_manifest(spec["path"], split, spec.get("captions"))
        folder = Path(spec["path"])
        sets.append(_DataSet(folder, folder / split, manifest, list(spec.get("captions") or manifest.captions[:1])))
    return sets
