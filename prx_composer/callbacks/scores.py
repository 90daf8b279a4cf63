"""The scores of the bundled data sets."""

import inspect
from typing import Any

from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler

from prx_composer.callbacks.images import check_size, draw_images
from prx_composer.callbacks.rehearsal import rehearsing
from prx_composer.data.digits import DIGIT_WORDS
from prx_composer.data.shapes import ShapesSource, heldout_scenes
from prx_composer.metrics.digits_score import score_digits
from prx_composer.metrics.shapes_score import nearest_scenes
from prx_composer.models.sampling import check_guidance_scale, check_seeds
from prx_composer.schedule.moments import Point


class ShapesScore(Callback):
    """Draws every held-out combination of the `shapes` source and logs `heldout_accuracy`: at the end, and at an interval.

    An image is right if, of the renderings of all combinations, the one asked for is the nearest.

    Args:
        source: the recipe's `train_loader.source`, which says what was held out.
        image_size: side of the images; the recipe's by default.
        images_per_prompt: with different seeds.
        seed, num_inference_steps, guidance_scale: of sampling.
        interval: score during training too, every "100ba", "6400sp" or "0.05dur".
        images_per_prompt_during: fewer images then; they are the first of those that the end draws.

    Raises:
        ValueError: data that isn't of the `shapes` source; an interval that isn't a time or is in epochs.
    """

    def __init__(
        self,
        source: dict[str, Any],
        image_size: int,
        images_per_prompt: int = 4,
        seed: int = 1000,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        interval: str | None = None,
        images_per_prompt_during: int = 1,
    ):
        if source.get("name") != "shapes":
            raise ValueError("scores models of `train_loader.source: {name: shapes, …}` only; set callbacks.shapes_score=false.")
        arguments = inspect.signature(ShapesSource).bind(**{key: value for key, value in source.items() if key != "name"})
        arguments.apply_defaults()
        self._scenes = heldout_scenes(arguments.arguments["heldout"], arguments.arguments["seed"])
        self._images_per_prompt, self._images_per_prompt_during = images_per_prompt, images_per_prompt_during
        check_seeds([seed, seed + images_per_prompt * len(self._scenes) - 1])
        check_guidance_scale(guidance_scale)
        self._seed = seed
        self._image_size = image_size
        self._sampling = (num_inference_steps, guidance_scale)
        self._due = None
        if interval is not None:
            Point.parse_interval(interval)
            time = Time.from_timestring(interval)
            if time.unit not in (TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.DURATION) or time.value <= 0:
                raise ValueError(f"interval must be a time such as 100ba, 6400sp or 0.05dur, not {interval}.")
            self._due = create_interval_scheduler(time, include_end_of_training=False)

    def init(self, state: State, logger: Logger) -> None:
        check_size(state, self._image_size, self._image_size, "callbacks.shapes_score.image_size")

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        elapsed = state.get_elapsed_duration()
        ends = elapsed is not None and elapsed.value >= 1  # then fit_end scores
        due = self._due is not None and self._due(state, Event.BATCH_CHECKPOINT)
        if (due or rehearsing(state)) and not ends:
            images_per_prompt = self._images_per_prompt if rehearsing(state) else self._images_per_prompt_during
            logger.log_metrics(self._score(state, images_per_prompt))

    def fit_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics(self._score(state, self._images_per_prompt))

    def _score(self, state: State, images_per_prompt: int) -> dict[str, float]:
        asked = self._scenes * images_per_prompt
        seeds = [self._seed + index for index in range(len(asked))]
        prompts = [scene.caption for scene in asked]
        drawn = nearest_scenes(draw_images(state, prompts, self._image_size, self._image_size, seeds, *self._sampling))
        pairs = list(zip(drawn, asked, strict=True))
        right = {"heldout_accuracy": [d == a for d, a in pairs]}
        for attribute in asked[0]._fields:
            right[f"heldout_accuracy/{attribute}"] = [getattr(d, attribute) == getattr(a, attribute) for d, a in pairs]
        return {name: sum(values) / len(values) for name, values in right.items()}


class DigitsScore(Callback):
    """At the end: draws digits and logs `classifier_accuracy`, and `classifier_accuracy_real` on real scans.

    Args:
        images: how many, the ten digits in turn.
        seed, num_inference_steps, guidance_scale: of sampling.
    """

    def __init__(self, images: int = 200, seed: int = 1000, num_inference_steps: int = 20, guidance_scale: float = 3.0):
        self._labels = [index % 10 for index in range(images)]
        self._seeds = [seed + index for index in range(images)]
        check_seeds(self._seeds)
        check_guidance_scale(guidance_scale)
        self._sampling = (num_inference_steps, guidance_scale)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if rehearsing(state):
            self.fit_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        prompts = [f"a handwritten {DIGIT_WORDS[label]}" for label in self._labels]
        score = score_digits(draw_images(state, prompts, 8, 8, self._seeds, *self._sampling), self._labels)
        logger.log_metrics({"classifier_accuracy": score.generated, "classifier_accuracy_real": score.real})
