"""FlexAttention's blocks against torch's own, and the backbone with them against the one with a mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Precision
from test_backbone import PIXELS, both, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask

from prx_composer.models import PRXBackbone, TextToImage
from prx_composer.models.layers import attend, cudnn_first, cudnn_problem, key_blocks, key_mask
from prx_composer.models.routing import Route
from prx_composer.training import run


def lengths(valid: list[int], tokens: int) -> Tensor:
    return torch.arange(tokens)[None] < torch.tensor(valid)[:, None]


@pytest.mark.parametrize(("image", "text"), [(256, 256), (255, 256), (128, 200), (12, 7)])
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(image: int, text: int) -> None:
    mask = lengths([text, text // 2, 1], text)
    valid = key_mask(mask, image)[:, 0, 0]
    ours = key_blocks(mask, image)
    theirs = create_block_mask(lambda b, h, q, kv: valid[b, kv], 3, None, image, image + text, device="cpu")
    assert ours.shape == theirs.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        count, chosen = (getattr(theirs, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(getattr(ours, f"{kind}_num_blocks"), count), kind
        listed = torch.arange(chosen.shape[-1]) < count[..., None]
        assert torch.equal(getattr(ours, f"{kind}_indices")[listed], chosen[listed]), kind


def test_padding_alone_is_skipped() -> None:
    blocks = key_blocks(lengths([40, 256], 256), 256)
    seen = blocks.kv_num_blocks + blocks.full_kv_num_blocks  # pyright: ignore[reportOptionalOperand]
    assert seen[:, 0, 0].tolist() == [3, 4]  # of two blocks of text and two of the image


def test_the_backbone_gives_the_output_and_gradients_of_the_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Route(1, 2, torch.tensor([[0, 3, 5, 11], [1, 2, 8, 9], [4, 6, 7, 10]]))
    found: list[list[Any]] = []
    for blocks in (False, True):
        if blocks:  # as on a GPU; on the CPU torch's eager implementation stands in
            monkeypatch.setattr(PRXBackbone, "_keys", lambda self, mask, tokens: key_blocks(mask, tokens))
        _, ours = both(PIXELS)
        sample = ours(**inputs(PIXELS), route=route)
        sample.square().mean().backward()
        found.append([sample, *(parameter.grad for parameter in ours.parameters())])
    for masked, flexible in zip(*found, strict=True):
        torch.testing.assert_close(flexible, masked, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_blocks_go_into_compiled_blocks_without_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(PRXBackbone, "_keys", lambda self, mask, tokens: key_blocks(mask, tokens))
    _, ours = both(PIXELS | {"depth": 1})
    expected = ours(**inputs(PIXELS)).detach()
    ours.blocks[0].forward = torch.compile(ours.blocks[0].forward, backend=graphs, fullgraph=True, dynamic=False)
    for valid in ([7, 3, 1], [2, 7, 5]):
        sample = ours(**inputs(PIXELS) | {"attention_mask": lengths(valid, 7)})
        sample.square().mean().backward()
        if valid == [7, 3, 1]:
            torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-5)
    assert graphs.frame_count == 1


def order() -> list[int]:
    return [*torch._C._get_sdp_priority_order()]


def allowed() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("cudnn", "flash", "mem_efficient", "math")]


def test_cudnn_comes_first_inside_of_its_context_alone_and_others_stay_allowed() -> None:
    before, there = order(), allowed()
    with cudnn_first():
        assert order()[0] == int(SDPBackend.CUDNN_ATTENTION) != before[0] and all(allowed())
    assert (order(), allowed()) == (before, there)


def test_cudnn_is_chosen_for_a_run_on_a_gpu_that_asks_for_it_and_what_it_lacks_is_said(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, chosen = order(), list[int]()
    assert cudnn_problem(2, 8, 16, 4, torch.device("cpu"), torch.bfloat16), "none here, as on a GPU without it"
    asked = list[tuple[Any, ...]]()

    def problem(*sizes: int, **_: Any) -> str | None:
        asked.append(sizes)
        return None if len(asked) > 1 else "No available kernel."

    monkeypatch.setattr(run, "cudnn_problem", problem)
    for attention, device in (("sdpa", "gpu"), ("cudnn", "cpu"), ("cudnn", "gpu"), ("cudnn", "gpu")):
        state: Any = SimpleNamespace(model=tiny_model(), device=SimpleNamespace(name=device), precision=Precision.AMP_BF16)
        recipe: Any = SimpleNamespace(model={"attention": attention}, image_size=16)
        with run.chosen_attention(recipe, state):
            chosen.append(order()[0])
        assert order() == before
    cudnn = int(SDPBackend.CUDNN_ATTENTION)
    assert chosen == [before[0], before[0], cudnn, cudnn]
    assert len(asked) == 2 and [record.getMessage() for record in caplog.records] == [
        "model.attention: cudnn does not attend here (No available kernel.); the next of PyTorch's kernels does."
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cudnn_attends_with_a_mask_as_the_others_do() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 64, generator=generator, device="cuda").bfloat16() for n in (256, 300, 300))
    mask = key_mask(lengths([44, 20], 44).cuda(), 256)
    assert cudnn_problem(4, 64, 256, 44, torch.device("cuda"), torch.bfloat16) is None
    expected = attend(q.float(), k.float(), v.float(), mask)
    with cudnn_first():
        torch.testing.assert_close(attend(q, k, v, mask).float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(attention="flex"), "model.compile"),
        (dict(attention="dense", compile=True), "sdpa, cudnn or flex"),
    ],
)
def test_what_cannot_be_had_is_refused(arguments: dict[str, Any], message: str, tiny_model: Any) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        TextToImage(model.backbone, model.text_encoder, **arguments)
