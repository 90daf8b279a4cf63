"""iREPA against scikit-learn's scaler, scipy's correlation and transformers called directly."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alignment import COLUMNS, ROWS, Batch, Build, attach, make_teacher, transformers_features
from scipy.ndimage import correlate
from sklearn.preprocessing import StandardScaler

from prx_composer.algorithms.repa import IREPA, ConvProjector, TappedTokens, normalise_over_space


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def test_spatial_normalisation_is_a_standard_scaler_with_part_of_the_mean_put_back() -> None:
    features = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0)) * 3 + 5
    for image, found in zip(features.numpy(), normalise_over_space(features, 1.0), strict=True):
        np.testing.assert_allclose(found, StandardScaler().fit_transform(image), atol=1e-5)
    partly, scaler = normalise_over_space(features, 0.6)[0], StandardScaler().fit(features[0].numpy())
    expected = scaler.transform(features[0].numpy()) + 0.4 * scaler.mean_ / scaler.scale_  # pyright: ignore
    np.testing.assert_allclose(partly, expected, atol=1e-5)
    assert normalise_over_space(features[:, :1], 0.6).isfinite().all()


def test_the_convolution_is_scipys_with_zeros_where_tokens_are_missing(tiny_model: Build, tiny_batch: Batch) -> None:
    torch.manual_seed(0)
    head, tokens = ConvProjector(5, 3, 3), torch.randn(2, 7, 5)
    kept = torch.stack([torch.randperm(ROWS * COLUMNS)[:7].sort().values for _ in range(2)])
    found = head(TappedTokens(tokens, ROWS, COLUMNS, kept, None, None))  # pyright: ignore[reportArgumentType]
    weight, bias = (p.detach().numpy() for p in head.convolution.parameters())
    for image in range(2):
        grid = np.zeros((5, ROWS * COLUMNS), np.float32)
        grid[:, kept[image]] = tokens[image].T
        grid = grid.reshape(5, ROWS, COLUMNS)
        full = [sum(correlate(grid[i], weight[o, i], mode="constant") for i in range(5)) + bias[o] for o in range(3)]
        expected = np.stack(full).reshape(3, -1)[:, kept[image]].T
        np.testing.assert_allclose(found[image].detach(), expected, atol=1e-5)


def test_irepa_compares_normalised_features(tiny_model: Build, tiny_batch: Batch, folder: Path) -> None:
    model, algorithm = tiny_model(), IREPA(str(folder), block=1, gamma=0.6)
    attach(model, algorithm)
    outputs = model(tiny_batch)
    y = transformers_features(folder, tiny_batch["image"])
    z_scored = (y - 0.6 * y.mean(1, keepdim=True)) / y.std(1, keepdim=True)
    grid = outputs.taps[1].transpose(1, 2).unflatten(2, (ROWS, COLUMNS))
    projected = algorithm.head.convolution(grid).flatten(2).transpose(1, 2)  # pyright: ignore
    expected = -F.cosine_similarity(projected, z_scored, dim=-1).mean()
    torch.testing.assert_close(algorithm.loss(outputs, tiny_batch), expected)
