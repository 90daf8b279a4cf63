"""This package's algorithms, callbacks, loggers, optimizers and schedulers as classes that llm-foundry can call.

llm-foundry asks an entry point for a class of Composer's kind and calls it with what its YAML says. A class here makes no object
of its own: calling it checks and builds the component as a recipe's is, so that wrong arguments are answered in the same way.
"""

from collections.abc import Iterable
from typing import Any

import torch

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.integrations.llm_foundry.components import model_with
from prx_composer.integrations.llm_foundry.lookup import OURS
from prx_composer.recipe.arguments import check_arguments
from prx_composer.recipe.config import build
from prx_composer.registry import Registry

_ELSEWHERE_PROVIDED = ("folder", "source")  # our train.py passes these; here they are arguments like others


class _Published:
    """Components of one kind by name, as attributes."""

    def __init__(self, components: Registry, path: str):
        self._components, self._path = components, path

    def __getattr__(self, name: str) -> Any:
        if name not in self._components.builtin:
            raise AttributeError(name)
        target = self._components.get(name, name)
        path = self._path.format(name=OURS + name)

        def build_instead(cls: type, **arguments: Any) -> Any:
            provided = {key: arguments.pop(key) for key in _ELSEWHERE_PROVIDED if key in arguments}
            return self._build(target, name, arguments, path, provided)

        return type(target)(target.__name__, (target,), {"__new__": build_instead, "__doc__": target.__doc__})

    def _build(self, target: Any, name: str, arguments: dict[str, Any], path: str, provided: dict[str, Any]) -> Any:
        check_arguments(target, arguments, path, frozenset(provided))
        return build(self._components, name, arguments, path, **provided)


class _PublishedOptimizers(_Published):
    """llm-foundry hands an optimizer parameters; ours ask the model which of them decay, or are matrices for Muon."""

    def _build(self, target: Any, name: str, arguments: dict[str, Any], path: str, provided: dict[str, Any]) -> Any:
        params: Iterable[Any] = arguments.pop("params")
        first = next(iter(params), None)
        if isinstance(first, dict):
            raise UserError(
                f"{path}.param_groups: {OURS}{name} makes its own; leave them out, or name an optimizer of llm-foundry's."
            )
        model = model_with(first) if isinstance(first, torch.Tensor) else None
        if model is None:
            raise UserError(f"{path}.name: {OURS}{name} trains {OURS}text_to_image; name an optimizer of llm-foundry's.")
        return super()._build(target, name, arguments, path, {"model": model})


algorithms = _Published(registry.algorithms, "algorithms.{name}")
callbacks = _Published(registry.callbacks, "callbacks.{name}")
loggers = _Published(registry.loggers, "loggers.{name}")
optimizers = _PublishedOptimizers(registry.optimizers, "optimizer")
schedulers = _Published(registry.schedulers, "scheduler")
