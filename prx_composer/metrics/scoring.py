"""Scores of drawn images: each metric by name, by all ranks together; what the bundled data are judged by; patches that show."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor

from prx_composer.common.distributed import from_rank_zero, gathered, share
from prx_composer.common.errors import UserError, nearest
from prx_composer.data.sources import HELDOUT, Scene, all_scenes, load_digit_scans, render
from prx_composer.metrics.features import (
    CLIP,
    CLIP_SCORE,
    DINO,
    INCEPTION,
    ClipScore,
    Extractor,
    clip_images,
    dino_images,
    frechet_distance,
    inception_images,
    mmd,
    moments,
)
from prx_composer.metrics.real_images import ImageSet, Reference, reference_features
from prx_composer.models.huggingface import returned_afterwards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Metric:
    extractor: str  # one of `Networks`
    kind: str  # mmd, frechet or score
    better: str  # ↓ or ↑


METRICS = {
    "cmmd": _Metric("clip", "mmd", "↓"),
    "dino_mmd": _Metric("dino", "mmd", "↓"),
    "fd_dino": _Metric("dino", "frechet", "↓"),
    "fid": _Metric("inception", "frechet", "↓"),
    "clip_score": _Metric("clip_score", "score", "↑"),
}
DEFAULT_METRICS = ("cmmd", "dino_mmd", "fd_dino", "clip_score")


@dataclass(frozen=True)
class Networks:
    """Hub id or folder of the network behind each metric."""

    clip: str = CLIP
    dino: str = DINO
    clip_score: str = CLIP_SCORE
    inception: str = INCEPTION


def check_metrics(names: Sequence[str]) -> list[str]:
    """Return the names, each once. Raise ValueError for one that isn't known, or for none."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is no metric.{nearest(name, list(METRICS))}")
    if not names:
        raise ValueError(f"metrics: name at least one of {', '.join(METRICS)}.")
    return list(dict.fromkeys(names))


class Scorer:
    """Metrics of drawn images. Networks move to a GPU when they are needed, and back.

    Args:
        metrics: names of `METRICS`.
        networks: which ones compute the features.

    Raises:
        OSError, ValueError: a network that cannot be had, or is none for that metric.
    """

    def __init__(self, metrics: Sequence[str], networks: Networks):
        self.metrics = check_metrics(metrics)
        make: dict[str, Callable[[str], Extractor]] = {"clip": clip_images, "dino": dino_images, "inception": inception_images}
        needed = {METRICS[name].extractor for name in self.metrics}
        self.extractors = {kind: make[kind](getattr(networks, kind)) for kind in make if kind in needed}
        self.clip_score = ClipScore(networks.clip_score) if "clip_score" in needed else None
        self.references: dict[str, Reference] = {}

    @property
    def needs_reference(self) -> bool:
        return bool(self.extractors)

    def description(self) -> dict[str, Any]:
        """Return which networks are used, and how they are told apart."""
        used: dict[str, Any] = dict(self.extractors)
        if self.clip_score is not None:
            used["clip_score"] = self.clip_score
        return {
            kind: {"name": one.name, "image_size": one.image_size, "fingerprint": one.fingerprint} for kind, one in used.items()
        }

    def compare_with(self, images: ImageSet, count: int | None, cache: Path, batch_size: int, device: torch.device) -> None:
        """Compute or read the features of real images; see `reference_features`."""
        with returned_afterwards():
            for kind, extractor in self.extractors.items():
                self.references[kind] = reference_features(images, extractor, count, cache, batch_size, device)

    def score(
        self, draw: Callable[[list[int]], Tensor], prompts: list[str], batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """Draw an image for every prompt, and compare.

        Args:
            draw: numbers of prompts → uint8 (B, 3, H, W). It must make image i from i alone.

        Returns:
            metric → value, the same on every rank.

        Raises:
            UserError: fewer than two prompts for a distance.
        """
        if self.extractors and len(prompts) < 2:
            raise UserError(f"A distance needs at least two prompts, not {len(prompts)}.")
        if self.clip_score is not None:
            self.clip_score.say_what_is_cut(prompts)
        made: dict[str, list[Tensor]] = defaultdict(list)
        mine = share(len(prompts))
        with returned_afterwards():
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                images = draw(batch).to(device)
                for kind, extractor in self.extractors.items():
                    made[kind].append(extractor(images))
                if self.clip_score is not None:
                    made["clip_score"].append(self.clip_score(images, [prompts[index] for index in batch]))
        rows = {kind: gathered(torch.cat(parts), len(prompts)) for kind, parts in made.items()}
        found: dict[str, float] = {}
        if dist.get_global_rank() == 0:
            for name in self.metrics:
                kind = METRICS[name].extractor
                if METRICS[name].kind == "score":
                    found[name] = float(rows[kind].double().mean())
                else:
                    found[name] = _distance(name, rows[kind].to(device), self.references[kind], device)
        return from_rank_zero(found)


def _distance(name: str, features: Tensor, reference: Reference, device: torch.device) -> float:
    if METRICS[name].kind == "mmd":
        return mmd(F.normalize(features, dim=-1), reference.unit.to(device), within_y=reference.within)
    fewest = min(len(features), len(reference.features))
    if fewest <= features.shape[1]:
        log.warning(
            "%s of %d images in %d dimensions is biased upwards; compare it only with one of as many images, or take an MMD.",
            name, fewest, features.shape[1],
        )  # fmt: skip
    mean, covariance = moments(features)
    real_mean, real_covariance = (moment.to(device) for moment in reference.moments)
    return frechet_distance(mean, covariance, real_mean, real_covariance)


def interval_95(values: Sequence[float]) -> float | None:
    """Return half the width of the 95% t-interval of the mean; None of a single value."""
    if len(values) < 2:
        return None
    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))


