"""Token routing: tread, sprint, deferred_masking and the guidance that goes with them."""

from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from composer.core import Event, State
from composer.devices import DeviceCPU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prx_composer.algorithms.base import LossTrick
from prx_composer.algorithms.token_routing import SPRINT, TREAD, DeferredMasking, SprintFusion
from prx_composer.common.errors import UserError
from prx_composer.models import TextToImage
from prx_composer.models.counting import flops_of_batch
from prx_composer.models.flow import ClassifierFreeGuidance, RoutedSelfGuidance, SamplingStep, TextConditioning
from prx_composer.models.routing import RandomRouter, Route, draw_kept_indices
from prx_composer.optim import AdamW

Build = Callable[..., TextToImage]
Batch = dict[str, torch.Tensor]


def attach(model: TextToImage, *algorithms: Any, batch: int = 0) -> State:
    """What the Trainer does up to the start of step `batch`."""
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="100ba")
    state.optimizers = AdamW(model)
    state.algorithms = list(algorithms)
    for event in (Event.INIT, Event.BEFORE_LOAD):
        for algorithm in algorithms:
            if algorithm.match(event, state):
                algorithm.apply(event, state, None)
    begin(state, batch)
    return state


def begin(state: State, batch: int) -> None:
    while int(state.timestamp.batch) < batch:
        state.timestamp = state.timestamp.to_next_batch(1)
    for algorithm in state.algorithms:
        if algorithm.match(Event.BATCH_START, state):
            algorithm.apply(Event.BATCH_START, state, None)  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------------- draws


def test_kept_tokens_are_a_uniformly_random_subset_in_order() -> None:
    kept = draw_kept_indices(4000, 10, 4, torch.Generator().manual_seed(0))
    assert kept.shape == (4000, 4) and (kept.diff(dim=1) > 0).all()
    counts = kept.flatten().bincount(minlength=10).numpy()
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    pairs = (kept[:, :, None] * 10 + kept[:, None, :]).flatten().bincount(minlength=100).reshape(10, 10)
    assert scipy.stats.chisquare(pairs[torch.triu(torch.ones(10, 10), 1).bool()].numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("rate", "tokens", "kept"), [(0.5, 256, 128), (0.75, 10, 2), (0.99, 4, 1), (0.5, 1, 1)])
def test_a_router_keeps_the_rest_of_its_rate_and_at_least_one_token(rate: float, tokens: int, kept: int) -> None:
    router = RandomRouter("tread", 1, 3, rate)
    route = router.draw(2, tokens, torch.Generator())
    assert route is not None and route.kept_indices.shape == (2, kept)


# --------------------------------------------------------------------------------------------------- tread


def test_tread_routes_from_start_to_end_block_in_its_window_and_never_in_evaluation(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=5)
    state = attach(model, TREAD(start_block=2, rate=0.5, start="1ba", end="3ba"))
    routed = []
    for batch in range(4):
        begin(state, batch)
        route = model(tiny_batch).route
        routed.append(None if route is None else (route.start, route.end, route.kept_indices.shape[1]))
        assert model.eval()(tiny_batch).route is None
        model.train()
    assert routed == [None, (2, 4, 12), (2, 4, 12), None], "the last but one block is the last routed one"


def test_a_model_is_treads_without_a_trace_in_its_weights(tiny_model: Build) -> None:
    plain = tiny_model(depth=4)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    attach(plain, TREAD(start_block=1))
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("algorithm", [TREAD(start_block=1), SPRINT(start_block=1), DeferredMasking(mixer_blocks=1, rate=0.5)])
def test_flops_under_routing_agree_with_torchs_counter(algorithm: Any, tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=4)
    attach(model, algorithm)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(model(tiny_batch), tiny_batch)["total"].backward()
    assert flops_of_batch(model, tiny_batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (TREAD(start_block=3, end_block=4), r"blocks 3 to 4 cannot be routed; model.backbone has 4 blocks"),
        (TREAD(start_block=3), r"blocks 3 to 2 cannot be routed"),
        (DeferredMasking(mixer_blocks=4), r"deferred_masking: blocks 4 to 3"),
    ],
)
def test_blocks_that_are_not_there_are_named(algorithm: Any, message: str, tiny_model: Build) -> None:
    with pytest.raises(UserError, match=message):
        attach(tiny_model(depth=4), algorithm)


