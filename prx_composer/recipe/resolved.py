"""A recipe with every default written out, so that two recipes that say the same are the same."""

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.common.outlines import constructor
from prx_composer.recipe.arguments import hints_of
from prx_composer.recipe.config import Recipe
from prx_composer.registry import NESTED, Registry

_COMPONENTS = {
    "model": registry.models,
    "optimizer": registry.optimizers,
    "scheduler": registry.schedulers,
    "train_loader": registry.loaders,
    "eval_loader": registry.loaders,
}
_BY_NAME = {"algorithms": registry.algorithms, "callbacks": registry.callbacks, "loggers": registry.loggers}
_NONE_MEANS: dict[str, Any] = {"flow": {}, "autoencoder": {"name": "pixels"}}  # of a model


def resolved(recipe: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Return a recipe, as YAML gives it, with the defaults of its keys and of every component's constructor.

    What cannot be looked up, such as a stranger's component whose file isn't imported, stays as it is.

    Args:
        recipe: perhaps of an older version, which had fewer keys.
        ranks: what a batch is divided by where `device_train_microbatch_size` is left out.
    """
    full = _plain(recipe)
    full |= {key: value for key, value in _defaults().items() if key not in full}
    for key, components in _COMPONENTS.items():
        if isinstance(full.get(key), dict):
            full[key] = _component(components, full[key])
    for key, components in _BY_NAME.items():
        entries = {name: arguments for name, arguments in (full.get(key) or {}).items() if arguments is not False}
        full[key] = {
            name: _component(components, {"name": name} | (arguments if isinstance(arguments, dict) else {}), named=False)
            for name, arguments in entries.items()
        }
    batch = full.get("global_train_batch_size")
    if isinstance(batch, int):
        full["device_train_microbatch_size"] = full.get("device_train_microbatch_size") or batch // ranks
        full["global_eval_batch_size"] = full.get("global_eval_batch_size") or batch
    return _plain(full)


def _plain(value: Any) -> Any:
    """As JSON gives it back: keys are strings, and tuples are lists."""
    return json.loads(json.dumps(value, default=str))


def _defaults() -> dict[str, Any]:
    """The defaults of a recipe's own keys."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Recipe):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _component(components: Registry, spec: dict[str, Any], named: bool = True) -> dict[str, Any]:
    name = spec.get("name")
    arguments = {key: value for key, value in spec.items() if key != "name"}
    try:
        function = constructor(components.get(str(name), str(name)))
    except (UserError, ImportError):
        return spec if named else arguments
    return ({"name": name} if named else {}) | _filled(function, arguments)


def _filled(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of a class written in C
        return dict(arguments)
    hints = hints_of(function)
    found = dict(arguments)
    for name, parameter in parameters.items():
        if name not in found and _is_plain(parameter.default):
            found[name] = parameter.default
        if name in found:
            found[name] = _value(found[name], name, hints.get(name))
    return found


def _value(value: Any, name: str, hint: Any) -> Any:
    value = _NONE_MEANS.get(name) if value is None else value
    if name in NESTED and isinstance(value, dict):
        return _component(NESTED[name], value)
    options = [hint, *typing.get_args(hint)]
    for option in options:
        item = next(iter(typing.get_args(option)), None)
        if dataclasses.is_dataclass(option) and isinstance(option, type) and isinstance(value, dict):
            return _filled(option, value)
        if dataclasses.is_dataclass(item) and isinstance(item, type) and isinstance(value, list):
            return [_filled(item, element) if isinstance(element, dict) else element for element in value]
    return value


def _is_plain(default: Any) -> bool:
    """Whether a default is a value that a recipe could give."""
    if isinstance(default, list | tuple):
        return all(map(_is_plain, default))
    return default is None or isinstance(default, bool | int | float | str)
