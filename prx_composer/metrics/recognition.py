"""Whether a drawing shows what was asked for, of the bundled data: the nearest of all shapes, and a classifier of digits."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prx_composer.data.sources import HELDOUT, Scene, all_scenes, load_digit_scans, render


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
