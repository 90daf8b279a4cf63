"""Readouts and internal guidance against loops over tokens with PIL's downsizing, closed forms, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer.core import Event, State
from composer.devices import DeviceCPU
from PIL import Image

from prx_composer.algorithms.readouts import GuidingReadout, Readout, Readouts, default_readouts, readout_error
from prx_composer.algorithms.token_routing import TREAD
from prx_composer.common.errors import UserError
from prx_composer.models import FlowMatching, PRXBackbone, TextToImage
from prx_composer.models.backbone import TIME_VECTOR
from prx_composer.models.flow import ClassifierFreeGuidance, InternalGuidance, SamplingStep, TextConditioning
from prx_composer.models.layers import patchify
from prx_composer.models.routing import RandomRouter
from prx_composer.optim import AdamW
from prx_composer.optim.muon import Muon
from prx_composer.recipe import config
from prx_composer.training.trial import check_config

Build = Callable[..., TextToImage]
Batch = dict[str, torch.Tensor]
Recipe = dict[str, Any]
Write = Callable[..., str]
HEADS = [Readout(0, 1), Readout(1, 2), Readout(1, 4)]  # a quarter, a half and the whole of a patch of 4


def begin(model: TextToImage, *tricks: Any, optimizer: Any = None, batch: int = 0) -> State:
    """What the Trainer does up to the start of step `batch`, with heads that say something."""
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba")
    state.optimizers, state.algorithms = optimizer or AdamW(model), list(tricks)
    for trick in tricks:
        trick.apply(Event.INIT, state, None)
    for parameter in model.auxiliary_losses.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    for _ in range(batch):
        state.timestamp = state.timestamp.to_next_batch(1)
    for trick in tricks:
        trick.apply(Event.BATCH_START, state, None)
    return state


def shrunk(image: torch.Tensor, factor: int) -> np.ndarray:
    """An image (C, H, W) at 1/factor of its sides, by PIL: (C, h, w)."""
    height, width = image.shape[1] // factor, image.shape[2] // factor
    channels = [Image.fromarray(channel.numpy()).resize((width, height), Image.Resampling.BILINEAR) for channel in image]
    return np.stack([np.asarray(channel) for channel in channels])


def by_hand(model: TextToImage, readout: Readout, weights: Any, outputs: Any, route: Any) -> float:
    """A head's error: token by token, of those that its block saw, in numpy."""
    errors, patch, columns = [], readout.patch_size, outputs.clean.shape[-1] // 4
    for i in range(len(outputs.clean)):
        tokens, vec = outputs.taps[readout.block][i].detach(), outputs.taps[TIME_VECTOR][i].detach()
        places = range(len(tokens)) if route is None or readout.block < route.start else route.kept_indices[i].tolist()
        shift, scale = F.linear(F.silu(vec), weights["modulation.weight"], weights["modulation.bias"]).chunk(2)
        clean, noise = (shrunk(image[i], 4 // patch) for image in (outputs.clean, outputs.noise))
        t = max(float(outputs.timestep[i]), model.flow.min_timestep)
        assert len(places) == len(tokens)
        for token, place in zip(tokens, places, strict=True):
            normed = (token - token.mean()) / (token.var(correction=0) + 1e-6).sqrt()
            said = F.linear(normed * (1 + scale) + shift, weights["linear.weight"], weights["linear.bias"])
            top, left = place // columns * patch, place % columns * patch
            x0, epsilon = (image[:, top : top + patch, left : left + patch] for image in (clean, noise))
            wanted = x0 if model.flow.prediction == "x" else model.flow.noise_scale * epsilon - x0
            error = said.numpy().reshape(wanted.shape) - wanted
            errors.append(np.mean((error / (t if model.flow.prediction == "x" else 1)) ** 2))
    return float(np.mean(errors))


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("router", [None, "tread", "deferred"])
def test_the_loss_is_the_networks_on_the_smaller_image_of_what_each_block_saw(
    prediction: Any, router: str | None, tiny_model: Build, tiny_batch: Batch
) -> None:
    model, trick = tiny_model(flow=FlowMatching(prediction, noise_scale=2.0), depth=3), Readouts(HEADS, weight=0.7)
    if router is not None:
        model.backbone.router = RandomRouter(router, 1, 3 if router == "deferred" else 2, 0.5, router == "deferred")
    begin(model, trick)
    outputs = model(tiny_batch)
    assert outputs.taps.keys() == {TIME_VECTOR, 0, 1} and outputs.clean.shape[-2:] == (16, 24)
    assert outputs.taps[1].shape[1] == (24 if router is None else 12) and outputs.taps[0].shape[1] == 24
    errors = [
        by_hand(model, readout, head.state_dict(), outputs, outputs.route)
        for readout, head in zip(HEADS, trick.heads, strict=True)
    ]
    terms = model.loss(outputs, tiny_batch)
    assert float(terms["readouts"].detach()) == pytest.approx(0.7 * sum(errors), rel=2e-4)
    torch.testing.assert_close(terms["total"], terms["flow"] + terms["readouts"])


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_a_head_that_is_right_has_no_loss_and_one_that_is_wrong_does(
    prediction: Any, tiny_model: Build, tiny_batch: Batch
) -> None:
    """Images of one colour, and noise that is nothing: then a bias can be right everywhere."""
    model, trick = tiny_model(flow=FlowMatching(prediction)), Readouts([Readout(0, 2), Readout(1, 4)])
    begin(model, trick)
    colour = torch.tensor([255, 51, 0], dtype=torch.uint8)
    outputs = model(tiny_batch | {"image": colour[:, None, None].expand(4, 3, 16, 24)})
    outputs.noise = torch.zeros_like(outputs.noise)
    with torch.no_grad():
        for head, patch in zip(trick.heads, (2, 4), strict=True):
            head.linear.weight.zero_()
            head.linear.bias.copy_((1 if prediction == "x" else -1) * outputs.clean[0, :, 0, 0].repeat_interleave(patch**2))
    assert float(trick.loss(outputs, tiny_batch).detach()) < 1e-10
    outputs.clean = outputs.clean + 0.5
    assert float(trick.loss(outputs, tiny_batch).detach()) > 0.4


def test_true_patches_have_no_error_whatever_is_kept() -> None:
    flow, generator = FlowMatching(), torch.Generator().manual_seed(0)
    outputs: Any = type("Outputs", (), {})()
    outputs.clean, outputs.timestep = torch.randn(2, 5, 24, 8, generator=generator), torch.tensor([0.0, 1.0])  # latents
    smaller = torch.stack([torch.from_numpy(shrunk(image, 2)) for image in outputs.clean])
    patches, kept = patchify(smaller, 4), torch.tensor([[0, 2], [1, 2]])
    assert patches.shape == (2, 3, 80)
    predicted = torch.stack([patches[0, kept[0]], patches[1, kept[1]]])
    assert readout_error(flow, patches, outputs, 8, 4).max() < 1e-8 > readout_error(flow, predicted, outputs, 8, 4, kept).max()
    wrong = readout_error(flow, predicted + 0.1, outputs, 8, 4, kept)
    torch.testing.assert_close(wrong, torch.tensor([(0.1 / 0.05) ** 2, 0.01]), rtol=1e-3, atol=0)


def test_gradients_reach_what_is_read_and_no_further_and_heads_begin_with_nothing(tiny_model: Build, tiny_batch: Batch) -> None:
    model, trick = tiny_model(depth=4), Readouts([Readout(1, 2)])
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba")
    state.optimizers = AdamW(model)
    for event in (Event.INIT, Event.BATCH_START):
        trick.apply(event, state, None)  # pyright: ignore[reportArgumentType]
    assert not any(parameter.any() for parameter in trick.term.parameters())
    torch.nn.init.normal_(trick.heads[0].linear.weight)
    trick.loss(model(tiny_batch), tiny_batch).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trick.term.parameters())
    blocks: Any = model.backbone.blocks
    reached = [block.up_proj.weight.grad for block in blocks]
    assert reached[0].any() and reached[1].any() and reached[2] is None is reached[3], "there is no stop-gradient"
    assert model.backbone.time_in.in_layer.weight.grad.any() and model.backbone.final_layer.linear.weight.grad is None  # pyright: ignore


def test_heads_are_trained_by_adam_beside_muon(tiny_model: Build) -> None:
    model = tiny_model()
    optimizer = Muon(model)
    before = {id(p) for group in optimizer.param_groups for p in group["params"]}
    begin(model, Readouts(), GuidingReadout(), optimizer=optimizer)
    heads = {id(p) for p in model.auxiliary_losses.parameters()}
    added = [group for group in optimizer.param_groups if any(id(p) in heads for p in group["params"])]
    assert heads == {id(p) for group in added for p in group["params"]} and not heads & before
    assert not any(group.get("use_muon") or group.get("muon") for group in added)


@pytest.mark.parametrize(
    ("depth", "patch_size", "expected"),
    [
        (22, 32, [(9, 8), (15, 16)]),  # P-JiT's own
        (16, 32, [(6, 8), (11, 16)]),
        (4, 4, [(1, 1), (2, 2)]),
        (1, 4, [(0, 1), (0, 2)]),
        (16, 2, [(11, 1)]),
        (16, 1, []),
    ],
)
def test_by_default_heads_lie_where_pjit_has_them(depth: int, patch_size: int, expected: list[tuple[int, int]]) -> None:
    assert [(readout.block, readout.patch_size) for readout in default_readouts(depth, patch_size)] == expected


def test_compiled_with_taps_it_is_one_graph_with_the_same_numbers(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=2)
    model.backbone.router = RandomRouter("tread", 1, 2, 0.5)
    begin(model, Readouts(HEADS))
    outputs = model(tiny_batch)
    inputs = (outputs.noised, outputs.timestep, outputs.text.embedding.detach(), outputs.text.mask, outputs.route, True)
    compiled = torch.compile(model.backbone, fullgraph=True, dynamic=False, backend="eager")
    for theirs, ours in zip(model.backbone(*inputs), compiled(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_under_autocast_the_loss_is_about_the_same(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=3)
    begin(model, Readouts(HEADS))
    model.random.begin_step(0)
    plain = model.loss(model(tiny_batch), tiny_batch)["readouts"]
    with torch.autocast("cpu", torch.bfloat16):
        model.random.begin_step(0)
        rounded = model.loss(model(tiny_batch), tiny_batch)["readouts"]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.02, atol=0)
    rounded.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.auxiliary_losses.parameters())


def test_after_its_window_it_reads_nothing_and_its_weights_still_have_a_gradient(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=3)
    begin(model, Readouts(HEADS, end="2ba"), GuidingReadout(block=1, end="2ba"), batch=2)
    outputs = model(tiny_batch)
    assert outputs.taps == {} and type(model.guidance) is ClassifierFreeGuidance
    terms = model.loss(outputs, tiny_batch)
    assert terms["readouts"] == 0 == terms["internal_guidance"]
    terms["total"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.auxiliary_losses.parameters())


# ----------------------------------------------------------------------------------------------- internal guidance


DRAW: dict[str, Any] = dict(prompts=["a red circle", "a blue ring"], height=16, width=24, seeds=[1, 2], num_inference_steps=3)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_scale_of_one_draws_to_the_bit_what_is_drawn_without(guidance_scale: float, tiny_model: Build) -> None:
    model = tiny_model(depth=3)
    expected = model.sample(**DRAW, guidance_scale=guidance_scale)
    begin(model, GuidingReadout(scale=1.0))
    assert isinstance(model.guidance, InternalGuidance)
    assert torch.equal(model.sample(**DRAW, guidance_scale=guidance_scale), expected)
    for trick in (GuidingReadout(block=1, scale=1.8), GuidingReadout(block=1, scale=1.8, interval=(0.9, 0.99))):
        guided = tiny_model(depth=3)
        begin(guided, trick)
        is_equal = torch.equal(guided.sample(**DRAW, guidance_scale=guidance_scale), expected)
        assert is_equal == (trick.interval[0] == 0.9), "of three steps, at t = 1, 2/3 and 1/3, none lies in that interval"


def test_an_image_depends_on_its_own_prompt_and_seed_only_and_a_step_is_one_pass(tiny_model: Build) -> None:
    model, calls = tiny_model(depth=3), list[int]()
    begin(model, GuidingReadout(block=1, scale=2.0))
    together = model.sample(**DRAW, guidance_scale=3.0)
    torch.testing.assert_close(together[1:], model.sample(["a blue ring"], 16, 24, [2], 3, 3.0), atol=1e-4, rtol=1e-4)
    model.backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    model.sample(**DRAW, guidance_scale=3.0)
    assert calls == [4, 4, 4], "both halves in one call"


def test_the_guidance_is_the_formula_within_that_of_classifier_free_guidance() -> None:
    """The final prediction is 5·x_t + c, the middle one 2·x_t − c, with the text's c; t says where it guides."""
    x_t, t = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.9])
    text, null = (TextConditioning(torch.full((3, 1, 1), c), torch.ones(3, 1, dtype=torch.bool)) for c in (1.0, -1.0))

    def both(x_t: torch.Tensor, t: torch.Tensor, text: TextConditioning) -> tuple[torch.Tensor, torch.Tensor]:
        c = text.embedding[:, :, :, None]
        return 5 * x_t + c, 2 * x_t - c

    guidance = InternalGuidance(both, 1.6, (0.5, 0.9))
    denoise: Any = None  # isn't asked: the pass is its own
    for scale in (1.0, 4.0):
        drawn = guidance(denoise, x_t, t, SamplingStep(text, null, scale, 0, [1, 2, 3], 4))
        expected = []
        for image, inside in zip(x_t, (False, True, True), strict=True):
            halves = []
            for c in (-1.0, 1.0):
                final, middle = 5 * image + c, 2 * image - c
                halves.append(middle + 1.6 * (final - middle) if inside else final)
            expected.append(halves[0] + scale * (halves[1] - halves[0]))
        torch.testing.assert_close(drawn, torch.stack(expected))


