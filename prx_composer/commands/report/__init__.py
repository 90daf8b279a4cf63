"""`prx report`: a run as one page of charts, samples and stages."""

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `prx report`."""

    run: Annotated[str, typer.Argument(help="The run's folder, such as runs/quickstart.")]
    output: Annotated[str | None, typer.Option(metavar="FILE", help="The page to write. [default: report.html in the run]")] = (
        None
    )
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per GPU-hour.")] = None
    title: Annotated[str | None, typer.Option(help="Heading of the page. [default: the run's name]")] = None


def report_run(options: ReportOptions) -> None:
    """One HTML page of a run: samples, losses, speed, stages, evaluation, cost, environment and recipe.

    The page is one file, needs no network, and can be made while the run goes on.
    """
    from prx_composer.commands.report.page import write_page

    typer.echo(write_page(options.run, options.output, options.price, options.title))
