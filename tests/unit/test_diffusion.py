"""DDPM and EDM against diffusers' schedulers and against closed forms, beside flow matching."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from torch import Tensor, nn

from prx_composer.algorithms.contrastive_flow_matching import ContrastiveFlowMatching
from prx_composer.algorithms.perceptual import LPIPS, PixelLoss
from prx_composer.algorithms.readouts import GuidingReadout, readout_error
from prx_composer.algorithms.timestep_phases import TimestepPhase, TimestepPhases
from prx_composer.common.errors import UserError
from prx_composer.models import DDPM, EDM, FlowMatching, PRXBackbone, TextToImage
from prx_composer.models.layers import patchify
from prx_composer.models.processes import Process
from prx_composer.models.text_to_image import VALIDATION_TIMESTEPS
from prx_composer.recipe import config
from prx_composer.training.trial import check_config

Build = Callable[..., TextToImage]
BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
]
EVERY: dict[str, Process] = {
    "flow x": FlowMatching("x", noise_scale=2.0, timestep_shift=3.0),
    "flow v": FlowMatching("v"),
    "ddpm eps": DDPM("eps"),
    "ddpm v": DDPM("v", "scaled_linear", 0.00085, 0.012),
    "ddpm cosine": DDPM("v", "squaredcos_cap_v2"),
    "edm": EDM(sigma_data=0.9),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clean images and unit noise."""
    return torch.randn(2, 6, 3, 4, 6, generator=generator(seed)).unbind()


STEPS = torch.tensor([0, 1, 40, 500, 900, 999])


