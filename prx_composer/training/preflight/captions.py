"""Whether the text encoder reads the captions whole: a few of them, counted with its tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prx_composer.data.dataset import read_manifest
from prx_composer.data.format import MANIFEST, Manifest, open_local
from prx_composer.models.encoders import load_tokenizer, tokenize, train_tokenizer
from prx_composer.models.prompts import CaptionCounts, cleaner, with_cleaning
from prx_composer.recipe.arguments import split
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.data_sets import data_sets
from prx_composer.runs.folder import TOKENIZER
from prx_composer.training.components import Components
from prx_composer.training.preflight.result import Result, passed, skipped, warned

LOOKED_AT = 256  # captions of a column, evenly spaced over its data set
MAX_TOKENS = 256  # of a text encoder that doesn't say


def check_captions(recipe: Recipe, parts: Components) -> Iterator[Result]:
    """How many of the training captions are cut, and how many words are unknown; nothing is downloaded."""
    if parts.is_wrong("model") or parts.is_wrong("train_loader") or recipe.train_loader.get("name") != "image_caption":
        return
    encoder = split(recipe.model, "model")[1].get("text_encoder")
    if not isinstance(encoder, dict):
        return
    try:
        found = [part for part in data_sets(recipe.train_loader).values() if not part.get("remote")]
        captions = [text for part in found for text in _some_captions(part)]
    except (OSError, ValueError, LookupError):  # said by the checks of data
        return
    if not captions:  # remote, or still to be made
        return
    own = not isinstance(encoder.get("tokenizer", encoder.get("pretrained")), str)
    cleaning = encoder.get("clean", "none")
    tokenizer = _tokenizer(recipe, encoder, list(map(cleaner(cleaning), captions)))
    if tokenizer is None:
        yield skipped("train_loader: captions", "their tokenizer is not on this machine")
        return
    tokenizer = with_cleaning(tokenizer, cleaning)
    max_tokens, counts = int(encoder.get("max_tokens", MAX_TOKENS)), CaptionCounts()
    for start in range(0, len(captions), LOOKED_AT):
        tokenize(tokenizer, captions[start : start + LOOKED_AT], max_tokens, counts)
    lost = counts.told(max_tokens)
    if lost is not None:
        yield warned("train_loader: captions", f"of those looked at, {lost}")
    else:
        unknown = "" if own else ", and their words are known"
        yield passed("train_loader: captions", f"{len(captions):,} looked at are read whole, in {max_tokens} tokens{unknown}")


def _some_captions(part: dict[str, Any]) -> Iterator[str]:
    """Evenly spaced ones of the columns that are trained on; none of a data set that isn't there or isn't right."""
    name = part.get("split", "train")
    folder = Path(part["path"]) / name
    if not (folder / MANIFEST).exists():
        return
    manifest: Manifest = read_manifest(part["path"], name, part.get("captions"))
    columns = list(part.get("captions") or manifest.captions[:1])
    total, first = sum(manifest.buckets.values()), 0
    step = max(1, -(-total // LOOKED_AT))
    for bucket, count in manifest.buckets.items():
        rows = open_local(folder / str(bucket))
        for index in range(-first % step, count, step):
            row = rows[index]
            yield from (row[column] for column in columns)
        first += count


def _tokenizer(recipe: Recipe, encoder: dict[str, Any], captions: list[str]) -> PreTrainedTokenizerBase | None:
    """The run's or the named one, if it is here; for one that the run will train, one of the same kind, which counts alike."""
    spec, folder = encoder.get("tokenizer", encoder.get("pretrained")), Path(recipe.run_folder) / TOKENIZER
    try:
        if folder.exists():
            return load_tokenizer(str(folder))
        if isinstance(spec, str):
            return load_tokenizer(spec, encoder.get("revision"), local_files_only=True)
    except (OSError, ValueError):  # said by the checks of weights
        return None
    return train_tokenizer(captions)
