"""Frozen parts of a model that a recipe names by a folder, kept with the run: no checkpoint holds them, and folders go.

runs/<run_name>/frozen/text_encoder  runs/<run_name>/frozen/autoencoder     hard links where the disk allows, or else copies

Parts of the hub are not kept: they are found again by their id and revision.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from prx_composer.common.files import sync
from prx_composer.runs.folder import FROZEN, TOKENIZER

log = logging.getLogger(__name__)

_NAMES = {"text_encoder": "huggingface", "autoencoder": "diffusers"}  # of components that load folders
_WEIGHTS = (".safetensors", ".bin")  # the first of these that is there


def with_kept(model: dict[str, Any], run_folder: Path) -> dict[str, Any]:
    """Return a recipe's `model`, which names what its run has kept instead of folders of elsewhere."""
    changed = dict(model)
    for part in _NAMES:
        kept = run_folder / FROZEN / part
        if _named_folder(model, part) is None or not kept.is_dir():
            continue
        changed[part] = model[part] | {"pretrained": str(kept)} | ({"subfolder": None} if "subfolder" in model[part] else {})
        if part == "text_encoder" and (run_folder / TOKENIZER).is_dir():
            changed[part]["tokenizer"] = str(run_folder / TOKENIZER)
    return changed


def keep_frozen(model: dict[str, Any], run_folder: Path) -> None:
    """Keep what a recipe's `model` names by a folder with its run, once; on one rank.

    Raises:
        OSError: it cannot be written.
    """
    for part in _NAMES:
        source, kept = _named_folder(model, part), run_folder / FROZEN / part
        if source is None or kept.exists() or not source.is_dir():
            continue
        files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix == ".json"]
        weights = ([file for file in sorted(source.glob(f"*{suffix}")) if file.is_file()] for suffix in _WEIGHTS)
        files += next((found for found in weights if found), [])
        partial = kept.with_name(f".{part}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copied = sum(_link_or_copy(file.resolve(), partial / file.name) for file in files)
        sync(partial)
        partial.rename(kept)
        how = f"copied ({copied / 1e9:.2f} GB)" if copied else "linked"
        log.info("model.%s: %s is %s into %s, so that the run needs it no more.", part, source, how, kept)


def _named_folder(model: dict[str, Any], part: str) -> Path | None:
    """The folder that `pretrained` would be; an id of the hub is none that is there."""
    spec = model.get(part)
    if not isinstance(spec, dict) or spec.get("name") != _NAMES[part] or not isinstance(spec.get("pretrained"), str):
        return None
    return Path(spec["pretrained"]).expanduser() / (spec.get("subfolder") or "")


def _link_or_copy(source: Path, target: Path) -> int:
    """Bytes that were copied."""
    try:
        os.link(source, target)
        return 0
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        sync(target)
        return target.stat().st_size
