"""The Newton–Schulz iteration: a stack of matrices made nearly orthogonal by products of matrices alone, without an SVD."""
# pyright: reportPrivateImportUsage=false

import functools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Coefficients = Literal["jordan", "polar_express"]
Quintic = tuple[float, float, float]  # (a, b, c) of aσ + bσ³ + cσ⁵

_JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
_LOWEST = 1e-3  # smallest singular value, as a part of the norm, that Polar Express is made for
_CUSHION = 0.02407327424182761  # of the largest singular value: what is smaller than that is not fitted, only lifted
_SAFETY = 1.01  # how much larger than reckoned a singular value may be, by rounding
_CLOSE = 1e-4  # an interval this narrow has the polynomial of one point
_WIDE = 1.5  # long side / short side from which iterating on XXᵀ is less work, at five steps
_HALF = (torch.float16, torch.bfloat16)


def newton_schulz(
    matrices: Tensor, steps: int = 5, coefficients: Coefficients = "jordan", dtype: torch.dtype | None = None
) -> Tensor:
    """Return nearly U·Vᵀ of every matrix U·Σ·Vᵀ, without an SVD.

    Divided by its Frobenius norm, a matrix has singular values in [0, 1]. X ← aX + b(XXᵀ)X + c(XXᵀ)²X sends each of them to
    p(σ) = aσ + bσ³ + cσ⁵ and leaves U and V alone. Jordan's (a, b, c) buy a steep slope at 0, 3.4445 per step, with the
    exactness at 1: after five steps no singular value is above 1.203, and those that were at least 0.0016 of the norm are
    above 0.68 and keep moving in between. More steps lift smaller ones, and bring none closer to 1. Those of Polar Express are
    other ones in every step (`polar_express`): after five, what was at least 0.001 of the norm lies between 0.84 and 1.124,
    after seven it is 1 up to 1.1e-5.

    All factors commute, so that the steps can also be made on the smaller XXᵀ alone, collected in P, and X multiplied by P at the
    end: less work for matrices that are wider than 1.5 times their height. But small σ² are lost in the rounding of XXᵀ and may
    come out negative, and each step makes them a² times as large. So X is multiplied by P in between, and XXᵀ taken anew, as
    Dao-AILab's Gram Newton–Schulz does: in fp32 after every fifth step, in fp16 after the second and every third from there. In
    bf16, which keeps three bits less, even two steps are too many: there the products stay with X.

    Args:
        matrices: (..., m, n), floating point. One whose norm is far below 1e-12 comes out small, zero as zero.
        steps: iterations, of `flops` each.
        coefficients: jordan, or polar_express.
        dtype: of the products; None: that of the input. The input is divided by its norm before it is cast.

    Returns:
        (..., m, n) in the dtype of the input; tall matrices come out transposed in memory.
    """
    dtype = matrices.dtype if dtype is None else dtype
    x = matrices.reshape(-1, *matrices.shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    if coefficients == "polar_express":
        norm = norm * _SAFETY
    x = (x / norm.clamp(min=1e-12)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    polynomials = quintics(coefficients, steps)
    if on_gram(x.shape[-2], x.shape[-1], steps, dtype):
        first, then = (2, 3) if dtype in _HALF else (5, 5)
        ends = [*range(first, steps, then), steps]
        for start, end in zip([0, *ends], ends, strict=False):
            polynomial = _gram_polynomial(torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT), polynomials[start:end])
            x = torch.bmm(x, polynomial) if tall else torch.bmm(polynomial, x)
        return x.view(matrices.shape).to(matrices.dtype)
    x = x.mT if tall else x
    for a, b, c in polynomials:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).view(matrices.shape).to(matrices.dtype)


def on_gram(rows: int, columns: int, steps: int, dtype: torch.dtype) -> bool:
    """Say whether matrices of this shape are iterated on by their XXᵀ."""
    short, long = sorted((rows, columns))
    return dtype != torch.bfloat16 and long > _WIDE * short and steps > 1


