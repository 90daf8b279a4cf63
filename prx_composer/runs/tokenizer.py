"""The tokenizer of a run: the one that a recipe names, or one trained on its captions, kept in the run's folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from prx_composer.common.errors import UserError, at_path
from prx_composer.data.format import Manifest, iterate_captions
from prx_composer.models.prompts import cleaner, with_cleaning
from prx_composer.models.text_encoder import load_tokenizer, train_tokenizer
from prx_composer.recipe.arguments import Spec, data_sets
from prx_composer.runs.folder import TOKENIZER

_ENCODER, _PATH = "model.text_encoder", "model.text_encoder.tokenizer"


def made_tokenizer(encoder: Spec, loader: Spec, folder: Path) -> PreTrainedTokenizerBase:
    """Return a run's tokenizer, made and kept in the run's folder if it isn't there yet; on all ranks alike.

    Args:
        encoder: a recipe's `model.text_encoder`.
        loader: its `train_loader`, for a tokenizer that is trained on the captions.
        folder: of the run.

    Raises:
        UserError: one that cannot be had.
    """
    with dist.run_local_rank_zero_first():
        if (folder / TOKENIZER).exists():
            tokenizer = load_tokenizer(str(folder / TOKENIZER))
        else:
            tokenizer = _new(encoder, loader)
            keep_tokenizer(tokenizer, folder / TOKENIZER)
    with at_path(_ENCODER):
        return with_cleaning(tokenizer, encoder.get("clean", "none"))


def kept_tokenizer(encoder: Spec, folder: Path | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a run has in its folder, or the one that its text encoder names; nothing is written.

    Args:
        encoder: a recipe's `model.text_encoder`.

    Raises:
        UserError: it was trained with the run, and isn't there.
    """
    named = encoder.get("tokenizer", encoder.get("pretrained"))
    with at_path(_PATH):
        if folder is not None and (folder / TOKENIZER).exists():
            return load_tokenizer(str(folder / TOKENIZER))
        if isinstance(named, str):
            return load_tokenizer(named, encoder.get("revision"))
        raise UserError(
            f"{_PATH}: it was trained with the run and lies in its folder; there is no {(folder or Path()) / TOKENIZER}. "
            "Put the checkpoint where the run wrote it: <run folder>/checkpoints/."
        )


def _new(encoder: Spec, loader: Spec) -> PreTrainedTokenizerBase:
    spec: Any = encoder.get("tokenizer", encoder.get("pretrained"))
    with at_path(_PATH):
        if isinstance(spec, str):
            return load_tokenizer(spec, encoder.get("revision"))
        if isinstance(spec, dict) and spec.keys() <= {"train", "vocab_size"} and spec.get("train"):
            clean = cleaner(encoder.get("clean", "none"))
            return trained_tokenizer(loader, spec.get("vocab_size", 4096), clean)
    raise UserError(f"{_PATH}: give a hub id or folder, or {{train: true}} to train one on the captions, not {spec!r}.")


def trained_tokenizer(loader: Spec, vocab_size: int = 4096, clean: Callable[[str], str] = str) -> PreTrainedTokenizerBase:
    """Return a word-level tokenizer of the captions that a loader trains on, as they are cleaned."""
    return train_tokenizer(map(clean, _training_captions(loader)), vocab_size)


def _training_captions(loader: Spec) -> Iterator[str]:
    for part in data_sets(loader).values():
        folder = Path(part["path"]) / part.get("split", "train")
        for column in part.get("captions") or [Manifest.read(folder).captions[0]]:
            yield from iterate_captions(folder, column)


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer to a new folder, whole or not at all, on rank 0."""
    if dist.get_global_rank() == 0:
        partial = folder.with_name(f".{folder.name}.partial")
        tokenizer.save_pretrained(str(partial))
        partial.rename(folder)