@pytest.mark.parametrize("bad", [dict(rate=0.0), dict(rate=1.0), dict(start_block=3, end_block=2), dict(start_block=-1)])
def test_arguments_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rate must lie|start_block ≤ end_block"):
        TREAD(**bad)


def test_two_routers_are_refused_by_name(tiny_model: Build) -> None:
    with pytest.raises(UserError, match=r"algorithms.sprint and algorithms.tread both route tokens"):
        attach(tiny_model(depth=4), TREAD(start_block=1), SPRINT(start_block=1))


# ------------------------------------------------------------------------------------------- self-guidance


def test_self_guidance_is_the_formula_with_a_route_of_its_own_for_every_image_and_step() -> None:
    router = RandomRouter("tread", 1, 3, 0.5)
    text = TextConditioning(torch.zeros(3, 1, 1), torch.ones(3, 1, dtype=torch.bool))
    routes: list[torch.Tensor] = []

    def denoise(x_t: torch.Tensor, t: torch.Tensor, text: TextConditioning, route: Route | None = None) -> torch.Tensor:
        if route is None:
            return 5 * x_t
        routes.append(route.kept_indices)
        return 2 * x_t

    x_t, t = torch.randn(3, 1, 2, 2), torch.full((3,), 0.5)
    guidance = RoutedSelfGuidance(router)
    for index in range(2):
        guided = guidance(denoise, x_t, t, SamplingStep(text, text, 3.0, index, [7, 8, 9], 16))
        torch.testing.assert_close(guided, (2 + 3 * (5 - 2)) * x_t)
    assert not torch.equal(routes[0], routes[1]) and len({tuple(row.tolist()) for row in torch.cat(routes)}) == 6
    guidance(denoise, x_t[:1], t[:1], SamplingStep(text, text, 3.0, 1, [8], 16))
    assert torch.equal(routes[2][0], routes[1][1]), "an image depends on its own seed only"
    assert torch.equal(guidance(denoise, x_t, t, SamplingStep(text, text, 1.0, 0, [7, 8, 9], 16)), 5 * x_t)
    assert len(routes) == 3, "a scale of 1 is the dense model"


def test_tread_lends_its_guidance_while_its_window_is_open(tiny_model: Build) -> None:
    model = tiny_model(depth=4)
    state = attach(model, TREAD(start_block=1, self_guidance=True, end="2ba"))
    draw = dict(prompts=["a red circle", "a blue ring"], height=16, width=16, seeds=[1, 2], num_inference_steps=3)
    assert isinstance(model.guidance, RoutedSelfGuidance)
    together = model.generate(**draw, guidance_scale=4.0)
    alone = model.generate(["a blue ring"], 16, 16, [2], 3, 4.0)
    assert (together[1:].int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together, model.generate(**draw, guidance_scale=1.0))
    begin(state, 2)
    assert isinstance(model.guidance, ClassifierFreeGuidance)


# -------------------------------------------------------------------------------------------------- sprint


def test_fusion_is_a_projection_of_both_paths_with_a_mask_token_where_the_deep_one_is_missing() -> None:
    torch.manual_seed(0)
    fusion = SprintFusion(1, 3, 6)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_()
    early, deep, kept = torch.randn(2, 5, 6), torch.randn(2, 2, 6), torch.tensor([[0, 3], [1, 4]])
    fused = fusion(early, deep, kept)
    for image in range(2):
        for token in range(5):
            position = kept[image].tolist().index(token) if token in kept[image] else None
            theirs = fusion.mask_token if position is None else deep[image, position]
            expected = fusion.project(torch.cat([early[image, token], theirs]))
            torch.testing.assert_close(fused[image, token], expected)
    torch.testing.assert_close(fusion(early, early, None), fusion.project(torch.cat([early, early], -1)))


