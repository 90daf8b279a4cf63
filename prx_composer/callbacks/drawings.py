"""What the model draws while it trains: grids of images, and their scores."""

import inspect
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from pydantic.alias_generators import to_snake
from torch import Tensor

from prx_composer.common.distributed import unwrapped
from prx_composer.common.errors import UserError
from prx_composer.common.pages import image_grid
from prx_composer.data.sources import DIGIT_WORDS, ShapesSource, heldout_scenes
from prx_composer.loggers.trackers import log_drawings
from prx_composer.metrics.real_images import DataSet, ImageFolder, default_cache, evenly, open_images
from prx_composer.metrics.scoring import (
    DEFAULT_METRICS,
    VISIBLE_GRID,
    Networks,
    Scorer,
    can_measure_grid,
    grid_energy,
    nearest_scenes,
    score_digits,
    seam_energy,
)
from prx_composer.models.flow import check_guidance_scale, check_seeds
from prx_composer.models.huggingface import returned_afterwards
from prx_composer.models.text_to_image import TextToImage
from prx_composer.schedule.clock import Due, rehearsing, with_rehearsal
from prx_composer.schedule.moments import Point

log = logging.getLogger(__name__)

_DIGIT = 8  # px, of the scans


def unwrap(state: State) -> TextToImage:
    """Return the model itself, without what DDP puts around it."""
    model = unwrapped(state.model)
    if not isinstance(model, TextToImage):
        raise TypeError(f"This callback draws with a TextToImage model, not a {type(model).__name__}.")
    return model


def multiple_of_sides(state: State) -> int:
    """Return of how many pixels every side must be a multiple that the model draws."""
    model = unwrap(state)
    return model.backbone.patch_size * model.autoencoder.downsampling


def draw_images(
    state: State,
    prompts: list[str],
    height: int,
    width: int,
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 256,
) -> Tensor:
    """Draw on every rank, with averaged weights when there are any and without touching training's random state.

    A frozen network that only drawing needs, such as the encoder of text that is stored, is on the device meanwhile alone.

    Returns:
        uint8 (len(prompts), 3, height, width), on the CPU.
    """
    model = unwrap(state)
    drawn = []
    with returned_afterwards(), model.sampling_weights(), get_precision_context(state.precision, state.precision_config):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            images = model.generate(prompts[part], height, width, seeds[part], num_inference_steps, guidance_scale)
            drawn.append(images.cpu())
    return torch.cat(drawn)


