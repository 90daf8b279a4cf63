"""The count of a step against closed forms by hand, torch's counter at work, and what autograd really keeps."""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from kept import KeptBytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prx_composer.algorithms.base import LossTrick
from prx_composer.algorithms.lora import LoRA
from prx_composer.algorithms.low_precision import apply_low_precision_norm
from prx_composer.algorithms.perceptual import LPIPS, Net, PerceptualDINO
from prx_composer.algorithms.readouts import GuidingReadout, Readouts
from prx_composer.algorithms.repa import IREPA, REPA, Adapter
from prx_composer.algorithms.token_routing import SPRINT
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.counting import StepCounter, flops_of_backbone, flops_of_batch, shape_of
from prx_composer.models.encoders import TeacherSpec
from prx_composer.models.text_to_image import TextToImage

Build = Callable[..., TextToImage]
Batch = dict[str, torch.Tensor]


class Brightness(LossTrick):
    """A stranger's, with a matrix of its own."""

    name = "brightness"

    def __init__(self) -> None:
        super().__init__(weight=1.0)
        self.head: Any = None

    def build(self, model: Any) -> dict[str, torch.nn.Module]:
        self.head = torch.nn.Linear(3, 5)
        return {"head": self.head}

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return self.head(outputs.prediction.mean((2, 3))).square().mean()


def by_hand(d: int, mlp: int, depth: int, patch: int, n: int, s: int, context: int) -> int:
    """Of a PRX backbone: three passes of every matrix product, but two of the first layer on each input."""
    projections = 2 * (3 * n * d * d + 2 * s * d * d + n * d * d)
    block = projections + 4 * n * (n + s) * d + 2 * 3 * n * d * mlp + 2 * d * 6 * d
    ends = 2 * d * d + 2 * n * d * patch + 2 * d * 2 * d  # time, final layer and its modulation
    first = 2 * (n * patch * d + s * context * d + 256 * d)
    return 3 * (depth * block + ends) + 2 * first


def test_a_small_backbone_is_counted_as_its_closed_form() -> None:
    with torch.device("meta"):
        backbone = PRXBackbone(3, 4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3)
    assert flops_of_backbone(backbone, 16, 24, 14) == by_hand(32, 64, 3, 48, 24, 14, 24)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("trained_text", [False, True])
@pytest.mark.parametrize(
    "backbone", [{}, dict(hidden_size=64, mlp_ratio=3.5, bottleneck_size=16, resolution_embeds=True)], ids=str
)
def test_a_step_is_counted_as_it_is_taken(
    backbone: dict[str, Any], trained_text: bool, amp: bool, tiny_model: Build, tiny_batch: Batch
) -> None:
    """Its FLOPs as torch counts them, and the bytes of all storages that autograd and the outputs hold."""
    model = tiny_model(trainable_text=trained_text, **backbone)
    if amp:
        apply_low_precision_norm(model)
    counter = StepCounter(model, amp=amp)
    count = counter.count(shape_of(tiny_batch))
    with torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext(), KeptBytes(model) as kept:
        outputs = model(tiny_batch)
        loss = model.loss(outputs, tiny_batch)["total"]
        kept.add_outputs(outputs)
    loss.backward()
    assert 4 * count.kept + count.copies == pytest.approx(kept.bytes, rel=0.02)
    assert (count.copies > 0) == amp
    weights = sum(p.numel() for block in model.backbone.blocks for p in block.parameters() if p.ndim == 2)
    gains = sum(p.numel() for block in model.backbone.blocks for p in block.parameters() if p.ndim == 1)
    assert amp * 2 * weights <= count.block_copies <= min(amp * 2 * (weights + gains), count.copies)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        model.loss(model(tiny_batch), tiny_batch)["total"].backward()
    assert 4 * count.total_flops == pytest.approx(real.get_total_flops(), rel=1e-4)
    assert counter.count(shape_of(tiny_batch)) is count


