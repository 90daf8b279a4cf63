"""Flow matching against closed forms."""

import numpy as np
import pytest
import scipy.stats
import torch

from prx_composer.models.flow import FlowMatching, shift_timesteps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 3, 4, 6, generator=generator(seed), dtype=torch.float64)


T = torch.tensor([0.0, 0.02, 0.3, 0.7, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("mean", "std", "uniform"), [(0.0, 1.0, 0.1), (-0.8, 0.8, 0.0), (0.5, 2.0, 1.0)])
def test_timesteps_follow_the_stated_distribution(shift: float, mean: float, std: float, uniform: float) -> None:
    flow = FlowMatching(timestep_shift=shift, logit_mean=mean, logit_std=std, uniform_fraction=uniform)
    t = flow.sample_timesteps(20_000, generator()).numpy().astype(np.float64)

    def cdf(value: np.ndarray) -> np.ndarray:
        unshifted = value / (shift - (shift - 1) * value)
        logit_normal = scipy.stats.norm.cdf(scipy.special.logit(unshifted), mean, std)
        return uniform * unshifted + (1 - uniform) * logit_normal

    assert scipy.stats.kstest(t, cdf).pvalue > 1e-3


def test_shift_is_the_sigma_shift_of_the_sampler() -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    sigmas = FlowMatchEulerDiscreteScheduler(1000, shift=3.0).sigmas
    torch.testing.assert_close(shift_timesteps(torch.linspace(1, 0.001, 1000), 3.0), sigmas, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_path_ends_at_image_and_noise_and_its_slope_is_the_velocity(scale: float) -> None:
    flow = FlowMatching(noise_scale=scale)
    x0, noise = images(0), images(1)
    path = [flow.interpolate(x0, noise, torch.full((5,), t, dtype=torch.float64)) for t in (0.0, 1.0, 0.4, 0.5)]
    torch.testing.assert_close(path[0], x0)
    torch.testing.assert_close(path[1], scale * noise)
    torch.testing.assert_close((path[3] - path[2]) / 0.1, flow.velocity(x0, noise))


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_a_perfect_prediction_has_no_error_and_gives_velocity_and_image(prediction: str) -> None:
    flow = FlowMatching(prediction=prediction, noise_scale=2.0)  # pyright: ignore[reportArgumentType]
    x0, noise = images(0), images(1)
    x_t = flow.interpolate(x0, noise, T)
    perfect = x0 if prediction == "x" else flow.velocity(x0, noise)
    assert flow.squared_error(perfect, x0, noise, T).abs().max() == 0
    torch.testing.assert_close(flow.to_x0(perfect, x_t, T), x0)
    beyond = flow.min_timestep <= T
    torch.testing.assert_close(flow.to_velocity(perfect, x_t, T)[beyond], flow.velocity(x0, noise)[beyond])


def test_x_loss_is_the_image_error_over_clamped_t_squared() -> None:
    flow = FlowMatching(min_timestep=0.05)
    x0, noise, guess = images(0), images(1), images(2)
    expected = (guess - x0).square().mean((1, 2, 3)) / T.clamp_min(0.05) ** 2
    torch.testing.assert_close(flow.squared_error(guess, x0, noise, T), expected.float(), rtol=1e-5, atol=1e-5)


def test_both_predictions_have_the_same_loss_where_nothing_is_clamped() -> None:
    x0, noise, velocity_guess = images(0), images(1), images(2)
    t = torch.tensor([0.1, 0.2, 0.3, 0.7, 1.0], dtype=torch.float64)
    v, x = FlowMatching(prediction="v"), FlowMatching(prediction="x")
    x_guess = v.to_x0(velocity_guess, v.interpolate(x0, noise, t), t)
    errors = v.squared_error(velocity_guess, x0, noise, t), x.squared_error(x_guess, x0, noise, t)
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "bad", [{"prediction": "eps"}, {"timestep_shift": 0}, {"noise_scale": -1}, {"min_timestep": 0}, {"uniform_fraction": 1.5}]
)
def test_values_out_of_range_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FlowMatching(**bad)  # pyright: ignore[reportArgumentType]
