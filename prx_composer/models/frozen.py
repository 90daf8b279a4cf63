"""Networks that are used but not trained: kept out of the state dict, the optimizer, DDP and FSDP."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_moves: "list[list[tuple[Frozen, torch.device | None]]]" = []  # one list per open `returned_afterwards`


@contextmanager
def returned_afterwards() -> Iterator[None]:
    """Modules that move to a device for the first time inside of this context move back after it."""
    _moves.append([])
    try:
        yield
    finally:
        for frozen, device in reversed(_moves.pop()):
            frozen.move(device)


class Frozen:
    """Holds a module without registering it, so that no checkpoint carries a teacher's or an encoder's weights.

    Being invisible to `model.to(...)`, it moves itself to the device of its first call.

    Args:
        module: any module; put into eval mode, gradients off.
        dtype: storage dtype of its floating-point weights, or None to keep it.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None):
        self.module = module.requires_grad_(False).eval()
        if dtype is not None:
            self.module.to(dtype)
        self._device: torch.device | None = None

    def on(self, device: torch.device) -> Any:
        """The module, on `device`."""
        if self._device != device:
            for moves in _moves:
                moves.append((self, self._device))
            self.move(device)
        return self.module

    def move(self, device: torch.device | None) -> None:
        """To a device; None: to the CPU, as if it had never been used."""
        self.module.to(device or "cpu")
        self._device = device
