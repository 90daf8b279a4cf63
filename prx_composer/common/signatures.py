"""What a component is called with, also where its class doesn't say so."""

import inspect
from collections.abc import Callable
from typing import Any

from prx_composer.common.outlines import CannotTell, Foreign

_CALLBACK = ("composer.core.callback", "Callback")  # by name, since its outline has the same


def constructor(target: Any) -> Callable[..., Any]:
    """The function whose signature says which arguments a class or function takes.

    A constructor of `*args, **kwargs` alone that stands around another one, or that hands everything on to the class it
    inherits from, is looked through. Composer's Callback takes any arguments and drops them: it counts as one without.

    Raises:
        CannotTell: an outline whose constructor is that of a class which wasn't read.
    """
    if not inspect.isclass(target):
        return target
    open_ended = None
    for cls in target.__mro__:
        if cls is object or (cls.__module__, cls.__qualname__) == _CALLBACK:
            break
        if cls is Foreign:
            raise CannotTell(f"the constructor of {target.__qualname__} is another package's")
        init = vars(cls).get("__init__")
        if init is None:
            continue
        init = _wrapped(init)
        if not _takes_anything(init):
            return init
        open_ended = open_ended or init
    return open_ended or _nothing


def _nothing(self: Any) -> None: ...


def _takes_anything(init: Any) -> bool:
    try:
        parameters = list(inspect.signature(init).parameters.values())[1:]
    except ValueError:  # of a class written in C
        return False
    return [parameter.kind for parameter in parameters] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _wrapped(init: Any) -> Any:
    """llm-foundry's `experimental_class` puts a constructor around a class's own and doesn't name it in `__wrapped__`."""
    while inspect.isfunction(init) and _takes_anything(init):
        inner = [value for value in inspect.getclosurevars(init).nonlocals.values() if inspect.isfunction(value)]
        if len(inner) != 1:
            break
        init = inner[0]
    return init
