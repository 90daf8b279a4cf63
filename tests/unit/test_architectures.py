"""Classes of diffusers as backbones: through the adapter they compute what they compute by themselves, seams included."""

import inspect
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from architectures import HEADS, ROUTED, TEXT, TINY, backbone, inputs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prx_composer import registry
from prx_composer.algorithms.token_routing import TREAD
from prx_composer.common.errors import UserError
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.counting import flops_of_backbone
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.routing import Route
from prx_composer.optim.muon import muon_parameters
from prx_composer.recipe.arguments import check_component


def as_its_pipeline_calls_it(model: Any, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, pooled: Tensor | None) -> Tensor:
    """Return a velocity, of what diffusers' pipelines do around the class."""
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return model(x, text, pooled, 1000 * t).sample
    if isinstance(model, diffusers.FluxTransformer2DModel):
        of, (b, c, h, w) = diffusers.FluxPipeline, x.shape
        packed = of._pack_latents(x, b, c, h, w)
        places = of._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype)
        out = model(packed, text, pooled, t, places, torch.zeros(text.shape[1], 3), torch.ones(b)).sample
        return of._unpack_latents(out, 8 * h, 8 * w, 8)
    if isinstance(model, diffusers.PixArtTransformer2DModel):
        sides = torch.tensor([[8.0 * x.shape[2], 8.0 * x.shape[3]]] * len(x))
        added = {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]}
        out = model(x, text, 1000 * t, added_cond_kwargs=added, encoder_attention_mask=mask).sample
        return out.chunk(2, dim=1)[0]
    if isinstance(model, diffusers.SanaTransformer2DModel):
        return model(x, text, 1000 * t * model.config.timestep_scale, encoder_attention_mask=mask).sample
    if isinstance(model, diffusers.DiTTransformer2DModel):
        return model.eval()(x, 1000 * t, torch.tensor([3, 5, 0])).sample[:, :4]
    if isinstance(model, diffusers.Lumina2Transformer2DModel):
        return -model(x, 1 - t, text, mask).sample
    if isinstance(model, diffusers.StableCascadeUNet):
        return model(x, t + 0.001, pooled[:, None], text, torch.zeros(len(x), 1, 8)).sample  # no image beside the text
    return model(x, text, t).sample


@pytest.mark.parametrize("name", TINY)
def test_output_and_every_gradient_are_the_class_s_own(name: str) -> None:
    ours = backbone(name)
    theirs: Any = getattr(diffusers, name)(**TINY[name])
    theirs.load_state_dict(ours.model.state_dict())
    x = inputs(ours)
    found = {}
    for key in ("ours", "theirs"):
        image, text = x["hidden_states"].clone().requires_grad_(), x["encoder_hidden_states"].clone().requires_grad_()
        if key == "ours":
            output = ours(**(x | {"hidden_states": image, "encoder_hidden_states": text}))
            weights = dict(ours.model.named_parameters())
        else:
            masked = text if ours.context_in_dim == 1 else text * x["attention_mask"][..., None]
            output = as_its_pipeline_calls_it(theirs, image, x["timestep"], masked, x["attention_mask"], x.get("pooled"))
            weights = dict(theirs.named_parameters())
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).mean().backward()
        found[key] = {"output": output, "image": image.grad, "text": text.grad} | {n: p.grad for n, p in weights.items()}
    assert found["ours"]["output"].shape == x["hidden_states"].shape
    for part, expected in found["theirs"].items():
        torch.testing.assert_close(found["ours"][part], expected, atol=1e-6, rtol=1e-6, msg=lambda m, p=part: f"{p}: {m}")
    assert all(gradient is not None for part, gradient in found["ours"].items() if part != "text")  # DDP waits for each


# ------------------------------------------------------------------------------------------------------------- seams


