"""Networks that are used but not trained: kept out of the state dict, the optimizer, DDP and FSDP."""

from typing import Any

import torch
from torch import nn

__all__ = ["Frozen"]


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
            self.module.to(device)
            self._device = device
        return self.module
