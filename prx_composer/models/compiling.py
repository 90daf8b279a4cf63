"""Graphs of `torch.compile` for images of many sizes, and where they are kept."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

_MOST_GRAPHS = 1024  # image sizes, dense and routed, in training, evaluation and sampling
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def allow_many_graphs() -> None:
    """Let a function have a graph for every image size. By torch's 8, the ninth size and all after it would run uncompiled."""
    settings: Any = torch._dynamo.config  # pyright: ignore[reportPrivateImportUsage]
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(settings, limit, max(getattr(settings, limit), _MOST_GRAPHS))


def compile_by_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which makes one graph for each image size when it first meets one.

    It is for what is trained: its kernels know their sizes.
    """
    allow_many_graphs()
    return torch.compile(function, fullgraph=True, dynamic=False)


def compile_for_all_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which makes one graph for images of all sizes, or a few: its kernels are told them.

    It is for frozen networks. Their time is in products and convolutions, which are not compiled anyway. What torch takes to hold
    of all sizes by the first that it meets, such as equal or even sides, is what further graphs are for.
    """
    allow_many_graphs()
    return torch.compile(function, fullgraph=True, dynamic=True)


def compile_layers(network: nn.Module) -> None:
    """Compile the layers of a frozen transformer, so that all of them and all image sizes share one graph for each way of use.

    They are the modules of its longest list of one class. A network without such a list is compiled as a whole.
    """
    allow_many_graphs()
    lists = [list(part) for part in network.modules() if isinstance(part, nn.ModuleList) and len({*map(type, part)}) == 1]
    for layer in max(lists, key=len, default=[network]):
        layer.compile(dynamic=True)


@contextmanager
def graphs_kept_in(folder: Path) -> Iterator[None]:
    """Have torch keep what it compiles inside of this context in a folder, for the next process that asks for the same.

    Whoever has set TORCHINDUCTOR_CACHE_DIR has chosen another one, which stays.
    """
    if _CACHE in os.environ:
        yield
        return
    os.environ[_CACHE] = str(folder.absolute())
    try:
        yield
    finally:
        os.environ.pop(_CACHE, None)
