"""FlexAttention's blocks against torch's own, and the backbone with them against the one with a mask."""

from typing import Any

import pytest
import torch
from test_backbone import PIXELS, both, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from prx_composer.models import PRXBackbone, TextToImage
from prx_composer.models.layers import key_blocks, key_mask
from prx_composer.models.routing import Route


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(attention="flex"), "model.compile"),
        (dict(attention="dense", compile=True), "sdpa or flex"),
    ],
)
def test_what_cannot_be_had_is_refused(arguments: dict[str, Any], message: str, tiny_model: Any) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        TextToImage(model.backbone, model.text_encoder, **arguments)
