"""What a recipe's loader and tokenizer are made of on first use: data by its source, a tokenizer from its captions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.common.errors import UserError, at_path
from prx_composer.data.dataset import read_manifest
from prx_composer.data.format import Manifest, iterate_captions
from prx_composer.data.sources import is_made, prepare
from prx_composer.models.text_encoder import train_tokenizer
from prx_composer.recipe.arguments import split
from prx_composer.recipe.config import build
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


def trained_tokenizer(spec: dict[str, Any], vocab_size: int = 4096, clean: Callable[[str], str] = str) -> PreTrainedTokenizerBase:
    """A word-level tokenizer of the captions that a loader trains on, as they are cleaned."""
    return train_tokenizer(map(clean, _training_captions(spec)), vocab_size)


def _training_captions(spec: dict[str, Any]) -> Iterator[str]:
    for part in data_sets(spec).values():
        folder = Path(part["path"]) / part.get("split", "train")
        for column in part.get("captions") or [Manifest.read(folder).captions[0]]:
            yield from iterate_captions(folder, column)


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes it to a new folder, whole or not at all, on rank 0."""
    if dist.get_global_rank() == 0:
        partial = folder.with_name(f".{folder.name}.partial")
        tokenizer.save_pretrained(str(partial))
        partial.rename(folder)
