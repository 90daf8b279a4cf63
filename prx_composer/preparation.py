"""What a recipe's loader and tokenizer are made of on first use: data by its source, a tokenizer from its captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.config import build, split
from prx_composer.data.data_sets import data_sets
from prx_composer.data.dataset import read_manifest
from prx_composer.data.schema import Manifest, iterate_captions
from prx_composer.data.sources import prepare
from prx_composer.errors import UserError, at_path
from prx_composer.models.text_encoder import train_tokenizer

__all__ = ["keep_tokenizer", "make_data", "read_manifests", "source_of", "trained_tokenizer"]


def source_of(spec: dict[str, Any] | None, key: str) -> Any:
    """The source that a loader's data set is made from, or None if it names none.

    Args:
        spec: the loader's configuration.
        key: where in the YAML it is.

    Raises:
        UserError: one that cannot be built, or no folder to make it in.
    """
    if not spec or not spec.get("source"):
        return None
    name, arguments = split(spec["source"], f"{key}.source")
    if "path" not in spec:
        raise UserError(f"{key}.path is missing: the folder that the source is to make the data set in.")
    return build(registry.sources, name, arguments, f"{key}.source")


def make_data(spec: dict[str, Any] | None, key: str) -> None:
    """Makes a loader's data set, if it has a source and is not there yet.

    Raises:
        UserError: data that cannot be made.
    """
    source = source_of(spec, key)
    if spec is not None and source is not None:
        with at_path(key):
            prepare(Path(spec["path"]), source, spec["source"])


def read_manifests(spec: dict[str, Any], key: str) -> None:
    """Raises UserError if an `image_caption` loader's data isn't there, or isn't what the loader asks for."""
    with at_path(key):
        for part in data_sets(spec).values():
            if not part.get("remote"):
                read_manifest(part["path"], part.get("split", "train"), part.get("captions"))


def trained_tokenizer(spec: dict[str, Any], vocab_size: int = 4096) -> PreTrainedTokenizerBase:
    """A word-level tokenizer of the captions that a loader trains on."""
    return train_tokenizer(_training_captions(spec), vocab_size)


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
