"""MicroDiT's class, which a file beside its recipe registers: its experts, patches and narrow mixer, through the adapter."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prx_composer import registry
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.routing import Route
from prx_composer.recipe.arguments import check_component

FILE = Path(__file__).parents[2] / "yamls" / "architectures" / "published" / "microdit.py"
SIZES = dict(num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, num_layers=4, sample_size=8)
SIZES |= dict(caption_channels=12, mixer_layers=2, mixer_width=16, num_experts=3)


@pytest.fixture
def backbone() -> Any:
    registry.import_code([str(FILE)])
    torch.manual_seed(0)
    made = DiffusersBackbone(**{"class": "MicroDiTTransformer2DModel"}, **SIZES)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def called(backbone: Any, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, 3, 8, 12, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return backbone(image, torch.tensor([0.2, 0.7]), text, **more)


def test_experts_take_the_tokens_that_want_them_most(backbone: Any) -> None:
    module: Any = sys.modules["prx_composer_user_microdit"]
    experts, x = module.Experts(8, 16, 3, 2.0), torch.randn(2, 9, 8)
    share, place = experts.choice(x).softmax(-1).mT.topk(6, dim=-1)  # (B, E, K), K = 2 · 9 / 3
    chosen = F.one_hot(place, 9).float()
    up, down = (torch.stack([one.weight.mT for one in of]) for of in (experts.up, experts.down))
    made = F.gelu(torch.einsum("beki,bid,edf->bekf", chosen, x, up))
    expected = torch.einsum("beki,bek,bekf,efd->bid", chosen, share, made, down)
    torch.testing.assert_close(experts(x), expected)
    assert len(set(chosen.sum((1, 2)).flatten().tolist())) > 1, "some tokens have more experts than others"


def test_every_weight_has_a_gradient_and_patches_lie_where_they_came_from(backbone: Any) -> None:
    called(backbone).square().mean().backward()
    assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    with torch.no_grad():  # a last layer that says which pixel of its patch it is; then one that says which token
        backbone.model.proj_out.weight.zero_()
        backbone.model.proj_out.bias.copy_(torch.arange(12.0))  # (rows, columns, channels) of a patch
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
        expected = 6 * (rows % 2) + 3 * (columns % 2) + torch.arange(3)[:, None, None]
        assert torch.equal(called(backbone)[0], expected.float())


def test_masked_patches_are_mixed_and_then_nobody_attends_to_them(backbone: Any) -> None:
    kept = torch.tensor([[0, 1, 5, 9, 20, 23], [2, 3, 4, 11, 12, 22]])
    seen = []
    backbone.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    prediction = called(backbone, route=Route(2, backbone.depth, kept, discard=True))
    assert seen == [(2, 6, 32)] and prediction.shape == (2, 3, 8, 12)
    backbone.taps = (TIME_VECTOR, 2)
    assert called(backbone, return_taps=True)[1][TIME_VECTOR].shape == (2, backbone.time_size)
    backbone.taps = (1,)
    with pytest.raises(ValueError, match="Tokens at block 1 are 16 wide, and 32 are needed"):
        called(backbone, return_taps=True)


def test_its_arguments_are_checked(backbone: Any) -> None:
    given = {"class": "MicroDiTTransformer2DModel"} | SIZES
    check_component(registry.backbones, "diffusers", given, "model.backbone", imports=False)
    with pytest.raises(Exception, match=re.escape("model.backbone.num_expert: no such argument. Did you mean 'num_experts'")):
        check_component(registry.backbones, "diffusers", given | {"num_expert": 2}, "model.backbone", imports=False)
