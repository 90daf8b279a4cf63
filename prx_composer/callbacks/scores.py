"""The final scores of the bundled data sets."""

import inspect
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer.callbacks.images import check_size, draw_images
from prx_composer.data.digits import DIGIT_WORDS
from prx_composer.data.shapes import ShapesSource, heldout_scenes
from prx_composer.evaluation.digits import score_digits
from prx_composer.evaluation.shapes import nearest_scenes

__all__ = ["DigitsScore", "ShapesScore"]


class ShapesScore(Callback):
    """At the end: draws every held-out combination of the `shapes` source and logs `heldout_accuracy`.

    An image is right if, of the renderings of all combinations, the one asked for is the nearest.

    Args:
        source: the recipe's `train_loader.source`, which says what was held out.
        image_size: side of the images; the recipe's by default.
        images_per_prompt: with different seeds.
        seed, num_inference_steps, guidance_scale: of sampling.

    Raises:
        ValueError: data that isn't of the `shapes` source.
    """

    def __init__(
        self,
        source: dict[str, Any],
        image_size: int,
        images_per_prompt: int = 4,
        seed: int = 1000,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
    ):
        if source.get("name") != "shapes":
            raise ValueError("scores models of `train_loader.source: {name: shapes, …}` only; set callbacks.shapes_score=false.")
        arguments = inspect.signature(ShapesSource).bind(**{key: value for key, value in source.items() if key != "name"})
        arguments.apply_defaults()
        scenes = heldout_scenes(arguments.arguments["heldout"], arguments.arguments["seed"])
        self._scenes = scenes * images_per_prompt
        self._seeds = [seed + index for index in range(len(self._scenes))]
        self._image_size = image_size
        self._sampling = (num_inference_steps, guidance_scale)

    def init(self, state: State, logger: Logger) -> None:
        check_size(state, self._image_size, self._image_size, "callbacks.shapes_score.image_size")

    def fit_end(self, state: State, logger: Logger) -> None:
        prompts = [scene.caption for scene in self._scenes]
        images = draw_images(state, prompts, self._image_size, self._image_size, self._seeds, *self._sampling)
        found = nearest_scenes(images)
        scores = {"heldout_accuracy": [drawn == asked for drawn, asked in zip(found, self._scenes, strict=True)]}
        for attribute in self._scenes[0]._fields:
            pairs = zip(found, self._scenes, strict=True)
            scores[f"heldout_accuracy/{attribute}"] = [getattr(d, attribute) == getattr(a, attribute) for d, a in pairs]
        logger.log_metrics({name: sum(right) / len(right) for name, right in scores.items()})


class DigitsScore(Callback):
    """At the end: draws digits and logs `classifier_accuracy`, and `classifier_accuracy_real` on real scans.

    Args:
        images: how many, the ten digits in turn.
        seed, num_inference_steps, guidance_scale: of sampling.
    """

    def __init__(self, images: int = 200, seed: int = 1000, num_inference_steps: int = 20, guidance_scale: float = 3.0):
        self._labels = [index % 10 for index in range(images)]
        self._seeds = [seed + index for index in range(images)]
        self._sampling = (num_inference_steps, guidance_scale)

    def fit_end(self, state: State, logger: Logger) -> None:
        prompts = [f"a handwritten {DIGIT_WORDS[label]}" for label in self._labels]
        score = score_digits(draw_images(state, prompts, 8, 8, self._seeds, *self._sampling), self._labels)
        logger.log_metrics({"classifier_accuracy": score.generated, "classifier_accuracy_real": score.real})