def nearest_scenes(images: Tensor, scenes: list[Scene] | None = None) -> list[Scene]:
    """Return for uint8 images (B, 3, H, W) the combination whose plain rendering has the smallest Euclidean distance.

    Args:
        scenes: the combinations; all of the source by default.
    """
    height, width = images.shape[-2:]
    scenes = scenes or all_scenes()
    renderings = np.stack([np.asarray(render(scene, height, width)) for scene in scenes])
    references = torch.from_numpy(renderings).permute(0, 3, 1, 2).flatten(1).float()
    distance = torch.cdist(images.cpu().flatten(1).float(), references)
    return [scenes[index] for index in distance.argmin(1).tolist()]


class DigitScore(NamedTuple):
    """Shares of digits that the classifier recognises."""

    generated: float
    real: float  # of the training scans, none of which the classifier has seen


def score_digits(images: Tensor, labels: list[int]) -> DigitScore:
    """Return how many of uint8 (B, 3, 8, 8), drawn for `labels`, a support-vector classifier takes for what they should be.

    It is fitted on real scans that were kept out of training.
    """
    from sklearn.svm import SVC

    scans, targets = load_digit_scans()
    pixels = scans.reshape(len(scans), -1).astype(np.float64)
    classifier = SVC(gamma="scale").fit(pixels[-HELDOUT:], targets[-HELDOUT:])
    drawn = images.cpu().double().mean(1).flatten(1).numpy()
    generated = float((classifier.predict(drawn) == np.array(labels)).mean())
    return DigitScore(generated, float(classifier.score(pixels[:-HELDOUT], targets[:-HELDOUT])))


VISIBLE_GRID = 3.0
"""Above it, as the median of several images, either energy means a grid that one can see. Measured: single photographs, noise and
fields with power spectra from 1/f² to 1/f⁴ stay below 1.4 with patches of 16 and 32 pixels and below 4 with patches of 4 and 8,
where fewer harmonics are averaged; their medians below 1.7. Waves or lines of 4 grey levels (of 255) have a `grid_energy` of 30
and more on a plain ground and 3 to 30 on one with noise of 5 levels; on busy photographs it takes lines of 8 to 16. JPEG's blocks
have a `seam_energy` of 1.5 at quality 80, 3 at 60, 18 at 20."""

_LUMINANCE = (0.2126, 0.7152, 0.0722)  # Rec. 709
_MIN_PATCHES = 8  # along a side: with fewer, harmonics and neighbours are too close to each other and to the picture itself
_NEAR, _FAR = 2, 4  # neighbours, in bins; the window's main lobe ends at 2
_LEVEL = 1 / 255