def kept_half(of: DiffusersBackbone, x: dict[str, Any], columns_only: bool = False) -> Tensor:
    """Of each image other tokens; or of all of them those of the left half."""
    rows, columns = (side // of.patch_size for side in x["hidden_states"].shape[-2:])
    if columns_only:
        left = torch.arange(rows * columns).reshape(rows, columns)[:, : columns // 2]
        return left.flatten().expand(3, -1)
    order = torch.rand(3, rows * columns, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, : rows * columns // 2].sort(1).values


@pytest.mark.parametrize("name", TINY)
def test_taps_are_the_blocks_image_tokens_and_no_hook_stays(name: str) -> None:
    ours = backbone(name)
    x = inputs(ours)
    ours.taps = tuple(range(ours.depth))
    seen: list[Tensor] = []
    probes = [block.register_forward_hook(lambda module, args, output: seen.append(output)) for block in ours.blocks]
    prediction, taps = ours(**x, return_taps=True)
    for probe in probes:
        probe.remove()
    count = ours.num_tokens(*x["hidden_states"].shape[-2:])
    for index, raw in enumerate(seen):
        tokens = raw[1] if isinstance(raw, tuple) else raw.flatten(2).mT if raw.ndim == 4 else raw
        for image, valid in enumerate(x["attention_mask"].sum(1).tolist()):  # Lumina2 puts an image's tokens behind its text
            first = valid if name.startswith("Lumina2") else tokens.shape[1] - count
            torch.testing.assert_close(taps[index][image], tokens[image, first : first + count], rtol=0, atol=0)
    ours.taps = ()
    torch.testing.assert_close(ours(**x), prediction, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())


@pytest.mark.parametrize("name", TINY)
def test_the_time_vector_is_of_the_time_and_not_of_the_image(name: str) -> None:
    ours = backbone(name)
    x, ours.taps = inputs(ours), (TIME_VECTOR,)
    if not ours.time_size:
        assert TIME_VECTOR not in ours(**x, return_taps=True)[1]
        return
    vector = ours(**x, return_taps=True)[1][TIME_VECTOR]
    assert vector.shape == (3, ours.time_size)
    torch.testing.assert_close(ours(**(x | {"hidden_states": x["hidden_states"] + 1}), return_taps=True)[1][TIME_VECTOR], vector)
    later = ours(**(x | {"timestep": x["timestep"].flip(0)}), return_taps=True)[1][TIME_VECTOR]
    assert ((later - vector).abs().amax(1) > 1e-3).tolist() == [True, False, True]  # the second image's is what it was


@pytest.mark.parametrize("name", ROUTED)
def test_a_route_that_keeps_every_token_changes_nothing(name: str) -> None:
    ours = backbone(name)
    x = inputs(ours)
    every = torch.arange(ours.num_tokens(*x["hidden_states"].shape[-2:])).expand(3, -1)
    torch.testing.assert_close(ours(**x, route=Route(1, ours.depth - 1, every)), ours(**x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROUTED)
def test_tokens_that_are_routed_around_blocks_leave_them_as_they_came_and_nobody_attends_to_them(name: str) -> None:
    ours = backbone(name)
    x, depth = inputs(ours), ours.depth
    kept, count = kept_half(ours, x), ours.num_tokens(*x["hidden_states"].shape[-2:])
    skipped = torch.ones(3, count, dtype=torch.bool).scatter(1, kept, False)
    ours.taps = (0, depth - 2)
    last, found = ours.blocks[depth - 2], []
    probe = last.register_forward_hook(lambda module, args, output: found.append(output))
    _, taps = ours(**x, route=Route(1, depth - 1, kept), return_taps=True)
    probe.remove()
    assert taps[0].shape[1] == count and taps[depth - 2].shape[1] == kept.shape[1]
    entering: list[Any] = []  # the block after the routed ones
    probe = ours.blocks[depth - 1].register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs.get("hidden_states", args[0] if args else None)), with_kwargs=True
    )
    ours(**x, route=Route(1, depth - 1, kept))
    probe.remove()
    for image, valid in enumerate(x["attention_mask"].sum(1).tolist()):
        first = valid if name.startswith("Lumina2") else entering[0].shape[1] - count
        tokens = entering[0][image, first : first + count]
        torch.testing.assert_close(tokens[skipped[image]], taps[0][image, skipped[image]], rtol=0, atol=0)
        torch.testing.assert_close(tokens[~skipped[image]], taps[depth - 2][image], rtol=0, atol=0)
    discarded = Route(0, depth, kept, discard=True)
    ours.taps = ()
    patches = skipped.view(3, x["hidden_states"].shape[-2] // 2, -1).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    if name.startswith("Lumina2"):
        ours.model.noise_refiner = torch.nn.ModuleList()  # which sees every token
    before = ours(**x, route=discarded)
    x["hidden_states"] = torch.where(patches, torch.randn_like(x["hidden_states"]), x["hidden_states"])
    torch.testing.assert_close(ours(**x, route=discarded).where(~patches, 0), before.where(~patches, 0), rtol=1e-5, atol=1e-6)


def test_a_routed_token_of_lumina2_keeps_its_position() -> None:
    """Without the right half of an image, the left half is what the class makes of it alone: positions count from the left."""
    ours = backbone("Lumina2Transformer2DModel", num_refiner_layers=0)
    x = inputs(ours)
    routed = ours(**x, route=Route(0, ours.depth, kept_half(ours, x, columns_only=True), discard=True))
    alone = ours(**(x | {"hidden_states": x["hidden_states"][..., :8]}))
    torch.testing.assert_close(routed[..., :8], alone, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------- what is known of a class beforehand


def test_learnt_positions_of_auraflow_begin_as_sinusoids_of_column_and_row() -> None:
    made = DiffusersBackbone(**{"class": "AuraFlowTransformer2DModel"}, **TINY["AuraFlowTransformer2DModel"])
    table = made.model.pos_embed.pos_embed[0].detach()  # 8 × 8 places of 32 channels
    turns = 10_000 ** -(torch.arange(8) / 8)
    for row, column in ((0, 0), (2, 5), (7, 1)):
        expected = torch.cat([wave(2 * place * turns) for place in (column, row) for wave in (torch.sin, torch.cos)])
        torch.testing.assert_close(table[8 * row + column], expected, atol=1e-5, rtol=1e-5)


def convolution_backward(gradient: list[int], _: Any, weight: list[int], *others: Any, **__: Any) -> int:
    """As many as forward for each factor. FlopCounterMode counts a weight's gradient as if there were no groups."""
    return 2 * math.prod(gradient[2:]) * gradient[0] * math.prod(weight) * sum(others[-1][:2])


QUICK = ("SD3Transformer2DModel", "Lumina2Transformer2DModel")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY])
def test_flops_are_those_of_the_real_class_at_work(name: str) -> None:
    ours = backbone(name)
    x = {key: value[:1] for key, value in inputs(ours).items()}
    mended = {torch.ops.aten.convolution_backward: convolution_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mended) as counter:
        ours(**x).sum().backward()
    sides, text = x["hidden_states"].shape[-2:], x["attention_mask"].shape[1]
    with torch.device("meta"):
        planned = DiffusersBackbone(**{"class": name}, **TINY[name])
    assert flops_of_backbone(planned, *sides, text) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def innermost(blocks: Any) -> list[nn.Module]:
    return [block for entry in blocks for block in (entry if isinstance(entry, nn.ModuleList) else [entry])]


@pytest.mark.parametrize("name", TINY)
def test_muon_and_fsdp_find_all_of_the_blocks(name: str) -> None:
    ours = backbone(name)
    lists = {
        path.split(".")[0]
        for path, module in ours.model.named_modules()
        if isinstance(module, nn.ModuleList) and "." not in path and "scalers" not in path and "repeat" not in path
    }
    inside = {
        f"backbone.model.{path}"
        for path, weight in ours.model.named_parameters()
        if path.split(".")[0] in lists and weight.ndim == 2 and path.endswith(".weight") and "embedding_table" not in path
    }
    model = nn.Module()
    model.backbone = ours
    assert muon_parameters(model).keys() == inside
    wrapped = [module for module in ours.modules() if ours.fsdp_wrap_fn(module)]
    borrowed = 1 if name.startswith("DiT") else 0  # its head uses a layer of the first block, which is gathered with the rest
    assert len(wrapped) + borrowed == sum(len(innermost(ours.model.get_submodule(path))) for path in lists)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", TINY)
def test_arguments_are_checked_against_the_class_without_importing_it(name: str) -> None:
    read = registry.constructor_in_diffusers(name, "model.backbone.class")
    real = inspect.signature(getattr(diffusers, name))
    assert {k: p.default for k, p in inspect.signature(read).parameters.items() if k != "self"} == {
        k: p.default for k, p in real.parameters.items()
    }
    check_component(registry.backbones, "diffusers", {"class": name} | TINY[name], "model.backbone", imports=False)
    width = next(key for key in TINY[name] if "num" in key)
    with pytest.raises(UserError, match=rf"model\.backbone\.{width}s: no such argument. Did you mean '{width}'"):
        check_component(registry.backbones, "diffusers", {"class": name, f"{width}s": 1}, "model.backbone", imports=False)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("SD3Transformer2DModel", dict(caption_projection_dim=48), "caption_projection_dim is 48, but must be the hidden size"),
        ("PixArtTransformer2DModel", dict(dropout=0.1), "dropout: 0.1 draws what a resumed run would not"),
        ("StableCascadeUNet", dict(dropout=(0.0, 0.1)), "dropout: .*0.1. draws what a resumed run would not"),
        ("StableCascadeUNet", dict(clip_image_in_channels=None), "clip_image_in_channels must be given: without both"),
        ("SD3Transformer", {}, "'SD3Transformer' has no signature.*Did you mean 'SD3Transformer2DModel'.*code_paths"),
        ("QwenImageTransformer2DModel", {}, "has no signature.*prx_composer/models/README.md"),
    ],
)
def test_what_cannot_be_trained_is_named(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        DiffusersBackbone(**{"class": name}, **(TINY.get(name, {}) | changed))


@pytest.mark.parametrize(
    ("name", "sides", "message"),
    [
        ("DiTTransformer2DModel", (8, 16), "square images only, not 8×16"),
        ("SD3Transformer2DModel", (8, 26), "positions for 12 patches on a side"),
        ("AuraFlowTransformer2DModel", (18, 8), "positions for 8 patches on a side"),
        ("FluxTransformer2DModel", (8, 9), "not divisible by patch_size 2"),
    ],
)
def test_an_image_that_a_class_would_mistake_is_refused(name: str, sides: tuple[int, int], message: str) -> None:
    ours = backbone(name)
    with pytest.raises(ValueError, match=message):
        ours.num_tokens(*sides)
    with pytest.raises(ValueError, match=message):
        ours(torch.zeros(1, 4, *sides), torch.zeros(1), torch.zeros(1, 3, ours.context_in_dim))


@pytest.mark.parametrize("name", sorted(TINY.keys() - {*ROUTED}))
def test_routing_is_refused_where_tokens_are_no_plain_sequence(name: str) -> None:
    with pytest.raises(UserError, match=rf"algorithms\.tread doesn't go with {name}: its blocks"):
        TREAD().check(None, [], backbone(name))


STRANGER = """
from prx_composer import registry
from prx_composer.models.signatures import BlockList, Inputs, Signature


@registry.signatures.register("ChromaTransformer2DModel")
class Chroma(Signature):
    blocks = (BlockList("transformer_blocks", output=1), BlockList("single_transformer_blocks", joint=True))
    text_width = "joint_attention_dim"
    packs = True
    unroutable = "its blocks take one table of positions for the whole batch"

    def inputs(self, x: Inputs):
        rows, columns = x.grid
        places = x.t.new_zeros(rows, columns, 3)
        places[..., 1] += torch.arange(rows)[:, None]
        places[..., 2] += torch.arange(columns)[None]
        text = dict(encoder_hidden_states=x.text, txt_ids=x.t.new_zeros(x.text.shape[1], 3))
        return dict(hidden_states=x.image, timestep=x.t, img_ids=places.flatten(0, 1)) | text
"""


def test_a_stranger_s_signature_makes_another_class_a_backbone(tmp_path: Path) -> None:
    file = tmp_path / "chroma.py"
    file.write_text("import torch\n" + STRANGER)
    registry.import_code([str(file)])
    arguments = HEADS | dict(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT, axes_dims_rope=[4, 6, 6]
    )
    arguments |= dict(approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1)
    check_component(registry.backbones, "diffusers", {"class": "ChromaTransformer2DModel"} | arguments, "b", imports=False)
    ours = DiffusersBackbone(**{"class": "ChromaTransformer2DModel"}, **arguments)
    ours.taps = (0, 1)
    prediction, taps = ours(**inputs(ours), return_taps=True)
    assert prediction.shape == (3, 4, 8, 16) and [tap.shape for tap in taps.values()] == 2 * [(3, 32, 32)]
    assert flops_of_backbone(ours, 8, 16, 7) > 0


def test_a_coarser_level_of_stable_cascade_is_not_tapped() -> None:
    ours = backbone("StableCascadeUNet", switch_level=None)
    x = inputs(ours)
    ours.taps = (0, ours.depth - 1)
    prediction, taps = ours(**x, return_taps=True)
    assert prediction.shape == x["hidden_states"].shape and [tap.shape for tap in taps.values()] == 2 * [(3, 32, 32)]
    ours.taps = (4,)
    with pytest.raises(ValueError, match="Tokens at block 4 are 2×4, and 4×8 are needed: tap a block of the finest level"):
        ours(**x)
