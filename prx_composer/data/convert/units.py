"""What an engine runs, on whatever machine: one work unit, whole or not at all."""

import io
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from prx_composer.data.convert.output import open_output
from prx_composer.data.convert.records import Job, Record, Unit
from prx_composer.data.convert.sources import open_source
from prx_composer.data.convert.writer import PICTURED_UNITS, write_unit

__all__ = ["convert_unit", "hash_unit", "load_hashes"]


def _records(job: Job, unit: Unit) -> Iterator[Record]:
    return itertools.islice(open_source(job.settings).read(unit), unit.take)


def convert_unit(job: Job, unit: Unit, duplicates: Mapping[int, str]) -> int:
    """Writes a unit's shards and makes it count as done. Returns the number of records read."""
    output = open_output(job.output, job.settings.split)
    with output.scratch() as folder:
        result = write_unit(_records(job, unit), job.settings, folder, unit.number < PICTURED_UNITS, duplicates)
        output.commit(unit, folder, result)
    return int(result["counts"].get("read", 0))


def hash_unit(job: Job, unit: Unit) -> int:
    """Stores the hashes of a unit's records. Returns their number."""
    from prx_composer.data.convert.duplicates import hash_records

    hashes, file = hash_records(_records(job, unit), job.settings), io.BytesIO()
    np.save(file, hashes, allow_pickle=False)
    open_output(job.output, job.settings.split).put(f"hashes/{unit.name}", file.getvalue())
    return len(hashes)


def load_hashes(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)