def can_measure_grid(height: int, width: int, patch_size: int) -> bool:
    """Say whether `grid_energy` and `seam_energy` take images of that size."""
    return patch_size >= 3 and max(height, width) // patch_size >= _MIN_PATCHES


def grid_energy(images: Tensor, patch_size: int) -> Tensor:
    """Return the energy at the frequency of the patches and its harmonics, relative to the frequencies beside them; 1 = no grid.

    Along the width W, and likewise along the height: rows that lie a multiple of the patch size p apart are averaged, which keeps
    what repeats from patch to patch and averages out the picture. S(n) is the power spectrum of the p rows that are left, of
    their luminance under a Hann window, averaged over them, plus that of white noise of one grey level. The harmonics of the
    patches are the bins n_k = k·W/p, 0 < k < p/2, and

        energy = mean over k of  n_k·S(n_k) / mean over d ∈ {±2, ±3, ±4} of (n_k + d)·S(n_k + d).

    The weight n makes spectra that fall as 1/n, as those of rows of natural images do, as well as flat ones come out as 1. The
    noise of one level keeps what nobody can see out of it. Both directions count alike.

    It sees what is the same in all patches: lines, waves, textures. Steps between patches, up here and down there, have no
    frequency of their own; they are for `seam_energy`.

    Args:
        images: (B, 3, H, W), uint8, or floating point in [0, 1]. What is left over of a last patch is cut off.
        patch_size: in pixels of the images, that is with the autoencoder's downsampling; at least 3.

    Returns:
        (B,) fp32. A direction with fewer than 8 patches is left out.

    Raises:
        ValueError: patches below 3 pixels, or fewer than 8 of them in both directions.
    """
    luminance = _luminance(images, patch_size)
    return _energy([luminance, luminance.mT], patch_size)


def seam_energy(images: Tensor, patch_size: int) -> Tensor:
    """Return the `grid_energy` of the steps |Y(x) − Y(x − 1)| from pixel to pixel along each direction; 1 = no seams.

    It sees patches that don't continue each other, like the blocks of a strongly compressed JPEG. Arguments, result and errors
    are those of `grid_energy`.
    """
    luminance = _luminance(images, patch_size)
    steps = [torch.nn.functional.pad(field.diff(dim=-1).abs(), (1, 0)) for field in (luminance, luminance.mT)]
    return _energy(steps, patch_size)


def _luminance(images: Tensor, patch_size: int) -> Tensor:
    height, width = images.shape[-2:]
    if not can_measure_grid(height, width, patch_size):
        raise ValueError(
            f"A grid can be measured with patches of at least 3 pixels, {_MIN_PATCHES} of them or more along a side; "
            f"these images are {height}×{width} with patches of {patch_size}."
        )
    scale = 255 if images.dtype == torch.uint8 else 1
    return torch.einsum("bchw,c->bhw", images.float(), torch.tensor(_LUMINANCE, device=images.device) / scale)


def _energy(directions: list[Tensor], patch_size: int) -> Tensor:
    """Return the mean energy (B,) of fields, each (B, …, along its direction)."""
    long_enough = [field for field in directions if field.shape[-1] // patch_size >= _MIN_PATCHES]
    return torch.cat([_ratios(field, patch_size) for field in long_enough], dim=1).mean(1)


def _ratios(field: Tensor, patch_size: int) -> Tensor:
    """Return the energy (B, harmonics) of a field (B, H, W) along its width."""
    height, width = (max(side // patch_size, 1) * patch_size for side in field.shape[-2:])
    field = field[:, :height, :width]
    folds = max(field.shape[1] // patch_size, 1)
    rows = field.unflatten(1, (folds, -1)).mean(1)
    rows = rows - rows.mean(-1, keepdim=True)
    window = torch.hann_window(width, device=field.device)
    power = torch.fft.rfft(rows * window).abs().square().mean(1) / window.square().sum()
    power = power + _LEVEL**2 / folds  # white noise of one level, averaged over as many rows
    power = power * torch.arange(power.shape[-1], device=field.device)
    harmonics = torch.arange(1, -(-patch_size // 2), device=field.device) * (width // patch_size)
    distances = torch.arange(_NEAR, _FAR + 1, device=field.device)
    neighbours = harmonics[:, None] + torch.cat([-distances, distances])
    return power[:, harmonics] / power[:, neighbours].mean(-1)
