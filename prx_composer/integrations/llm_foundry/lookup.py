"""llm-foundry's components, for names that this package's registries don't know.

It is imported when such a name is looked up and not before: that takes seconds, and not everybody has it.
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

log = logging.getLogger(__name__)

OURS = "prx_"  # how the names begin under which llm-foundry finds components of this package
INSTALL = "uv sync --group foundry"


def is_installed() -> bool:
    return importlib.util.find_spec("llmfoundry") is not None


def may_have(kind: str, name: str) -> bool:
    """Return whether llm-foundry, or a plug-in of it, spells a name anywhere; if not, it registers none. Imports nothing."""
    if name.startswith(OURS) or any(entry.name == name for entry in entry_points(group=f"llmfoundry_{kind}")):
        return True
    return any(f"{quote}{name}{quote}" in text for text in _sources() for quote in "'\"")


def spelt_names(kind: str) -> list[str]:
    """Return the names of a kind that llm-foundry's source registers where one reads them, to suggest the nearest."""
    call = re.compile(rf"\b{kind}\.register\(\s*['\"]([\w.]+)['\"]")
    return sorted({name for text in _sources() for name in call.findall(text)})


@functools.cache
def _sources() -> list[str]:
    found = importlib.util.find_spec("llmfoundry")
    folders = [] if found is None else found.submodule_search_locations or []
    return [file.read_text(encoding="utf-8", errors="replace") for folder in folders for file in Path(folder).rglob("*.py")]


def foundry_component(kind: str, name: str) -> Any:
    """The class that llm-foundry registers under that name, or None.

    Raises:
        LookupError: it has one, which works in its own trainer only.
        ImportError: llm-foundry is installed, but cannot be imported.
    """
    if name.startswith(OURS):
        raise LookupError(f"That is how a YAML of llm-foundry's names it; here it is {name.removeprefix(OURS)}.")
    registries = _registries()
    if name in getattr(registries, kind):
        return getattr(registries, kind).get(name)
    if kind == "callbacks" and name in registries.callbacks_with_config:
        raise LookupError("llm-foundry's of that name reads llm-foundry's own configuration and runs in its trainer only.")
    return None


@functools.cache
def _registries() -> ModuleType:
    log.info("Looking into llm-foundry, which takes some seconds to import")
    try:
        importlib.import_module("llmfoundry")  # its modules fill the registries
    except Exception as error:  # with other versions of what it needs than its own, anything
        raise ImportError(f"{type(error).__name__}: {error}") from error
    return importlib.import_module("llmfoundry.registry")
