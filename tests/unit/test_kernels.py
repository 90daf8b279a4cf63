"""What is counted of kernels against counts by hand: what is read and written, eager and fused, and how long that takes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stacks import stack_of_24h
from torch import Tensor

from prx_composer import registry
from prx_composer.algorithms.base import Trick
from prx_composer.commands.plan.conditions import Conditions, find_gpu
from prx_composer.commands.plan.plan import make_plan
from prx_composer.commands.plan.roofline import PartTime, Peaks, largest_losses, passes, peaks_of, time_of, times_by_part
from prx_composer.common.errors import UserError
from prx_composer.models.kernels import MATMUL, OTHER, Kernel, Recorder, Watching, kernels_of
from prx_composer.recipe import config

ROWS, COLUMNS = 64, 32
N = 4 * ROWS * COLUMNS  # bytes of an fp32 tensor
H200 = find_gpu("h200")


def counted(
    function: Callable[..., Tensor], inputs: list[Tensor], graph: str = "", backward: bool = False
) -> tuple[list[Kernel], list[Kernel]]:
    """Return the kernels of a function's forward and backward pass."""
    recorder = Recorder("part", graph)
    with Watching(recorder):
        made = function(*inputs)
        if backward:
            recorder.on = False
            gradient = torch.ones_like(made)
            recorder.on, recorder.backward = True, True
            torch.autograd.grad([made], [one for one in inputs if one.requires_grad], [gradient])
    kernels = kernels_of(recorder.ops)
    return [one for one in kernels if not one.backward], [one for one in kernels if one.backward]


def make(*shape: int, grad: bool = False) -> Tensor:
    return torch.rand(shape, requires_grad=grad)


def moved(kernels: list[Kernel]) -> list[int]:
    return sorted(one.bytes for one in kernels)


# ------------------------------------------------------------------------------------------------------- bytes


def chain(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x * 2 + y)


