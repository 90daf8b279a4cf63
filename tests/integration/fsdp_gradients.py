"""Run by torchrun on two ranks: gradients of FSDP2 against those of the same model on one rank with both halves of the batch."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from prx_composer.common.distributed import average_on_gloo

dist.init_process_group("gloo")
torch.manual_seed(0)
sharded = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 5))
whole = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 5))
whole.load_state_dict(sharded.state_dict())
batch = torch.randn(6, 8)
for layer in sharded:
    fully_shard(layer)
average_on_gloo(sharded)
sharded(batch.chunk(2)[dist.get_rank()]).square().mean().backward()
whole(batch).square().mean().backward()
for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
