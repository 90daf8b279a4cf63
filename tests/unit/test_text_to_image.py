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
    assert model.eval_forward(tiny_batch).route is None


def test_eval_is_repeatable_and_the_bins_average_to_the_whole(tiny_model: Build, tiny_batch: Batch) -> None:
    model = tiny_model().eval()
    metrics = model.get_metrics(is_train=False)
    outputs = model.eval_forward(tiny_batch)
    assert torch.equal(outputs.noise, model.eval_forward(tiny_batch).noise)
    wide = FlowOutput(**{**vars(outputs), "timestep": torch.tensor([0.1, 0.2, 0.6, 1.0])})
    for metric in metrics.values():
        metric.reset()
        model.update_metric(tiny_batch, wide, metric)
    error = model.flow.squared_error(wide.prediction, wide.clean, wide.noise, wide.timestep)
    torch.testing.assert_close(metrics["mse"].compute(), error.mean())
    torch.testing.assert_close(metrics["mse_t0.00-0.25"].compute(), error[:2].mean())
    torch.testing.assert_close(metrics["mse_t0.75-1.00"].compute(), error[3])
    assert torch.isnan(metrics["mse_t0.25-0.50"].compute())


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
