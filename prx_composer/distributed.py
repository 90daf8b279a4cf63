"""What a backend gets wrong, met where PyTorch lets one."""

import torch
import torch.distributed as torch_dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["GlooAverage", "average_on_gloo"]


def average_on_gloo(model: nn.Module) -> bool:
    """Makes FSDP2 average gradients over CPU ranks; returns whether that was needed.

    On torch 2.7 gloo's reduce-scatter takes AVG for SUM, so every gradient is world_size times too large. Adam hides it,
    but gradient clipping doesn't. Whether it is so is asked of the backend, not read off a version.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units or not torch_dist.is_initialized() or torch_dist.get_backend() != "gloo":
        return False
    ranks = torch_dist.get_world_size()
    answer = torch.empty(1)
    torch_dist.reduce_scatter_tensor(answer, torch.ones(ranks), op=torch_dist.ReduceOp.AVG)
    if answer.item() == 1:
        return False

    def divide(reduced: Tensor) -> None:
        reduced.div_(ranks)

    for unit in units:
        unit.set_all_reduce_hook(divide)  # despite its name it is called after a reduce-scatter too
    return True


class GlooAverage(Callback):
    """Applies `average_on_gloo` once the model is sharded."""

    def before_load(self, state: State, logger: Logger) -> None:
        average_on_gloo(state.model)
