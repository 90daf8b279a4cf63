"""The plan of a run against reference numbers, torch's counters, and what real tiny runs hold in memory and leave on disk."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kept import KeptBytes
from stacks import REPOSITORY, TEACHER, stack_of_24h
from torch.nn.attention import SDPBackend, sdpa_kernel  # the counter knows no formula of the CPU's own kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from prx_composer.algorithms.perceptual import LPIPS, PerceptualDINO
from prx_composer.commands.plan import as_text
from prx_composer.commands.plan.conditions import GPUS, Conditions, Measured, find_gpu
from prx_composer.commands.plan.plan import make_plan
from prx_composer.commands.plan.step_cost import Memory, Segment, memory
from prx_composer.commands.plan.timeline import timeline
from prx_composer.models.counting import StepCount
from prx_composer.optim import state_after_a_step
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.runs.checkpoints import content_of, staged
from prx_composer.training.meta_model import MetaModel, staged_bytes, training_state
from prx_composer.training.run import build_trainer

Write = Callable[..., str]
H200 = find_gpu("h200")
FAST = dataclasses.replace(H200, link=float("inf"), network=float("inf"))  # as the reference counts: nothing waits for links
LIMIT = Conditions(FAST, num_gpus=32, price=2.0, utilisation=1.0, stored_text=True)
FULL = str(REPOSITORY / "yamls" / "24h.yaml")
# reference.md counts a projector of 1,024 channels, and REPA in both stages.
AS_REFERENCE = ["algorithms.repa.projector_hidden=1024", "algorithms.repa.end=null"]


def full(*changes: str) -> Recipe:
    return config.load([FULL, *changes])


# ------------------------------------------------------------------------------------------ the 24-hour recipe


def test_parameters_are_those_of_the_reference() -> None:
    assert make_plan(full(), LIMIT).parameters / 1e6 == pytest.approx(1177, abs=0.5)


def resizing(side: int, target: int, passes: int) -> float:
    """GFLOP of an image resized by two matrix products, which the reference leaves out."""
    return passes * 2 * 3 * (target * side * side + target * side * target) / 1e9


# Of both products of attention a backward pass needs two gradients each; the reference counts one, where weights are frozen.
ATTENTION = 12 * 4 * 261**2 * 768 / 1e9
LEFT_OUT = {  # by the reference, in GFLOP at 512 and at 1024 px
    "repa": [resizing(512, 256, 1), resizing(1024, 512, 1)],
    "lpips": [resizing(512, 256, 3), resizing(1024, 512, 3)],
    "perceptual_dino": [resizing(512, 224, 3) + ATTENTION, resizing(1024, 224, 3) + ATTENTION],
}


# Without the networks beside the denoiser, which would be counted anew for one number.
ALONE = [f"algorithms.{name}=false" for name in ("tread", *LEFT_OUT)]


@pytest.mark.parametrize(
    ("changes", "name", "at_512", "at_1024"),
    [
        (ALONE, "denoiser", 1365.9, 5235.9),
        ([], "denoiser", 878.1, 3119.9),
        ([], "repa", 167.7, 739.3),
        ([], "lpips", 80.2 + 40.1, 320.8 + 160.4),
        ([], "perceptual_dino", 94.2 + 47.1, 94.2 + 47.1),
        (["model.backbone.depth=1", *ALONE], "text encoder", 1050.4, 1050.4),
    ],
)
def test_flops_of_every_component_are_those_of_the_reference(
    changes: list[str], name: str, at_512: float, at_1024: float
) -> None:
    """The denoiser's differ by up to 0.3%: the reference counts three forward passes, but nobody computes input gradients of
    the first layers. The others agree to the digits given."""
    conditions = dataclasses.replace(LIMIT, stored_text=name != "text encoder")
    stages = make_plan(full(*AS_REFERENCE, *changes), conditions).stages
    tolerance = 3e-3 if name == "denoiser" else 1e-3
    assert [stage.flops[name] / 1e9 for stage in stages] == pytest.approx(
        [a + b for a, b in zip((at_512, at_1024), LEFT_OUT.get(name, (0, 0)), strict=True)], rel=tolerance
    )
    assert stages[0].flops["denoiser"] / 1e9 < 878.1 or changes


def test_the_limit_is_that_of_the_reference_and_half_of_it_takes_twice_as_long() -> None:
    plan = make_plan(full(*AS_REFERENCE), LIMIT)
    more = [1 + sum(extra) / work for extra, work in zip(zip(*LEFT_OUT.values(), strict=True), (1307, 4482), strict=True)]
    assert [stage.total_flops / 1e9 for stage in plan.stages] == pytest.approx([1307 * more[0], 4482 * more[1]], rel=2e-3)
    assert [stage.images_per_second for stage in plan.stages] == pytest.approx([604 / more[0], 176 / more[1]], rel=3e-3)
    assert plan.training_hours == pytest.approx(2.0, abs=0.05)
    half = make_plan(full(*AS_REFERENCE), dataclasses.replace(LIMIT, utilisation=0.5))
    assert half.training_hours == pytest.approx(4.0, abs=0.1) and half.training_hours == pytest.approx(2 * plan.training_hours)


def test_the_reported_run_took_a_day_and_1500_dollars() -> None:
    measured = dataclasses.replace(LIMIT, utilisation=None, throughput={512: Measured(40.7), 1024: Measured(40.7)}, disk=1e15)
    plan = make_plan(full(), measured)
    assert plan.images == pytest.approx(112.6e6, rel=1e-3)
    assert plan.training_hours == pytest.approx(24, rel=2e-3)
    assert plan.training_hours * 32 * 2 == pytest.approx(1500, rel=0.03) and plan.dollars == plan.hours * 32 * 2
    assert plan.stages[0].utilisation == pytest.approx(40.7 / 604, rel=0.01)


def test_muons_work_is_that_of_the_reference_and_not_part_of_the_sum() -> None:
    for stage in make_plan(full(), LIMIT).stages:
        assert stage.optimizer_flops * stage.batch_size / 1e12 == pytest.approx(47.9, abs=0.05)
        assert stage.total_flops == sum(stage.flops.values())


def test_what_ends_with_a_stage_is_not_in_the_next() -> None:
    first, second = make_plan(full(), LIMIT).stages
    assert "repa" in first.flops and "repa" not in second.flops
    assert first.memory.frozen - second.memory.frozen == 2 * 303_129_600  # DINOv3 ViT-L in bf16 is let go


# With what has a window and six of sixteen blocks.
SHORT = ["model.backbone.depth=6", "algorithms.repa.block=3", "algorithms.lpips=false", "algorithms.perceptual_dino=false"]


def test_a_window_that_opens_inside_of_a_stage_counts_for_its_share_and_for_all_of_the_memory() -> None:
    short = [*SHORT, "algorithms.tread.end_block=4"]
    dense, routed = (make_plan(full(*c), LIMIT).stages[0] for c in ([*SHORT, "algorithms.tread=false"], short))
    mixed = make_plan(full(*short, "algorithms.tread.start=25000ba", "algorithms.repa.end=50000ba"), LIMIT).stages[0]
    assert routed.flops["denoiser"] < dense.flops["denoiser"]
    assert mixed.flops["denoiser"] == pytest.approx(0.25 * dense.flops["denoiser"] + 0.75 * routed.flops["denoiser"])
    # for a quarter of the steps REPA's head sees all tokens, for a quarter half of them
    assert mixed.flops["repa"] == pytest.approx(0.25 * dense.flops["repa"] + 0.25 * routed.flops["repa"])
    assert mixed.memory.activations == dense.memory.activations


# --------------------------------------------------------------------------------------------- torch's counters


@pytest.fixture
def stack(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """The stack of the 24-hour recipe at toy size, without what a count of FLOPs leaves out: resizing and Muon."""
    recipe = stack_of_24h(tiny_recipe)
    recipe["optimizer"], recipe["scheduler"] = {"name": "adamw", "lr": 1e-3}, {"name": "constant"}
    recipe["algorithms"]["lpips"]["scale"] = 1.0
    sizes = dict(global_train_batch_size=6, device_train_microbatch_size=6)
    recipe["algorithms"]["progressive_resolution"]["stages"] = [
        {"until": "1ba", "image_size": 20, **sizes},
        {"image_size": 24, **sizes},
    ]
    recipe["algorithms"]["repa"]["end"] = "1ba"
    recipe["algorithms"]["perceptual_dino"] |= {"image_size": 20, "end": "1ba"}
    return recipe | {"image_size": 20, "max_duration": "2ba", "save_interval": "2ba", **sizes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"repa": {"teacher": TEACHER, "block": 2, "adapter": {"depth": 1}}, "tread": {"start_block": 1, "end": "1ba"}},
        {"repa": False, "irepa": {"teacher": TEACHER, "block": 1}, "tread": False, "sprint": {"start_block": 1, "rate": 0.5}},
    ],
    ids=["as the recipe", "adapter", "iREPA and SPRINT"],
)
def test_the_flops_of_a_whole_run_are_those_that_torch_counts(
    changes: dict[str, Any], stack: dict[str, Any], write_recipe: Write
) -> None:
    stack["algorithms"] |= changes
    recipe = config.load([write_recipe(stack)])
    planned = sum(stage.images * stage.total_flops for stage in make_plan(recipe, Conditions(H200, utilisation=1.0)).stages)
    trainer = build_trainer(recipe)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.fit()
    trainer.close()
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_no_step_is_charged_for_frozen_networks_that_come_to_their_device(stack: dict[str, Any], write_recipe: Write) -> None:
    recipe = config.load([write_recipe(stack)])
    planned = MetaModel(recipe)
    count = planned.count(recipe.image_size, set(planned.tricks))
    assert {"repa", "lpips", "perceptual_dino"} <= {kernel.part for kernel in count.kernels}
    assert not {kernel.part for kernel in count.kernels if kernel.weight}, "fp32 has no weights to cast"


# ------------------------------------------------------------------------------------------------ memory and disk


def bytes_of(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "adamw", "lr": 1e-3},
        {"name": "muon", "lr": 1e-3, "exclude": ["modulation"]},
        {"name": "decoupled_adamw", "lr": 1e-3},
    ],
    ids=lambda optimizer: optimizer["name"],
)
def test_state_is_byte_for_byte_that_of_a_run_and_a_checkpoint_is_as_large_as_foretold(
    optimizer: dict[str, Any], stack: dict[str, Any], write_recipe: Write
) -> None:
    path = write_recipe(stack | {"optimizer": optimizer, "max_duration": "1ba"})
    trainer = build_trainer(config.load([path]))
    foretold, guessed = state_after_a_step(trainer.state.optimizers[0])
    assert not trainer.state.optimizers[0].state and not guessed
    trainer.fit()
    recipe = config.load([path])  # now the run's tokenizer is there, whose size the plan needs
    state, model = training_state(MetaModel(recipe)), trainer.state.model
    assert state.weights == bytes_of([p for p in model.parameters() if p.requires_grad])
    held = trainer.state.optimizers[0].state.values()
    assert state.optimizer == bytes_of([tensor for tensors in held for tensor in tensors.values()]) == bytes_of(foretold)
    ema: Any = next(a for a in trainer.state.algorithms if type(a).__name__ == "EMA")
    assert state.ema == bytes_of(list(ema.average.average.values()))
    copied = [one for one in tree_leaves(staged(content_of(trainer.state))) if isinstance(one, torch.Tensor)]
    pinned = sum(2 ** math.ceil(math.log2(one.nbytes)) for one in copied if one.nbytes)  # as CachingHostAllocator rounds
    assert staged_bytes(MetaModel(recipe), recipe, 1, 1) == pytest.approx(pinned, rel=0.02)
    trainer.close()
    folder = Path(recipe.run_folder) / "checkpoints"
    largest = max(file.stat().st_size for file in folder.rglob("*.pt") if not file.is_symlink())
    assert state.checkpoint == pytest.approx(largest, rel=0.1, abs=200_000)


WITHIN = 1.1  # the factor that an estimate of activations is held to


def test_activations_of_the_whole_stack_are_about_what_a_step_really_keeps(stack: dict[str, Any], write_recipe: Write) -> None:
    del stack["algorithms"]["progressive_resolution"]
    for name in ("repa", "perceptual_dino"):
        del stack["algorithms"][name]["end"]
    path = write_recipe(stack | {"max_duration": "1ba"})
    trainer = build_trainer(config.load([path]))
    trainer.fit()  # opens the windows
    model: Any = trainer.state.model.train()
    batch = {name: values[:6] for name, values in next(iter(trainer.state.train_dataloader)).items()}
    frozen = [trick.encoder._frozen.module for trick in trainer.state.algorithms if isinstance(trick, PerceptualDINO)]
    frozen += [trick.network.module for trick in trainer.state.algorithms if isinstance(trick, LPIPS)]
    with KeptBytes(model, *frozen) as kept:
        outputs = model(batch)
        loss = model.loss(outputs, batch)["total"]
        kept.add_outputs(outputs)
    trainer.close()
    assert loss.requires_grad
    stage = make_plan(config.load([path]), Conditions(H200, utilisation=1.0)).stages[0]
    assert stage.microbatch_size == 6 and {"repa", "lpips", "perceptual_dino"} <= stage.flops.keys()
    assert 1 / WITHIN < stage.memory.activations / kept.bytes < WITHIN


def test_fsdp_cuts_the_state_into_parts_and_ddp_holds_all_of_it_and_buckets() -> None:
    degree = "parallelism_config.fsdp.shard_degree"
    whole = training_state(MetaModel(full()))
    one_by_one = "parallelism_config.fsdp.reshard_after_forward=true"
    ranks = [make_plan(full(f"{degree}=-1", one_by_one), LIMIT), make_plan(full("parallelism_config=null"), LIMIT)]
    sharded, replicated = (plan.stages[0].memory for plan in ranks)
    for name in ("weights", "optimizer", "ema"):
        assert getattr(replicated, name) == getattr(whole, name)
        # every parameter's last part may be padded
        assert getattr(whole, name) <= 32 * getattr(sharded, name) < 1.03 * getattr(whole, name)
    assert replicated.gathered == whole.weights > 3 * sharded.gathered
    hybrid = make_plan(full(f"{degree}=8"), LIMIT)
    assert hybrid.stages[0].memory.weights == pytest.approx(4 * sharded.weights, rel=0.03)
    assert ranks[0].checkpoints.bytes == ranks[1].checkpoints.bytes == whole.checkpoint
    # Of DDP rank 0's node has a copy of all; of HSDP every node, in eight parts; of FSDP2 over four nodes each has a quarter.
    for plan, part in ((ranks[1], 1), (hybrid, 1), (ranks[0], 0.25)):
        assert part * whole.checkpoint < plan.checkpoints.staged < 2 * part * whole.checkpoint, "in powers of two"
    for gib, warns in ((1, True), (64, False)):
        on_node = dataclasses.replace(hybrid.conditions, host_memory=gib)
        assert (f"NOT fit into {gib} GiB" in as_text(dataclasses.replace(hybrid, conditions=on_node))) is warns


def test_weights_gathered_in_bf16_are_the_copies_that_autocast_would_make() -> None:
    planned, span = MetaModel(full(), stored_text=True), timeline(full(), 8, None).spans[0]
    blocks = sum(p.numel() for p in planned.model.backbone.blocks.parameters())
    segment = Segment(1.0, StepCount({}, kept=0, copies=2 * blocks + 10, block_copies=2 * blocks, blocks=()), frozen=0)

    def memory_with(reshard: bool, mixed: str) -> Memory:
        ways = f"{{fsdp: {{shard_degree: 8, reshard_after_forward: {reshard}, mixed_precision: {mixed}}}}}"
        return memory(planned, full(f"parallelism_config={ways}"), 8, span, [segment])

    ways = [memory_with(reshard, mixed) for reshard in (True, False) for mixed in ("FULL", "WEIGHTS", "DEFAULT")]
    before, low, default, kept, low_and_kept, _ = ways
    two_blocks = 2 * blocks // 16
    assert kept.gathered - before.gathered == 4 * (blocks - two_blocks) and kept.casts == before.casts == 2 * blocks + 10
    assert low_and_kept.gathered - low.gathered == 2 * (blocks - two_blocks) and low.casts == low_and_kept.casts == 10
    assert before.gathered - low.gathered == 2 * two_blocks and default.gathered < low.gathered and default.casts == 0
    assert low_and_kept.peak < before.peak < kept.peak


def test_checkpointing_activations_keeps_fewer() -> None:
    plain, checkpointed = (
        make_plan(full(f"parallelism_config={{fsdp: {{activation_checkpointing: {on}}}}}"), LIMIT).stages[0].memory.activations
        for on in ("false", "true")
    )
    assert checkpointed < 0.5 * plain


def test_a_plan_that_does_not_fit_says_which_microbatch_would() -> None:
    small = dataclasses.replace(LIMIT, gpu=GPUS["rtx4090"], stored_text=True)
    plan = make_plan(full(), small)
    stage = plan.stages[1]
    assert not stage.fits and 0 < stage.fitting_microbatch < stage.microbatch_size
    path = "algorithms.progressive_resolution.stages[1].device_train_microbatch_size"
    assert make_plan(full(f"{path}={stage.fitting_microbatch}"), small).stages[1].fits
    assert f"device_train_microbatch_size: {stage.fitting_microbatch} would" in as_text(plan)


@pytest.mark.parametrize(("interval", "keep", "count"), [("3ba", 2, 3), ("0.5dur", -1, 2), ("8ba", 5, 1), ("50sp", 1, 6)])
def test_checkpoints_are_counted_with_the_last_one(
    interval: str, keep: int, count: int, tiny_recipe: dict[str, Any], write_recipe: Write
) -> None:
    recipe = config.load([write_recipe(tiny_recipe | {"save_interval": interval, "save_num_checkpoints_to_keep": keep})])
    found = make_plan(recipe, Conditions(H200, utilisation=0.1, disk=2e6)).checkpoints
    assert found.count == count and found.seconds == found.bytes / 2e6
    assert found.on_disk == found.bytes * (count if keep < 0 else min(count, keep + 1))