class Drawing(Callback):
    """Base of what draws images: with an `interval`, it calls `draw` then and at the end of the run.

    Args:
        seed: of the first image; the next ones count on.
        images: how many there are at most.
        num_inference_steps: Euler steps.
        guidance_scale: 1 = unguided.
        interval: a time string, such as "0.25dur" or "1000ba".
        image_size: side of the images; by default that which the model is trained at by then.

    Raises:
        ValueError: an argument out of range.
        UserError: no `image_size`, and a training loader that doesn't say its own.
    """

    def __init__(
        self,
        seed: int,
        images: int,
        num_inference_steps: int,
        guidance_scale: float,
        interval: str | None = None,
        image_size: int | None = None,
    ):
        for name, number in (("num_inference_steps", num_inference_steps), ("the number of images", images)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}.")
        check_seeds([seed, seed + images - 1])
        check_guidance_scale(guidance_scale)
        self._seed, self._sampling = seed, (num_inference_steps, guidance_scale)
        self._given_sides, self._trained_at = {"image_size": image_size}, None
        self._due: Due = lambda state, event: False
        if interval is not None:
            Point.parse_interval(interval)
            self._due = with_rehearsal(create_interval_scheduler(interval))

    def draw(self, state: State, logger: Logger) -> None:
        """Draw images, and log them or what they are worth."""

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels: the one given, or that of the newest step's stage."""
        size = self._given_sides["image_size"] or self._trained_at
        if size is None:
            raise UserError(f"{self._path}.image_size: give one, since the training loader does not say which size it has.")
        return size

    @property
    def _path(self) -> str:
        return f"callbacks.{to_snake(type(self).__name__)}"

    def init(self, state: State, logger: Logger) -> None:
        multiple = multiple_of_sides(state)
        for name, side in self._given_sides.items():
            if side is not None and (side < 1 or side % multiple):
                raise UserError(
                    f"{self._path}.{name}: {side} is not a multiple of {multiple} (patch_size × autoencoder downsampling)."
                )

    def fit_start(self, state: State, logger: Logger) -> None:
        self.batch_start(state, logger)
        _ = self.image_size  # rather now than after hours

    def batch_start(self, state: State, logger: Logger) -> None:  # later in the step the loader may be in the next stage already
        self._trained_at = getattr(state.train_dataloader, "image_size", None)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._due(state, Event.BATCH_CHECKPOINT):
            self.draw(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._due(state, Event.EPOCH_CHECKPOINT):
            self.draw(state, logger)

    def _seeds(self, images: int) -> list[int]:
        return [self._seed + index for index in range(images)]


class Images(Drawing):
    """Draw the same prompts from the same seeds at an interval and at the end.

    Grids go to `<run folder>/images/ba<batch>.png` and to every logger that takes images (wandb, TensorBoard, MLflow). Also logs
    `images/grid_energy` and `images/seam_energy`, medians over the images of how much of the grid of patches shows in them (1 =
    nothing), if there are enough patches to tell, and warns when one can see it.

    Args:
        prompts: one image each.
        folder: the run folder.
        height, width: for other aspect ratios.
        interval, image_size, seed, num_inference_steps, guidance_scale: see `Drawing`.
    """

    def __init__(
        self,
        prompts: list[str],
        folder: str,
        image_size: int | None = None,
        interval: str = "0.25dur",
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
    ):
        if not prompts:
            raise ValueError("prompts must name at least one prompt.")
        super().__init__(seed, len(prompts), num_inference_steps, guidance_scale, interval, image_size)
        self.prompts = list(prompts)
        self.folder = Path(folder) / "images"
        self._given_sides |= {"height": height, "width": width}

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        unwrap(state).say_what_is_lost(self.prompts)

    def draw(self, state: State, logger: Logger) -> None:
        seeds = self._seeds(len(self.prompts))
        height, width = (self._given_sides[name] or self.image_size for name in ("height", "width"))
        images = draw_images(state, self.prompts, height, width, seeds, *self._sampling)
        if dist.get_global_rank() == 0:
            path = self.folder / f"ba{int(state.timestamp.batch):06d}.png"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                image_grid(images, self.prompts).save(path)
                log.info("Drew %s", path)
            except OSError as error:  # a full disk: no reason to lose the run
                log.error("%s cannot be written: %s", path, error)
        log_drawings(logger, images, self.prompts, int(state.timestamp.batch))
        self._look_for_grid(images, state, logger)

    def _look_for_grid(self, images: Tensor, state: State, logger: Logger) -> None:
        patch_size = multiple_of_sides(state)
        if not can_measure_grid(images.shape[-2], images.shape[-1], patch_size):
            return
        for name, measure in {"grid": grid_energy, "seam": seam_energy}.items():
            energy = measure(images, patch_size).median().item()
            logger.log_metrics({f"images/{name}_energy": energy})
            if energy > VISIBLE_GRID and dist.get_global_rank() == 0:
                log.warning(
                    "The grid of patches shows in the images, as is usual early on: %s energy %.1f; 1 is none.", name, energy
                )


class GenerationMetrics(Drawing):
    """Draw prompts of a data set at an interval and at the end, and log `metrics/generation/<name>`.

    Weights are averaged if there is an average. Ranks share the prompts; nothing of it touches training's random state.

    Args:
        path: folder of the data set whose captions are drawn and whose images are compared with. Keep it out of training.
        split, caption: of the data set; its first caption column by default.
        reference: other real images: a data set with that split, or a folder of images.
        num: prompts, evenly spaced.
        reference_num: real images that are compared with, likewise; all by default.
        metrics: of cmmd, dino_mmd, fd_dino, fid, clip_score.
        networks: hub id or folder behind a metric, by `clip`, `dino`, `clip_score`, `inception`.
        interval, image_size, seed, num_inference_steps, guidance_scale: see `Drawing`.
        batch_size: images at a time, per GPU.
        cache: folder for features of real images.

    Raises:
        ValueError: a metric or a network's name that isn't known, a network that is of another kind, no such data.
        OSError: a network that cannot be had.
    """

    def __init__(
        self,
        path: str,
        image_size: int | None = None,
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
        super().__init__(seed, num, num_inference_steps, guidance_scale, interval, image_size)
        data = DataSet(path, split, caption)
        self._prompts = [data.caption(index) for index in evenly(len(data), num)]
        self._real: DataSet | ImageFolder = data if reference is None else open_images(reference, split, caption)
        self._reference_num = reference_num
        self._scorer = Scorer(metrics or DEFAULT_METRICS, Networks(**(networks or {})))
        self._cache = default_cache() if cache is None else Path(cache).expanduser()
        self._batch_size = batch_size

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        unwrap(state).say_what_is_lost(self._prompts)

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        device = next(unwrap(state).parameters()).device
        if self._scorer.needs_reference:
            self._scorer.compare_with(self._real, self._reference_num, self._cache, self._batch_size, device)

    def draw(self, state: State, logger: Logger) -> None:
        model: Any = unwrap(state)
        device: torch.device = next(model.parameters()).device

        def images_of(indices: list[int]) -> Tensor:
            prompts, seeds = [self._prompts[i] for i in indices], [self._seed + i for i in indices]
            with get_precision_context(state.precision, state.precision_config):
                return model.generate(prompts, self.image_size, self.image_size, seeds, *self._sampling)

        with model.sampling_weights():
            found = self._scorer.score(images_of, self._prompts, self._batch_size, device)
        logger.log_metrics({f"metrics/generation/{name}": value for name, value in found.items()})


class ShapesScore(Drawing):
    """Draw every held-out combination of the `shapes` source and log `heldout_accuracy`: at the end, and at an interval.

    An image is right if, of the renderings of all combinations, the one asked for is the nearest.

    Args:
        source: the recipe's `train_loader.source`, which says what was held out.
        images_per_prompt: with different seeds.
        image_size, seed, num_inference_steps, guidance_scale: see `Drawing`.
        interval: score during training too, every "100ba", "6400sp" or "0.05dur".
        images_per_prompt_during: fewer images then; they are the first of those that the end draws.

    Raises:
        ValueError: data that isn't of the `shapes` source; an interval that isn't a time or is in epochs.
    """

    def __init__(
        self,
        source: dict[str, Any],
        image_size: int | None = None,
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
        images = images_per_prompt * len(self._scenes)
        super().__init__(seed, images, num_inference_steps, guidance_scale, image_size=image_size)
        if images_per_prompt_during < 1:
            raise ValueError(f"images_per_prompt_during must be at least 1, not {images_per_prompt_during}.")
        if interval is not None:
            if Point.parse_interval(interval).unit not in ("ba", "sp", "dur"):
                raise ValueError(f"interval must be a time such as 100ba, 6400sp or 0.05dur, not {interval}.")
            self._due = create_interval_scheduler(interval, include_end_of_training=False)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        elapsed = state.get_elapsed_duration()
        ends = elapsed is not None and elapsed.value >= 1  # then fit_end scores
        if (self._due(state, Event.BATCH_CHECKPOINT) or rehearsing(state)) and not ends:
            images_per_prompt = self._images_per_prompt if rehearsing(state) else self._images_per_prompt_during
            logger.log_metrics(self._score(state, images_per_prompt))

    def fit_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics(self._score(state, self._images_per_prompt))

    def _score(self, state: State, images_per_prompt: int) -> dict[str, float]:
        asked = self._scenes * images_per_prompt
        prompts, side = [scene.caption for scene in asked], self.image_size
        drawn = nearest_scenes(draw_images(state, prompts, side, side, self._seeds(len(asked)), *self._sampling))
        pairs = list(zip(drawn, asked, strict=True))
        right = {"heldout_accuracy": [d == a for d, a in pairs]}
        for attribute in asked[0]._fields:
            right[f"heldout_accuracy/{attribute}"] = [getattr(d, attribute) == getattr(a, attribute) for d, a in pairs]
        return {name: sum(values) / len(values) for name, values in right.items()}


class DigitsScore(Drawing):
    """Draw digits at the end and log `classifier_accuracy`, and `classifier_accuracy_real` on real scans.

    Args:
        images: how many, the ten digits in turn.
        seed, num_inference_steps, guidance_scale: see `Drawing`.
    """

    def __init__(self, images: int = 200, seed: int = 1000, num_inference_steps: int = 20, guidance_scale: float = 3.0):
        super().__init__(seed, images, num_inference_steps, guidance_scale, image_size=_DIGIT)
        self._labels = [index % 10 for index in range(images)]

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if rehearsing(state):
            self.fit_end(state, logger)

    def init(self, state: State, logger: Logger) -> None:
        if _DIGIT % (multiple := multiple_of_sides(state)):
            raise UserError(
                f"callbacks.digits_score draws at {_DIGIT} px, and the model in multiples of {multiple} (patch_size × "
                "autoencoder downsampling) only; set callbacks.digits_score=false."
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        prompts = [f"a handwritten {DIGIT_WORDS[label]}" for label in self._labels]
        drawn = draw_images(state, prompts, self.image_size, self.image_size, self._seeds(len(prompts)), *self._sampling)
        score = score_digits(drawn, self._labels)
        logger.log_metrics({"classifier_accuracy": score.generated, "classifier_accuracy_real": score.real})
