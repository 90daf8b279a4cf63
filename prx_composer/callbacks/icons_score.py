"""Score of a model of icons while it trains: are things recognised in styles that it has not seen them in?"""

import inspect
from typing import Any

from composer.core import Callback, Event, State, Time
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from torch import Tensor

from prx_composer.callbacks.images import check_size, draw_images
from prx_composer.common.errors import UserError
from prx_composer.data.icons import IconsSource
from prx_composer.metrics.nearest_icons import CANDIDATES, score_icons
from prx_composer.models.sampling import check_guidance_scale, check_seeds
from prx_composer.schedule.moments import Point
from prx_composer.schedule.time_budget import with_rehearsal


class IconsScore(Callback):
    """Draws pairs of name and style that the `icons` source kept out of training, and as many trained ones, and looks for every
    drawing among 100 icons of its style; see `metrics/nearest_icons.py`. Logs, at an interval and at the end, `heldout_accuracy`,
    `trained_accuracy`, `other_style_accuracy`, which memorising reaches, and `chance_accuracy`, each also as `…/top5`.

    Every rank draws all of them, so that the score does not depend on their number.

    Args:
        source: the recipe's `train_loader.source`, which says what was held out.
        image_size: side of the images; the recipe's by default.
        interval: a time string, such as "0.25dur" or "1000ba".
        images_per_pair: with different seeds.
        candidates: icons that a drawing is looked for among.
        seed: of the first image; the next ones count on.
        num_inference_steps, guidance_scale: of sampling.

    Raises:
        ValueError: data that isn't of the `icons` source; an interval that isn't a time.
    """

    def __init__(
        self,
        source: dict[str, Any],
        image_size: int,
        interval: str = "1dur",
        images_per_pair: int = 1,
        candidates: int = CANDIDATES,
        seed: int = 1000,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
    ):
        if source.get("name") != "icons":
            raise ValueError("scores models of `train_loader.source: {name: icons, …}` only; set callbacks.icons_score=false.")
        if images_per_pair < 1 or candidates < 2:
            raise ValueError(f"images_per_pair must be at least 1 and candidates 2, not {images_per_pair} and {candidates}.")
        arguments = {key: value for key, value in source.items() if key != "name"}
        inspect.signature(IconsSource).bind(**arguments)
        self._source_arguments = arguments
        self._image_size, self._images_per_pair, self._candidates = image_size, images_per_pair, candidates
        self._seed = seed
        check_seeds([seed])
        check_guidance_scale(guidance_scale)
        self._sampling = (num_inference_steps, guidance_scale)
        Point.parse_interval(interval)
        self._due = with_rehearsal(create_interval_scheduler(Time.from_timestring(interval), include_end_of_training=True))

    def init(self, state: State, logger: Logger) -> None:
        check_size(state, self._image_size, self._image_size, "callbacks.icons_score.image_size")
        self._source = IconsSource(**self._source_arguments)
        if not any(map(self._source.heldout_style, self._source.icons)):
            raise UserError(
                "callbacks.icons_score: no pair of name and style is kept out of training; it needs two sets and "
                "train_loader.source.heldout above 0. Set callbacks.icons_score=false to train without it."
            )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._score_if_due(Event.BATCH_CHECKPOINT, state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._score_if_due(Event.EPOCH_CHECKPOINT, state, logger)

    def _score_if_due(self, event: Event, state: State, logger: Logger) -> None:
        if not self._due(state, event):
            return

        def draw(prompts: list[str]) -> Tensor:
            seeds = [self._seed + index for index in range(len(prompts))]
            return draw_images(state, prompts, self._image_size, self._image_size, seeds, *self._sampling)

        logger.log_metrics(score_icons(self._source, self._image_size, draw, self._images_per_pair, self._candidates))
