"""The data sets that a recipe's `source` makes on first use."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_composer import registry
from prx_composer.common.errors import UserError, at_path
from prx_composer.data.dataset import read_manifest
from prx_composer.data.sources import is_made, prepare
from prx_composer.recipe.arguments import split
from prx_composer.recipe.config import Recipe, build
from prx_composer.recipe.data_sets import data_sets


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


def sources_of(spec: dict[str, Any] | None, key: str) -> list[Making]:
    """The data sets of a loader that are made from a source.

    Args:
        spec: the loader's configuration.
        key: where in the YAML it is.

    Raises:
        UserError: a source that cannot be built, or no folder to make a data set in.
    """
    spec = spec or {}
    if spec.get("source") and spec.get("mix"):
        raise UserError(f"{key}.source is of one data set; with {key}.mix, give it to a data set of the mixture.")
    if spec.get("source") and not spec.get("path"):
        raise UserError(f"{key}.path is missing: the folder that the source is to make the data set in.")
    if not spec.get("source") and (not spec.get("mix") or not str(spec.get("name", "image_caption")).endswith("image_caption")):
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


def unmade_sources(spec: dict[str, Any] | None, key: str) -> list[Making]:
    """Those of `sources_of` that are still to be made. Raises UserError as that, and for a folder that holds other data."""
    return [making for making in sources_of(spec, key) if not making.is_made()]


def make_data(spec: dict[str, Any] | None, key: str) -> None:
    """Makes a loader's data sets that have a source and are not there yet. Raises UserError for data that cannot be made."""
    for making in sources_of(spec, key):
        making.make()


def read_manifests(spec: dict[str, Any], key: str) -> None:
    """Raises UserError if an `image_caption` loader's data isn't there, or isn't what the loader asks for."""
    with at_path(key):
        for part in data_sets(spec).values():
            if not part.get("remote"):
                read_manifest(part["path"], part.get("split", "train"), part.get("captions"))


def make_recipe_data(recipe: Recipe) -> None:
    """Make what a recipe's sources make, and see that all of its data are there. Raises UserError as the functions above."""
    for key in ("train_loader", "eval_loader"):
        spec = getattr(recipe, key)
        make_data(spec, key)
        if spec and spec["name"] == "image_caption":
            read_manifests(spec, key)