def test_sprint_fuses_in_training_and_in_sampling_and_is_trained(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=4)
    state = attach(model, SPRINT(start_block=1, rate=0.75, end="1ba"))
    trained = {id(p) for group in state.optimizers[0].param_groups for p in group["params"]}
    fusion = model.backbone.fusion
    assert fusion is not None and all(id(p) in trained for p in fusion.parameters())
    for batch in (0, 1):  # in the window, and after it
        begin(state, batch)
        model.zero_grad()
        outputs = model(tiny_batch)
        assert (outputs.route is None) == (batch == 1)
        model.loss(outputs, tiny_batch)["total"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "DDP waits for every parameter"
    before = model.eval()(tiny_batch).prediction
    with torch.no_grad():
        fusion.get_parameter("project.bias").add_(torch.linspace(-1, 1, 32))
    model.random.begin_step(0)
    assert not torch.allclose(before, model(tiny_batch).prediction)


# ----------------------------------------------------------------------------------------- deferred masking


def test_the_loss_is_taken_on_kept_patches_alone(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=3)
    attach(model, DeferredMasking(mixer_blocks=1, rate=0.75))
    outputs = model(tiny_batch)
    assert outputs.route is not None and outputs.counted is not None
    kept = outputs.counted.bool().expand_as(outputs.clean)
    assert kept.float().mean() == pytest.approx(0.25)
    assert (outputs.prediction[~kept] == 0).all() and (outputs.prediction[kept] != 0).all()
    patches = kept[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).flatten(2)
    assert torch.equal(patches.all(-1), patches.any(-1)), "whole patches"
    for image, indices in enumerate(outputs.route.kept_indices):
        assert patches[image].all(-1).nonzero()[:, 0].tolist() == indices.tolist()
    scale = outputs.timestep.clamp_min(0.05)[:, None, None, None]
    expected = ((outputs.prediction - outputs.clean) / scale)[kept].square().reshape(4, -1).mean(1).mean()
    torch.testing.assert_close(model.loss(outputs, tiny_batch)["total"], expected)


def test_after_its_window_whole_images_are_trained_on(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(depth=3)
    state = attach(model, DeferredMasking(mixer_blocks=1, end="1ba"))
    begin(state, 1)
    assert model(tiny_batch).counted is None


class WholeImage(LossTrick):
    name = "whole_image"
    needs_whole_image = True

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return outputs.prediction.mean()


@pytest.mark.parametrize("swapped", [False, True])
def test_losses_of_whole_images_are_refused_unless_the_windows_are_apart(swapped: bool, tiny_model: Build) -> None:
    def both(start: str) -> None:
        algorithms = [DeferredMasking(mixer_blocks=1, end="0.5dur"), WholeImage(1.0, start=start)]
        attach(tiny_model(depth=3), *(algorithms[::-1] if swapped else algorithms))

    both("0.5dur")
    for start in ("0ba", "0.4dur", "50ba"):
        with pytest.raises(UserError, match=r"algorithms.whole_image needs whole images, but algorithms.deferred_masking"):
            both(start)


# ------------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize("algorithm", [TREAD(start_block=1, end_block=1), SPRINT(start_block=1), DeferredMasking(1, 0.5)])
def test_a_routed_backbone_compiles_as_one_graph_and_gives_the_eager_result(
    algorithm: Any, tiny_model: Build, tiny_batch: Batch
) -> None:
    """Traced with its backward; test_backbone has inductor generate code for a routed backbone."""
    model = tiny_model(depth=3)
    attach(model, algorithm)
    outputs = model(tiny_batch)
    inputs = (outputs.noised, outputs.timestep, outputs.text.embedding.detach(), outputs.text.mask, outputs.route)
    compiled = torch.compile(model.backbone, fullgraph=True, dynamic=False, backend="aot_eager")
    eager, ours = model.backbone(*inputs), compiled(*inputs)
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=2e-5)
    weights = list(model.backbone.blocks.parameters())
    for theirs, gradient in zip(*(torch.autograd.grad(o.square().mean(), weights) for o in (eager, ours)), strict=True):
        torch.testing.assert_close(gradient, theirs, atol=2e-5, rtol=2e-4)