def flops(rows: int, columns: int, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the FLOPs of `newton_schulz` on one matrix: 4·s²·l + 2·s³ per step for the short side s and the long side l.

    In fp16 a wide matrix is iterated on by its XXᵀ: then 8·s³ per step, less 6·s³ each time that X is multiplied by P, and for
    that and for the XXᵀ before it 4·s²·l. What fp32 does on the CPU is counted as bf16, so that shares stay what they were.
    """
    short, long = sorted((rows, columns))
    if dtype == torch.float16 and on_gram(rows, columns, steps, dtype):
        times = 1 + len(range(2, steps, 3))
        return 8 * steps * short**3 + times * (4 * short**2 * long - 6 * short**3)
    return steps * (4 * short**2 * long + 2 * short**3)


def _gram_polynomial(gram: Tensor, quintics: tuple[Quintic, ...]) -> Tensor:
    """Return the P of Newton–Schulz's P·X from G = XXᵀ, (..., s, s): with Q = aI + bG + cG², P ← Q·P and G ← Q·G·Q."""

    def factor_of(gram: Tensor, a: float, b: float, c: float) -> Tensor:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)  # rather than to every product, for which each would be copied once more
        return factor

    product = factor = factor_of(gram, *quintics[0])
    for quintic in quintics[1:]:
        gram = torch.bmm(factor, torch.bmm(factor, gram))
        factor = factor_of(gram, *quintic)
        product = torch.bmm(factor, product)
    return product


# ---------------------------------------------------------------------------------------------------- coefficients


@functools.cache
def quintics(coefficients: Coefficients, steps: int) -> tuple[Quintic, ...]:
    """Return (a, b, c) for every step; those of Polar Express leave room for rounding, but where all is 1 already."""
    if coefficients == "jordan":
        return (_JORDAN,) * steps
    found = polar_express(steps)
    return tuple(q if abs(q[0] - 15 / 8) < 1e-6 else (q[0] / _SAFETY, q[1] / _SAFETY**3, q[2] / _SAFETY**5) for q in found)


def polar_express(steps: int, lowest: float = _LOWEST) -> tuple[Quintic, ...]:
    """Return the quintics that together bring all of [`lowest`, 1] closest to 1 (Amsel et al. 2025, arXiv:2505.16932).

    Each is the odd quintic with the smallest largest error on the interval [l, u] that the ones before it have left. As in the
    paper, parts of it below 0.024·u are not fitted, which would lower the middle where most singular values are, and the
    polynomial is scaled so that [l, u] lies around 1 again. It converges: the interval's width falls faster than any power.

    Args:
        steps: how many.
        lowest: smallest singular value, as a part of the largest that is possible.
    """
    low, high = lowest, 1.0
    found: list[Quintic] = []
    for _ in range(steps):
        a, b, c = _best_quintic(max(low, _CUSHION * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        scale = 2 / sum(ends)
        found.append((a * scale, b * scale, c * scale))
        low = min(scale * ends[0], 1.0)
        high = 2 - low
    return tuple(found)


def _best_quintic(low: float, high: float) -> Quintic:
    """Return the odd quintic with the smallest largest distance from 1 on [low, high], found by Remez exchange.

    Its error takes its largest size, with alternating signs, at both ends and at the two extrema between them. For given four
    points that is a linear system; the extrema of its solution are the next two points.
    """
    if 1 - low / high < _CLOSE:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    points = np.linspace(low, high, 5)[[0, 1, 3, 4]]
    a = b = c = 0.0
    for _ in range(100):
        rows = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c = (float(value) for value in np.linalg.solve(rows, np.ones(4))[:3])
        middle = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b**2 - 20 * a * c)) / (10 * c))
        moved = float(np.abs(middle - points[1:3]).max())
        points[1:3] = middle
        if moved < 1e-15:
            break
    return a, b, c
