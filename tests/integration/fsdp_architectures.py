"""Run by `composer -n 2`: classes of diffusers that DDP copies or FSDP2 shards train as whole ones on the whole batch."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from prx_composer.common.distributed import average_on_gloo
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.routing import Route

sys.path.insert(0, str(Path(__file__).parents[1]))
from architectures import ROUTED, TINY, backbone, inputs


def sharded(name: str) -> Any:
    made = backbone(name)
    for block in [module for module in made.modules() if made.fsdp_wrap_fn(module)]:
        fully_shard(block)
    fully_shard(made)
    average_on_gloo(made)
    return made


def trained(model: nn.Module, x: dict[str, Tensor], route: Route | None, ranks: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Three steps; returns their losses, which ranks share, and the gradients of the first."""
    optimizer, losses, gradients = torch.optim.SGD(model.parameters(), lr=0.05), list[Tensor](), dict[str, Tensor]()
    for _ in range(3):
        prediction, taps = model(**x, route=route, return_taps=True)
        loss = prediction.square().mean() + sum(tapped.square().mean() for tapped in taps.values())  # as auxiliary losses do
        loss.backward()
        losses.append(loss.detach() / ranks)
        if ranks > 1:
            dist.all_reduce(losses[-1])
        if not gradients:
            plain = ((key.removeprefix("module."), parameter.grad) for key, parameter in model.named_parameters())
            gradients = {key: getattr(value, "full_tensor", value.clone)() for key, value in plain}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


dist.init_process_group("gloo")
half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
for name in TINY:
    x = {key: value.repeat(2, *[1] * (value.ndim - 1))[:4] for key, value in inputs(backbone(name)).items()}
    x["hidden_states"] = x["hidden_states"] + torch.arange(4.0)[:, None, None, None]
    count = backbone(name).num_tokens(*x["hidden_states"].shape[-2:])
    kept = torch.stack([torch.arange(count)[shift::2] for shift in (0, 1, 1, 0)])
    found = {}
    for kind in ("whole", "copied", "sharded"):
        made = sharded(name) if kind == "sharded" else backbone(name)
        made.taps = (TIME_VECTOR, 1) if made.time_size else (1,)
        part, ranks = (slice(None), 1) if kind == "whole" else (half, 2)
        model = DistributedDataParallel(made) if kind == "copied" else made
        route = Route(1, 2, kept[part]) if name in ROUTED else None
        found[kind] = trained(model, {key: value[part] for key, value in x.items()}, route, ranks)
    losses, gradients = found.pop("whole")
    for kind, (ours, of) in found.items():
        torch.testing.assert_close(ours, losses, rtol=1e-4, atol=1e-6, msg=lambda m, at=(name, kind): f"{at}: {m}")
        for parameter, gradient in of.items():
            torch.testing.assert_close(
                gradient, gradients[parameter], rtol=1e-4, atol=1e-6, msg=lambda m, at=(name, kind, parameter): f"{at}: {m}"
            )
