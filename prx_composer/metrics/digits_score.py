"""Scores drawn digits with a classifier fitted on real scans that were kept out of training."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from prx_composer.data.digits import HELDOUT, load_digit_scans


class DigitScore(NamedTuple):
    """Shares of digits that the classifier recognises."""

    generated: float
    real: float  # of the training scans, none of which the classifier has seen


def score_digits(images: Tensor, labels: list[int]) -> DigitScore:
    """uint8 (B, 3, 8, 8) drawn for `labels` → how many a support-vector classifier takes for what they should be."""
    from sklearn.svm import SVC

    scans, targets = load_digit_scans()
    pixels = scans.reshape(len(scans), -1).astype(np.float64)
    classifier = SVC(gamma="scale").fit(pixels[-HELDOUT:], targets[-HELDOUT:])
    drawn = images.cpu().double().mean(1).flatten(1).numpy()
    generated = float((classifier.predict(drawn) == np.array(labels)).mean())
    return DigitScore(generated, float(classifier.score(pixels[:-HELDOUT], targets[:-HELDOUT])))
