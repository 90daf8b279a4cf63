"""The grid monitor, against closed forms, fields of known spectra, photographs and JPEG's own blocks."""

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from prx_composer.metrics.scoring import VISIBLE_GRID, can_measure_grid, grid_energy, seam_energy
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import run

Measure = Callable[[Tensor, int], Tensor]
Write = Callable[..., str]
Recipe = dict[str, Any]
SIZES = [(256, 256, 16), (256, 384, 32), (32, 32, 4), (90, 130, 8)]


def grey(field: np.ndarray) -> Tensor:
    """(B, H, W) of grey levels → uint8 (B, 3, H, W)."""
    return torch.from_numpy(field.round().clip(0, 255).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)


def random_fields(count: int, height: int, width: int, exponent: float, spread: float = 40.0) -> np.ndarray:
    """Grey levels with an amplitude spectrum 1/f^exponent, cut out of a larger torus so that opposite edges don't meet."""
    rng = np.random.default_rng([height, width, int(10 * exponent)])
    frequency = np.hypot(np.fft.fftfreq(2 * height)[:, None], np.fft.fftfreq(2 * width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.standard_normal((count, 2 * height, 2 * width))) / frequency**exponent
    field = np.fft.ifft2(spectrum).real[:, :height, :width]
    return 128 + spread * (field - field.mean((1, 2), keepdims=True)) / field.std((1, 2), keepdims=True)


def lines(height: int, width: int, patch: int) -> np.ndarray:
    """1 in the first row and column of every patch."""
    return ((np.arange(height)[:, None] % patch == 0) | (np.arange(width) % patch == 0)).astype(float)


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """(B, 3, 256, 256): parts of scikit-learn's two sample photographs, scaled down so that JPEG's blocks are gone."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photograph in load_sample_images().images:
        small = np.asarray(Image.fromarray(photograph).resize((480, 320), Image.Resampling.LANCZOS), dtype=float)
        parts += [small[y : y + 256, x : x + 256].transpose(2, 0, 1) for y in (0, 64) for x in (0, 75, 150, 224)]
    return np.stack(parts)


@pytest.mark.parametrize(("amplitude", "harmonic"), [(2.0, 1), (10.0, 3)])
def test_a_wave_on_a_plain_ground_has_the_energy_of_the_formula(amplitude: float, harmonic: int) -> None:
    """|X|² of a·cos under a Hann window is (a/2)²(Σw)², (Σw)²/Σw² = W/6; 7 harmonics each way; noise of 1 level / 16 folds."""
    height, width, patch = 256, 384, 16
    wave = 128 + amplitude * np.cos(2 * np.pi * harmonic * np.arange(width) / patch)
    image = torch.from_numpy(np.broadcast_to(wave / 255, (1, 3, height, width)).copy())
    over_noise = (amplitude / 2) ** 2 * width / 1.5 / (1 / (height // patch))
    expected = ((1 + over_noise) + 6 + 7) / 14
    assert grid_energy(image, patch).item() == pytest.approx(expected, rel=1e-3)
    assert grid_energy(image.mT, patch).item() == pytest.approx(expected, rel=1e-3), "the other direction"


@pytest.mark.parametrize("measure", [grid_energy, seam_energy])
@pytest.mark.parametrize(("height", "width", "patch"), SIZES)
def test_images_without_a_grid_have_an_energy_of_about_one(height: int, width: int, patch: int, measure: Measure) -> None:
    fields = {f"1/f^{e}": random_fields(24 if patch < 16 else 8, height, width, e) for e in (0.0, 1.0, 1.5, 2.0)}
    for name, field in fields.items():
        assert 0.4 < measure(grey(field), patch).median().item() < 1.6, name
        if patch >= 16:
            energy = measure(grey(field), patch)
            assert energy.min().item() > 0.6 and energy.max().item() < 1.6, name
    plain = measure(torch.full((1, 3, height, width), 77, dtype=torch.uint8), patch)
    assert plain.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("height", "width", "patch"), SIZES)
def test_a_grid_that_one_just_sees_is_far_above_the_threshold_on_an_even_ground(height: int, width: int, patch: int) -> None:
    slope = 128 + 40 * np.linspace(-1, 1, width)[None, None] * np.linspace(-1, 1, height)[None, :, None]
    assert grid_energy(grey(slope), patch).item() < VISIBLE_GRID
    assert grid_energy(grey(slope + 4 * lines(height, width, patch)), patch).item() > 5 * VISIBLE_GRID


def test_steps_between_patches_are_seams_and_no_wave() -> None:
    levels = 4 * np.random.default_rng(0).standard_normal((8, 16, 16))
    steps = grey(random_fields(8, 256, 256, 2.0) + np.kron(levels, np.ones((16, 16))))
    assert seam_energy(steps, 16).median().item() > 5 * VISIBLE_GRID
    assert grid_energy(steps, 16).max().item() < VISIBLE_GRID


def test_photographs_have_no_grid_until_one_is_laid_over_them(photographs: np.ndarray) -> None:
    for patch in (16, 32):
        assert grid_energy(torch.from_numpy(photographs / 255), patch).max().item() < 1.6
        assert seam_energy(torch.from_numpy(photographs / 255), patch).max().item() < 1.6
        texture = np.random.default_rng(0).standard_normal((patch, patch))
        repeated = 6 * np.tile(texture, (256 // patch, 256 // patch))
        gridded = torch.from_numpy((photographs + repeated).clip(0, 255) / 255)
        assert grid_energy(gridded, patch).median().item() > VISIBLE_GRID


def test_the_blocks_of_jpeg_are_seams_of_their_own_size_the_more_it_is_compressed(photographs: np.ndarray) -> None:
    def compressed(image: np.ndarray, quality: int) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0).round().astype(np.uint8)).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)

    def energy(quality: int, patch: int) -> float:
        images = torch.stack([compressed(image, quality) for image in photographs])
        return seam_energy(images, patch).median().item()

    by_quality = [energy(quality, 8) for quality in (100, 60, 20, 5)]
    assert by_quality == sorted(by_quality) and by_quality[0] < 1.6 and by_quality[2] > 3 * VISIBLE_GRID
    assert max(energy(5, 7), energy(5, 9)) < 1.5


def test_neither_the_phase_of_the_grid_nor_the_type_of_the_numbers_matters() -> None:
    field = random_fields(4, 256, 256, 1.0, spread=10.0) + 20 * lines(256, 256, 16)
    image = grey(field)
    energy = grid_energy(image, 16)
    assert energy.median().item() > VISIBLE_GRID and energy.shape == (4,)
    torch.testing.assert_close(grid_energy(image.double() / 255, 16), energy, rtol=1e-4, atol=0)
    torch.testing.assert_close(grid_energy(image.mT, 16), energy, rtol=1e-4, atol=0)
    moved = grid_energy(grey(np.roll(field, (5, 11), (1, 2))), 16)
    assert (moved / energy).log().abs().max().item() < 0.3


def test_a_grid_of_another_period_is_not_one_of_patches() -> None:
    field = random_fields(6, 256, 256, 1.0, spread=10.0)
    assert grid_energy(grey(field + 20 * lines(256, 256, 16)), 16).min().item() > VISIBLE_GRID
    assert grid_energy(grey(field + 20 * lines(256, 256, 13)), 16).max().item() < 2


def test_images_with_too_few_patches_are_refused() -> None:
    assert not can_measure_grid(28, 28, 4) and can_measure_grid(16, 32, 4) and not can_measure_grid(64, 64, 2)
    with pytest.raises(ValueError, match="28×28 with patches of 4"):
        grid_energy(torch.zeros(1, 3, 28, 28), 4)
    assert grid_energy(torch.rand(1, 3, 2, 64), 4).isfinite().all(), "lower than a patch"


def test_the_images_callback_logs_the_energy_and_warns_of_a_model_that_draws_a_grid(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last layer's bias is the same in every patch: made large, it is a grid."""
    warnings.filterwarnings("ignore")
    code = tmp_path / "gridded.py"
    code.write_text(
        """
import torch
from composer.core import Algorithm, Event
from prx_composer import registry

@registry.algorithms.register("gridded")
class Gridded(Algorithm):
    def match(self, event, state):
        return event == Event.INIT
    def apply(self, event, state, logger):
        state.model.backbone.final_layer.linear.bias.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
"""
    )
    tiny_recipe["callbacks"] = {"images": {"prompts": ["a red circle", "a blue ring"], "num_inference_steps": 1}}
    tiny_recipe["code_paths"], tiny_recipe["algorithms"] = [str(code)], {"gridded": {}}
    path = write_recipe(tiny_recipe)
    rows = {}
    for name, arguments in {"small": [], "large": ["callbacks.images.height=48", "callbacks.images.width=48"]}.items():
        with caplog.at_level(logging.WARNING, "prx_composer"):
            run(config.load([path, f"run_name={name}", "max_duration=1ba", "optimizer.lr=0.0", *arguments]))
        rows[name] = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")[-1]
        assert ("grid energy" in caplog.text) == (name == "large")
    assert "images/grid_energy" not in rows["small"] and rows["large"]["images/grid_energy"] > VISIBLE_GRID
    assert rows["large"]["images/seam_energy"] > 0
