"""`prx encode …`: what is computed from a data set once, on any number of processes, and stored beside it."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option, echo

HELP = (
    "Compute embeddings, features and latents once and store them beside the data. On several GPUs or processes: "
    "composer -n 8 -m prx_composer.cli encode text RECIPE.yaml"
)

Recipe = Annotated[list[str], Argument(help="YAML files and key=value, as for train.py: its encoder, its train_loader.")]
Split = Annotated[str, Option(help="Split to encode.")]
Part = Annotated[int, Option("--part", min=1, help="Samples of a shard; what a kill can cost.")]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of `prx encode text`."""

    recipe: Recipe
    name: Annotated[str, Option(help="What train_loader.text_embedding calls it.")] = "text"
    split: Split = "train"
    storage: Annotated[str, Option(help="bfloat16, or int8 with a scale per token.")] = "bfloat16"
    batch_size: Annotated[int, Option(min=1, help="Captions at a time, of similar length.")] = 64
    part: Part = 512


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
    from prx_composer.commands.encode.encode_jobs import encode_text

    o = options
    _tell(encode_text(o.recipe, o.name, o.split, o.storage, o.batch_size, o.part))


def store_features(options: FeaturesOptions) -> None:
    """Store a teacher's patch features of every image, one vector for each patch of the backbone."""
    from prx_composer.commands.encode.encode_jobs import encode_features

    o = options
    _tell(encode_features(o.recipe, o.teacher, o.name, o.split, o.image_size, o.storage, o.batch_size, o.part))


def store_latents(options: LatentsOptions) -> None:
    """Store what the recipe's autoencoder makes of every image, at one size: the mode of its distribution, not a sample.

    Train on them with train_loader.latent=NAME: no image is decoded or encoded then. For stages of several sizes give the command
    once for each, with --image-size, and name all: train_loader.latent=[A,B].
    """
    from prx_composer.commands.encode.encode_jobs import encode_latents

    o = options
    _tell(encode_latents(o.recipe, o.name, o.split, o.image_size, o.storage, o.batch_size, o.part))


def _tell(lines: Iterable[str]) -> None:
    """Print the lines of a job, which it yields as it stores things."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("prx_composer").setLevel(logging.INFO)
    for line in lines:
        echo(line)