def test_both_predictions_are_of_one_pass_and_the_middle_one_is_what_the_loss_measures(
    tiny_model: Build, tiny_batch: Batch
) -> None:
    model, trick = tiny_model(depth=3), GuidingReadout(block=1, weight=1.0)
    begin(model, trick)
    outputs = model(tiny_batch)
    final, middle = trick.predict_both(outputs.noised, outputs.timestep, outputs.text)
    torch.testing.assert_close(final, outputs.prediction)
    error = model.flow.squared_error(middle, outputs.clean, outputs.noise, outputs.timestep).mean()
    torch.testing.assert_close(model.loss(outputs, tiny_batch)["internal_guidance"], error)


# ------------------------------------------------------------------------------------------------------- refusals


def test_all_mistakes_are_said_at_once_before_training(tiny_recipe: Recipe, write_recipe: Write) -> None:
    def problems(**algorithms: Any) -> list[str]:
        recipe = copy.deepcopy(tiny_recipe)
        recipe["algorithms"] |= algorithms
        results = check_config(config.load([write_recipe(recipe)]))
        return [result.text for result in results if result.mark == "✗"]

    heads = [{"block": 2, "patch_size": 3}, {"block": 1, "patch_size": 4}, {"block": 1, "patch_size": 4}]
    found = problems(readouts={"heads": heads})
    assert found == [
        "algorithms.readouts.heads[0].block: 2 is no block of model.backbone, which has 2, counted from 0 to 1.",
        "algorithms.readouts.heads[0].patch_size: 3 doesn't divide model.backbone.patch_size, which is 4; give one of 1, 2, 4.",
        "algorithms.readouts.heads[2] is heads[1] again; one of them is enough.",
    ]
    (found,) = problems(internal_guidance={"block": 5})
    assert found.startswith("algorithms.internal_guidance.block: 5 is no block of model.backbone, which has 2")
    (found,) = problems(internal_guidance={}, tread={"start_block": 0, "end_block": 0, "self_guidance": True})
    assert "algorithms.internal_guidance and algorithms.tread.self_guidance both guide sampling" in found
    assert not problems(readouts={}, internal_guidance={}, tread={"start_block": 0, "end_block": 0})
    found = problems(readouts={"heads": [{"block": 0, "patch": 2}]})
    assert any("algorithms.readouts.heads[0].patch: no such argument" in text for text in found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Readouts([]), "at least one"),
        (lambda: Readouts(weight=-1.0), "weight must not be negative"),
        (lambda: Readout(-1, 2), "block must not be negative"),
        (lambda: Readout(0, 0), "patch_size must be at least 1"),
        (lambda: GuidingReadout(block=-1), "block must not be negative"),
        (lambda: GuidingReadout(scale=0.9), "scale must be a number from 1 on"),
        (lambda: GuidingReadout(scale=float("nan")), "scale must be a number"),
        (lambda: GuidingReadout(interval=(0.5, 0.2)), "interval must be two timesteps"),
        (lambda: GuidingReadout(interval=(0.5, 1.2)), "interval must be two timesteps"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_what_cannot_be_read_out_is_said(tiny_model: Build) -> None:
    with pytest.raises(UserError, match=r"algorithms\.readouts: model\.backbone\.patch_size is 1, which cannot be halved"):
        begin(tiny_model(patch_size=1), Readouts())
    model: Any = tiny_model()
    model.backbone = torch.nn.Identity()
    with pytest.raises(UserError, match=r"algorithms\.internal_guidance doesn't go with"):
        GuidingReadout().attach(model, None)
    assert TREAD().self_guidance is False and isinstance(tiny_model().backbone, PRXBackbone)
