"""Whether the weights that a recipe names can be had: a folder, the local cache, or a hub that answers. Nothing is downloaded."""

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedTokenizerBase

from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import read_manifest
from prx_composer.data.format import MANIFEST, BrokenShardError, Manifest, open_rows, read_row
from prx_composer.models.caption_format import FORMAT, CaptionFormat, cleaner, with_format
from prx_composer.models.encoders import TeacherSpec, load_tokenizer, train_tokenizer
from prx_composer.models.prompts import CaptionCounts, tokenize, wordings
from prx_composer.recipe.arguments import data_sets, text_encoders
from prx_composer.recipe.config import Recipe
from prx_composer.runs.checkpoints import newest_checkpoint
from prx_composer.runs.model_parts import MOST_WORDS, TRAINED_BY, tokenizer_folder
from prx_composer.runs.pretrained_models import check_init_from
from prx_composer.training.components import Components
from prx_composer.training.preflight import Result, collected, failed, passed, skipped, warned

TIMEOUT = 5.0  # seconds for one answer
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Reference:
    """Something that a recipe loads by name.

    Args:
        path: in the YAML.
        name: hub id or folder.
        revision, subfolder: where in the repository.
        weights, tokenizer: what of it is loaded.
    """

    path: str
    name: str
    revision: str | None = None
    subfolder: str | None = None
    weights: bool = True
    tokenizer: bool = False


def references(parts: Components) -> list[Reference]:
    """Return what a recipe loads through transformers and diffusers: encoder and tokenizer, an autoencoder, teachers."""
    found = [] if parts.is_wrong("model") else _of_model(parts.arguments(), Path(parts.recipe.run_folder))
    for algorithm in parts.algorithms.values():
        teacher = getattr(algorithm, "teacher", None)
        path = f"algorithms.{getattr(algorithm, 'name', type(algorithm).__name__)}.teacher"
        if isinstance(teacher, str):
            found.append(Reference(path, teacher))
        elif isinstance(teacher, TeacherSpec) and teacher.pretrained is not None:
            found.append(Reference(path, teacher.pretrained, teacher.revision))
    return found


def _of_model(model: dict[str, Any], run_folder: Path) -> list[Reference]:
    found = []
    for path, encoder in text_encoders(model).items():
        pretrained, revision = encoder.get("pretrained"), encoder.get("revision")
        tokenizer: Any = encoder.get("tokenizer") or pretrained
        if tokenizer_folder(run_folder, path).exists() or not isinstance(tokenizer, str):  # a run keeps its own
            tokenizer = None
        if pretrained:
            found.append(Reference(path, pretrained, revision, tokenizer=tokenizer == pretrained))
        if tokenizer not in (None, pretrained):
            found.append(Reference(f"{path}.tokenizer", tokenizer, revision, weights=False, tokenizer=True))
    autoencoder = model.get("autoencoder")
    if isinstance(autoencoder, dict) and autoencoder.get("pretrained"):
        where = autoencoder.get("revision"), autoencoder.get("subfolder")
        found.append(Reference("model.autoencoder", autoencoder["pretrained"], *where))
    return found


@collected
def check_weights(parts: Components) -> Iterator[Result]:
    """Yield one result per reference; those that must be asked for are asked for at once."""
    recipe, algorithms = parts.recipe, list(parts.algorithms.values())
    if source := recipe.model.get("init_from"):
        yield from _check_init_from(source, parts)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(_answer, references(parts)))
    yield from (result for result, _ in answers)
    if download := sum(size for _, size in answers):
        yield from _check_cache(download)
    for algorithm in algorithms:
        if isinstance(algorithm, Trick):
            try:
                if (fact := algorithm.find_weights(TIMEOUT)) is not None:
                    yield passed(f"algorithms.{algorithm.name}", fact)
            except UserError as error:
                yield failed(str(error))


@collected
def _check_init_from(source: str, parts: Components) -> Iterator[Result]:
    newest = newest_checkpoint(Path(parts.recipe.run_folder)) if parts.recipe.autoresume else None
    if parts.is_wrong("model"):
        return
    if newest is not None:
        yield passed("model.init_from", f"is not read again: the run goes on from {newest.path}")
        return
    yield passed("model.init_from", check_init_from(source, parts.backbone))


def _answer(reference: Reference) -> tuple[Result, int]:
    """Return the result, and how many bytes will be downloaded."""
    try:
        fact, size = _look_up(reference)
        return passed(reference.path, f"{reference.name} {fact}"), size
    except UserError as error:
        return failed(f"{reference.path}: {reference.name} cannot be loaded: {error}"), 0


