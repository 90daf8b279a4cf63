"""How far two sets of images are apart, in features: Fréchet distance and maximum mean discrepancy (MMD)."""

import torch
from torch import Tensor

SIGMA, SCALE = 10.0, 1000.0  # of CMMD (Jayasumana et al., arXiv:2401.09603, section 4.1)
_BLOCK = 2048  # rows and columns of the kernel matrix that are in memory at once


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}.")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.mT @ centred / (len(features) - 1)


def frechet_distance(mean_x: Tensor, covariance_x: Tensor, mean_y: Tensor, covariance_y: Tensor) -> float:
    """Return |μx − μy|² + tr(Σx + Σy − 2 (Σx Σy)^½), of two normal distributions (FID: arXiv:1706.08500).

    In float64, by eigenvalues of the symmetric Σx^½ Σy Σx^½, which has those of Σx Σy; singular covariances, of fewer images
    than features, are no special case.
    """
    values, vectors = torch.linalg.eigh(covariance_x.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    inner = root @ covariance_y.double() @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum()
    squares = (mean_x.double() - mean_y.double()).square().sum()
    return float(squares + covariance_x.double().trace() + covariance_y.double().trace() - 2 * cross)


def mean_kernel(x: Tensor, y: Tensor | None = None, unbiased: bool = True) -> float:
    """Return the mean of k − 1 over the pairs of x (N, D) and y (M, D), or of x with itself; k(a, b) = exp(−|a − b|² / 2σ²).

    k is close to 1 everywhere, so it is k − 1 that is added up. In float64 and block by block: memory doesn't grow with N·M.

    Args:
        unbiased: leave out the pairs of a row and itself, of x with itself.

    Raises:
        ValueError: `unbiased` of fewer than two rows.
    """
    itself = y is None
    x = x.double()
    y = x if y is None else y.double()
    if itself and unbiased and len(x) < 2:
        raise ValueError(f"an unbiased estimate needs at least 2 images, not {len(x)}.")
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for x_block, x_start in zip(x.split(_BLOCK), range(0, len(x), _BLOCK), strict=True):
        for y_block, y_start in zip(y.split(_BLOCK), range(0, len(y), _BLOCK), strict=True):
            if itself and y_start < x_start:  # counted by its mirror image
                continue
            squared = (x_block.square().sum(1)[:, None] + y_block.square().sum(1) - 2 * x_block @ y_block.mT).clamp(min=0)
            if itself and x_start == y_start:
                squared.fill_diagonal_(0)
            added = torch.expm1(squared / (-2 * SIGMA**2)).sum()
            total += 2 * added if itself and y_start > x_start else added
    pairs = len(x) * (len(x) - 1) if itself and unbiased else len(x) * len(y)
    return float(total / pairs)


def mmd(x: Tensor, y: Tensor, unbiased: bool = True, within_y: float | None = None) -> float:
    """Return the squared MMD with CMMD's kernel (σ = 10), times 1000.

    Args:
        x, y: features (N, D) and (M, D); CMMD's are of length 1.
        unbiased: Gretton et al. 2012, equation 3, which may be slightly negative. False: their equation 5, as CMMD's authors
            compute it; it is higher by about 1000 · (1 − mean k) · (1/N + 1/M), so it depends on the number of images.
        within_y: `mean_kernel(y, unbiased=unbiased)`, if it is known.

    Raises:
        ValueError: `unbiased` of fewer than two rows.
    """
    within_y = mean_kernel(y, unbiased=unbiased) if within_y is None else within_y
    return SCALE * (mean_kernel(x, unbiased=unbiased) + within_y - 2 * mean_kernel(x, y))
