"""`prx encode …`: what is computed from a data set once, on any number of processes, and stored beside it."""

import logging
from typing import Annotated

import typer

_HELP = (
    "Compute embeddings, features and latents once and store them beside the data. On several GPUs or processes: "
    "composer -n 8 -m prx_composer.cli encode text RECIPE.yaml"
)
app = typer.Typer(no_args_is_help=True, help=_HELP)

Recipe = Annotated[list[str], typer.Argument(help="YAML files and key=value, as for train.py: its encoder, its train_loader.")]
Split = Annotated[str, typer.Option(help="Split to encode.")]
Part = Annotated[int, typer.Option("--part", min=1, help="Samples of a shard; what a kill can cost.")]

ImageSize = Annotated[int, typer.Option(help="Size that images are encoded at. [default: the recipe's image_size]")]
Storage = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]


@app.command()
def text(
    recipe: Recipe,
    name: Annotated[str, typer.Option(help="What train_loader.text_embedding calls it.")] = "text",
    split: Split = "train",
    storage: Annotated[str, typer.Option(help="bfloat16, or int8 with a scale per token.")] = "bfloat16",
    batch_size: Annotated[int, typer.Option(min=1, help="Captions at a time, of similar length.")] = 64,
    part: Part = 512,
) -> None:
    """Store embeddings of all captions that the recipe trains on, valid tokens only.

    Killed and given again, the same command goes on where it was. Train on them with train_loader.text_embedding=NAME; the run
    refuses embeddings of another encoder.
    """
    from prx_composer.commands.encode.encode_jobs import encode_text

    _prepare()
    for line in encode_text(recipe, name, split, storage, batch_size, part):
        typer.echo(line)


@app.command()
def features(
    recipe: Recipe,
    teacher: Annotated[str, typer.Option(help="YAML path of a teacher in the recipe.")] = "algorithms.repa.teacher",
    name: Annotated[str, typer.Option(help="What train_loader.features calls it.")] = "features",
    split: Split = "train",
    image_size: ImageSize = 0,
    storage: Storage = "bfloat16",
    batch_size: Batch = 32,
    part: Part = 128,
) -> None:
    """Store a teacher's patch features of every image, one vector for each patch of the backbone."""
    from prx_composer.commands.encode.encode_jobs import encode_features

    _prepare()
    for line in encode_features(recipe, teacher, name, split, image_size, storage, batch_size, part):
        typer.echo(line)


@app.command()
def latents(
    recipe: Recipe,
    name: Annotated[str, typer.Option(help="What train_loader.latent calls it.")] = "latent",
    split: Split = "train",
    image_size: ImageSize = 0,
    storage: Storage = "bfloat16",
    batch_size: Batch = 32,
    part: Part = 128,
) -> None:
    """Store what the recipe's autoencoder makes of every image, at one size: the mode of its distribution, not a sample.

    Train on them with train_loader.latent=NAME: no image is decoded or encoded then. For stages of several sizes give the command
    once for each, with --image-size, and name all: train_loader.latent=[A,B].
    """
    from prx_composer.commands.encode.encode_jobs import encode_latents

    _prepare()
    for line in encode_latents(recipe, name, split, image_size, storage, batch_size, part):
        typer.echo(line)


def _prepare() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("prx_composer").setLevel(logging.INFO)
