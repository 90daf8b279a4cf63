"""`prx data stats` and `prx data view`: look at a data set before training on it. `prx data caption`: write captions for it."""

import logging
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from prx_composer.commands import show_log, write_json
from prx_composer.common.errors import UserError

HELP = "Data sets: convert what you have into what is trained on, look at it, and write captions for it."

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


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Options of `prx data caption`."""

    what: Annotated[
        list[str],
        typer.Argument(
            help="Folder of a data set; or a recipe, YAML files and key=value, all of whose training data it then is."
        ),
    ]
    model: Annotated[str, typer.Option(help="Image-text-to-text model of transformers: hub id or folder.")]
    column: Annotated[str, typer.Option(help="What train_loader.captions calls it.")]
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What the model is asked, or begins with. [default: to describe the image; none, without chat template]"
        ),
    ] = None
    samples: Annotated[
        int | None, typer.Option(min=1, help="Caption only so many images, evenly spaced, and print it: nothing is written.")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in the model's tokens.")] = 256
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square whose area images have. [default: 448, or the data's if that is smaller]"),
    ] = None
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 writes the most probable caption; 1 draws by the model's probabilities.")
    ] = 0.0
    seed: Annotated[int, typer.Option(min=0, help="Of the draws; each is of its image.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16"
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.")] = None
    split: Annotated[str, typer.Option(help="Split to caption.")] = "train"
    part: Annotated[int, typer.Option(min=1, help="Samples of a shard; what a kill can cost.")] = 128


_RANKS_WAIT = 86_400.0  # seconds: for the last part of another rank


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


def write_captions(options: CaptionOptions) -> None:
    """Write captions of all images with a model, as a column beside the data, which stay as they are.

    Look at some first: --samples 8. On several GPUs or processes: composer -n 8 -m prx_composer.cli data caption …
    Killed and given again, the same command goes on where it was. Train on them with train_loader.captions: {COLUMN: 1.0}.
    """
    from composer.utils import dist

    from prx_composer.commands.data import captioner as writer
    from prx_composer.commands.encode import encoding
    from prx_composer.data.format import IMAGE
    from prx_composer.data.stored import encoded_folder

    show_log(timed=True)
    o = options
    if o.dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype: {o.dtype!r} must be bfloat16, float16 or float32.")
    writer.check_model(o.model, o.revision)
    sets, having = writer.data_to_caption(o.what, o.split, o.column)
    for data in having:
        typer.echo(f"{data.path}, {o.split}: left as it is, since it came with captions called {o.column}")
    device = encoding.connect(_RANKS_WAIT)
    if o.samples and dist.get_global_rank() != 0:
        return
    writing = writer.Writing(o.prompt, o.max_new_tokens, o.temperature, o.seed, o.batch_size)
    captioner = writer.Captioner(o.model, o.revision, o.dtype, device, writing)
    for data in sets:
        size = o.image_size or min(writer.LARGEST, data.manifest.image_size)
        if o.samples:
            for line in writer.look_first(captioner, data, o.split, o.samples, size):
                typer.echo(line)
            continue
        size_of = data.size_of(size, 1)
        target = encoded_folder(data.path, o.split, o.column, IMAGE)
        made = encoding.encode_split(
            data.path / o.split,
            target,
            captioner.column(size),
            lambda bucket, rows, size_of=size_of: captioner.write(rows, size_of(bucket)),
            o.part,
            **captioner.settings,
        )
        lost = writer.summary(made.cut or 0, made.empty or 0, made.undecodable or 0, o.max_new_tokens)
        typer.echo(f"{target}: {sum(made.buckets.values()):,} captions by {o.model}, of images of {size} px{lost}")
    if not o.samples:
        typer.echo(f"Train on them: train_loader.captions: {{{o.column}: 1.0}}")


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
