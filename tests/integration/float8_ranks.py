"""Run on four ranks: float8 layers (emulated) in a sharded backbone, and in replicas of shards, against whole copies of it.

Scales are of a rank's own batch, so that every rank is compared with a copy that sees the same one. Of replicas only the forward
pass is tried: on CPUs torch 2.7 doesn't take the mean of their gradients, which know of no float8.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from prx_composer.algorithms.low_precision import apply_float8, apply_low_precision_norm
from prx_composer.models import PRXBackbone

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()


def build() -> PRXBackbone:
    torch.manual_seed(0)
    backbone = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=16, hidden_size=64, depth=2, num_heads=2)
    for parameter in backbone.parameters():  # what begins as zero gives no gradient
        parameter.data += 0.05 * torch.randn(parameter.shape)
    assert len(apply_float8(backbone, emulate=True)) == 12
    apply_low_precision_norm(backbone)  # so that blocks gathered in bf16 compute what whole ones do
    return backbone


def step(backbone: Any, autocast: bool, backward: bool = True) -> tuple[Tensor, dict[str, Any]]:
    """Return the prediction, and the gradient of each weight of the blocks."""
    own = torch.Generator().manual_seed(rank)
    image, text = torch.randn(4, 3, 16, 16, generator=own), torch.randn(4, 8, 16, generator=own)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = backbone(image, torch.rand(4, generator=own), text, torch.ones(4, 8, dtype=torch.bool))
    if not backward:
        return prediction, {}
    (prediction.float() * torch.randn(prediction.shape, generator=own)).sum().backward()  # far from fp16's least number
    return prediction, {name: parameter.grad for name, parameter in backbone.blocks.named_parameters()}


def check(mesh: DeviceMesh, low_weights: bool) -> None:
    alone = build()
    if low_weights:  # float8's rounding is of what was gathered
        alone.blocks.bfloat16()
    prediction, expected = step(alone, low_weights)
    expected = {name: gradient.float() for name, gradient in expected.items()}
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= ranks
    sharded: Any = build()
    # gloo has a sum and no mean; torch asks for a sum where gradients travel in fp16.
    policy = MixedPrecisionPolicy(torch.bfloat16 if low_weights else None, torch.float16, cast_forward_inputs=False)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))
    ours, found = step(sharded, low_weights, backward=mesh.ndim == 1)
    assert torch.equal(ours, prediction)
    if not found:
        return
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        distance = (found[name].full_tensor() - gradient).norm() / gradient.norm()
        assert distance < (5e-3 if low_weights else 1e-3), f"{low_weights=} {name}: {distance}"


for shape in ((ranks,), (2, ranks // 2)):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    check(mesh, low_weights=False)
    check(mesh, low_weights=True)
dist.barrier()
dist.destroy_process_group()
