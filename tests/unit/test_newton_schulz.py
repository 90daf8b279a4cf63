"""The Newton–Schulz iteration against LAPACK's SVD, the paper's table, a linear program and torch's counter of FLOPs."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prx_composer.optim.newton_schulz import Coefficients, flops, newton_schulz, polar_express, quintics

# arXiv:2505.16932, algorithm 1, before and after its safety factor
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
SAFE = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in PAPER[:-1]] + PAPER[-1:]
JORDAN = [(3.4445, -4.7750, 2.0315)]


def ill_conditioned(*shape: int, condition: float) -> Tensor:
    """Random singular vectors, singular values spaced evenly in the logarithm."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, dtype=torch.float64, generator=generator)
    u, _, vt = torch.linalg.svd(noise, full_matrices=False)
    return u * torch.logspace(0, -np.log10(condition), min(shape[-2:]), dtype=torch.float64) @ vt


def oracle(matrix: Tensor, steps: int, coefficients: Coefficients) -> Tensor:
    """The polynomials of the singular values that LAPACK finds, in fp64."""
    u, s, vt = scipy.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s /= np.linalg.norm(s) * (1.01 if coefficients == "polar_express" else 1)
    table = SAFE + SAFE[-1:] * steps if coefficients == "polar_express" else JORDAN * steps
    for a, b, c in table[:steps]:
        s = a * s + b * s**3 + c * s**5
    return torch.from_numpy(u * s @ vt)


def error(found: Tensor, expected: Tensor) -> float:
    difference = found.double() - expected
    return float(torch.linalg.matrix_norm(difference, 2)) if difference.isfinite().all() else float("inf")


def test_polar_express_is_the_papers_table() -> None:
    np.testing.assert_allclose(polar_express(8), PAPER, rtol=2e-8)
    for steps in (5, 8, 10):
        np.testing.assert_allclose(quintics("polar_express", steps), (SAFE + SAFE[-1:] * 2)[:steps], rtol=2e-8)


def test_its_quintics_are_the_best_that_a_linear_program_finds() -> None:
    """Smallest E with |p(x) − 1| ≤ E on a grid, for an interval on which nothing is left unfitted."""
    x = np.linspace(0.2, 1, 2001)
    powers = np.stack([x, x**3, x**5], axis=1)
    one = np.ones((len(x), 1))
    rows, limits = np.block([[powers, -one], [-powers, -one]]), np.concatenate([one[:, 0], -one[:, 0]])
    best = scipy.optimize.linprog([0, 0, 0, 1], A_ub=rows, b_ub=limits, bounds=[(None, None)] * 4)
    np.testing.assert_allclose(polar_express(1, lowest=0.2)[0], best.x[:3], rtol=1e-3)


def test_polar_express_converges_to_one_and_jordans_coefficients_do_not() -> None:
    x = np.geomspace(1e-3, 1, 20_000)
    for steps, low, high in ((5, 0.84, 1.124), (6, 0.993, 1.0012), (7, 1 - 1.1e-5, 1), (8, 1 - 1e-9, 1 + 1e-9)):
        y = x / 1.01
        for a, b, c in quintics("polar_express", steps):
            y = a * y + b * y**3 + c * y**5
        assert low <= y.min() and y.max() <= high + 1e-9, steps
    for steps in (5, 8, 20):
        y = x
        for a, b, c in quintics("jordan", steps):
            y = a * y + b * y**3 + c * y**5
        assert y.max() > 1.13 and y.min() < 0.69, steps


@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (2, 3, 16, 9), (1, 7)])
def test_polar_express_iterates_its_polynomials_on_the_singular_values(shape: tuple[int, ...], steps: int) -> None:
    matrices = ill_conditioned(*shape, condition=1e3)
    found = newton_schulz(matrices, steps, "polar_express")
    assert found.shape == matrices.shape
    for ours, matrix in zip(found.reshape(-1, *shape[-2:]), matrices.reshape(-1, *shape[-2:]), strict=True):
        torch.testing.assert_close(ours, oracle(matrix, steps, "polar_express"), atol=1e-9, rtol=0)


def test_seven_steps_of_polar_express_give_the_polar_factor() -> None:
    matrix = ill_conditioned(24, 60, condition=100)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert error(newton_schulz(matrix, 7, "polar_express"), u @ vt) < 1.1e-5
    assert error(newton_schulz(matrix, 7), u @ vt) > 0.1


