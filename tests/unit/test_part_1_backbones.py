"""DiT-Air and U-ViT, whose classes files beside their recipes register: what else PRX part 1 compares."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.counting import flops_of_backbone
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.routing import Route

FOLDER = Path(__file__).parents[2] / "yamls" / "architectures"
SIZES = dict(num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, num_layers=5, patch_size=2)
CLASSES = {"dit_air": ("DiTAirTransformer2DModel", SIZES), "uvit": ("UViTTransformer2DModel", SIZES | {"sample_size": 8})}
WIDTH, TEXT = 32, 12


def made(name: str, **changed: Any) -> Any:
    registry.import_code([str(FOLDER / f"{name}.py")])
    given, sizes = CLASSES[name]
    torch.manual_seed(0)
    backbone = DiffusersBackbone(**{"class": given}, **(sizes | {"caption_channels": TEXT} | changed))
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone


def called(backbone: Any, text: Tensor | None = None, valid: tuple[int, int] = (5, 3), **more: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    image, drawn = torch.randn(2, 3, 8, 12, generator=generator), torch.randn(2, 5, TEXT, generator=generator)
    mask = torch.arange(5)[None] < torch.tensor(valid)[:, None]
    return backbone(image, torch.tensor([0.2, 0.7]), drawn if text is None else text, mask, **more)


@pytest.mark.parametrize("name", CLASSES)
def test_every_weight_has_a_gradient_and_padding_is_not_seen(name: str) -> None:
    backbone = made(name)
    prediction = called(backbone)
    prediction.square().mean().backward()
    assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    short = torch.randn(2, 5, TEXT, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        shorter, other = short.clone(), short.clone()
        other[:, 3:] = 7.0
        torch.testing.assert_close(called(backbone, shorter, (3, 3)), called(backbone, other, (3, 3)))
        assert not torch.allclose(called(backbone, shorter), called(backbone, other))


@pytest.mark.parametrize("name", CLASSES)
def test_a_permutation_of_text_is_no_matter_and_one_of_patches_is(name: str) -> None:
    """Tokens of the text carry their encoder's positions; patches have positions of their own."""
    backbone, text = made(name), torch.randn(2, 5, TEXT, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = called(backbone, text, (5, 5))
        torch.testing.assert_close(called(backbone, text.flip(1), (5, 5)), whole, atol=1e-4, rtol=1e-4)
        flat = backbone(torch.ones(1, 3, 8, 12), torch.tensor([0.5]), text[:1])[0]
        edges = 1 if name == "uvit" else 0  # its convolution sees the border
        inner = flat[:, 2 * edges : 8 - 2 * edges, 2 * edges : 12 - 2 * edges]
        assert (inner[:, :2, :2] - inner[:, 2:4, 2:4]).abs().max() > 1e-3, "two patches of one colour are two places"


def test_dit_air_is_a_plain_transformer_over_text_and_image_with_one_modulation() -> None:
    """Of the paper's formulas, by torch's own multi-head attention."""
    backbone = made("dit_air")
    block, module = backbone.model.blocks[0], sys.modules["prx_composer_user_dit_air"]
    generator = torch.Generator().manual_seed(3)
    x, modulation = torch.randn(2, 9, WIDTH, generator=generator), torch.randn(2, 1, 6 * WIDTH, generator=generator)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    still = torch.zeros(2, 9, 8, 2)
    still[..., 0] = 1.0  # turns nothing
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    for own, theirs in ((block.attention.qkv, attention.in_proj_weight), (block.attention.out, attention.out_proj.weight)):
        theirs.data.copy_(own.weight.data)
    attention.in_proj_bias.data.copy_(block.attention.qkv.bias.data)
    attention.out_proj.bias.data.copy_(block.attention.out.bias.data)
    block.attention.norm_q = block.attention.norm_k = nn.Identity()
    s1, c1, g1, s2, c2, g2 = modulation.split(WIDTH, dim=-1)

    def normed(x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,), eps=1e-6)

    seen = s1 + (1 + c1) * normed(x)
    expected = x + g1 * attention(seen, seen, seen, key_padding_mask=~mask)[0]
    hidden = nn.functional.gelu(block.up(s2 + (1 + c2) * normed(expected)), approximate="tanh")
    torch.testing.assert_close(block(x, modulation, still, mask), expected + g2 * block.down(hidden), atol=1e-4, rtol=1e-4)
    assert isinstance(block, module.Block)
    assert sum("modulation.weight" in name for name, _ in backbone.named_parameters()) == 2, "one of all blocks, one of the end"


