"""Graphs of `torch.compile` for images of many sizes."""

from collections.abc import Callable
from typing import Any

import torch

_MOST_GRAPHS = 1024  # image sizes, dense and routed, in training, evaluation and sampling


def allow_many_graphs() -> None:
    """Let a function have a graph for every image size. By torch's 8, the ninth size and all after it would run uncompiled."""
    settings: Any = torch._dynamo.config  # pyright: ignore[reportPrivateImportUsage]
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(settings, limit, max(getattr(settings, limit), _MOST_GRAPHS))


def compile_by_size(function: Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
    """Return the function, which makes a graph for each image size when it first meets one.

    Args:
        fullgraph: raise an error where it cannot be one graph.
    """
    allow_many_graphs()
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)