def _look_up(reference: Reference) -> tuple[str, int]:
    folder = Path(reference.name).expanduser()
    if folder.is_dir():
        if missing := _what_is_missing(folder, reference):
            raise UserError(f"the folder has no {missing}.")
        return "is a folder", 0
    cached = _cached(reference)
    missing = None if cached is None else _what_is_missing(cached, reference)
    if cached is not None and missing is None:
        return "is in the local cache", 0
    cache = f"the local cache, {constants.HF_HUB_CACHE},"
    there = f"it is not in {cache}" if cached is None else f"{cache} lacks its {missing},"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{there} and HF_HUB_OFFLINE is set. {_elsewhere(reference)}")
    return _ask_hub(reference, there)


def _elsewhere(reference: Reference) -> str:
    return (
        f"Run `hf download {reference.name}` where there is a network (if it is gated, accept its licence and `hf auth login` "
        "first), and give its folder instead of the hub id."
    )


def _cached(reference: Reference) -> Path | None:
    try:
        return Path(snapshot_download(reference.name, revision=reference.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:  # a path, not an id
        raise UserError("there is no such folder, and it is no hub id either.") from error


def bytes_here(reference: Reference) -> float:
    """Return the size of the weights in a folder of this machine; infinity for what is in none."""
    if not reference.weights:
        return 0
    folder = Path(reference.name, reference.subfolder or "").expanduser()
    return sum(file.stat().st_size for of in _WEIGHTS for file in folder.glob(of)) or math.inf


def is_here(reference: Reference) -> bool:
    """Return whether nothing of it must be downloaded."""
    folder: Path | None = Path(reference.name).expanduser()
    try:
        folder = folder if folder.is_dir() else _cached(reference)
    except UserError:
        return False
    return folder is not None and _what_is_missing(folder, reference) is None


def _what_is_missing(folder: Path, reference: Reference) -> str | None:
    """Return what a folder lacks of what is loaded from it, in words; None if all is there."""
    if reference.tokenizer and not any((folder / name).exists() for name in _TOKENIZERS):
        return f"tokenizer ({_TOKENIZERS[0]} or the like)"
    if not reference.weights:
        return None
    folder = folder / (reference.subfolder or "")
    if not (folder / "config.json").exists():
        return "config.json"
    lacking = []
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if absent := sorted(shard for shard in shards if not (folder / shard).exists()):
            lacking.append(f"{len(absent)} of {len(shards)} shards of the weights")
        else:
            return None
    if lacking:
        return lacking[0]
    return None if any(path.exists() for pattern in _WEIGHTS for path in folder.glob(pattern)) else "weights (*.safetensors)"


def _ask_hub(reference: Reference, there: str) -> tuple[str, int]:
    api = HfApi()
    try:
        info = api.model_info(reference.name, revision=reference.revision, files_metadata=True, timeout=TIMEOUT)
        if info.gated or info.private:  # its description may be public
            api.auth_check(reference.name)
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{reference.name}"
        raise UserError(f"it is gated. Accept its licence on {page} and run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"it has no revision {reference.revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{constants.ENDPOINT} has none of that name, or it is private. Mend the name, or `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{there} and {constants.ENDPOINT} answers: {_first_line(error)}") from error
    except Exception as error:  # the many ways in which requests and httpx say that nobody is there
        silence = f"{constants.ENDPOINT} does not answer ({_first_line(error)})"
        raise UserError(f"{there} and {silence}. {_elsewhere(reference)}") from error
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    needed = f"{reference.subfolder}/config.json" if reference.subfolder else "config.json"
    if reference.weights and needed not in files:
        raise UserError(f"the repository has no {needed}; mend `pretrained` or `subfolder`.")
    size = _download_size(files, reference) if reference.weights else 0
    return f"is downloaded on first use ({size / 1e9:.1f} GB)" if size else "is downloaded on first use", size


def _download_size(files: dict[str, int], reference: Reference) -> int:
    """Return the bytes of the weights in one format, which are nearly all of it."""
    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    here = [name for name in files if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    for ending in (".safetensors", ".bin"):
        if size := sum(files[name] for name in here if name.endswith(ending)):
            return size
    return 0


def _check_cache(download: int) -> Iterator[Result]:
    """Warn of a cache without room; only that, since a repository may hold the weights more than once."""
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if free < 1.2 * download:
        yield warned(
            "HF_HUB_CACHE",
            f"{cache} has {free / 1e9:.1f} GB free, and about {download / 1e9:.1f} GB will be downloaded; set it to a folder "
            "with more room",
        )


def _first_line(error: BaseException) -> str:
    """Return the bottom of an error in one line: requests and urllib wrap the reason in what they were doing."""
    inner = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, BaseException)), None)
    if isinstance(inner, BaseException):
        return _first_line(inner)
    return (str(error).strip().partition("\n")[0].rpartition("): ")[2] or type(error).__name__)[:200]


LOOKED_AT = 256  # captions of a column, evenly spaced over its data set
MAX_TOKENS = 256  # of a text encoder that doesn't say


@collected
def check_captions(parts: Components) -> Iterator[Result]:
    """Say how many of the training captions are cut, and how many words are unknown; nothing is downloaded."""
    recipe = parts.recipe
    if parts.is_wrong("model") or parts.is_wrong("train_loader") or recipe.train_loader.get("name") != "image_caption":
        return
    try:
        found = [part for part in data_sets(recipe.train_loader).values() if not part.get("remote")]
        captions = [text for part in found for text in _some_captions(part, recipe.seed)]
    except (OSError, ValueError, LookupError):  # said by the checks of data
        return
    if not captions:  # remote, or still to be made
        return
    for path, encoder in text_encoders(recipe.model).items():
        yield _read_whole(recipe, path, encoder, captions)


def _read_whole(recipe: Recipe, path: str, encoder: dict[str, Any], captions: list[str]) -> Result:
    """Say how much of these captions a text encoder reads."""
    what = "train_loader: captions" + (f" by {path.rpartition('.')[2]}" if ".encoders." in path else "")
    own = not isinstance(encoder.get("tokenizer") or encoder.get("pretrained"), str)
    form = CaptionFormat(encoder.get("clean", "none"), encoder.get("instruction", ""))
    tokenizer = _tokenizer(recipe, path, encoder, [form.of(text, cleaner(form.cleaning)) for text in captions])
    if tokenizer is None:
        return skipped(what, "their tokenizer is not on this machine")
    tokenizer = with_format(tokenizer, **{key: encoder[key] for key in FORMAT if key in encoder})
    max_tokens, counts = int(encoder.get("max_tokens", MAX_TOKENS)), CaptionCounts()
    for start in range(0, len(captions), LOOKED_AT):
        tokenize(tokenizer, captions[start : start + LOOKED_AT], max_tokens, counts)
    lost = counts.told(max_tokens)
    if lost is not None:
        return warned(what, f"of those looked at, {lost}")
    unknown = "" if own else ", and their words are known"
    return passed(what, f"{len(captions):,} looked at are read whole, in {max_tokens} tokens{unknown}")


def _some_captions(part: dict[str, Any], seed: int) -> Iterator[str]:
    """Yield evenly spaced captions of the columns that are trained on, as the first epoch reads them.

    None of a data set that isn't there or isn't right.
    """
    name = part.get("split", "train")
    folder = Path(part["path"]) / name
    if not (folder / MANIFEST).exists():
        return
    manifest: Manifest = read_manifest(part["path"], name, part.get("captions"))
    columns = wordings(part.get("captions") or {manifest.captions[0]: 1.0})
    total, first = sum(manifest.buckets.values()), 0
    step = max(1, -(-total // LOOKED_AT))
    for bucket, count in manifest.buckets.items():
        rows = open_rows(folder, bucket, manifest)
        for index in range(-first % step, count, step):
            try:
                row = read_row(rows, index)
            except BrokenShardError:  # said by the checks of data
                continue
            yield from (wording.of(row[column], seed, 0, first + index) for column, wording in columns.items())
        first += count


def _tokenizer(recipe: Recipe, path: str, encoder: dict[str, Any], captions: list[str]) -> PreTrainedTokenizerBase | None:
    """Return the run's or the named tokenizer if it is here, else one of the kind that the run will train, which counts alike."""
    spec, folder = encoder.get("tokenizer") or encoder.get("pretrained"), tokenizer_folder(Path(recipe.run_folder), path)
    try:
        if folder.exists():
            return load_tokenizer(str(folder))
        if isinstance(spec, str):
            return load_tokenizer(spec, encoder.get("revision"), local_files_only=True)
    except (OSError, ValueError):  # said by the checks of weights
        return None
    by = spec.get("by") if isinstance(spec, dict) else None
    return TRAINED_BY.get(by or "word", train_tokenizer)(captions, MOST_WORDS)
