"""The data sets that a recipe makes on first use: those with a `source`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_composer import registry
from prx_composer.config import Recipe, build, split
from prx_composer.data.data_sets import data_sets
from prx_composer.data.sources import is_made, prepare
from prx_composer.errors import UserError, at_path

__all__ = ["Making", "sources_of", "unmade_sources"]


@dataclass(frozen=True)
class Making:
    """A data set that a source makes.

    Args:
        key: where in the recipe its data set is named: train_loader, eval_loader or train_loader.mix.NAME.
        path: the folder to be.
        source: makes it.
        spec: the source as the recipe has it.
    """

    key: str
    path: Path
    source: Any
    spec: dict[str, Any]

    def is_made(self) -> bool:
        """Raises UserError for a folder that holds other data."""
        with at_path(self.key):
            return is_made(self.path, self.source, self.spec)

    def make(self) -> None:
        """Makes it, unless it is there already. Raises UserError for what is wrong with what the source reads."""
        with at_path(self.key):
            prepare(self.path, self.source, self.spec)


def sources_of(recipe: Recipe, key: str) -> list[Making]:
    """The data sets of a loader that are made from a source.

    Raises:
        UserError: a source that cannot be built, or no folder to make a data set in.
    """
    spec = getattr(recipe, key) or {}
    if spec.get("source") and spec.get("mix"):
        raise UserError(f"{key}.source is of one data set; with {key}.mix, give it to a data set of the mixture.")
    if spec.get("source") and not spec.get("path"):
        raise UserError(f"{key}.path is missing: the folder that the source is to make the data set in.")
    if not spec.get("source") and not spec.get("mix"):
        return []
    with at_path(key):
        found = data_sets(spec)
    made = []
    for where, arguments in found.items():
        if arguments.get("source"):
            path = f"{key}.{where}" if where else key
            name, options = split(arguments["source"], f"{path}.source")
            source = build(registry.sources, name, options, f"{path}.source")
            made.append(Making(path, Path(arguments["path"]), source, arguments["source"]))
    return made


def unmade_sources(recipe: Recipe, key: str) -> list[Making]:
    """Those of `sources_of` that are still to be made. Raises UserError as that, and for a folder that holds other data."""
    return [making for making in sources_of(recipe, key) if not making.is_made()]
