"""Run by torchrun: Muon on equal copies and on shards of every kind against one process, its state through checkpoints, clipping.

On four ranks some shards are short and some are empty, and FSDP2 is tried on a 2 × 2 mesh (HSDP) too.
"""

from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from prx_composer.models import PRXBackbone
from prx_composer.optim import clip_by_norm
from prx_composer.optim.muon import Muon, muon_parameters

ARGUMENTS: dict[str, Any] = dict(lr=0.05, weight_decay=0.1, split_heads=True)
ROWS: dict[str, Any] = dict(lr=0.05, weight_decay=0.1, split_qkv=True, normuon=True, coefficients="polar_express")


def build() -> nn.Module:
    """A PRX backbone, among whose blocks is one with small, odd matrices."""
    torch.manual_seed(0)
    model = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=8, hidden_size=12, num_heads=3, depth=3, axes_dim=(2, 2))
    model.blocks.append(nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False), nn.Linear(3, 1)))
    return model


def gradients(model: nn.Module, step: int) -> None:
    """The same on all ranks; in the second step one block has none."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        gradient: torch.Tensor | None = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = None if step == 1 and name.startswith("blocks.1.") else gradient


def train(model: nn.Module, optimizer: Muon, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(whole, theirs, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def sharded(mesh: DeviceMesh) -> nn.Module:
    model = build()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_itself(arguments: dict[str, Any]) -> nn.Module:
    model = build()
    train(model, Muon(model, **arguments), range(3))
    return model


before_there_are_ranks = [(arguments, by_itself(arguments)) for arguments in (ARGUMENTS, ROWS)]

dist.init_process_group("gloo")
size = dist.get_world_size()


def check_copies(arguments: dict[str, Any], alone: nn.Module) -> None:
    copies = build()
    optimizer = Muon(copies, **arguments)
    train(copies, optimizer, range(3))
    assert_equal(copies, alone)
    for parameter in copies.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter), "copies must stay equal to the bit"
    owners = {(block.replica, block.shard) for plan in optimizer._plans for part in plan.parts for block in part.blocks}
    assert len(owners) == size, "every rank has its share"


def check_shards(mesh: DeviceMesh, folder: str, arguments: dict[str, Any], alone: nn.Module) -> None:
    model = sharded(mesh)
    optimizer = Muon(model, **arguments)
    get_optimizer_state_dict(model, optimizer)  # makes states before the first step
    train(model, optimizer, range(2))
    assert all(isinstance(optimizer.state[w]["momentum_buffer"], DTensor) for w in muon_parameters(model).values())
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)

    resumed = sharded(mesh)
    again = Muon(resumed, **arguments | dict(lr=0.0))  # the checkpoint has the learning rate
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, again)}
    dcp.load(state, checkpoint_id=folder)
    if arguments is ROWS:  # which keeps all that the other does, and more
        check_on_other_ranks(folder, arguments, state["optimizer"])
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, again, state["optimizer"])
    train(resumed, again, range(2, 3))
    assert_equal(resumed, alone)

    whole = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=whole)
    third = Muon(model, **arguments)
    third.zero_grad()  # torch makes no states while there are gradients
    set_optimizer_state_dict(model, third, state, options=whole)
    train(model, third, range(2, 3))
    assert_equal(model, alone)


def check_clipping(mesh: DeviceMesh) -> None:
    """To the bit what torch makes of DTensors: of all parameters and without some, above the norm and below it."""
    model = sharded(mesh)
    for step, largest in ((0, 0.5), (1, 0.5), (2, 1e6)):
        clipped = []
        for clip in (torch.nn.utils.clip_grad_norm_, clip_by_norm):
            gradients(model, step)
            clip(model.parameters(), largest)
            clipped.append([p.grad.to_local() for p in model.parameters() if isinstance(p.grad, DTensor)])
        assert all(torch.equal(theirs, ours) for theirs, ours in zip(*clipped, strict=True))


def check_on_other_ranks(folder: str, arguments: dict[str, Any], saved: dict[str, Any]) -> None:
    """One rank alone, and a grid with other shards, read the checkpoint's state of the optimizer to the bit."""
    for other in [build(), *(sharded(mesh) for mesh in meshes)]:
        optimizer = Muon(other, **arguments)
        state = {"optimizer": get_optimizer_state_dict(other, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        for name, slots in state["optimizer"]["state"].items():
            for slot, value in slots.items():
                read, kept = (v.full_tensor() if isinstance(v, DTensor) else v for v in (value, saved["state"][name][slot]))
                assert torch.equal(read, kept) and read.shape == kept.shape, (name, slot)


meshes = [init_device_mesh("cpu", (size,))]
if size > 2:
    meshes.append(init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards")))
with TemporaryDirectory() as folder:
    shared = [folder]
    dist.broadcast_object_list(shared)
    for number, (arguments, alone) in enumerate(before_there_are_ranks):
        check_copies(arguments, alone)
        for mesh in meshes:
            check_shards(mesh, f"{shared[0]}/{number}-{mesh.ndim}", arguments, alone)
    for mesh in meshes:
        check_clipping(mesh)
    dist.barrier()

mesh = meshes[0]
columns = nn.Module()
columns.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False)])
weight = distribute_tensor(columns.blocks[0].weight.detach(), mesh, [Shard(1)])
columns.blocks[0].weight = nn.Parameter(weight)
gradients(columns, 0)
with pytest.raises(ValueError, match=r"Shard\(0\)"):
    Muon(columns).step()
columns.blocks[0].weight = nn.Parameter(distribute_tensor(weight.full_tensor(), mesh, [Replicate()]))
gradients(columns, 0)
Muon(columns).step()
dist.barrier()
dist.destroy_process_group()
