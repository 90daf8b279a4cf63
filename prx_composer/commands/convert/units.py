"""What an engine runs, on whatever machine: one work unit, whole or not at all."""

import io
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from prx_composer.commands.convert.engine import progress
from prx_composer.commands.convert.input_kinds import open_source
from prx_composer.commands.convert.output import open_output
from prx_composer.commands.convert.records import Job, Passed, Record, Unit
from prx_composer.commands.convert.writer import PICTURED_UNITS, write_unit


def _records(job: Job, unit: Unit) -> tuple[Iterator[Record], Passed]:
    """The unit's records, and what was seen beside them, once they are read."""
    source = open_source(job.settings)
    return _counted(itertools.islice(source.read(unit), unit.take)), source.passed


def _counted(records: Iterator[Record]) -> Iterator[Record]:
    for record in records:
        yield record
        progress.step()


def convert_unit(job: Job, unit: Unit, duplicates: Mapping[int, str]) -> int:
    """Writes a unit's shards and makes it count as done. Returns the number of records read."""
    output = open_output(job.output, job.settings.split)
    with output.scratch() as folder:
        records, passed = _records(job, unit)
        result = write_unit(records, job.settings, folder, unit.number < PICTURED_UNITS, duplicates, passed)
        output.commit(unit, folder, result)
    return int(result["counts"].get("read", 0))


def hash_unit(job: Job, unit: Unit) -> int:
    """Stores the hashes of a unit's records. Returns their number."""
    from prx_composer.commands.convert.duplicates import hash_records

    hashes, file = hash_records(_records(job, unit)[0], job.settings), io.BytesIO()
    np.save(file, hashes, allow_pickle=False)
    open_output(job.output, job.settings.split).put(f"hashes/{unit.name}", file.getvalue())
    return len(hashes)


def load_hashes(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)
