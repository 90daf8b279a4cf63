"""Composer's gradient clipping, with arguments that are checked before training."""

from typing import Literal

import composer.algorithms

__all__ = ["GradientClipping"]


class GradientClipping(composer.algorithms.GradientClipping):
    """Clips gradients before every optimizer step.

    Args:
        clipping_type: "norm" of all gradients together, "value" of every element, or "adaptive" per unit (arXiv:2102.06171).
        clipping_threshold: largest norm, value, or ratio to the weight's norm.

    Raises:
        ValueError: a threshold that is not positive.
    """

    def __init__(self, clipping_type: Literal["norm", "value", "adaptive"], clipping_threshold: float):
        if clipping_threshold <= 0:
            raise ValueError(f"clipping_threshold must be positive, not {clipping_threshold}.")
        super().__init__(clipping_type, clipping_threshold)
