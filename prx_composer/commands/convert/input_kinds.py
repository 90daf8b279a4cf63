"""The kinds of input by name."""

import dataclasses
import itertools

from prx_composer.commands.convert.records import Source, Unit
from prx_composer.commands.convert.settings import Settings


def open_source(settings: Settings) -> Source:
    """The source that the settings name; only its own libraries are imported."""
    if settings.source == "webdataset":
        from prx_composer.commands.convert.webdataset import WebDataset

        return WebDataset(settings)
    if settings.source == "parquet":
        from prx_composer.commands.convert.tables import Tables

        return Tables(settings)
    if settings.source == "jsonl":
        from prx_composer.commands.convert.lines import Lines

        return Lines(settings)
    from prx_composer.commands.convert.shards import Shards

    return Shards(settings)


def limited(source: Source, units: list[Unit], limit: int) -> list[Unit]:
    """The first units, as many as hold `limit` records, the last of them cut; reads that many records, and no more."""
    kept: list[Unit] = []
    for unit in units:
        count = sum(1 for _ in itertools.islice(source.read(unit), limit))
        kept.append(dataclasses.replace(unit, take=count))
        limit -= count
        if limit <= 0:
            break
    return kept