@pytest.mark.parametrize("betas", BETAS)
def test_ddpm_noises_and_asks_for_what_diffusers_does(betas: dict[str, Any]) -> None:
    scheduler, (x0, noise), t = DDIMScheduler(**{"beta_end": 0.02} | betas), pair(), STEPS / 1000
    eps, v = DDPM("eps", **betas), DDPM("v", **betas)
    noised = scheduler.add_noise(x0, noise, STEPS)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(eps.interpolate(x0, noise, t), noised, atol=2e-6, rtol=0)
    torch.testing.assert_close(v.target(x0, noise, t), scheduler.get_velocity(x0, noise, STEPS), atol=2e-6, rtol=0)  # pyright: ignore[reportArgumentType]
    guess = torch.randn(x0.shape, generator=generator(5))
    for process, target in ((eps, noise), (v, scheduler.get_velocity(x0, noise, STEPS))):  # pyright: ignore[reportArgumentType]
        expected = ((guess - target).numpy().astype(np.float64) ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(process.squared_error(guess, x0, noise, t), expected, rtol=1e-5)


def test_ddpm_draws_every_step_as_often_as_another() -> None:
    steps = DDPM().sample_timesteps(200_000, generator()) * 1000
    torch.testing.assert_close(steps, steps.round())
    assert scipy.stats.chisquare(np.bincount(steps.round().int().numpy(), minlength=1000)).pvalue > 1e-3


SIGMAS = torch.tensor([0.002, 0.03, 0.5, 2.0, 30.0, 80.0])


@pytest.mark.parametrize("sigma_data", [0.5, 0.9])
def test_edm_is_preconditioned_as_by_diffusers_and_its_loss_is_the_papers(sigma_data: float) -> None:
    """The loss λ(σ)·‖D(x0 + σ·ε) − x0‖² of the paper's equation 2, in fp64, of any output F."""
    scheduler, (x0, noise), process = EDMEulerScheduler(sigma_data=sigma_data), pair(), EDM(sigma_data)
    sigma = SIGMAS[:, None, None, None]
    t, x_sigma, output = SIGMAS.log() / 4, x0 + sigma * noise, torch.randn(x0.shape, generator=generator(5))
    torch.testing.assert_close(t, scheduler.precondition_noise(SIGMAS))
    seen = process.interpolate(x0, noise, t)
    torch.testing.assert_close(seen, scheduler.precondition_inputs(x_sigma, sigma), atol=1e-5, rtol=1e-5)
    denoised = scheduler.precondition_outputs(x_sigma, output, sigma)
    torch.testing.assert_close(process.to_x0(output, seen, t), denoised, atol=2e-5, rtol=1e-5)
    s, exact, images, unit = (value.double() for value in (sigma, output, x0, noise))
    denoised = sigma_data**2 / (s**2 + sigma_data**2) * (images + s * unit)
    denoised += s * sigma_data / (s**2 + sigma_data**2).sqrt() * exact
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    expected = (weight * (denoised - images) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(process.squared_error(output, x0, noise, t), expected.float(), rtol=1e-4, atol=0)


def test_edm_draws_a_lognormal_noise() -> None:
    log_sigma = 4 * EDM(p_mean=-0.6, p_std=1.2).sample_timesteps(20_000, generator()).double()
    assert scipy.stats.kstest(log_sigma.numpy(), scipy.stats.norm(-0.6, 1.2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 333])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", EVERY)
def test_a_perfect_denoiser_ends_on_the_image(name: str, order: int, steps: int) -> None:
    """It returns the true target of one image, of whatever noise there is in x_t. A predicted noise in one step has no chance:
    there x̂0 = (x_t − σ·ε̂)/α divides by α = 0.006."""
    process = EVERY[name]
    process = process if isinstance(process, FlowMatching) else replace(process, solver_order=order)  # pyright: ignore[reportArgumentType]
    x0, noise = pair(3)

    def perfect(x_t: Tensor, t: Tensor, index: int) -> Tensor:
        clean, other = process.interpolate(x0, 0 * noise, t), process.interpolate(0 * x0, torch.ones_like(noise), t)
        return process.target(x0, (x_t - clean) / other, t)

    drawn = process.sample(perfect, noise, steps)
    amplified = 158 if name == "ddpm eps" and steps == 1 else 1
    assert (drawn - x0).abs().max() <= 1e-5 * amplified * (3 if steps == 1 else 1)


def wrong(x_t: Tensor, t: Tensor, index: int) -> Tensor:
    """A network that knows nothing of an image."""
    return torch.tanh(x_t) * (1 + t[:, None, None, None]) - 0.2


def test_the_first_order_is_ddim_and_euler() -> None:
    """Against the schedulers of those names, with a network that is no perfect one, on the same noise."""
    noise = pair()[1]
    ddim = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    numbers: dict[str, Any] = {"sigma_data": 0.9, "sigma_min": 0.01, "sigma_max": 40.0, "rho": 5.0}
    euler = EDMEulerScheduler(**numbers)
    for process, scheduler in ((DDPM("v", solver_order=1), ddim), (EDM(**numbers, solver_order=1), euler)):
        scheduler.set_timesteps(20)
        x: Any = noise * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            t = (timestep / 1000 if scheduler is ddim else timestep).expand(len(x))
            x = scheduler.step(wrong(scheduler.scale_model_input(x, timestep), t, index), timestep, x)[0]  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(process.sample(wrong, noise, 20), x, atol=2e-4, rtol=2e-4)


def test_the_cosine_is_drawn_from_where_an_image_shows() -> None:
    """Its last steps are nothing but noise, σ/α up to 20,000: what a network predicts there tells no image."""
    process, shares = DDPM("eps", "squaredcos_cap_v2"), list[float]()

    def watched(x_t: Tensor, t: Tensor, index: int) -> Tensor:
        shares.append(float(process.noise_share(t)[0]))
        return x_t

    process.sample(watched, pair()[1], 28)
    assert len(shares) == 28 and shares == sorted(shares, reverse=True)
    assert 0.99 < shares[0] <= 164 / 165 < float(process.noise_share(torch.tensor([0.999])))


@pytest.mark.parametrize("name", EVERY)
def test_the_validation_loss_is_of_one_velocity_whatever_is_predicted(name: str) -> None:
    """At the share of noise that is asked for, or the nearest of DDPM's; 0 for a perfect prediction."""
    process, (x0, noise) = EVERY[name], pair()
    for share in VALIDATION_TIMESTEPS:
        t = process.time_at(torch.full((6,), share))
        assert (process.noise_share(t) - share).abs().max() < 5e-3
        x_t, off = process.interpolate(x0, noise, t), torch.randn(x0.shape, generator=generator(9))
        perfect = process.target(x0, noise, t)
        assert process.velocity_error(perfect, x_t, x0, noise, t).max() < 1e-9
        image = (process.to_x0(perfect + off, x_t, t) - x0).double() / process.noise_share(t)[:, None, None, None]
        error = process.velocity_error(perfect + off, x_t, x0, noise, t)
        torch.testing.assert_close(error, image.square().mean((1, 2, 3)).float(), rtol=1e-4, atol=1e-6)


def test_the_share_of_noise_is_that_of_what_the_network_sees() -> None:
    for process in EVERY.values():
        if isinstance(process, FlowMatching):
            continue
        t = process.sample_timesteps(64, generator())
        one, none = torch.ones(64, 1, 1, 1), torch.zeros(64, 1, 1, 1)
        image, noise = (process.interpolate(*given, t).flatten() for given in ((one, none), (none, one)))
        torch.testing.assert_close(process.noise_share(t), noise / (image + noise))


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("flow")])
def test_a_model_trains_evaluates_and_draws(name: str, tiny_model: Build, tiny_batch: Mapping[str, Any]) -> None:
    model = tiny_model(flow=EVERY[name])
    outputs = model(tiny_batch)
    terms = model.loss(outputs, tiny_batch)
    error = EVERY[name].squared_error(outputs.prediction, outputs.clean, outputs.noise, outputs.timestep)
    torch.testing.assert_close(terms["total"], error.mean())
    assert model.eval_forward(tiny_batch).shape == (4, 8)
    seen = []
    image = model.sample(["a red circle"], 16, 16, num_inference_steps=3, watch=lambda index, x0: seen.append(x0))
    torch.testing.assert_close(seen[-1], image, atol=1e-4, rtol=1e-4)  # the last step ends on what is predicted there


