"""Distances between sets of features, against scipy, torchmetrics and sums written out."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import maximum_mean_discrepancy

from prx_composer.metrics import features as distances
from prx_composer.metrics.features import frechet_distance, mean_kernel, mmd, moments


def features(count: int, width: int = 12, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=generator) @ mixing + shift


def kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-(x.double()[:, None] - y.double()[None]).square().sum(-1) / 200)


@pytest.mark.parametrize("count", [500, 7])  # of 12 features: full rank, and singular
def test_frechet_distance_is_scipys_closed_form(count: int) -> None:
    x, y = features(count), features(count + 3, seed=1, shift=0.3)
    (mean_x, cov_x), (mean_y, cov_y) = moments(x), moments(y)
    assert np.allclose(mean_x, x.double().numpy().mean(0)) and np.allclose(cov_x, np.cov(x.double().numpy(), rowvar=False))
    root = scipy.linalg.sqrtm(cov_x.numpy() @ cov_y.numpy())
    expected = ((mean_x - mean_y) ** 2).sum().item() + np.trace(cov_x.numpy() + cov_y.numpy() - 2 * np.real(root))
    assert frechet_distance(mean_x, cov_x, mean_y, cov_y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_diagonal_normals_is_the_sum_over_axes() -> None:
    mean, a, b = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 9.0, 0.25])
    expected = 5.0 + ((a.sqrt() - b.sqrt()) ** 2).sum().item()
    assert frechet_distance(mean, a.diag(), torch.zeros(3), b.diag()) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_torchmetrics() -> None:
    class Flat(nn.Module):
        num_features = 27

        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1).float()

    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 200, (80, 3, 3, 3), generator=generator, dtype=torch.uint8)
    fake = torch.randint(0, 256, (70, 3, 3, 3), generator=generator, dtype=torch.uint8)
    metric = FrechetInceptionDistance(feature=Flat(), normalize=False, input_img_size=(3, 3, 3)).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet_distance(*moments(fake.flatten(1)), *moments(real.flatten(1)))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize("block", [4096, 16])
def test_mmd_is_the_double_sum_over_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK", block)
    x, y = features(33), features(50, seed=1, shift=0.5)
    xx, yy, xy = kernel_matrix(x, x), kernel_matrix(y, y), kernel_matrix(x, y)
    unbiased = (xx.sum() - 33) / (33 * 32) + (yy.sum() - 50) / (50 * 49) - 2 * xy.mean()
    biased = xx.mean() + yy.mean() - 2 * xy.mean()
    assert mmd(x, y) == pytest.approx(1000 * unbiased.item(), rel=1e-9)
    assert mmd(x, y, unbiased=False) == pytest.approx(1000 * biased.item(), rel=1e-9)
    assert mmd(x, y, within_y=mean_kernel(y)) == mmd(x, y)


def test_mmd_is_torchmetrics_estimate_with_this_kernel() -> None:
    x, y = features(40), features(40, seed=1, shift=0.2)
    expected = maximum_mean_discrepancy(kernel_matrix(x, x), kernel_matrix(x, y), kernel_matrix(y, y))
    assert mmd(x, y) == pytest.approx(1000 * expected.item(), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself() -> None:
    x = features(60)
    assert mmd(x, x, unbiased=False) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(*moments(x), *moments(x)) == pytest.approx(0, abs=1e-6)


def test_the_unbiased_estimate_is_zero_on_average_for_samples_of_one_distribution_and_the_biased_one_is_not() -> None:
    pairs = [(features(20, seed=2 * s), features(20, seed=2 * s + 1)) for s in range(200)]
    unbiased = torch.tensor([mmd(x, y) for x, y in pairs])
    error = (unbiased.std() / len(pairs) ** 0.5).item()
    assert abs(unbiased.mean().item()) < 4 * error
    assert min(mmd(x, y, unbiased=False) for x, y in pairs) > 4 * error


def test_features_of_length_one_keep_their_digits() -> None:
    """k is then within 2% of 1, and the difference of three means of it is what counts."""
    x = nn.functional.normalize(features(300, 64), dim=1)
    y = nn.functional.normalize(features(300, 64, seed=1) + 0.01, dim=1)
    exact = [kernel_matrix(a, b).numpy().astype(np.longdouble) for a, b in ((x, x), (y, y), (x, y))]
    expected = (exact[0].sum() - 300) / (300 * 299) + (exact[1].sum() - 300) / (300 * 299) - 2 * exact[2].mean()
    assert mmd(x, y) == pytest.approx(float(1000 * expected), abs=1e-9)


def test_one_image_has_no_distribution() -> None:
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        moments(features(1))
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        mmd(features(1), features(3))
