"""Everything is checked before the first GPU second is spent: by `prx check`, and by train.py when it starts.

examine.py       names, arguments, types; what must divide
pretrained.py    hub ids: a folder, in the cache, or answered for by the hub; whether captions are read whole
data_fit.py      splits, columns, shards, buckets
surroundings.py  run folder, disk, GPUs, loggers
step.py          one forward and backward pass of every stage, without a trace

A check yields what it finds, one `Result` for each line of the page.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, ParamSpec

from prx_composer.common.errors import UserError, problems_of, raise_all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """✓ is right, ! will train but should be known, ✗ must be mended, – could not be checked here."""

    mark: Literal["✓", "!", "✗", "–"]
    text: str

    def __str__(self) -> str:
        return f"{self.mark} {self.text}"


def passed(what: str, fact: str) -> Result:
    return Result("✓", f"{what}: {fact}")


def warned(what: str, fact: str) -> Result:
    return Result("!", f"{what}: {fact}")


def failed(problem: str) -> Result:
    """Return a mistake, which begins with the YAML path as the message of every UserError does."""
    return Result("✗", problem)


def skipped(what: str, reason: str) -> Result:
    return Result("–", f"{what}: not checked here, because {reason}")


Given = ParamSpec("Given")


def collected(function: Callable[Given, Iterable[Result]]) -> Callable[Given, Iterator[Result]]:
    """Decorate a check: a UserError ends it, and becomes one more result for everything that it names."""

    @functools.wraps(function)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Iterator[Result]:
        try:
            yield from function(*args, **kwargs)
        except UserError as error:
            yield from map(failed, problems_of(error))

    return checked


def require(results: Iterable[Result]) -> list[Result]:
    """Return all results, and warn of what should be known.

    Raises:
        UserError: with everything that must be mended, if anything must.
    """
    results = list(results)
    raise_all([result.text for result in results if result.mark == "✗"])
    for result in results:
        if result.mark == "!":
            log.warning("%s", result.text)
    return results