# largest error in the spectral norm, about twice what was found
BOUNDS: dict[Coefficients, dict[float, float]] = {
    "jordan": {1: 0.02, 1e2: 0.05, 1e4: 0.08, 1e6: 0.1},
    "polar_express": {1: 0.02, 1e2: 0.07, 1e4: 0.2, 1e6: 0.2},
}


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
@pytest.mark.parametrize("shape", [(32, 128), (96, 48), (64, 64)])
def test_fp16_is_exact_to_a_bound_at_every_condition(
    shape: tuple[int, int], coefficients: Coefficients, condition: float
) -> None:
    matrix = ill_conditioned(*shape, condition=condition).float()
    found = newton_schulz(matrix, 5, coefficients, torch.float16)
    expected = oracle(matrix, 5, coefficients)
    assert found.dtype == torch.float32
    assert error(found, expected) < BOUNDS[coefficients][condition]
    in_bf16 = newton_schulz(matrix, 5, coefficients, torch.bfloat16)
    assert error(found, expected) < 0.5 * error(in_bf16, expected), "better than the other 16 bits, on X itself"


def on_gram(matrix: Tensor, coefficients: Coefficients, dtype: torch.dtype, restart: int | None) -> Tensor:
    """Five steps on XXᵀ, plainly, with or without one new XXᵀ."""
    x = (matrix / matrix.norm() / (1.01 if coefficients == "polar_express" else 1)).to(dtype)
    gram, product = x @ x.mT, torch.eye(len(x), dtype=dtype)
    for step, (a, b, c) in enumerate(quintics(coefficients, 5)):
        if step == restart:
            x = product @ x
            gram, product = x @ x.mT, torch.eye(len(x), dtype=dtype)
        factor = a * torch.eye(len(x), dtype=dtype) + b * gram + c * (gram @ gram)
        gram, product = factor @ (factor @ gram), factor @ product
    return product @ x


@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
def test_bf16_fails_on_the_gram_matrix_and_so_does_fp16_without_a_restart(coefficients: Coefficients) -> None:
    matrix = ill_conditioned(32, 128, condition=1e6)
    expected = oracle(matrix, 5, coefficients)
    bound = BOUNDS[coefficients][1e6]
    assert error(on_gram(matrix, coefficients, torch.float16, restart=2), expected) < bound
    assert error(on_gram(matrix, coefficients, torch.float16, restart=None), expected) > 10 * bound
    assert error(on_gram(matrix, coefficients, torch.bfloat16, restart=2), expected) > 2 * bound
    assert error(on_gram(matrix, coefficients, torch.bfloat16, restart=None), expected) > 1000 * bound


@pytest.mark.parametrize("steps", [8, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
def test_many_steps_do_not_blow_up_what_is_lost_in_the_gram_matrix(
    coefficients: Coefficients, dtype: torch.dtype, steps: int
) -> None:
    """Without a new XXᵀ now and then, fp32 gives 5e23 after ten steps."""
    matrix = ill_conditioned(32, 128, condition=1e9).float()
    largest = torch.linalg.matrix_norm(newton_schulz(matrix, steps, coefficients, dtype), 2)
    assert largest < (1.21 if coefficients == "jordan" else 1.01)


@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (8, 8)])
def test_fp16_takes_what_its_range_does_not_hold(shape: tuple[int, int]) -> None:
    """The norm is taken out before the cast: DeepSpeed's #8533."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    expected = newton_schulz(matrix, 5, dtype=torch.float16)
    for size in (1e-9, 1e8, 1e15):
        assert (size * matrix).half().isinf().any() or not (size * matrix).half().any(), "a cast alone loses it"
        torch.testing.assert_close(newton_schulz(size * matrix, 5, dtype=torch.float16), expected, atol=0.01, rtol=0)
    assert not newton_schulz(torch.zeros(*shape), 5, "polar_express", torch.float16).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (8, 9), (8, 8)])
def test_flops_are_those_that_torch_counts(shape: tuple[int, int], steps: int, dtype: torch.dtype) -> None:
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(3, *shape), steps, dtype=dtype)
    assert counter.get_total_flops() == 3 * flops(*shape, steps, dtype)
