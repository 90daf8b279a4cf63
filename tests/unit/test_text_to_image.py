"""The ComposerModel: losses, metrics, draws, costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prx_composer.models import AuxiliaryLoss, FlowMatching, FlowOutput, HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.counting import StepCounter, flops_of_backbone, flops_of_batch, shape_of
from prx_composer.models.routing import RandomRouter, Route

Build = Callable[..., TextToImage]
Batch = dict[str, torch.Tensor]


def test_loss_is_the_v_space_error_and_terms_sum_to_total(tiny_model: Build, tiny_batch: Batch) -> None:
    class Brightness(AuxiliaryLoss):
        def forward(self, outputs: FlowOutput, batch: Any) -> torch.Tensor:
            return outputs.prediction.mean().square()

    model = tiny_model(flow=FlowMatching(prediction="v"))
    model.auxiliary_losses["brightness"] = Brightness(weight=0.5)
    model.auxiliary_losses["asleep"] = Brightness(weight=9.0)
    model.auxiliary_losses["asleep"].active = False
    out = model(tiny_batch)
    loss = model.loss(out, tiny_batch)
    assert loss.keys() == {"total", "flow", "brightness"}
    torch.testing.assert_close(loss["flow"], torch.nn.functional.mse_loss(out.prediction, out.noise - out.clean))
    torch.testing.assert_close(loss["brightness"], 0.5 * out.prediction.mean().square())
    torch.testing.assert_close(loss["total"], loss["flow"] + loss["brightness"])


def test_no_auxiliary_loss_no_term(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model()
    assert model.loss(model(tiny_batch), tiny_batch).keys() == {"total", "flow"}


def test_the_batch_is_never_written_to(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model()
    model.caption_dropout = 0.9
    before = {key: value.clone() for key, value in tiny_batch.items()}
    model.loss(model(tiny_batch), tiny_batch)["total"].backward()
    assert before.keys() == tiny_batch.keys() and all(torch.equal(before[key], tiny_batch[key]) for key in before)


def test_caption_dropout_puts_the_empty_caption_in_the_stated_share(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model()
    model.caption_dropout = 0.3
    wide = {key: value.repeat(500, *([1] * (value.ndim - 1))) for key, value in tiny_batch.items()}
    text = model._encode_text(wide, 0.3)
    null = model.encode_prompts([""], torch.device("cpu"))
    dropped = (text.embedding == null.embedding).flatten(1).all(1) & (text.mask == null.mask).all(1)
    assert 0.26 < dropped.float().mean() < 0.34  # 2,000 draws: four standard deviations
    kept = model.text_encoder(wide["input_ids"], wide["attention_mask"])
    torch.testing.assert_close(text.embedding[~dropped], kept[~dropped])


def test_draws_depend_on_step_and_microbatch_and_nothing_else(tiny_model: Build, tiny_batch: Batch) -> None:
    def draws(model: TextToImage, step: int, count: int) -> list[torch.Tensor]:
        model.random.begin_step(step)
        return [model(tiny_batch).noise for _ in range(count)]

    model = tiny_model()
    first = draws(model, 3, 2)
    torch.rand(100)  # the global generator doesn't matter
    again = draws(tiny_model(), 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]), "two microbatches of a step must not share their noise"
    assert not torch.equal(first[0], draws(model, 4, 1)[0])


def test_routers_are_drawn_per_microbatch_in_training_only(tiny_model: Build, tiny_batch: Batch) -> None:
    class KeepHalf:
        discard = False

        def draw(self, batch_size: int, num_tokens: int, generator: torch.Generator) -> Route:
            order = torch.rand(batch_size, num_tokens, generator=generator).argsort(1)
            return Route(0, 1, order[:, : num_tokens // 2].sort(1).values)

    model = tiny_model()
    dense = flops_of_batch(model, tiny_batch)
    model.backbone.router = KeepHalf()
    first, second = model(tiny_batch).route, model(tiny_batch).route
    assert first is not None and second is not None and not torch.equal(first.kept_indices, second.kept_indices)
    assert flops_of_batch(model, tiny_batch) < dense
    model.eval()
    assert model(tiny_batch).route is None
    routed, model.backbone.router = model.eval_forward(tiny_batch), None
    assert torch.equal(routed, model.eval_forward(tiny_batch))
    model.train().backbone.router = KeepHalf()
    assert torch.equal(routed, model.eval_forward(tiny_batch)), "also in a loop that forgot to call eval()"


# ------------------------------------------------------------------------------------------------------ the validation loss


def answering(model: TextToImage, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> TextToImage:
    """Let a model predict `answer(x_t, t)` in place of what its backbone would."""
    model._predict = lambda x_t, t, text, route=None: answer(x_t, t)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def summed(model: TextToImage, batch: Batch) -> dict[str, float]:
    metrics = model.get_metrics(is_train=False)
    for metric in metrics.values():
        metric.reset()
        model.update_metric(batch, model.eval_forward(batch), metric)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def test_the_metrics_are_the_error_at_eight_timesteps_and_its_mean(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model().eval()
    errors = model.eval_forward(tiny_batch)
    assert errors.shape == (4, 8) and errors.dtype == torch.float32 and not errors.requires_grad
    assert torch.equal(errors, model.eval_forward(tiny_batch)), "it is repeatable"
    found = summed(model, tiny_batch)
    timesteps = ("0.0625", "0.1875", "0.3125", "0.4375", "0.5625", "0.6875", "0.8125", "0.9375")
    assert list(found) == ["validation_loss", *(f"validation_loss_t{t}" for t in timesteps)]
    assert list(found.values()) == pytest.approx([float(errors.mean()), *errors.mean(0).tolist()], rel=1e-6)
    counted = tiny_batch | {"counted": torch.tensor([True, False, True, True])}
    assert summed(model, counted)["validation_loss"] == pytest.approx(float(errors[[0, 2, 3]].mean()), rel=1e-6)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_a_perfect_denoiser_has_none_and_one_that_says_nothing_the_energy_of_the_target(
    tiny_model: Build, tiny_batch: Batch, prediction: Any
) -> None:
    flow = FlowMatching(prediction=prediction, noise_scale=1.5, min_timestep=0.3)
    model = tiny_model(flow=flow)
    clean = model.autoencoder.encode(tiny_batch["image"])
    seen = dict[float, torch.Tensor]()

    def perfect(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen[float(t[0])] = x_t
        return clean if prediction == "x" else (x_t - clean) / t[:, None, None, None]

    assert summed(answering(model, perfect), tiny_batch)["validation_loss"] == pytest.approx(0, abs=1e-9)
    noise = (seen[0.5625] - (1 - 0.5625) * clean) / 0.5625 / 1.5
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert all((x_t - ((1 - t) * clean + t * 1.5 * noise)).abs().max() < 1e-5 for t, x_t in seen.items()), (
        "one noise, eight times"
    )
    silent = summed(answering(model, lambda x_t, t: torch.zeros_like(x_t)), tiny_batch)
    energy = float(clean.double().square().mean()), float((1.5 * noise - clean).double().square().mean())
    for t in seen:
        expected = energy[0] / t**2 if prediction == "x" else energy[1]
        assert silent[f"validation_loss_t{t:g}"] == pytest.approx(expected, rel=1e-5), "not clamped at 0.3"


def test_the_same_knowledge_of_the_image_is_the_same_loss_whatever_is_predicted(tiny_model: Build, tiny_batch: Batch) -> None:
    def guess(x_t: torch.Tensor) -> torch.Tensor:
        return 0.7 * x_t.roll(1, -1)

    x = tiny_model(flow=FlowMatching("x", min_timestep=0.2))
    v = tiny_model(flow=FlowMatching("v"))
    losses = summed(answering(x, lambda x_t, t: guess(x_t)), tiny_batch)
    same = summed(answering(v, lambda x_t, t: (x_t - guess(x_t)) / t[:, None, None, None]), tiny_batch)
    assert same == pytest.approx(losses, rel=1e-5)


def test_neither_how_a_run_draws_nor_its_seed_has_a_part_in_its_validation_loss(tiny_model: Build, tiny_batch: Batch) -> None:
    model, other = tiny_model().eval(), tiny_model().train()
    other.flow = FlowMatching(logit_mean=-2.0, timestep_shift=3.0, uniform_fraction=1.0, sampled_min=0.5, min_timestep=0.5)
    other.random.seed, other.caption_dropout = 5, 0.9
    other.random.begin_step(77)
    torch.manual_seed(99)
    expected = model.eval_forward(tiny_batch)
    assert torch.equal(other.eval_forward(tiny_batch), expected)
    moved = {name: value.flip(0) for name, value in tiny_batch.items()}
    torch.testing.assert_close(other.eval_forward(moved), expected.flip(0), rtol=1e-6, atol=0)
    renamed = tiny_batch | {"sample_id": torch.tensor([0, 1, 2, 9])}
    assert (other.eval_forward(renamed) == expected).all(1).tolist() == [True, True, True, False], "of the sample's number it is"


@pytest.mark.parametrize("trainable_text", [True, False])
@pytest.mark.parametrize("extra", [{}, {"bottleneck_size": 6, "resolution_embeds": True}])
def test_flops_agree_with_torchs_counter(
    tiny_model: Build, tiny_batch: Batch, trainable_text: bool, extra: dict[str, Any]
) -> None:
    model = tiny_model(trainable_text=trainable_text, **extra)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(model(tiny_batch), tiny_batch)["total"].backward()
    assert flops_of_batch(model, tiny_batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("image_tokens", "gigaflops"), [(256, 1365.9), (1024, 5235.9)])
def test_flops_of_the_24h_recipe_are_those_of_the_reference(image_tokens: int, gigaflops: float) -> None:
    with torch.device("meta"):
        backbone = PRXBackbone(in_channels=3, patch_size=32, bottleneck_size=256)
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(1177e6, rel=1e-3)
    # The reference counts a backward pass as twice the forward, input gradients of the first layers included.
    side = 32 * int(image_tokens**0.5)
    assert flops_of_backbone(backbone, side, side, 256) / 1e9 == pytest.approx(gigaflops, rel=2e-3)
    backbone.router = RandomRouter("tread", 2, 15, 0.5)  # blocks 2 to 14, both included
    routed = flops_of_backbone(backbone, side, side, 256)
    assert routed / 1e9 == pytest.approx({256: 878.1, 1024: 3119.9}[image_tokens], rel=3e-3)


def test_frozen_parts_are_in_no_checkpoint_and_no_optimizer(tiny_model: Build) -> None:
    frozen, trained = tiny_model(trainable_text=False), tiny_model(trainable_text=True)
    assert not any("text_encoder" in name for name in frozen.state_dict())
    assert any("text_encoder" in name for name in trained.state_dict())
    assert all(p.requires_grad for p in frozen.parameters())


def test_parts_that_do_not_fit_are_named_by_their_yaml_path(tokenizer: Any) -> None:
    encoder = HuggingFaceTextEncoder(
        tokenizer, config=dict(model_type="t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), max_tokens=14
    )
    with pytest.raises(ValueError, match="model.backbone.context_in_dim is 24.*16"):
        TextToImage(PRXBackbone(in_channels=3, context_in_dim=24, hidden_size=32, num_heads=2, depth=1), encoder)
    with pytest.raises(ValueError, match="model.backbone.in_channels is 4"):
        TextToImage(PRXBackbone(in_channels=4, context_in_dim=16, hidden_size=32, num_heads=2, depth=1), encoder)


def test_stored_text_embeddings_give_the_loss_of_the_encoder_run_online(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(trainable_text=False)
    model.caption_dropout = 0.5
    stored = tiny_batch | {"text_embedding": model.text_encoder(tiny_batch["input_ids"], tiny_batch["attention_mask"])}
    losses = []
    for batch in (tiny_batch, stored):
        model.zero_grad()
        model.random.begin_step(3)
        loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        losses.append((loss.detach(), model.backbone.txt_in.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])
    online, of_data = (StepCounter(model).count(shape_of(batch)).flops for batch in (tiny_batch, stored))
    assert online.pop("text encoder") > 0 and online == of_data


def test_stored_embeddings_of_an_encoder_that_is_trained_are_refused(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model(trainable_text=True)
    stored = tiny_batch | {"text_embedding": model.text_encoder(tiny_batch["input_ids"], tiny_batch["attention_mask"])}
    with pytest.raises(ValueError, match=r"model\.text_encoder is trained"):
        model(stored)