def consumed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Multiply what a function makes by a matrix, which no compiler fuses: the result must lie in memory."""
    return lambda *inputs: function(*inputs) @ torch.ones(COLUMNS, 1)


def test_every_operation_of_an_eager_chain_reads_its_inputs_and_writes_its_output() -> None:
    kernels, _ = counted(chain, [make(ROWS, COLUMNS), make(ROWS, COLUMNS)])
    assert moved(kernels) == [2 * N, 2 * N, 3 * N]  # x → 2x; 2x, y → sum; sum → its positive part


def test_a_compiled_chain_is_one_kernel_that_reads_what_is_given_and_writes_what_is_needed() -> None:
    kernels, _ = counted(consumed(chain), [make(ROWS, COLUMNS), make(ROWS, COLUMNS)], "graph")
    assert moved([one for one in kernels if one.kind == OTHER and one.bytes > 4 * COLUMNS]) == [3 * N]


def test_views_are_free_and_what_is_broadcast_is_read_once() -> None:
    kernels, _ = counted(lambda x, row: x.view(-1, COLUMNS).transpose(0, 1) + row, [make(ROWS, COLUMNS), make(1, ROWS)])
    assert moved(kernels) == [2 * N + 4 * ROWS]
    kernels, _ = counted(lambda x, row: x + row.expand(ROWS, COLUMNS), [make(ROWS, COLUMNS), make(1, COLUMNS)])
    assert moved(kernels) == [2 * N + 4 * COLUMNS]


def test_in_place_reads_and_writes_and_an_overwriting_copy_only_writes_its_target() -> None:
    assert moved(counted(lambda x, y: x.add_(y), [make(ROWS, COLUMNS), make(ROWS, COLUMNS)])[0]) == [3 * N]
    assert moved(counted(lambda x, y: x.copy_(y), [make(ROWS, COLUMNS), make(ROWS, COLUMNS)])[0]) == [2 * N]
    assert moved(counted(lambda x: x.zero_(), [make(ROWS, COLUMNS)])[0]) == [N]


def test_an_embedding_reads_the_rows_that_it_gathers_and_not_the_table() -> None:
    ids = torch.zeros(8, dtype=torch.int64)
    kernels, _ = counted(lambda table, ids: F.embedding(ids, table), [make(10_000, COLUMNS), ids])
    assert moved(kernels) == [2 * 4 * 8 * COLUMNS + 8 * 8]


def test_a_norm_and_what_follows_it_are_one_kernel_but_a_sum_over_rows_is_another() -> None:
    def normed(x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True))

    kernels, _ = counted(consumed(normed), [make(ROWS, COLUMNS)], "graph")
    assert moved([one for one in kernels if one.kind == OTHER and one.bytes > 4 * COLUMNS]) == [2 * N]
    kernels, _ = counted(lambda x: (2 * x).sum(0) @ torch.ones(COLUMNS), [make(ROWS, COLUMNS)], "graph")
    assert N + 4 * COLUMNS in moved([one for one in kernels if one.kind == OTHER])  # which computes 2x again: it is never written


def test_a_compiled_backward_pass_computes_again_what_would_have_to_be_kept() -> None:
    """gelu(gate)·up: eager keeps gelu(gate). Compiled, forward reads two and writes one, backward reads three and writes two."""
    gates = [make(ROWS, COLUMNS, grad=True), make(ROWS, COLUMNS, grad=True)]
    forward, backward = counted(lambda gate, up: F.gelu(gate) * up, gates, "graph", backward=True)
    assert moved(backward) == [5 * N]
    eager = counted(lambda gate, up: F.gelu(gate) * up, gates, backward=True)
    assert sum(moved(eager[0])) == 5 * N and sum(moved(eager[1])) == (3 + 3 + 3) * N
    assert not forward  # nobody needs it here


def test_what_two_graphs_share_is_written_by_one_and_read_by_the_other() -> None:
    recorder, x = Recorder("part", "one"), make(ROWS, COLUMNS)
    with Watching(recorder):
        middle = torch.relu(2 * x)
        recorder.graph = "two"
        consumed(torch.exp)(middle)
    assert [k.bytes for k in kernels_of(recorder.ops) if k.bytes == 2 * N] == [2 * N, 2 * N]


# --------------------------------------------------------------------------------------------------------- time

BF16 = torch.bfloat16


def product(rows: int, columns: int, inner: int) -> Kernel:
    size = 2 * (rows * inner + inner * columns + rows * columns)
    return Kernel("part", MATMUL, 2 * rows * columns * inner, size, BF16, (rows, columns, 1))


def test_a_matrix_product_takes_its_flops_and_a_thin_one_its_bytes() -> None:
    peaks = Peaks({BF16: 800e12, torch.float32: 60e12}, 4e12)
    assert time_of(product(8192, 8192, 8192), peaks).seconds == 2 * 8192**3 / 800e12
    thin = product(8192, 1, 8192)
    assert time_of(thin, peaks).seconds == thin.bytes / 4e12 == time_of(thin, peaks).by_bytes
    fp32 = dataclasses.replace(product(8192, 8192, 8192), dtype=torch.float32)
    assert time_of(fp32, peaks).seconds == 2 * 8192**3 / 60e12


def test_tiles_that_fill_the_processors_are_faster_than_those_that_leave_some_idle() -> None:
    peaks = Peaks({BF16: 800e12, torch.float32: 60e12}, 4e12, processors=132)
    full, more = (time_of(product(128 * 12, 256 * count, 65536), peaks).seconds for count in (11, 12))
    assert full == pytest.approx(2 * 1536 * 2816 * 65536 / 800e12, rel=0.01)
    assert more > 1.2 * full  # nine per cent more work, and a wave for a twelfth of it


def test_launches_count_by_the_kernel_and_are_told_as_a_loss() -> None:
    peaks = Peaks({torch.float32: 1e15}, 1e15, launch=1e-6)
    kernels = [Kernel("part", OTHER, 0, 8, torch.float32, (0, 0, 0))] * 100
    parts = times_by_part(kernels, peaks)
    assert parts["part: other kernels"].seconds == pytest.approx(1e-4, rel=1e-3)
    assert largest_losses(parts)[0][0] == "part: other kernels, starting kernels"


def test_a_step_of_many_small_kernels_waits_for_the_host() -> None:
    @dataclasses.dataclass
    class Segment:
        share: float
        images: int
        kernels: list[Kernel]

    segment = Segment(1.0, 2, [Kernel("part", OTHER, 0, 8, torch.float32, (0, 0, 0))] * 100)
    parts = passes([segment], 4, peaks_of(H200), (), True)
    assert sum(part.seconds for part in parts.values()) == pytest.approx(2 * 100 * 7e-6)
    assert passes([segment], 4, peaks_of(H200), ("part",), True)["part: other kernels"] == parts["part: other kernels"]


# --------------------------------------------------------------------------------------------------------- plans


def test_a_stranger_s_trick_is_counted_by_how_often_it_goes_over_the_weights(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    class Heavy(Trick):
        name = "heavy"
        weight_passes = 4

    registry.algorithms.register("heavy")(Heavy)
    tiny_recipe["algorithms"] = {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}}
    name = "clipping, checks and EMA"
    without = parts_of(tiny_recipe, write_recipe)[name].bytes
    tiny_recipe["algorithms"]["heavy"] = {}
    assert parts_of(tiny_recipe, write_recipe)[name].bytes == pytest.approx(without * (1 + 3 + 4) / (1 + 3))
    tiny_recipe["algorithms"]["ema"] = {"half_life": "40ba", "update_interval": "10ba"}
    assert parts_of(tiny_recipe, write_recipe)[name].bytes == pytest.approx(without * (1 + 3 + 4 + 0.3) / (1 + 3))


def test_the_parts_of_a_predicted_step_are_all_of_it_and_each_image_s_work_is_in_them(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    for stage in make_plan(config.load([write_recipe(stack_of_24h(tiny_recipe))]), Conditions(H200)).stages:
        parts = stage.step.parts
        assert sum(part.seconds for part in parts.values()) == pytest.approx(stage.step.total, rel=1e-9)
        assert stage.images_per_second == pytest.approx(stage.batch_size / stage.step.total)
        work = sum(part.flops for name, part in parts.items() if not name.startswith("Muon"))
        assert work == pytest.approx(stage.batch_size * stage.total_flops, rel=1e-2)
        assert stage.step.total > stage.batch_size * stage.total_flops / 790e12  # no faster than its FLOPs allow


def parts_of(recipe: dict[str, Any], write_recipe: Callable[..., str], **conditions: Any) -> dict[str, PartTime]:
    """Return those of the first stage's step."""
    return make_plan(config.load([write_recipe(recipe)]), Conditions(H200, **conditions)).stages[0].step.parts