class WithVariances(nn.Module):
    """A backbone that says a variance behind every channel, as DiT and PixArt do."""

    def __init__(self, backbone: PRXBackbone):
        super().__init__()
        self.backbone, self.out_channels = backbone, 2 * backbone.in_channels

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("backbone"), name) if name != "backbone" else super().__getattr__(name)

    def forward(self, *arguments: Any, return_taps: bool = False, **options: Any) -> Any:
        prediction, taps = self.backbone(*arguments, return_taps=True, **options)
        both = torch.cat([prediction, 7 + prediction], 1)
        return (both, taps) if return_taps else both


def test_the_variances_behind_a_prediction_are_left_alone(tiny_model: Build, tiny_batch: Mapping[str, Any]) -> None:
    model, other = tiny_model(flow=DDPM()), tiny_model(flow=DDPM())
    other.backbone = WithVariances(other.backbone)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(model.loss(model(tiny_batch), tiny_batch)["total"], other.loss(other(tiny_batch), tiny_batch)["total"])
    drawn = [m.sample(["a red circle"], 16, 16, num_inference_steps=3, guidance_scale=2.0) for m in (model, other)]
    assert torch.equal(*drawn)
    strange = WithVariances(model.backbone)
    strange.out_channels = 7
    with pytest.raises(ValueError, match=r"model\.backbone\.out_channels is 7.*set out_channels: 3 or 6"):
        TextToImage(strange, model.text_encoder)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", EVERY)
