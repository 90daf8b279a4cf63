"""Score of a model of icons while it trains: are things recognised in styles that it has not seen them in?"""

import inspect
from typing import Any

from composer.core import State
from composer.loggers import Logger
from torch import Tensor

from prx_composer.callbacks.drawings import Drawing, check_size, draw_images
from prx_composer.common.errors import UserError
from prx_composer.data.icons import IconsSource
from prx_composer.metrics.nearest_icons import CANDIDATES, score_icons


class IconsScore(Drawing):
    """Draw pairs of name and style that the `icons` source kept out of training, and as many trained ones, and look for them.

    Every drawing is looked for among 100 icons of its style; see `metrics/nearest_icons.py`. Logs, at an interval and at the end,
    `heldout_accuracy`, `trained_accuracy`, `other_style_accuracy`, which memorising reaches, and `chance_accuracy`, each also as
    `…/top5`. Every rank draws all of them, so that the score does not depend on their number.

    Args:
        source: the recipe's `train_loader.source`, which says what was held out.
        image_size: side of the images; the recipe's by default.
        images_per_pair: with different seeds.
        candidates: icons that a drawing is looked for among.
        interval, seed, num_inference_steps, guidance_scale: see `Drawing`; by default it scores at the end only.

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
        super().__init__(seed, 1, num_inference_steps, guidance_scale, interval)
        self._source_arguments = {key: value for key, value in source.items() if key != "name"}
        inspect.signature(IconsSource).bind(**self._source_arguments)
        self._image_size, self._images_per_pair, self._candidates = image_size, images_per_pair, candidates

    def init(self, state: State, logger: Logger) -> None:
        check_size(state, self._image_size, self._image_size, "callbacks.icons_score.image_size")
        self._source = IconsSource(**self._source_arguments)
        if not any(map(self._source.heldout_style, self._source.icons)):
            raise UserError(
                "callbacks.icons_score: no pair of name and style is kept out of training; it needs two sets and "
                "train_loader.source.heldout above 0. Set callbacks.icons_score=false to train without it."
            )

    def draw(self, state: State, logger: Logger) -> None:
        def pictures(prompts: list[str]) -> Tensor:
            seeds = self._seeds(len(prompts))
            return draw_images(state, prompts, self._image_size, self._image_size, seeds, *self._sampling)

        logger.log_metrics(score_icons(self._source, self._image_size, pictures, self._images_per_pair, self._candidates))
