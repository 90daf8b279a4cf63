"""Scores of what the model draws while it trains: CMMD, DINO-MMD, FD-DINO, FID, CLIP score, and those of the bundled data."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from torch import Tensor

from prx_composer.callbacks.images import check_size, draw_images, unwrap
from prx_composer.data.sources import DIGIT_WORDS, ShapesSource, heldout_scenes
from prx_composer.metrics.real_images import DataSet, ImageFolder, default_cache, evenly, open_images
from prx_composer.metrics.recognition import nearest_scenes, score_digits
from prx_composer.metrics.scoring import DEFAULT_METRICS, Networks, Scorer
from prx_composer.models.sampling import check_guidance_scale, check_seeds
from prx_composer.schedule.clock import rehearsing, with_rehearsal
from prx_composer.schedule.moments import Point


class GenerationMetrics(Callback):
    """Draws prompts of a data set at an interval and at the end, with averaged weights if there are any, and logs
    `metrics/generation/<name>`. Ranks share the prompts; nothing of it touches training's random state.

    Args:
        path: folder of the data set whose captions are drawn and whose images are compared with. Keep it out of training.
        image_size: side of the images; the recipe's by default.
        split, caption: of the data set; its first caption column by default.
        reference: other real images: a data set with that split, or a folder of images.
        num: prompts, evenly spaced. reference_num: real images, likewise; all by default.
        metrics: of cmmd, dino_mmd, fd_dino, fid, clip_score.
        networks: hub id or folder behind a metric, by `clip`, `dino`, `clip_score`, `inception`.
        interval: a time string, such as "0.1dur" or "5000ba".
        seed: of the first image; the next ones count on.
        num_inference_steps, guidance_scale: of sampling.
        batch_size: images at a time, per GPU.
        cache: folder for features of real images.

    Raises:
        ValueError: a metric or a network's name that isn't known, a network that is of another kind, no such data.
        OSError: a network that cannot be had.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        split: str = "train",
        caption: str | None = None,
        reference: str | None = None,
        num: int = 1000,
        reference_num: int | None = None,
        metrics: list[str] | None = None,
        networks: dict[str, str] | None = None,
        interval: str = "0.1dur",
        seed: int = 0,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        batch_size: int = 32,
        cache: str | None = None,
    ):
        known = [field.name for field in fields(Networks)]
        if unknown := sorted((networks or {}).keys() - known):
            raise ValueError(f"networks.{unknown[0]}: there are {', '.join(known)}.")
        if num < 2 or batch_size < 1:
            raise ValueError(f"num must be at least 2 and batch_size 1, not {num} and {batch_size}.")
        check_seeds([seed, seed + num - 1])
        check_guidance_scale(guidance_scale)
        data = DataSet(path, split, caption)
        self._prompts = [data.caption(index) for index in evenly(len(data), num)]
        self._real: DataSet | ImageFolder = data if reference is None else open_images(reference, split, caption)
        self._reference_num = reference_num
        self._scorer = Scorer(metrics or DEFAULT_METRICS, Networks(**(networks or {})))
        self._cache = default_cache() if cache is None else Path(cache).expanduser()
        self._image_size, self._seed, self._batch_size = image_size, seed, batch_size
        self._sampling = (num_inference_steps, guidance_scale)
        Point.parse_interval(interval)
        self._due = with_rehearsal(create_interval_scheduler(Time.from_timestring(interval), include_end_of_training=True))

    def init(self, state: State, logger: Logger) -> None:
        check_size(state, self._image_size, self._image_size, "callbacks.generation_metrics.image_size")
        unwrap(state).say_what_is_lost(self._prompts)

    def fit_start(self, state: State, logger: Logger) -> None:
        device = next(unwrap(state).parameters()).device
        if self._scorer.needs_reference:
            self._scorer.compare_with(self._real, self._reference_num, self._cache, self._batch_size, device)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._score_if_due(Event.BATCH_CHECKPOINT, state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._score_if_due(Event.EPOCH_CHECKPOINT, state, logger)

    def _score_if_due(self, event: Event, state: State, logger: Logger) -> None:
        if not self._due(state, event):
            return
        model: Any = unwrap(state)
        device: torch.device = next(model.parameters()).device

        def draw(indices: list[int]) -> Tensor:
            prompts, seeds = [self._prompts[i] for i in indices], [self._seed + i for i in indices]
            with get_precision_context(state.precision, state.precision_config):
                return model.generate(prompts, self._image_size, self._image_size, seeds, *self._sampling)

        with model.sampling_weights():
            found = self._scorer.score(draw, self._prompts, self._batch_size, device)
        logger.log_metrics({f"metrics/generation/{name}": value for name, value in found.items()})


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