def test_kept_tokens_of_dit_air_take_their_positions_and_their_mask_with_them() -> None:
    backbone, kept = made("dit_air"), torch.arange(24).expand(2, -1).flip(1)
    with torch.no_grad():
        dense = called(backbone)
        torch.testing.assert_close(called(backbone, route=Route(1, 4, kept)), dense, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(called(backbone, route=Route(1, 4, kept[:, :6])), dense, atol=1e-3)
    backbone.taps = (TIME_VECTOR, 2)
    taps = called(backbone, return_taps=True)[1]
    assert taps[TIME_VECTOR].shape == (2, backbone.time_size) and taps[2].shape == (2, 24, WIDTH)


def test_late_blocks_of_uvit_join_early_ones_last_first_and_tokens_cannot_skip() -> None:
    backbone, seen = made("uvit"), dict[str, list[Tensor]](early=[], late=[])
    for block in backbone.model.early:
        block.register_forward_hook(lambda module, given, output: seen["early"].append(output))
    for block in backbone.model.late:
        block.register_forward_hook(lambda module, given, output: seen["late"].append(given[2]))
    called(backbone)
    assert len(seen["early"]) == 2 and all(a is b for a, b in zip(seen["early"], reversed(seen["late"]), strict=True))
    assert backbone.depth == 5 and seen["early"][0].shape == (2, 1 + 5 + 24, WIDTH)
    with pytest.raises(UserError, match="its late blocks join the tokens of early ones, all of them"):
        registry.algorithms.get("tread", "algorithms.tread")(start_block=1, end_block=2, rate=0.5).check(None, [], backbone)


def test_parameters_and_flops_at_the_size_of_part_1() -> None:
    """16 blocks of 28 heads, 1792 wide, 256 px of the FLUX autoencoder; the blog counts 689M and 696M."""
    d, text, patch = 1792, 2304, 64
    size = dict(num_attention_heads=28, attention_head_dim=64, in_channels=16, out_channels=16, num_layers=16, patch_size=2)
    size |= {"caption_channels": text}
    linear = lambda inside, outside: (inside + 1) * outside  # noqa: E731
    mlp = linear(d, 4 * d) + linear(4 * d, d)
    around = linear(patch, d) + linear(text, d) + linear(d, patch)
    air = (
        16 * (linear(d, 3 * d) + linear(d, d) + mlp + 2 * 64)
        + linear(d, 6 * d)
        + linear(d, 2 * d)
        + linear(256, d)
        + linear(d, d)
    )
    uvit = 16 * (3 * d * d + linear(d, d) + mlp + 4 * d) + 8 * linear(2 * d, d) + 2 * d + 9 * 16 * 16 + 16
    for name, expected, changed in (("dit_air", air, {}), ("uvit", uvit, {"sample_size": 32})):
        registry.import_code([str(FOLDER / f"{name}.py")])
        with torch.device("meta"):
            backbone = DiffusersBackbone(**{"class": CLASSES[name][0]}, **(size | changed))
        assert sum(parameter.numel() for parameter in backbone.parameters()) == expected + around
        assert flops_of_backbone(backbone, 32, 32, 256) > 6 * 12 * d * d * 16 * 512, (
            "each of 512 tokens passes each block's matrices"
        )
