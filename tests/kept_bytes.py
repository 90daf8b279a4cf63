"""The bytes that autograd really keeps."""

from typing import Any

import torch


class KeptBytes:
    """Counts the bytes of distinct storages that autograd saves, but for the parameters'."""

    def __init__(self, *models: torch.nn.Module):
        self._parameters = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    def add_outputs(self, outputs: Any) -> None:
        """What a step holds until the backward pass, whether or not autograd saves it."""
        for tensor in (outputs.prediction, outputs.clean, outputs.noise, outputs.noised, outputs.text.embedding):
            self.add(tensor)

    def __enter__(self) -> "KeptBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.__exit__(*_)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
