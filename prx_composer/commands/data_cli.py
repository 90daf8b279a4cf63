"""`prx data …`: what is done with data sets besides training on them."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from prx_composer.commands.convert import convert_data
from prx_composer.commands.options import command

app = typer.Typer(no_args_is_help=True, help="Data sets: convert what you have into what is trained on, and look at it.")


app.command("convert")(command(convert_data))

What = Annotated[
    list[str],
    typer.Argument(help="Folder of a data set, local or s3://…; or a recipe, YAML files and key=value, whose data it then is."),
]
SplitName = Annotated[str | None, typer.Option(help="Split to look at. [default: the recipe's, or train]")]


@app.command()
def stats(
    what: What,
    split: SplitName = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Look at about so many samples, evenly spaced. [default: every one]")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Global batch that every bucket should fill. [default: those of the recipe's stages]"),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write it as JSON too; - prints only that.")
    ] = None,
) -> None:
    """Say what a data set holds: buckets, captions, metadata, features, what was stored beside it, what conversion left out.

    With a recipe captions are also counted in its tokens, and buckets against its batches. No image is decoded.
    """
    from prx_composer.commands.data.split import open_split
    from prx_composer.commands.data.statistics import statistics
    from prx_composer.commands.data.statistics_text import as_text
    from prx_composer.commands.data.subject import subject_of
    from prx_composer.common.errors import UserError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    subject = subject_of(what, split)
    batch_sizes = subject.batch_sizes if batch_size is None else [batch_size]
    found = statistics(
        open_split(subject.path, subject.split), samples, batch_sizes, subject.tokenizer, subject.max_tokens, progress=True
    )
    if json_file != "-":
        typer.echo(as_text(found))
    if json_file is not None:
        content = json.dumps(found, indent=1)
        try:
            typer.echo(content) if json_file == "-" else Path(json_file).write_text(content + "\n")
        except OSError as error:
            raise UserError(f"--json {json_file} cannot be written: {error}") from error


@app.command()
def view(
    what: What,
    output: Annotated[str, typer.Option(help="File to write: a picture (.png) or a page (.html).")],
    n: Annotated[int, typer.Option("--n", min=1, help="Samples to show.")] = 32,
    split: SplitName = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of samples.")] = 0,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the square whose area images have. [default: the recipe's, or as stored]")
    ] = None,
    bucket: Annotated[str | None, typer.Option(help="Only of this bucket, such as 512x512.")] = None,
) -> None:
    """Show samples as a model sees them: decoded, scaled and cropped by the loader, with the caption that it takes.

    With a recipe they are what its loader gives in the first epoch, at its image size, with captions cut to its tokens. Without
    one, images are as stored, or at another --image-size in sides that are multiples of what all stored sides are.
    """
    from prx_composer.commands.data.split import open_split
    from prx_composer.commands.data.subject import subject_of
    from prx_composer.commands.data.view import check_output, look, title, write_view

    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # what cannot be decoded is on the sheet
    check_output(output)
    subject = subject_of(what, split)
    seen = look(subject, open_split(subject.path, subject.split), n, seed, image_size, bucket)
    write_view(seen, output)
    typer.echo(f"{output}: {title(seen)}")
