"""llm-foundry's components, for names that this package's registries don't know: a plug-in of `prx_composer.registry`.

llm-foundry is imported when it has such a name and not before: that takes seconds, and not everybody has it.
"""

import functools
import importlib
import importlib.util
import logging
import re
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from prx_composer.common.errors import nearest

log = logging.getLogger(__name__)

OURS = "prx_"  # how the names begin under which llm-foundry finds components of this package
INSTALL = "uv sync --inexact --group foundry"
KINDS = frozenset({"algorithms", "callbacks", "loggers", "optimizers", "schedulers"})  # that our trainer can use


def is_installed() -> bool:
    return importlib.util.find_spec("llmfoundry") is not None


def may_have(kind: str, name: str) -> bool:
    """Return whether llm-foundry, or a plug-in of it, spells a name anywhere; if not, it registers none. Imports nothing."""
    if kind not in KINDS or not is_installed():
        return False
    if name.startswith(OURS) or any(entry.name == name for entry in entry_points(group=f"llmfoundry_{kind}")):
        return True
    return any(f"{quote}{name}{quote}" in text for text in _sources() for quote in "'\"")


def _spelt_names(kind: str) -> list[str]:
    """Return the names of a kind that llm-foundry's source registers where one reads them, to suggest the nearest."""
    call = re.compile(rf"\b{kind}\.register\(\s*['\"]([\w.]+)['\"]")
    return sorted({name for text in _sources() for name in call.findall(text)})


@functools.cache
def _sources() -> list[str]:
    found = importlib.util.find_spec("llmfoundry")
    folders = [] if found is None else found.submodule_search_locations or []
    return [file.read_text(encoding="utf-8", errors="replace") for folder in folders for file in Path(folder).rglob("*.py")]


def find(kind: str, name: str) -> Any:
    """Return the class that llm-foundry registers under that name.

    Raises:
        LookupError: it has none, or one that works in its own trainer only, or cannot be looked at; says so.
    """
    if kind not in KINDS:
        raise LookupError
    if not is_installed():
        raise LookupError(f"llm-foundry's {kind} can be named too, but it isn't installed. In a clone: {INSTALL}")
    if name.startswith(OURS):
        raise LookupError(f"That is how a YAML of llm-foundry's names it; here it is {name.removeprefix(OURS)}.")
    if may_have(kind, name):
        try:
            registries = _registries()
        except ImportError as error:
            raise LookupError(f"llm-foundry's could not be looked at, since it cannot be imported: {error}") from error
        if name in getattr(registries, kind):
            return getattr(registries, kind).get(name)
        if kind == "callbacks" and name in registries.callbacks_with_config:
            raise LookupError("llm-foundry's of that name reads llm-foundry's own configuration and runs in its trainer only.")
    raise LookupError(f"llm-foundry has none either.{nearest(name, _spelt_names(kind))}")


@functools.cache
def _registries() -> ModuleType:
    log.info("Looking into llm-foundry, which takes some seconds to import")
    try:
        importlib.import_module("llmfoundry")  # its modules fill the registries
    except Exception as error:  # with other versions of what it needs than its own, anything
        raise ImportError(f"{type(error).__name__}: {error}") from error
    return importlib.import_module("llmfoundry.registry")
