"""`prx data convert`: from what people have (tars, parquet, JSON lines, MDS) to the bucketed shards that `data.format` defines.

In reading order: `settings.py` what was asked for; `records.py` what an input gives, read by `webdataset.py`, `tables.py`,
`lines.py` and `mds_shards.py`; `sample.py` one record, `units.py` one work unit, `job.py` all of them; `outcome.py` what came of
it.
"""

import logging
from dataclasses import dataclass
from typing import Annotated

from typer import Option, echo

from prx_composer.commands.convert.settings import Settings, whole_path
from prx_composer.commands.options import Parsed


@dataclass(frozen=True, kw_only=True)
class Running:
    """Options of `prx data convert` that do not change what it makes."""

    output: Annotated[str, Parsed(str, whole_path), Option(help="Folder of the data set, local or remote: train_loader.path.")]
    workers: Annotated[int, Option(min=0, help="Processes. 0: this one alone; with Ray: all CPUs of the cluster.")] = 1
    engine: Annotated[str, Option(help="local or ray.")] = "local"
    ray_address: Annotated[str | None, Option(help="Ray cluster to run on, such as auto. [default: one on this machine]")] = None
    report: Annotated[str | None, Option(metavar="FILE", help="Write an HTML page about it.")] = None


def convert_data(settings: Settings, running: Running) -> None:
    """Make a data set of aspect-ratio buckets out of tars, parquet, JSON lines or MDS.

    Killed and given again, the same command goes on where it was. What is left out and why: recipes/data/README.md
    """
    from prx_composer.commands.convert import job, outcome

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    statistics = job.convert(settings, running.output, running.workers, running.engine, running.ray_address, progress=True)
    if running.report is not None:
        outcome.write_report(statistics, running.output, running.report)
    echo(outcome.as_text(statistics))
