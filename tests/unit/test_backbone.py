"""The backbone is diffusers' PRX transformer, and its empty seams change nothing."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

from prx_composer.models import PRXBackbone
from prx_composer.models.backbone import Conditioning
from prx_composer.models.layers import cached_rotation, key_mask
from prx_composer.models.routing import Route, merge_tokens, select_tokens

LATENT = dict(in_channels=16, patch_size=2, context_in_dim=20, hidden_size=64, num_heads=2, depth=2, axes_dim=[16, 16])
PIXELS = dict(
    in_channels=3, patch_size=8, context_in_dim=20, hidden_size=96, num_heads=3, depth=3, axes_dim=[8, 24], mlp_ratio=2.5
)
CONFIGS = {
    "latents": LATENT,
    "pixels": PIXELS,
    "bottleneck": PIXELS | {"bottleneck_size": 12},
    "prx_pixel": PIXELS | {"bottleneck_size": 12, "resolution_embeds": True, "theta": 500, "time_max_period": 1000},
    "resolution": LATENT | {"resolution_embeds": True, "time_factor": 1.0},
}


def both(config: dict[str, Any]) -> tuple[PRXTransformer2DModel, PRXBackbone]:
    """diffusers' model and ours with the same random weights, none of them zero."""
    torch.manual_seed(0)
    theirs, ours = PRXTransformer2DModel(**config), PRXBackbone(**config)
    weights = {name: torch.randn_like(value) * 0.1 for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours.load_state_dict(weights)
    return theirs, ours


def inputs(config: dict[str, Any], height: int = 16, width: int = 48, batch: int = 3, tokens: int = 7) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(batch, config["in_channels"], height, width, generator=generator),
        timestep=torch.rand(batch, generator=generator),
        encoder_hidden_states=torch.randn(batch, tokens, config["context_in_dim"], generator=generator),
        attention_mask=torch.arange(tokens)[None] < torch.tensor([tokens, 3, 1][:batch])[:, None],
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_every_gradient_equal_diffusers(name: str, masked: bool) -> None:
    theirs, ours = both(CONFIGS[name])
    arguments = inputs(CONFIGS[name])
    if not masked:
        arguments["attention_mask"] = None
    gradients = {}
    outputs = {}
    for key, model in (("theirs", theirs), ("ours", ours)):
        leaves = {
            k: v.clone().requires_grad_(v is not None and v.is_floating_point()) for k, v in arguments.items() if v is not None
        }
        output = model(**leaves)
        outputs[key] = output if isinstance(output, torch.Tensor) else output.sample
        weight = torch.linspace(-1, 1, outputs[key].numel()).view_as(outputs[key])
        (outputs[key] * weight).mean().backward()
        gradients[key] = {n: p.grad for n, p in model.named_parameters()}
        gradients[key] |= {n: v.grad for n, v in leaves.items() if v.requires_grad}
    torch.testing.assert_close(outputs["ours"], outputs["theirs"], atol=1e-5, rtol=1e-5)
    assert gradients["ours"].keys() == gradients["theirs"].keys()
    for parameter, expected in gradients["theirs"].items():
        torch.testing.assert_close(
            gradients["ours"][parameter], expected, atol=1e-5, rtol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_the_model_of_the_24h_recipe_has_diffusers_names_and_shapes() -> None:
    with torch.device("meta"):
        config = dict(in_channels=3, patch_size=32, bottleneck_size=256, hidden_size=1792, depth=16, num_heads=28)
        ours, theirs = PRXBackbone(**config), PRXTransformer2DModel(**config)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    assert set(ours.config) == {key for key in theirs.config if not key.startswith("_")}


def test_one_timestep_serves_the_whole_batch() -> None:
    _, ours = both(PIXELS)
    arguments = inputs(PIXELS) | {"timestep": torch.tensor([0.3])}
    repeated = arguments | {"timestep": torch.full((3,), 0.3)}
    torch.testing.assert_close(ours(**arguments), ours(**repeated))


def test_padding_tokens_have_no_influence() -> None:
    _, ours = both(PIXELS)
    arguments = inputs(PIXELS)
    text = arguments["encoder_hidden_states"].clone()
    text[~arguments["attention_mask"]] = 1e3
    torch.testing.assert_close(ours(**arguments), ours(**(arguments | {"encoder_hidden_states": text})))


def test_empty_seams_change_nothing() -> None:
    _, ours = both(PIXELS)
    arguments = inputs(PIXELS)
    plain = ours(**arguments)
    keep_all = torch.arange(12).expand(3, -1)
    routed = ours(**arguments, route=Route(1, 3, keep_all))
    sample, taps = ours(**arguments, return_taps=True)
    assert torch.equal(plain, sample) and taps == {}
    torch.testing.assert_close(routed, plain)
    assert not any("conditioners" in name or "router" in name for name in ours.state_dict())


def test_taps_return_the_hidden_states_of_their_blocks() -> None:
    _, ours = both(PIXELS)
    seen: dict[int, torch.Tensor] = {}
    for index, block in enumerate(ours.blocks):
        block.register_forward_hook(lambda module, args, output, index=index: seen.__setitem__(index, output))
    ours.taps = (0, 2)
    _, taps = ours(**inputs(PIXELS), return_taps=True)
    assert taps.keys() == {0, 2} and all(torch.equal(taps[i], seen[i]) for i in taps)


def test_routed_blocks_see_the_kept_tokens_and_leave_the_others_as_they_were() -> None:
    _, ours = both(PIXELS)
    kept = torch.tensor([[0, 3, 5, 11], [1, 2, 8, 9], [4, 6, 7, 10]])
    entering, leaving = {}, {}
    for index, block in enumerate(ours.blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: entering.__setitem__(index, args[0]))
        block.register_forward_hook(lambda module, args, output, index=index: leaving.__setitem__(index, output))
    ours(**inputs(PIXELS), route=Route(1, 2, kept))
    rows = torch.arange(3)[:, None]
    assert torch.equal(entering[1], leaving[0][rows, kept])
    expected = leaving[0].clone()
    expected[rows, kept] = leaving[1]
    assert torch.equal(entering[2], expected)


def test_a_routed_token_keeps_its_position() -> None:
    """With one block and everything routed, permuting the kept indices permutes nothing in the output."""
    _, ours = both(PIXELS)
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(0)).expand(3, -1)
    torch.testing.assert_close(ours(**inputs(PIXELS), route=Route(0, 3, permutation)), ours(**inputs(PIXELS)))


def test_select_and_merge_are_inverse_on_the_kept_tokens() -> None:
    tokens = torch.randn(2, 6, 3)
    kept = torch.tensor([[0, 4], [2, 5]])
    changed = select_tokens(tokens, kept) + 1
    merged = merge_tokens(tokens, changed, kept)
    assert torch.equal(select_tokens(merged, kept), changed)
    assert int((merged != tokens).any(-1).sum()) == 4


def test_conditioners_add_to_the_time_vector_and_the_text() -> None:
    class Shift(torch.nn.Module):
        def forward(self, conditioning: Conditioning) -> Conditioning:
            return conditioning._replace(vec=conditioning.vec + 1)

    _, ours = both(PIXELS)
    plain = ours(**inputs(PIXELS))
    ours.conditioners["shift"] = Shift()
    shifted = ours(**inputs(PIXELS))
    del ours.conditioners["shift"]
    assert not torch.allclose(plain, shifted)
    with torch.no_grad():
        ours.time_in.out_layer.bias += 1
    torch.testing.assert_close(ours(**inputs(PIXELS)), shifted)


def test_no_mask_is_made_per_head_or_query() -> None:
    mask = key_mask(torch.ones(2, 5, dtype=torch.bool), 9)
    assert mask.shape == (2, 1, 1, 14) and bool(mask.all())


def test_the_rope_table_is_made_once_per_grid() -> None:
    _, ours = both(PIXELS)
    cached_rotation.cache_clear()
    wide, again, high = (ours._rotation(*sides, torch.device("cpu")) for sides in ((16, 48), (16, 48), (48, 16)))
    assert wide is again and wide.shape == high.shape and not torch.equal(wide, high)
    cached_rotation.cache_clear()
    assert ours._rotation(16, 48, torch.device("cpu")) is not wide


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    fresh = PRXBackbone(**PIXELS)
    assert not fresh(**inputs(PIXELS)).any()
    x = torch.randn(1, 4, 96)
    rotation = fresh._rotation(16, 16, x.device)
    assert torch.equal(fresh.blocks[0](x, torch.randn(1, 2, 96), torch.randn(1, 96), rotation, None), x)


@pytest.mark.parametrize("bad", [{"num_heads": 5}, {"axes_dim": [16, 8]}, {"axes_dim": [15, 17]}, {"axes_dim": [32]}])
def test_sizes_that_do_not_fit_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PRXBackbone(**(PIXELS | bad))


def test_compiles_as_one_graph_with_routing_and_taps_at_every_size(traced: None) -> None:
    _, ours = both(PIXELS | {"depth": 1})
    ours.taps = (0,)
    cached_rotation.cache_clear()
    compiled = torch.compile(ours, fullgraph=True, dynamic=False)
    kept = torch.tensor([[0, 3], [1, 2], [4, 5]])
    for height, width in ((16, 24), (24, 16)):
        arguments = inputs(PIXELS, height, width) | {"route": Route(0, 1, kept), "return_taps": True}
        sample, taps = compiled(**arguments)
        expected, expected_taps = ours(**arguments)
        torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(taps[0], expected_taps[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_budget_keeps_less_for_the_backward_pass_and_changes_no_gradient() -> None:
    kept, gradients = [], []
    budget = torch._functorch.config.activation_memory_budget  # pyright: ignore[reportPrivateImportUsage]
    try:
        for given in (1.0, 0.3):
            torch.compiler.reset()
            _, ours = both(PIXELS | {"depth": 1})
            ours.compile_graphs(per_block=True, activation_memory_budget=given)
            sizes: list[int] = []
            pack = lambda tensor, sizes=sizes: (sizes.append(tensor.nbytes), tensor)[1]  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                ours(**inputs(PIXELS, 48, 64)).square().mean().backward()
            kept.append(sum(sizes))
            gradients.append([parameter.grad for parameter in ours.parameters()])
    finally:
        torch._functorch.config.activation_memory_budget = budget  # pyright: ignore[reportPrivateImportUsage]
    assert kept[1] < 0.75 * kept[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)
