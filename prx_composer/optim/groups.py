"""Which parameters decay."""

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of trained parameters: matrices with `weight_decay`; biases, gains and embeddings without."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def add_parameters(optimizer: torch.optim.Optimizer | None, module: nn.Module) -> None:
    """Let an optimizer train a module that came after it, such as an algorithm's projector; do nothing without an optimizer."""
    if optimizer is None:
        return
    for group in parameter_groups(module, float(optimizer.defaults.get("weight_decay", 0.0))):
        optimizer.add_param_group(group)


def drop_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Takes parameters that are trained no more out of an optimizer that hasn't stepped yet."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, fused, over the parameter groups of a model.

    Args:
        model: what is trained.
        lr: learning rate per step.
        betas: decay of the first and second moment per step.
        eps: added to the root of the second moment.
        weight_decay: per step, as a fraction of lr; on matrices only.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, not {list(betas)}.")
        groups = parameter_groups(model, weight_decay)
        super().__init__(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=True)
