"""What GPUs send in a step and how long that takes, against closed forms and what an `Exchange` really asks to be sent."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stacks import REPOSITORY
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from prx_composer.commands.plan.conditions import (
    GPUS,
    LINK_SHARE,
    Conditions,
    Links,
    Measured,
    Traffic,
    find_gpu,
)
from prx_composer.commands.plan.plan import StagePlan, make_plan
from prx_composer.commands.plan.step_cost import (
    DDP,
    GATHER,
    MUON,
    MUON_REPLICAS,
    REDUCE,
    REPLICAS,
    StepTime,
    muon_plan,
    traffic,
    uncovered,
)
from prx_composer.optim.exchange import Exchange, Plan, _Layout, _Ranks, plan_for
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel

FULL = str(REPOSITORY / "yamls" / "24h.yaml")
INFINITE = float("inf")
H200 = find_gpu("h200")
FAST = dataclasses.replace(H200, link=INFINITE, network=INFINITE)
WHOLE = {"DDP": "parallelism_config=null", "FSDP2": "parallelism_config.fsdp.shard_degree=-1"}


def full(*changes: str) -> Recipe:
    return config.load([FULL, *changes])


@functools.cache
def model() -> MetaModel:
    return MetaModel(full(), stored_text=True)


def sent(num_gpus: int, *changes: str, microbatches: int = 1) -> dict[str, Traffic]:
    recipe = full(*changes)
    plan = muon_plan(model(), recipe, num_gpus)
    return {one.purpose: one for one in traffic(model(), recipe, num_gpus, microbatches, plan)}


def parameters() -> tuple[int, int]:
    """Of all that is trained, and of the blocks."""
    planned = model()
    blocks = sum(p.numel() for p in planned.model.backbone.blocks.parameters())
    return sum(p.numel() for p in planned.trained.values()), blocks


# ------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_ddp_sends_twice_all_gradients_but_a_rank_s_part_whatever_the_number_of_microbatches(ranks: int) -> None:
    whole, _ = parameters()
    for microbatches in (1, 4):
        found = sent(ranks, WHOLE["DDP"], microbatches=microbatches)[DDP]
        assert found.bytes == pytest.approx(2 * 4 * whole * (ranks - 1) / ranks)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("reshard", ["true", "false"])
def test_fsdp_gathers_blocks_twice_unless_they_stay_and_reduces_once_per_microbatch(reshard: str, microbatches: int) -> None:
    whole, blocks = parameters()
    changes = f"parallelism_config.fsdp.reshard_after_forward={reshard}", "parallelism_config.fsdp.mixed_precision=FULL"
    found = sent(8, *changes, microbatches=microbatches)
    gathered = whole + blocks if reshard == "true" else whole
    # a parameter's last part is filled up, which is little here
    assert found[GATHER].bytes == pytest.approx(microbatches * 4 * gathered * 7 / 8, rel=1e-4)
    assert found[REDUCE].bytes == pytest.approx(microbatches * 4 * whole * 7 / 8, rel=1e-4)
    assert REPLICAS not in found


def test_hsdp_averages_one_shard_over_the_replicas() -> None:
    whole, _ = parameters()
    found = sent(32)
    assert found[REPLICAS].bytes == pytest.approx(2 * 3 / 4 * 4 * whole / 8, rel=1e-4)
    assert (found[REPLICAS].ranks, found[REPLICAS].stride) == (4, 8)
    assert found[GATHER].bytes == sent(8)[GATHER].bytes  # the same within each replica


def test_weights_in_bf16_halve_gathers_and_leave_gradients_alone() -> None:
    default, halved = (sent(8, f"parallelism_config.fsdp.mixed_precision={how}") for how in ("FULL", "DEFAULT"))
    assert default[GATHER].bytes == 2 * halved[GATHER].bytes
    assert default[REDUCE].bytes == halved[REDUCE].bytes
    unsaid = dataclasses.replace(full(), parallelism_config={"fsdp": {"reshard_after_forward": False}})
    assert traffic(model(), unsaid, 8, 1, muon_plan(model(), unsaid, 8)) == list(default.values())


def test_blocks_alone_in_bf16_halve_what_blocks_send_and_kept_ones_send_it_once() -> None:
    whole, blocks = parameters()
    weights = "parallelism_config.fsdp.mixed_precision=weights"
    gathered = {True: 2 * 2 * blocks + 4 * (whole - blocks), False: 2 * blocks + 4 * (whole - blocks)}
    for reshard, expected in gathered.items():
        found = sent(8, weights, f"parallelism_config.fsdp.reshard_after_forward={reshard}")
        assert found[GATHER].bytes == pytest.approx(expected * 7 / 8, rel=1e-4)
        assert found[REDUCE].bytes == sent(8)[REDUCE].bytes
    assert sent(8) == found, "the recipe's own"
    in_fp32 = sent(8, weights, "precision=fp32")
    assert in_fp32 == sent(8, "parallelism_config.fsdp.mixed_precision=full", "precision=fp32")


@pytest.mark.parametrize("way", list(WHOLE))
def test_one_gpu_sends_nothing_and_more_send_more_each(way: str) -> None:
    amounts = [sum(t.bytes for t in sent(ranks, WHOLE[way]).values()) for ranks in (1, 2, 4, 8, 32)]
    assert amounts[0] == 0 and amounts == sorted(set(amounts))


# -------------------------------------------------------------------------------------------------------- Muon


class Sent(TorchDispatchMode):
    """Elements that this rank is asked to send to others, by operation."""

    def __init__(self, rank_in_group: int, replicas: int):
        super().__init__()
        self._own, self._replicas = rank_in_group, replicas
        self.to_shards = self.to_replicas = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "c10d::alltoall_base_":
            self.to_shards += sum(args[4]) - args[4][self._own]
        elif name == "c10d::_allgather_base_":
            self.to_replicas += (self._replicas - 1) * args[1].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    if dist.is_initialized():  # by a test that trained before, in this process; the next one does it again
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("replicas", "shards"), [(1, 8), (8, 1), (2, 4)])
def test_muons_elements_are_those_that_its_exchange_sends(replicas: int, shards: int, fake_ranks: None) -> None:
    shapes = [(24, 8), (24, 8), (20, 8), (8, 21), (9, 9)]  # some with rows that don't divide
    weights = [(0, 1, torch.nn.Parameter(torch.zeros(shape))) for shape in shapes]
    mesh = init_device_mesh("cpu", (replicas, shards))
    found = []
    for replica in range(replicas):
        for shard in range(shards):
            grid = (_Ranks(mesh.get_group(0), replicas, replica), _Ranks(mesh.get_group(1), shards, shard))
            plan = Plan(_Layout(*grid, torch.float32, torch.device("cpu")), weights)
            with Sent(shard, replicas) as counter:
                for part in plan.parts:
                    exchange = Exchange(part)
                    exchange.send()
                    exchange.work(lambda _, matrices: matrices.clone())
                    exchange.pass_on()
            found.append((counter.to_shards, counter.to_replicas))
    assert plan_for(weights, replicas, shards).elements_sent() == (max(s for s, _ in found), max(r for _, r in found))


def test_the_rank_with_most_to_do_has_at_least_an_equal_share_and_one_rank_has_all() -> None:
    shares = {}
    for ranks in (8, 32):
        plan = muon_plan(model(), full(), ranks)
        assert plan is not None
        shares[ranks] = plan.largest_share
        assert plan.cost / 1e12 == pytest.approx(47.9, abs=0.05)  # reference.md
    assert 1 / 8 <= shares[8] < 1.05 / 8 and 1 / 32 <= shares[32] < 1.5 / 32
    assert plan_for([(0, 1, torch.nn.Parameter(torch.zeros(3, 4)))], 1, 1).largest_share == 1


def test_in_fp16_muons_work_on_wide_matrices_is_less_and_its_other_options_cost_none() -> None:
    def work(*changes: str) -> float:
        recipe = full(*changes)
        plan = muon_plan(MetaModel(recipe, stored_text=True), recipe, 8)
        assert plan is not None
        return plan.cost

    whole = muon_plan(model(), full(), 8)
    assert whole is not None
    others = ["coefficients=polar_express", "normuon=true", "newton_schulz_steps=10"]
    assert work(*(f"optimizer.{other}" for other in others)) == 2 * whole.cost
    sides = [3, 2, 1, 3.5, 3.5, 3.5, 6]  # of a block's matrices: long over short, which is 1792; one of them is square
    once = sum(8 * side + 28 if side > 1 else 30 for side in sides)  # two products with X, two XXᵀ, 14 products of squares
    assert work("optimizer.newton_schulz_dtype=fp16") == 16 * once * 1792**3


# ------------------------------------------------------------------------------------------------------- links


LINKS = Links(inside=400e9, between=50e9, per_node=8)
GB = 1e9


@pytest.mark.parametrize(
    ("ranks", "stride", "pairwise", "gigabytes_per_second"),
    [
        (8, 1, False, 400),  # a node
        (4, 2, False, 400),  # every other GPU of a node
        (32, 1, False, 400),  # a ring over four nodes has eight adapters: as fast as inside
        (4, 8, False, 50),  # one GPU of each node
        (4, 4, False, 100),  # two GPUs of each of two nodes
        (6, 1, False, 100),  # 0–5 share a node, 6–11 don't: two in one, four in the next
        (16, 1, True, 50 * 15 / 8),  # of 15 peers, 8 are in the other node
        (2, 8, True, 50),
    ],
)
def test_a_group_sends_as_fast_as_its_narrowest_place(
    ranks: int, stride: int, pairwise: bool, gigabytes_per_second: float
) -> None:
    one = Traffic("", 10 * GB, ranks, window=0, stride=stride, pairwise=pairwise)
    assert LINKS.seconds(one) == pytest.approx(10 / gigabytes_per_second / LINK_SHARE)


def test_within_a_node_hsdp_leaves_only_replicas_to_the_network() -> None:
    links = Links(inside=INFINITE, between=50e9, per_node=8)
    found = sent(32)
    slow = {purpose for purpose, one in found.items() if links.seconds(one) > 0}
    assert slow == {REPLICAS, MUON_REPLICAS} and found.keys() - slow == {GATHER, REDUCE, MUON}


@pytest.mark.parametrize(
    ("compute", "sending", "late"),
    [
        (3.0, [], 0.0),
        (3.0, [(1.0, 2.0)], 0.0),
        (3.0, [(1.0, 4.0)], 1.0),
        (3.0, [(2 / 3, 2.5)], 0.5),  # the backward pass takes two
        (3.0, [(1.0, 1.0), (2 / 3, 1.0)], 0.0),
        (3.0, [(1.0, 2.5), (2 / 3, 1.5)], 1.0),
        (3.0, [(1.0, 0.1), (1 / 3, 1.5)], 0.5),  # DDP with two microbatches: only the last one's backward pass
    ],
)
def test_sending_outlasts_what_it_runs_beside(compute: float, sending: list[tuple[float, float]], late: float) -> None:
    assert uncovered(compute, sending) == pytest.approx(late)


def test_every_gpu_of_the_table_has_links_and_none_between_nodes_is_faster_than_inside() -> None:
    assert all(0 < gpu.network < gpu.link for gpu in GPUS.values())


# --------------------------------------------------------------------------------------------------- step time


def stage(conditions: Conditions, *changes: str) -> StagePlan:
    return make_plan(full(*changes), conditions).stages[0]


def alone(step: StepTime) -> float:
    return step.compute + step.optimizer


def test_utilisation_is_that_of_a_gpu_that_sends_nothing() -> None:
    free = stage(Conditions(FAST, 32, utilisation=0.4))
    assert free.step.total == pytest.approx(32 * free.total_flops / (0.4 * 790e12)) == alone(free.step)
    assert free.step.efficiency == 1 and free.utilisation == pytest.approx(0.4)
    linked = stage(Conditions(H200, 32, utilisation=0.4))
    assert alone(linked.step) == pytest.approx(free.step.total)
    # 790 TFLOP/s; the results of a quarter of the replicas' matrices go through one adapter of 50 GB/s, to three others
    assert linked.step.optimizer == pytest.approx(47.9e12 / 32 / 790e12, rel=0.05)
    assert linked.step.exchange > 3 * 2 * 1.0e9 / 32 / (50e9 * LINK_SHARE)
    assert linked.step.total == pytest.approx(free.step.total + linked.step.exchange)


def test_efficiency_falls_with_the_number_of_nodes_and_with_a_slow_network() -> None:
    def efficiency(nodes: int, network: float) -> float:
        batch = f"algorithms.progressive_resolution.stages[0].global_train_batch_size={256 * nodes}"
        return stage(Conditions(H200, 8 * nodes, utilisation=0.5, network=network), batch).step.efficiency

    by_nodes = [efficiency(nodes, 25) for nodes in (1, 2, 4)]
    assert by_nodes == sorted(set(by_nodes), reverse=True) and by_nodes[0] > 0.99
    by_network = [efficiency(2, 0.1), efficiency(2, 1), by_nodes[1]]
    assert by_network == sorted(set(by_network)) and by_network[0] < 0.1


def test_loaders_that_are_too_slow_set_the_pace_and_others_don_t() -> None:
    slow = stage(Conditions(H200, 32, utilisation=0.5, loader=200))
    assert 8 * slow.images_per_second == pytest.approx(200)
    assert slow.step.waiting > 0 and slow.step.efficiency < 0.2
    conditions = Conditions(H200, 32, utilisation=0.5)
    assert stage(dataclasses.replace(conditions, loader=1e6)).images_per_second == stage(conditions).images_per_second


def test_a_speed_measured_on_one_gpu_is_corrected_for_muons_work_and_sending() -> None:
    alone_32 = 32 / 100.0  # seconds
    there = {512: Measured(100.0, gpus=1, batch=32), 1024: Measured(50.0, gpus=1, batch=16)}
    muon = 47.87e12 / 790e12
    free = stage(Conditions(FAST, 32, throughput=there))
    assert free.step.compute == pytest.approx(alone_32 - muon, rel=1e-3)
    assert free.step.total == pytest.approx(alone_32 - muon * 31 / 32, rel=1e-3) and free.images_per_second > 100
    linked = stage(Conditions(H200, 32, throughput=there))
    assert linked.step.total == pytest.approx(free.step.total + linked.step.exchange)
    larger = {size: dataclasses.replace(speed, batch=4 * speed.batch) for size, speed in there.items() if speed.batch}
    quarter = stage(Conditions(FAST, 32, throughput=larger))  # of a step in which Muon's work is less of a part
    assert quarter.step.compute == pytest.approx(alone_32 - muon / 4, rel=1e-3)


@pytest.mark.parametrize("gpus", [None, 32])
def test_a_speed_measured_on_the_planned_gpus_is_the_plan_s(gpus: int | None) -> None:
    there = {size: Measured(40.7, gpus) for size in (512, 1024)}
    found = stage(Conditions(H200, 32, throughput=there, network=1))  # says otherwise of links, but was measured
    assert found.images_per_second == pytest.approx(40.7)
