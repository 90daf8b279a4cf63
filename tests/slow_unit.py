"""A work unit of the converter's engine that takes its time, and imports little."""

import time

from prx_composer.commands.convert.backends import progress


def slow_unit(records: int) -> int:
    for _ in range(records):
        time.sleep(0.06)
        progress.step()
    return records
