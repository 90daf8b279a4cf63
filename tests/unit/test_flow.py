"""Flow matching against closed forms."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from prx_composer.models.processes import FlowMatching, shift_timesteps


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


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.05, 0.9)])
@pytest.mark.parametrize(("shift", "uniform"), [(3.0, 0.1), (3.0, 1.0), (1.0, 0.5), (0.5, 0.3)])
def test_the_uniform_timesteps_stay_uniform_where_the_recipe_says_so(
    shift: float, uniform: float, low: float, high: float
) -> None:
    """Against the closed form of the mixture, of which each part is truncated to the range that is sampled."""
    flow = FlowMatching(timestep_shift=shift, uniform_fraction=uniform, shift_uniform=False, sampled_min=low, sampled_max=high)
    t = flow.sample_timesteps(20_000, generator()).numpy().astype(np.float64)

    def shifted_logit_normal(value: np.ndarray) -> np.ndarray:
        return scipy.stats.norm.cdf(scipy.special.logit(value / (shift - (shift - 1) * value)))

    def cdf(value: np.ndarray) -> np.ndarray:
        first, last = (float(edge) for edge in shifted_logit_normal(np.array([low, high])))
        return uniform * (value - low) / (high - low) + (1 - uniform) * (shifted_logit_normal(value) - first) / (last - first)

    assert scipy.stats.kstest(t, cdf).pvalue > 1e-3


@pytest.mark.parametrize(("shift_uniform", "share"), [(True, 0.0040), (False, 0.0104)])
def test_the_reference_trains_more_on_little_noise(shift_uniform: bool, share: float) -> None:
    """The share of t < 0.1, in closed form and drawn: within four of its standard deviations."""
    before = 0.1 / (3 - 2 * 0.1)  # where a shift of 3 makes 0.1 of it
    closed = 0.9 * float(scipy.stats.norm.cdf(scipy.special.logit(before))) + 0.1 * (before if shift_uniform else 0.1)
    assert closed == pytest.approx(share, abs=5e-5)
    drawn = FlowMatching(timestep_shift=3.0, shift_uniform=shift_uniform).sample_timesteps(400_000, generator(1))
    assert (drawn < 0.1).double().mean().item() == pytest.approx(closed, abs=4 * (closed / 400_000) ** 0.5)


def test_a_recipe_that_does_not_say_so_draws_what_it_always_drew() -> None:
    """Bit for bit: the shift of a mixture."""
    every: list[dict[str, Any]] = [{}, {"sampled_min": 0.1, "sampled_max": 0.8}]
    for options in every:
        drawn = FlowMatching(timestep_shift=3.0, **options).sample_timesteps(64, generator(2))
        source = generator(2)
        normal, (uniform, choice) = torch.randn(64, generator=source), torch.rand(2, 64, generator=source)
        if options:
            low, high = 0.1 / (3 - 2 * 0.1), 0.8 / (3 - 2 * 0.8)
            below, above = (float(scipy.stats.norm.cdf(scipy.special.logit(edge))) for edge in (low, high))
            uniform = low + (high - low) * uniform
            normal = torch.special.ndtri(below + (above - below) * torch.special.ndtr(normal.double())).float()
        mixture = torch.where(choice < 0.1, uniform, torch.sigmoid(normal))
        assert (
            torch.equal(drawn, shift_timesteps(mixture, 3.0))
            if not options
            else torch.allclose(drawn, shift_timesteps(mixture, 3.0), atol=1e-6)
        )


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


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("part", [None, 0.3])
def test_the_loss_and_its_gradient_are_those_of_autograd_s_own_chain(
    dtype: torch.dtype, rounding: float, part: float | None
) -> None:
    flow = FlowMatching(min_timestep=0.05)
    x0, noise, guess = (images(seed).float() for seed in range(3))
    t, guesses = T.float(), [guess.to(dtype).requires_grad_() for _ in range(2)]
    counted = None if part is None else (torch.rand(x0[:, :1].shape, generator=torch.Generator().manual_seed(3)) < part).float()
    errors = ((guesses[0].float() - x0) / t.clamp_min(0.05)[:, None, None, None]).square()
    weights = torch.ones_like(x0[:, :1]) if counted is None else counted
    expected = (errors * weights).sum((1, 2, 3)) / (weights.sum((1, 2, 3)) * x0.shape[1])
    found = flow.squared_error(guesses[1], x0, noise, t, counted)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for one in (expected, found):
        (one * torch.arange(1.0, 6.0)).sum().backward()
    assert guesses[1].grad is not None and guesses[1].grad.dtype == dtype
    torch.testing.assert_close(guesses[1].grad, guesses[0].grad, rtol=rounding, atol=0)


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


def test_a_target_that_wants_a_gradient_is_refused() -> None:
    """As of an autoencoder that is trained along: its gradient would be missing without a word."""
    image, t = torch.randn(2, 3, 8, 8), torch.full((2,), 0.5)
    with pytest.raises(ValueError, match="no gradient of its target"):
        FlowMatching().squared_error(image.clone(), image.clone().requires_grad_(), torch.randn_like(image), t)
