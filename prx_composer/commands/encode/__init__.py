"""`prx encode …`: what is computed from a data set once, on any number of processes, and stored beside it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, echo

from prx_composer.commands import show_log
from prx_composer.common.errors import UserError, at_path

HELP = (
    "Compute embeddings, features and latents once and store them beside the data. On several GPUs or processes: "
    "composer -n 8 -m prx_composer.cli encode text RECIPE.yaml"
)

_STORAGE = ("bfloat16", "float16", "float32")

Recipe = Annotated[list[str], Argument(help="YAML files and key=value, as for train.py: its encoder, its train_loader.")]
Split = Annotated[str, Option(help="Split to encode.")]
Part = Annotated[int, Option("--part", min=1, help="Samples of a shard; what a kill can cost.")]
Verify = Annotated[
    int | None,
    Option(
        "--verify", min=1, help="Store nothing: encode so many samples again, evenly spread, and compare with what is stored."
    ),
]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of `prx encode text`."""

    recipe: Recipe
    name: Annotated[str, Option(help="What train_loader.text_embedding calls it.")] = "text"
    split: Split = "train"
    storage: Annotated[str, Option(help="bfloat16, or int8 with a scale per token.")] = "bfloat16"
    batch_size: Annotated[int, Option(min=1, help="Captions at a time, of similar length.")] = 64
    part: Part = 512
    verify: Verify = None


@dataclass(frozen=True, kw_only=True)
class LatentsOptions:
    """Options of `prx encode latents`."""

    recipe: Recipe
    name: Annotated[str, Option(help="What train_loader.latent calls it.")] = "latent"
    split: Split = "train"
    image_size: Annotated[int, Option(help="Size that images are encoded at. [default: the recipe's image_size]")] = 0
    storage: Annotated[str, Option(help="bfloat16, float16 or float32.")] = "bfloat16"
    batch_size: Annotated[int, Option("--batch-size", min=1, help="Images at a time.")] = 32
    part: Part = 128
    verify: Verify = None


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(LatentsOptions):
    """Options of `prx encode features`: those of latents, and whose features."""

    name: Annotated[str, Option(help="What train_loader.features calls it.")] = "features"
    teacher: Annotated[str, Option(help="YAML path of a teacher in the recipe.")] = "algorithms.repa.teacher"


