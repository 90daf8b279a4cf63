"""What a training forward pass leaves, and the seam for losses beside the flow-matching one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prx_composer.models.routing import Route
from prx_composer.models.sampling import TextConditioning


@dataclass
class FlowOutput:
    """What a forward pass leaves for the losses."""

    prediction: Tensor  # (B, C, H, W), x̂0 or v̂
    clean: Tensor  # (B, C, H, W), x0
    noise: Tensor  # (B, C, H, W), unit variance
    noised: Tensor  # (B, C, H, W), x_t
    timestep: Tensor  # (B,)
    text: TextConditioning
    route: Route | None
    taps: dict[int, Tensor]  # block index → (B, N or K, D)
    counted: Tensor | None = None  # (B, 1, H, W), 1 where the prediction counts and 0 where tokens were discarded; None = all


class AuxiliaryLoss(nn.Module):
    """Base of what fills `model.auxiliary_losses`: `forward(FlowOutput, batch) → scalar`, times `weight` while `active`."""

    def __init__(self, weight: float):
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must not be negative, but is {weight}.")
        self.weight = weight
        self.active = True


class AuxiliaryLosses(nn.Module):
    """The auxiliary losses by name, called as one module so that FSDP gathers their parameters (it refuses a ModuleDict).

    They are kept in the order of their names: neither sums nor gradient norms depend on the order of a recipe's lines.
    """

    def __setitem__(self, name: str, loss: AuxiliaryLoss) -> None:
        self.add_module(name, loss)
        ordered = sorted(self._modules.items())
        self._modules.clear()
        self._modules.update(ordered)

    def __getitem__(self, name: str) -> AuxiliaryLoss:
        return self.get_submodule(name)  # pyright: ignore[reportReturnType]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def named(self) -> dict[str, AuxiliaryLoss]:
        return dict(self.named_children())  # pyright: ignore[reportReturnType]

    def forward(self, outputs: FlowOutput, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weighted terms of the losses that are active.

        One that is not but has parameters of its own gives them a gradient of zero: DDP waits for every parameter.
        """
        terms = {}
        for name, loss in self.named().items():
            if loss.active:
                terms[name] = loss.weight * loss(outputs, batch)
            elif idle := [parameter.sum() for parameter in loss.parameters() if parameter.requires_grad]:
                terms[name] = 0.0 * torch.stack(idle).sum()
        return terms