def test_what_is_compiled_moves_fewer_bytes_in_fewer_kernels(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    recipe = stack_of_24h(tiny_recipe)
    del recipe["algorithms"]["progressive_resolution"]
    eager = parts_of(recipe, write_recipe)
    recipe["model"]["compile"], recipe["algorithms"]["lpips"]["compile"] = "blocks", True
    compiled = parts_of(recipe, write_recipe)
    name = "blocks: other kernels"
    assert 2 * compiled[name].bytes < eager[name].bytes and 2 * compiled[name].kernels < eager[name].kernels
    assert compiled["lpips: other kernels"].bytes < eager["lpips: other kernels"].bytes
    same = [one for one in eager if "blocks" not in one and "lpips" not in one and "host" not in one]
    assert [compiled[one] for one in same] == [eager[one] for one in same]


def test_a_text_encoder_that_runs_online_is_a_part_and_stored_text_is_none(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    tiny_recipe["model"]["text_encoder"]["trainable"] = False
    online, stored = (parts_of(tiny_recipe, write_recipe, stored_text=stored) for stored in (False, True))
    assert any("text encoder" in name for name in online) and not any("text encoder" in name for name in stored)


def test_smaller_microbatches_need_as_many_more_kernels(tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]) -> None:
    del tiny_recipe["algorithms"]["progressive_resolution"]
    whole, quarters = (parts_of(tiny_recipe | {"device_train_microbatch_size": size}, write_recipe) for size in (48, 12))
    name = "blocks: other kernels"
    assert quarters[name].kernels == 4 * whole[name].kernels
    assert quarters["blocks: matrix products"].flops == pytest.approx(whole["blocks: matrix products"].flops)


def test_a_device_that_the_table_does_not_have_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"^--gpu: there is no 'cpu' in the table of GPUs.* name that of the table .* --mfu"):
        find_gpu("cpu")
