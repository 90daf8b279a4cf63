"""Run by `composer -n 2`: classes of diffusers sharded block by block, against whole ones with both halves of the batch."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from prx_composer.common.distributed import average_on_gloo
from prx_composer.models.routing import Route

sys.path.insert(0, str(Path(__file__).parents[1]))
from architectures import ROUTED, TINY, backbone, inputs

dist.init_process_group("gloo")
for name in TINY:
    sharded, whole = backbone(name), backbone(name)
    for block in [module for module in sharded.modules() if sharded.fsdp_wrap_fn(module)]:
        fully_shard(block)
    fully_shard(sharded)
    average_on_gloo(sharded)
    x = {key: value.repeat(2, *[1] * (value.ndim - 1))[:4] for key, value in inputs(whole).items()}
    x["hidden_states"] = x["hidden_states"] + torch.arange(4.0)[:, None, None, None]
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    count = whole.num_tokens(*x["hidden_states"].shape[-2:])
    kept = torch.stack([torch.arange(count)[shift::2] for shift in (0, 1, 1, 0)])
    losses = []
    for model, part in ((sharded, half), (whole, slice(None))):
        model.taps = (1,)
        route = Route(1, 2, kept[part]) if name in ROUTED else None
        prediction, taps = model(**{key: value[part] for key, value in x.items()}, route=route, return_taps=True)
        loss = prediction.square().mean() + taps[1].square().mean()  # an auxiliary loss, of a block in the middle
        loss.backward()
        losses.append(loss.detach())
    dist.all_reduce(losses[0])
    torch.testing.assert_close(losses[0] / 2, losses[1], rtol=1e-5, atol=1e-6)
    for (parameter, ours), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, p=f"{name} {parameter}": f"{p}: {m}"
        )