def store_text(options: TextOptions) -> None:
    """Store embeddings of all captions that the recipe trains on, valid tokens only.

    Killed and given again, the same command goes on where it was. Train on them with train_loader.text_embedding=NAME; the run
    refuses embeddings of another encoder.
    """
    from composer.utils import dist

    from prx_composer.commands.encode import encoding, verifying
    from prx_composer.data.stored import encoded_folder
    from prx_composer.models.prompts import not_to_be_stored
    from prx_composer.models.text_to_image import check_text
    from prx_composer.recipe.arguments import data_sets, encoder_title
    from prx_composer.runs.model_parts import ModelParts
    from prx_composer.runs.stored_text import why_never

    show_log(timed=True)
    o = options
    recipe, device, sets = encoding.begin(o.recipe, o.split, o.storage, (*_STORAGE, "int8"), o.verify is not None)
    for where, part in data_sets(recipe.train_loader).items():
        if problem := not_to_be_stored(part.get("captions") or {}):
            raise UserError(f"train_loader.{where + '.' if where else ''}{problem}")
    if reason := why_never(recipe.model):
        raise UserError(f"{reason}: what is stored would fit no run.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, str(dist.get_global_rank()))
        parts = ModelParts(recipe.model, recipe.seed, folder, loader=recipe.train_loader)
        encoder, (title, revision) = parts.text_encoder, encoder_title(recipe.model)
    if recipe.model.get("backbone"):
        try:
            check_text(ModelParts(recipe.model, recipe.seed, meta=True).backbone, encoder)
        except ValueError as error:
            raise UserError(str(error)) from error
    column = encoding.text_column(encoder, title, revision, o.storage)
    checked = []
    for data in sets:
        for caption in data.captions:
            target = encoded_folder(data.path, o.split, o.name, caption)
            work = encoding.CaptionEncoder(encoder, caption, o.storage, o.batch_size, device)
            if o.verify is not None:
                where = (o.split, o.name, caption)
                checked.append(verifying.verify(data, where, column, work, encoder.network, o.verify))
                continue
            made = encoding.encode_split(data.path / o.split, target, column, work, o.part, batch_size=o.batch_size)
            count = sum(made.buckets.values())
            said = f"{target}: {count:,} captions by {title}, {o.storage}"
            if made.error is not None:
                said += f", relative error of a token {made.error:.2%}"
            if made.cut and made.lost:
                said += (
                    f"; {made.cut:,} ({made.cut / count:.1%}) were cut to model.text_encoder.max_tokens: {made.max_tokens}"
                    f" and lost {made.lost / made.cut:.1f} tokens on average"
                )
            echo(said)
    verifying.tell(checked)


def store_features(options: FeaturesOptions) -> None:
    """Store a teacher's patch features of every image, one vector for each patch of the backbone."""
    from prx_composer.commands.encode import encoding, verifying
    from prx_composer.data.format import IMAGE
    from prx_composer.data.stored import StoredColumn, encoded_folder, fingerprint
    from prx_composer.models.encoders import TeacherSpec, VisionEncoder
    from prx_composer.runs.model_parts import ModelParts

    show_log(timed=True)
    o = options
    recipe, device, sets = encoding.begin(o.recipe, o.split, o.storage, _STORAGE, o.verify is not None)
    spec: Any = {"algorithms": recipe.algorithms}
    for key in o.teacher.split("."):
        spec = spec.get(key) if isinstance(spec, dict) else None
    if not isinstance(spec, dict | str):
        raise UserError(f"--teacher: the recipe has nothing at {o.teacher}; name one such as algorithms.repa.teacher.")
    with at_path(o.teacher, TypeError):
        teacher = VisionEncoder(TeacherSpec(**spec) if isinstance(spec, dict) else spec)
    parts = ModelParts(recipe.model, recipe.seed)
    patch = ModelParts(recipe.model, recipe.seed, meta=True).backbone.patch_size * int(parts.autoencoder.downsampling)
    revision = spec.get("revision") if isinstance(spec, dict) else None
    size, mark = o.image_size or recipe.image_size, fingerprint(teacher.module)
    column = StoredColumn("features", teacher.name, revision, mark, teacher.hidden_size, o.storage, image_size=size)
    checked = []
    for data in sets:
        target = encoded_folder(data.path, o.split, o.name, IMAGE)
        encode = encoding.features_of(teacher, patch)
        work = encoding.ImageEncoder(encode, data.size_of(size, patch), o.storage, o.batch_size, device)
        if o.verify is not None:
            checked.append(verifying.verify(data, (o.split, o.name, IMAGE), column, work, teacher.module, o.verify))
            continue
        made = encoding.encode_split(data.path / o.split, target, column, work, o.part, batch_size=o.batch_size, patch=patch)
        echo(f"{target}: features of {sum(made.buckets.values()):,} images by {teacher.name}, {o.storage}")
    verifying.tell(checked)


def store_latents(options: LatentsOptions) -> None:
    """Store what the recipe's autoencoder makes of every image, at one size: the mode of its distribution, not a sample.

    Train on them with train_loader.latent=NAME: no image is decoded or encoded then. For stages of several sizes give the command
    once for each, with --image-size, and name all: train_loader.latent=[A,B].
    """
    from prx_composer.commands.encode import encoding, verifying
    from prx_composer.data.format import IMAGE
    from prx_composer.data.stored import encoded_folder, latent_column
    from prx_composer.runs.model_parts import ModelParts

    show_log(timed=True)
    o = options
    recipe, device, sets = encoding.begin(o.recipe, o.split, o.storage, _STORAGE, o.verify is not None)
    autoencoder, given = ModelParts(recipe.model, recipe.seed).autoencoder, recipe.model.get("autoencoder") or {}
    size = o.image_size or recipe.image_size
    multiple = ModelParts(recipe.model, recipe.seed, meta=True).backbone.patch_size * int(autoencoder.downsampling)
    title = str(given.get("pretrained") or f"random {(given.get('config') or {}).get('_class_name', 'AutoencoderKL')}")
    column = latent_column(autoencoder, title, given.get("revision"), o.storage, size, multiple)
    sizes = [(size, size), *(data.size_of(size, multiple)(bucket) for data in sets for bucket in data.manifest.buckets)]
    if uneven := [sides for sides in sizes if any(side % multiple for side in sides)]:
        raise UserError(
            f"--image-size {size}: images of {uneven[0][0]}x{uneven[0][1]} cannot be cut into patches of {multiple} "
            "(model.backbone.patch_size × autoencoder downsampling)."
        )
    checked = []
    for data in sets:
        target = encoded_folder(data.path, o.split, o.name, IMAGE)
        work = encoding.ImageEncoder(autoencoder.encode, data.size_of(size, multiple), o.storage, o.batch_size, device)
        if o.verify is not None:
            where, network = (o.split, o.name, IMAGE), autoencoder.module
            checked.append(verifying.verify(data, where, column, work, network, o.verify, autoencoder.decode))
            continue
        made = encoding.encode_split(data.path / o.split, target, column, work, o.part, batch_size=o.batch_size)
        echo(f"{target}: latents of {sum(made.buckets.values()):,} images of {size} px by {title}, {o.storage}")
    verifying.tell(checked)
