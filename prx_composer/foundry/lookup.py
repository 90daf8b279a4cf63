"""llm-foundry's components, for names that this package's registries don't know.

It is imported when such a name is looked up and not before: that takes seconds, and not everybody has it.
"""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Any

__all__ = ["INSTALL", "OURS", "foundry_component", "foundry_names", "is_installed"]

log = logging.getLogger(__name__)

OURS = "prx_"  # how the names begin under which llm-foundry finds components of this package
INSTALL = "uv sync --group foundry"


def is_installed() -> bool:
    return importlib.util.find_spec("llmfoundry") is not None


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


def foundry_names(kind: str) -> list[str]:
    """All that can be named."""
    return [name for name in getattr(_registries(), kind).get_all() if not name.startswith(OURS)]


@functools.cache
def _registries() -> ModuleType:
    log.info("Looking into llm-foundry, which takes some seconds to import")
    try:
        importlib.import_module("llmfoundry")  # its modules fill the registries
    except Exception as error:  # with other versions of what it needs than its own, anything
        raise ImportError(f"{type(error).__name__}: {error}") from error
    return importlib.import_module("llmfoundry.registry")
