"""Tensors that follow from sizes alone, made once for each size and device."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MOST = 256


def cached_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function made for the last 256 different arguments, but not what it makes while a step is counted.

    Then tensors have no content (see models/counting.py), and `functools.lru_cache` would hand them to the next real step.
    """
    made: dict[Any, Tensor] = {}

    @functools.wraps(make)
    def cached(*arguments: Any) -> Tensor:
        if arguments not in made:
            tensor = make(*arguments)
            if isinstance(tensor, FakeTensor):
                return tensor
            if len(made) == _MOST:
                del made[next(iter(made))]
            made[arguments] = tensor
        return made[arguments]

    cached.cache_clear = made.clear  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue] -- as lru_cache has
    return cached