def test_counting_leaves_the_model_its_draws_and_what_is_cached_as_they_were(tiny_model: Build, tiny_batch: Batch) -> None:
    model, same = tiny_model(), tiny_model()
    assert flops_of_batch(model, tiny_batch) > 0
    losses = [one.loss(one(tiny_batch), tiny_batch)["total"] for one in (model, same)]
    assert torch.equal(*losses) and all(p.grad is None for p in model.parameters())


def test_checkpointed_blocks_keep_their_inputs_and_the_inside_of_one(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(trainable_text=False)
    count = StepCounter(model).count(shape_of(tiny_batch))
    assert len(count.blocks) == model.backbone.depth and count.blocks[0][0] == 24 * 32 * 4
    for block in model.backbone.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    with KeptBytes(model) as kept:
        kept.add_outputs(model(tiny_batch))
    inputs, inside = sum(given for given, _ in count.blocks), max(inside for _, inside in count.blocks)
    assert count.kept_with_checkpoints == pytest.approx(kept.bytes / 4 + inputs + inside, rel=0.05)


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16)
TEACHERS: list[dict[str, Any]] = [
    dict(model_type="dinov2"),
    dict(model_type="dinov2_with_registers", num_register_tokens=3),
    dict(model_type="dinov2", use_swiglu_ffn=True),
    dict(model_type="dinov3_vit", intermediate_size=64, num_register_tokens=2),
    dict(model_type="clip_vision_model", intermediate_size=64),
    dict(model_type="siglip_vision_model", intermediate_size=64),
]
TRICKS = {
    **{
        "-".join(map(str, teacher.values())): PerceptualDINO(TeacherSpec(config=teacher | SIZES), image_size=20)
        for teacher in TEACHERS
    },
    **{f"lpips {net}": LPIPS(net=net, random_weights=True, scale=scale) for net in get_args(Net) for scale in (2.0, 2.3)},
    "repa": REPA(TeacherSpec(config=TEACHERS[0] | SIZES), block=1),
    "adapter": REPA(TeacherSpec(config=TEACHERS[0] | SIZES), block=1, adapter=Adapter(depth=2)),
    "irepa": IREPA(TeacherSpec(config=TEACHERS[0] | SIZES), block=1),
    "readouts": Readouts(),
    "internal guidance": GuidingReadout(),
    "sprint": SPRINT(start_block=1, rate=0.5),
    "lora": LoRA(rank=4),
    "brightness": Brightness(),
}


@pytest.mark.parametrize("name", TRICKS)
def test_what_a_trick_adds_is_counted_as_it_works(name: str, tiny_model: Build, tiny_batch: Batch) -> None:
    """Teachers, heads, fusions and adapters; a stranger's trick like ours."""
    trick, model = copy.deepcopy(TRICKS[name]), tiny_model(trainable_text=False, depth=4)
    plain = StepCounter(model).count(shape_of(tiny_batch))
    trick.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    counter = StepCounter(model, [trick])
    trick.set_active(model, True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        model.loss(model(tiny_batch), tiny_batch)["total"].backward()
    count = counter.count(shape_of(tiny_batch), {trick.name})
    assert 4 * count.total_flops == pytest.approx(real.get_total_flops(), rel=1e-3)
    if name in ("sprint", "lora"):
        assert count.flops.keys() == plain.flops.keys() and count.flops["denoiser"] != plain.flops["denoiser"]
    elif name != "brightness":
        assert count.flops[trick.name] > 0 and count.flops["denoiser"] == plain.flops["denoiser"]
        assert counter.count(shape_of(tiny_batch)).flops == plain.flops  # outside of its window


def test_a_compiled_model_is_counted_as_an_eager_one(tiny_model: Build, tiny_batch: Batch) -> None:
    eager, compiled = tiny_model(), tiny_model()
    compiled.backbone.compile_graphs(per_block=True)
    assert flops_of_batch(compiled, tiny_batch) == flops_of_batch(eager, tiny_batch)
