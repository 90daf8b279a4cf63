"""What an engine runs on one work unit, whole or not at all: convert it, or hash it.

A unit becomes shards, one folder for each bucket, and a result that says what is in them: a function of its input alone.
"""

import base64
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from prx_composer.commands.convert.engine import progress
from prx_composer.commands.convert.input_files import Passed
from prx_composer.commands.convert.outcome import Tally
from prx_composer.commands.convert.output import RESULT, open_output
from prx_composer.commands.convert.records import Job, Record, Unit, open_source
from prx_composer.commands.convert.sample import Dropped, Kept, convert, thumbnail
from prx_composer.commands.convert.settings import METADATA_TYPES, Settings
from prx_composer.common.files import sync
from prx_composer.data.decoding import BadImageError, decode, open_image
from prx_composer.data.format import COLUMNS

SHARD_BYTES = 1 << 26
BUFFERED_BYTES = 1 << 28  # over all buckets of a unit: memory does not depend on how many there are
PICTURES = 2  # of every reason for dropping, kept for the report
PICTURED_UNITS = 50  # first units, which keep them


def convert_unit(job: Job, unit: Unit, duplicates: Mapping[int, str]) -> int:
    """Write a unit's shards and make it count as done. Return the number of records read."""
    output = open_output(job.output, job.settings.split)
    with output.scratch() as folder:
        records, passed = _records(job, unit)
        result = write_unit(records, job.settings, folder, unit.number < PICTURED_UNITS, duplicates, passed)
        output.commit(unit, folder, result)
    return int(result["counts"].get("read", 0))


def hash_unit(job: Job, unit: Unit) -> int:
    """Store the hashes of a unit's records. Return their number."""
    from prx_composer.commands.convert.duplicates import hash_records, to_bytes

    hashes = hash_records(_records(job, unit)[0], job.settings)
    open_output(job.output, job.settings.split).put(f"hashes/{unit.name}", to_bytes(hashes))
    return len(hashes)


def _records(job: Job, unit: Unit) -> tuple[Iterator[Record], Passed]:
    """Return the unit's records, and what was seen beside them, once they are read."""
    source = open_source(job.settings)
    return _counted(itertools.islice(source.read(unit), unit.take)), source.passed


def _counted(records: Iterator[Record]) -> Iterator[Record]:
    for record in records:
        yield record
        progress.step()


class BoundedWriter(MDSWriter):
    """An MDSWriter that can be told to write what it has buffered."""

    def flush(self) -> None:
        self.flush_shard()
        self._reset_cache()


def columns_of(settings: Settings) -> dict[str, str]:
    """Return the MDS encodings of the columns that a conversion writes."""
    metadata = {name: METADATA_TYPES[kind] for name, (_, kind) in settings.metadata.items()}
    return COLUMNS | dict.fromkeys(settings.captions, "str") | metadata


def write_unit(
    records: Iterable[Record],
    settings: Settings,
    folder: Path,
    pictured: bool,
    duplicates: Mapping[int, str],
    passed: Passed,
) -> dict[str, Any]:
    """Write a unit's shards below an empty folder, bucket by bucket, and beside them RESULT, which is returned.

    Args:
        pictured: whether to keep small pictures of what was dropped.
        duplicates: number of a record in the unit → reason, of those that are duplicates.
        passed: what the source has seen beside the records, when they are read.
    """
    tally, pictures = Tally(), dict[str, list[str]]()
    writers: dict[str, BoundedWriter] = {}
    asked = settings.input_columns
    for number, record in enumerate(records):
        tally.see(record, asked)
        outcome = convert(record, settings, duplicates.get(number, ""))
        tally.add(outcome)
        if isinstance(outcome, Dropped):
            if pictured:
                _picture(pictures.setdefault(outcome.reason, []), outcome, record, settings)
            continue
        _write(writers, outcome, settings, folder)
    tally.passed, shards = passed, {}
    for bucket, writer in sorted(writers.items()):
        writer.finish()
        index = folder / bucket / "index.json"
        shards[bucket] = json.loads(index.read_text())["shards"]
        index.unlink()
        for file in sorted((folder / bucket).iterdir()):
            sync(file)
        sync(folder / bucket)
    result = tally.to_json() | {"shards": shards, "pictures": {reason: some for reason, some in pictures.items() if some}}
    path = folder / RESULT
    path.write_text(json.dumps(result))
    sync(path)
    sync(folder)
    return result


def _write(writers: dict[str, BoundedWriter], kept: Kept, settings: Settings, folder: Path) -> None:
    name = str(kept.bucket)
    if name not in writers:
        writers[name] = BoundedWriter(out=str(folder / name), columns=columns_of(settings), size_limit=SHARD_BYTES)
    writers[name].write(kept.row)
    sizes = Counter({bucket: writer.new_shard_size for bucket, writer in writers.items()})
    if sizes.total() > BUFFERED_BYTES:
        writers[sizes.most_common(1)[0][0]].flush()


def _picture(pictures: list[str], dropped: Dropped, record: Record, settings: Settings) -> None:
    if len(pictures) >= PICTURES or record.image is None:
        return
    decoded = dropped.pixels
    if decoded is None:
        try:
            decoded = decode(record.image, open_image(record.image, settings.max_pixels))
        except BadImageError:
            return
    pictures.append(base64.b64encode(thumbnail(decoded)).decode())
