"""What of a recipe comes from Python files of its author's (`code_paths`), and that opening a run never imports them.

A recipe that a user hands to train.py is the user's program. The recipe inside of a run folder is data: it may be a stranger's.
"""

import logging
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe
from prx_composer.registry import NESTED, Registry

NEEDS_CODE = "needs_code"
"""Key of a checkpoint's index: the YAML paths of components that decide what the model draws and came from such files."""

log = logging.getLogger(__name__)


def needs_code(recipe: dict[str, Any]) -> list[str]:
    """Return what `NEEDS_CODE` says of a recipe, in the process that trains it."""
    found = []
    for path, components, name in _deciding(recipe):
        if components.is_packaged(name):
            continue
        if components is not registry.algorithms or getattr(components.get(name, path), "shapes_sampling", False):
            found.append(path)
    return found


def without_code(recipe: Recipe, index: dict[str, Any], where: Path) -> Recipe:
    """Return the recipe of a run that is opened, without algorithms that opening doesn't need and cannot name.

    Args:
        index: of the checkpoint.
        where: it lies, for messages.

    Raises:
        UserError: the model needs code that the user has not given.
    """
    recorded, saved = index.get(NEEDS_CODE), {"model": recipe.model, "algorithms": recipe.algorithms}
    lacking, passed_over = list[str](), list[str]()
    for path, components, name in _deciding(saved):
        replaced = bool(recorded) and path in recorded and components.is_packaged(name)  # the code had a class of that name
        if not replaced and _is_known(components, name, path):
            continue
        if components is registry.algorithms and isinstance(recorded, list) and path not in recorded:
            passed_over.append(name)  # a loss or the like: of training alone
        else:
            lacking.append(path)
    files = [str(file) for file in recipe.code_paths]
    if lacking and files:
        raise UserError(
            f"{where}: {', '.join(lacking)} came from Python code of the run's author: {', '.join(files)} (its code_paths). "
            "Opening a run executes nothing that the run names. Read that code, and if you trust it, give your copy: "
            f"{' '.join(f'--code {shlex.quote(file)}' for file in files)}"
        )
    if recorded is None and files and not any(components.is_added(name) for _, components, name in _deciding(saved)):
        log.warning(
            "%s: its recipe names Python code (%s), which is not executed. An older version wrote this checkpoint and didn't say "
            "whether the model needs it; if it does, give --code FILE.",
            where,
            ", ".join(files),
        )
    if passed_over:
        log.info("%s: algorithms.%s, of the author's own code, is of training alone.", where, ", ".join(passed_over))
    return replace(recipe, algorithms={key: value for key, value in recipe.algorithms.items() if key not in passed_over})


def _is_known(components: Registry, name: str, path: str) -> bool:
    try:
        components.get(name, path)
    except UserError:
        return False
    return True


def _deciding(recipe: dict[str, Any]) -> Iterator[tuple[str, Registry, str]]:
    """YAML path, registry and name of every component that may decide what a model draws."""
    yield from _nested(recipe.get("model"), "model", registry.models)
    for name, _ in entries(recipe.get("algorithms") or {}, "algorithms"):
        yield f"algorithms.{name}", registry.algorithms, name


def _nested(spec: Any, path: str, components: Registry) -> Iterator[tuple[str, Registry, str]]:
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        return
    yield path, components, spec["name"]
    for key, value in spec.items():
        if key in NESTED:
            yield from _nested(value, f"{path}.{key}", NESTED[key])
