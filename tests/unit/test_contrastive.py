"""Contrastive flow matching against the paper's formula, its closed-form minimum and the Trainer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from prx_composer.algorithms.contrastive_flow_matching import ContrastiveFlowMatching, contrastive_error
from prx_composer.common.errors import UserError
from prx_composer.models import FlowMatching, FlowOutput
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import run

Recipe = dict[str, Any]
Write = Callable[..., str]
Prediction = Literal["x", "v"]

CAPTIONS = {"input_ids": torch.arange(12).reshape(4, 3)}


def outputs_for(flow: FlowMatching, timestep: list[float]) -> FlowOutput:
    generator = torch.Generator().manual_seed(0)
    prediction, clean, noise = torch.randn(3, len(timestep), 3, 8, 8, generator=generator)
    t = torch.tensor(timestep)
    noised = flow.interpolate(clean, noise, t)
    return FlowOutput(prediction, clean, noise, noised, t, None, None, {})  # pyright: ignore[reportArgumentType]


def loss_of(weight: float, flow: FlowMatching, **options: Any) -> Callable[[FlowOutput, Any], torch.Tensor]:
    """Of a model that learns `flow`."""
    trick = ContrastiveFlowMatching(weight, **options)
    trick.flow = flow
    return trick.loss


def papers_terms(flow: FlowMatching, o: FlowOutput) -> list[float]:
    """‖v̂ − ṽ‖² in numpy, image by image."""
    terms = []
    for i in range(len(o.clean)):
        x_t, output, t = o.noised[i].numpy(), o.prediction[i].numpy(), float(o.timestep[i])
        velocity = output if flow.prediction == "v" else (x_t - output) / t
        negative = flow.noise_scale * o.noise[i - 1].numpy() - o.clean[i - 1].numpy()
        terms.append(float(np.mean((velocity - negative) ** 2)))
    return terms


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_error_is_the_papers_wherever_nothing_is_clamped(prediction: Prediction) -> None:
    flow = FlowMatching(prediction, noise_scale=2.0)
    o = outputs_for(flow, [0.05, 0.3, 0.7, 1.0])
    error = contrastive_error(flow, o)
    torch.testing.assert_close(error, torch.tensor(papers_terms(flow, o)), rtol=1e-4, atol=1e-4)
    loss = loss_of(0.05, flow)
    torch.testing.assert_close(loss(o, CAPTIONS), -error.mean(), msg="the term is what is maximised")


def test_velocity_and_image_prediction_of_the_same_velocity_have_the_same_error() -> None:
    image, velocity = FlowMatching("x", noise_scale=2.0), FlowMatching("v", noise_scale=2.0)
    o = outputs_for(image, [0.2, 0.5, 0.9])
    as_velocity = replace(o, prediction=image.to_velocity(o.prediction, o.noised, o.timestep))
    torch.testing.assert_close(contrastive_error(image, o), contrastive_error(velocity, as_velocity), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("timestep", [0.0, 0.01, 0.4, 1.0])
def test_the_whole_loss_is_least_at_the_velocity_away_from_the_negatives(prediction: Prediction, timestep: float) -> None:
    """v̂ = (v − λ·ṽ) / (1 − λ), also where the velocity is clamped: at t = 0 x̂0 is then what x_t shows, x0 itself."""
    flow, weight = FlowMatching(prediction), 0.05
    o = outputs_for(flow, [timestep] * 4)

    def gradient(prediction: torch.Tensor) -> torch.Tensor:
        outputs = replace(o, prediction=prediction.clone().requires_grad_())
        error = flow.squared_error(outputs.prediction, o.clean, o.noise, o.timestep).mean()
        return torch.autograd.grad(error + weight * loss_of(weight, flow)(outputs, CAPTIONS), outputs.prediction)[0]

    at_zero = gradient(torch.zeros_like(o.prediction))
    curvature = gradient(torch.ones_like(o.prediction)) - at_zero  # the loss is quadratic, with a diagonal Hessian
    assert (curvature > 0).all()
    least = -at_zero / curvature
    velocity = flow.velocity(o.clean, o.noise)
    velocity = (velocity - weight * velocity.roll(1, 0)) / (1 - weight)
    expected = velocity if prediction == "v" else o.noised - timestep * velocity
    torch.testing.assert_close(least, expected, atol=1e-5, rtol=1e-4)


def test_pixels_without_a_prediction_do_not_count() -> None:
    flow = FlowMatching()
    o = outputs_for(flow, [0.3, 0.6, 0.9])
    o.counted = torch.zeros(3, 1, 8, 8)
    o.counted[:, :, :4] = 1
    top = FlowOutput(*(x[:, :, :4] for x in (o.prediction, o.clean, o.noise, o.noised)), o.timestep, o.text, None, {})
    torch.testing.assert_close(contrastive_error(flow, o), contrastive_error(flow, top))
    o.prediction = o.prediction.requires_grad_()
    contrastive_error(flow, o).sum().backward()
    assert o.prediction.grad is not None and not o.prediction.grad[:, :, 4:].any()


def test_images_whose_negative_has_the_same_caption_can_be_left_out() -> None:
    flow = FlowMatching()
    o = outputs_for(flow, [0.2, 0.4, 0.6, 0.8])
    batch = {"input_ids": torch.tensor([[1, 2, 0], [1, 2, 0], [1, 3, 0], [5, 5, 5]])}  # image 1's negative is image 0
    error = contrastive_error(flow, o)
    loss, every = loss_of(0.05, flow), loss_of(0.05, flow, skip_same_caption=False)
    torch.testing.assert_close(loss(o, batch), -(error[0] + error[2] + error[3]) / 4)
    torch.testing.assert_close(every(o, batch), -error.mean())


def test_what_has_no_minimum_or_no_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="weight must be less than 1"):
        ContrastiveFlowMatching(1.0)
    flow = FlowMatching()
    with pytest.raises(UserError, match="contrastive_flow_matching.*device_train_microbatch_size to at least 2"):
        loss_of(0.05, flow)(outputs_for(flow, [0.5]), {"input_ids": torch.zeros(1, 3)})


def test_a_run_trains_on_it_and_logs_it(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["algorithms"]["contrastive_flow_matching"] = {"start": "1ba", "end": "3ba"}
    run(config.load([write_recipe(tiny_recipe), "max_duration=4ba", "save_interval=4ba"]))
    rows = read_metrics(Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny")) / "metrics.jsonl")
    terms = [row.get("loss/train/contrastive_flow_matching") for row in rows]
    assert terms[0] is None and terms[1] < 0 and terms[2] < 0 and terms[3] is None
    for row, term in zip(rows, terms, strict=True):
        assert row["loss/train/total"] == pytest.approx(row["loss/train/flow"] + (term or 0.0), rel=1e-5)
