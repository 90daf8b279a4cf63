"""`prx report`: a run as one page of charts, samples and stages."""

from dataclasses import dataclass
from typing import Annotated

from typer import Argument, Option, echo


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `prx report`."""

    run: Annotated[str, Argument(help="The run's folder, such as runs/quickstart.")]
    output: Annotated[str | None, Option(metavar="FILE", help="The page to write. [default: report.html in the run]")] = None
    price: Annotated[float | None, Option(min=0, help="Dollars per GPU-hour.")] = None
    title: Annotated[str | None, Option(help="Heading of the page. [default: the run's name]")] = None


def report_run(options: ReportOptions) -> None:
    """One HTML page of a run: samples, losses, speed, stages, evaluation, cost, environment and recipe.

    The page is one file, needs no network, and can be made while the run goes on.
    """
    from prx_composer.commands.report.page import write_page

    echo(write_page(options.run, options.output, options.price, options.title))
