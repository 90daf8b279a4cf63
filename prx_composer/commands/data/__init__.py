"""`prx data stats` and `prx data view`: look at a data set before training on it."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from prx_composer.common.errors import UserError

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
    found = statistics(data, options.samples, batch_sizes, subject.tokenizer, subject.max_tokens)
    if file != "-":
        typer.echo(as_text(found))
    if file is not None:
        content = json.dumps(found, indent=1)
        try:
            typer.echo(content) if file == "-" else Path(file).write_text(content + "\n")
        except OSError as error:
            raise UserError(f"--json {file} cannot be written: {error}") from error


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
    head = (
        f"{found['path']}, split {found['split']}: {found['samples']:,} samples in {_count(len(found['buckets']), 'bucket')} "
        f"around {found['image_size']}² pixels, {_size(found['bytes'])}"
    )
    sections = {
        "Images": _images(found["images"]),
        "Captions": _captions(found["captions"]),
        "Metadata": _metadata(found["metadata"]),
        "Features in the shards": _features(found["features"]),
        "Stored beside the shards, by `prx encode`": _stored(found["stored"]),
    }
    lines = [head, _looked_at(found), "", *_buckets(found), ""]
    for title, section in sections.items():
        lines += [title, *section, ""] if section else []
    return "\n".join([*lines, *_conversion(found["conversion"])]).rstrip()


def _looked_at(found: dict[str, Any]) -> str:
    seen, shards = found["looked_at"], found["looked_at"]["of_shards"]
    if seen["samples"] == found["samples"]:
        return "Every sample was read."
    if seen["shards"] < shards:
        return f"Columns: from {seen['samples']:,} samples, those of {seen['shards']:,} of {shards:,} shards, evenly spaced."
    return f"Columns: from {seen['samples']:,} samples, evenly spaced."


def _buckets(found: dict[str, Any]) -> list[str]:
    rows = [("height x width", "width/height", "samples", "share", "shards", "bytes", "")]
    for bucket in found["buckets"]:
        small = ", ".join(f"{size:,}" for size in bucket["smaller_than"])
        rows.append(
            (
                bucket["name"], f"{bucket['aspect']:.2f}", f"{bucket['samples']:,}", f"{bucket['share']:.1%}",
                f"{bucket['shards']:,}", _size(bucket["bytes"]), f"! fewer than a batch of {small}" if small else "",
            )
        )  # fmt: skip
    lines = _table(rows)
    for size in found["batch_sizes"]:
        small = [bucket for bucket in found["buckets"] if size in bucket["smaller_than"]]
        share = sum(bucket["share"] for bucket in small)
        if small:
            of = f"{len(small)} of {_count(len(found['buckets']), 'bucket')}, with {share:.1%} of the samples"
            lines.append(f"! A batch of {size:,} is filled by repetition in {of}.")
        else:
            lines.append(f"Every bucket fills a batch of {size:,}.")
    return lines


def _images(images: dict[str, Any]) -> list[str]:
    lines = [f"  bytes   {_spread(images['bytes'])}"]
    if images["smaller_than_bucket"]:
        lines.append(f"  {images['smaller_than_bucket']:,} are smaller than their bucket: training enlarges them")
    return lines


def _captions(captions: dict[str, Any]) -> list[str]:
    lines = []
    for name, caption in captions.items():
        lines += [f"  {name}", f"    characters   {_spread(caption['characters'])}"]
        if "tokens" in caption:
            cut, count = caption["cut"], caption["tokens"]["count"]
            lines.append(f"    tokens       {_spread(caption['tokens'])}")
            lines.append(f"    longer than {caption['max_tokens']} tokens, and cut: {cut:,} ({_share(cut, count)})")
            if caption["unknown"]:
                share = _share(caption["unknown"], caption["tokens_together"])
                lines.append(f"    words that the tokenizer does not know: {caption['unknown']:,} ({share} of the tokens)")
        if caption["empty"]:
            lines.append(f"    empty: {caption['empty']:,} ({_share(caption['empty'], caption['characters']['count'])})")
    return lines


def _metadata(metadata: dict[str, Any]) -> list[str]:
    lines = []
    for name, column in metadata.items():
        missing = f"; missing: {column['missing']:,}" if column["missing"] else ""
        if "distinct" in column:
            most = ", ".join(f"{text!r} {count:,}" for text, count in column["most"].items())
            more = "more than " if column["or_more"] else ""
            lines.append(f"  {name}   {more}{column['distinct']:,} distinct: {most}{missing}")
        else:
            lines.append(f"  {name}   {_spread(column)}{missing}")
    return lines


def _features(features: list[dict[str, Any]]) -> list[str]:
    lines = []
    for column in features:
        arrays = sorted({array.removeprefix("ndarray:") for array in column["arrays"].values()})
        lines.append(
            f"  {column['name']}   {column['channels']} channels; {'; '.join(arrays[:3])}{' …' if len(arrays) > 3 else ''}"
        )
    return lines


def _stored(stored: list[dict[str, Any]]) -> list[str]:
    lines = []
    for column in stored:
        name = f"  {column['name']} of {column['source']}   "
        if not column["whole"]:
            lines.append(f"{name}only begun, {_count(column['parts'], 'part')} done; the same `prx encode` goes on")
            continue
        cut = f", up to {column['max_tokens']} tokens" if column["max_tokens"] else ""
        cut += f" ({column['cut']:,} captions are cut)" if column["cut"] else ""
        cut += f", at {column['image_size']} px" if column["image_size"] else ""
        other = "" if column["of_this_data"] else "; ! made of other data than lies here: training refuses it"
        lines.append(
            f"{name}{column['kind']} by {column['encoder']}, {column['width']} wide, {column['storage']}{cut}: "
            f"{column['samples']:,} samples, {_size(column['bytes'])}{other}"
        )
    return lines


def _conversion(conversion: dict[str, Any] | None) -> list[str]:
    if not conversion:
        return []
    counts, dropped = conversion["counts"], conversion["dropped"] or {}
    lines = [
        f"Converted from {(conversion['settings'] or {}).get('input')}",
        f"  read {counts['read']:,}, kept {counts['kept']:,}",
    ]
    return [*lines, *(f"  left out: {reason} {n:,}" for reason, n in sorted(dropped.items(), key=lambda item: -item[1]))]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}".rstrip()
        for row in rows
    ]


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
