"""Scores of drawn images: each metric by name, computed by all ranks together, and what the bundled data are judged by."""

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
