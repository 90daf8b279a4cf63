"""`prx data convert`."""

import logging
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Option(help="webdataset, parquet (also Hugging Face datasets folders), jsonl or mds.")],
    input: Annotated[str, typer.Option(help="File or folder, local or remote (s3://…).")],
    output: Annotated[str, typer.Option(help="Folder of the data set, local or remote: train_loader.path.")],
    caption: Annotated[list[str], typer.Option(help="Caption column, or NAME=COLUMN to rename it. May be given again.")],
    base_size: Annotated[int, typer.Option(help="Side of the square whose area all buckets have, pixels.")] = 1024,
    patch: Annotated[int, typer.Option(help="Sides of buckets are multiples of this.")] = 32,
    bucket_aspect: Annotated[float, typer.Option(help="Aspect ratio of the widest bucket.")] = 2.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes. 0: this one alone; with Ray: all CPUs of the cluster.")] = 1,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to run on, such as auto. [default: one on this machine]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples of the input.")] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of images that must be encoded.")] = 92,
    chroma: Annotated[str, typer.Option(help="Their chroma subsampling, 4:2:0 or 4:4:4.")] = "4:2:0",
    metadata: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN:TYPE or NAME=COLUMN:TYPE to keep; str, int or float. meta.tags.0 looks inside. Repeatable."),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Image column (tars: suffix). [default: image, or the only one by type and name]")
    ] = None,
    include: Annotated[
        str, typer.Option(help="Pattern for names of input files, such as 'train-*', or for paths below it: 'train/*'.")
    ] = "*",
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Follow symbolic links that lead out of the input, as in a hub's cache.")
    ] = False,
    split: Annotated[str, typer.Option(help="Split to write.")] = "train",
    min_side: Annotated[int, typer.Option(help="Leave out images whose shorter side is below this, pixels.")] = 0,
    max_aspect: Annotated[float | None, typer.Option(help="Leave out images longer than this many times their width.")] = None,
    caption_chars: Annotated[str, typer.Option(help="LOWEST:HIGHEST length of captions, characters.")] = "1:",
    max_pixels: Annotated[int, typer.Option(help="Leave out images with more pixels, undecoded.")] = 1 << 27,
    keep_single_colour: Annotated[bool, typer.Option("--keep-single-colour", help="Keep images of one colour.")] = False,
    where: Annotated[str | None, typer.Option(help="Keep what fulfils this, e.g. 'aesthetic > 5 and width >= 512'.")] = None,
    duplicates: Annotated[str, typer.Option(help="keep, or leave out all but the first: exact, or perceptual.")] = "keep",
    distance: Annotated[int, typer.Option(help="Bits of 64 by which perceptual hashes of duplicates may differ.")] = 4,
    report: Annotated[str | None, typer.Option(metavar="FILE", help="Write an HTML page about it.")] = None,
) -> None:
    """Make a data set of aspect-ratio buckets out of tars, parquet, JSON lines or MDS.

    Killed and given again, the same command goes on where it was. What is left out and why: recipes/data/README.md
    """
    from prx_composer.commands.convert import job
    from prx_composer.commands.convert.settings import Settings, parse_captions, parse_metadata, parse_range, whole_path

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = Settings(
        source=source,
        input=whole_path(input),
        captions=parse_captions(caption),
        image_size=base_size,
        multiple=patch,
        metadata=parse_metadata(metadata or []),
        image=image,
        include=include,
        follow_links=follow_links,
        quality=quality,
        chroma=chroma,
        bucket_aspect=bucket_aspect,
        max_pixels=max_pixels,
        min_side=min_side,
        max_aspect=max_aspect,
        caption_chars=parse_range("--caption-chars", caption_chars),
        single_colour=keep_single_colour,
        where=where,
        duplicates=duplicates,
        distance=distance,
        limit=limit,
        split=split,
    )
    statistics = job.convert(settings, whole_path(output), workers, engine, ray_address, progress=True)
    if report is not None:
        from prx_composer.commands.convert.convert_report import write_report

        write_report(statistics, whole_path(output), report)
    typer.echo(job.as_text(statistics))