def test_a_readout_is_perfect_where_the_network_is(name: str) -> None:
    process, (x0, noise) = EVERY[name], pair()
    t = process.time_at(torch.linspace(0.1, 0.9, 6))
    target = patchify(process.target(x0, noise, t), 2)
    outputs: Any = SimpleNamespace(clean=x0, noise=noise, timestep=t)
    assert readout_error(process, target, outputs, 2, 2).max() < 1e-9
    off = readout_error(process, target + 0.5, outputs, 2, 2)
    divisor = process.divisor(t)
    torch.testing.assert_close(off, 0.25 / (torch.ones(6) if divisor is None else divisor).square(), rtol=1e-4, atol=0)


def test_what_makes_no_sense_is_refused_with_the_reason(tiny_model: Build) -> None:
    for process in (DDPM(), DDPM("v"), EDM()):
        model = tiny_model(flow=process)
        with pytest.raises(UserError, match=r"algorithms\.contrastive_flow_matching keeps velocities of straight paths apart"):
            ContrastiveFlowMatching().attach(model, None)
        with pytest.raises(UserError, match=r"algorithms\.timestep_phases changes the draws of flow matching"):
            TimestepPhases([TimestepPhase(logit_mean=1.0)]).attach(model, None)
    with pytest.raises(UserError, match=r"algorithms\.lpips\.max_timestep is 1\.0.*Set max_timestep to 0\.9 or less"):
        LPIPS(random_weights=True, net="alex").attach(tiny_model(flow=DDPM()), None)
    for process in (DDPM("v"), EDM()):
        LPIPS(random_weights=True, net="squeeze").attach(tiny_model(flow=process), None)


class One(PixelLoss):
    """Every image is at a distance of 1."""

    name = "one"

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.ones(len(target))


def test_limits_of_noise_are_shares_of_it(tiny_model: Build) -> None:
    """Of a perceptual loss, and of internal guidance: a half is σ = 1 for EDM, and σ = α for DDPM."""
    for process, t in ((EDM(), torch.tensor([0.5, 0.9, 1.1, 3.0]).log() / 4), (DDPM("v"), torch.tensor([0.1, 0.2, 0.3, 0.5]))):
        model, loss, readout = (
            tiny_model(flow=process),
            One(1.0, 0.5, "0ba", None),
            GuidingReadout(0, scale=3.0, interval=(0.0, 0.5)),
        )
        for trick in (loss, readout):
            trick.attach(model, None)
        x_t = torch.zeros(4, 3, 16, 16)
        outputs: Any = SimpleNamespace(prediction=x_t, noised=x_t, clean=x_t, timestep=t)
        assert float(loss.loss(outputs, {})) == 0.5
        readout.guidance.both = lambda x_t, t, text: (x_t + 1, x_t)
        guided = readout.guidance._extrapolate(x_t, t, None)  # pyright: ignore[reportArgumentType]
        assert guided[:, 0, 0, 0].tolist() == [3.0, 3.0, 1.0, 1.0]


def test_a_check_says_all_of_it_before_a_run(tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]) -> None:
    phases = {"phases": [{"logit_mean": 1.0}]}
    tiny_recipe["algorithms"] = {"contrastive_flow_matching": {}, "lpips": {"random_weights": True}, "timestep_phases": phases}
    tiny_recipe["model"]["flow"] = {"name": "ddpm"}
    said = [result.text for result in check_config(config.load([write_recipe(tiny_recipe)])) if result.mark == "✗"]
    assert [text.split()[0].split(".")[1] for text in said] == ["contrastive_flow_matching", "lpips", "timestep_phases"]


@pytest.mark.parametrize(
    ("process", "bad"),
    [
        (DDPM, {"prediction": "x"}), (DDPM, {"beta_start": 0.5}), (EDM, {"sigma_data": 0.0}), (EDM, {"sigma_max": 0.001}),
        (DDPM, {"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.1}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(process: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(bad)[-1]):
        process(**bad)
    with pytest.raises(ValueError, match="num_inference_steps: a model of 1000 steps"):
        DDPM().sample(wrong, pair()[1], 1001)
