"""`prx data stats` and `prx data view`: look at a data set before training on it."""

import logging
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from prx_composer.commands import write_json

HELP = "Data sets: convert what you have into what is trained on, and look at it."

What = Annotated[
    list[str],
    typer.Argument(help="Folder of a data set, local or s3://…; or a recipe, YAML files and key=value, whose data it then is."),
]
SplitName = Annotated[str | None, typer.Option(help="Split to look at. [default: the recipe's, or train]")]


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Options of `prx data stats`."""

    what: What
    split: SplitName = None
    samples: Annotated[
        int | None, typer.Option(min=1, help="Look at about so many samples, evenly spaced. [default: every one]")
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Global batch that every bucket should fill. [default: those of the recipe's stages]"),
    ] = None
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write it as JSON too; - prints only that.")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Options of `prx data view`."""

    what: What
    output: Annotated[str, typer.Option(help="File to write: a picture (.png) or a page (.html).")]
    n: Annotated[int, typer.Option("--n", min=1, help="Samples to show.")] = 32
    split: SplitName = None
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of samples.")] = 0
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the square whose area images have. [default: the recipe's, or as stored]")
    ] = None
    bucket: Annotated[str | None, typer.Option(help="Only of this bucket, such as 512x512.")] = None


def print_statistics(options: StatsOptions) -> None:
    """Say what a data set holds: buckets, captions, metadata, features, what was stored beside it, what conversion left out.

    With a recipe captions are also counted in its tokens, and buckets against its batches. No image is decoded.
    """
    from prx_composer.commands.data.split import open_split
    from prx_composer.commands.data.statistics import statistics
    from prx_composer.commands.data.view import subject_of

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    subject, file = subject_of(options.what, options.split), options.json_file
    batch_sizes = [stage.global_batch_size for stage in subject.stages] if options.batch_size is None else [options.batch_size]
    data = open_split(subject.path, subject.split)
    found = statistics(data, options.samples, batch_sizes, subject.tokenizer, subject.max_tokens, subject.loader.get("skip"))
    if file != "-":
        typer.echo(as_text(found))
    if file is not None:
        write_json(found, file)


def draw_samples(options: ViewOptions) -> None:
    """Show samples as a model sees them: decoded, scaled and cropped by the loader, with the caption that it takes.

    With a recipe they are what its loader gives in the first epoch, at its image size, with captions cut to its tokens. Without
    one, images are as stored, or at another --image-size in sides that are multiples of what all stored sides are.
    """
    from prx_composer.commands.data.split import open_split
    from prx_composer.commands.data.view import check_output, look, subject_of, title, write_view

    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # what cannot be decoded is on the sheet
    check_output(options.output)
    subject = subject_of(options.what, options.split)
    data = open_split(subject.path, subject.split)
    seen = look(subject, data, options.n, options.seed, options.image_size, options.bucket)
    write_view(seen, options.output)
    typer.echo(f"{options.output}: {title(seen)}")


# --------------------------------------------------------------------------------- statistics, as a page of text


def as_text(found: dict[str, Any]) -> str:
    """Return what `statistics` returned, for a terminal."""
    from prx_composer.common.pages import render

    return render(
        __name__,
        "statistics.txt.jinja",
        **found,
        number=_number,
        spread=_spread,
        share=_share,
        size=_size,
        counted=_count,
        repr=repr,
    ).rstrip()


def _spread(column: dict[str, Any]) -> str:
    if not column["count"]:
        return "no values"
    names = ("min", "5%", "median", "95%", "max", "mean")
    return "  ".join(f"{name} {_number(column[name])}" for name in names)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
