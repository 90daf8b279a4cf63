"""Whether a drawn icon shows what was asked for in the style that was asked for, among a hundred icons of that style.

Two pictures are compared by the mean squared error of their pixels after a Gaussian blur of standard deviation 1, at their own
size or at 32 px if that is less. A drawing is found (top-1) if no other icon of the style is nearer to it than the one asked for.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import State
from composer.loggers import Logger
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from prx_composer.callbacks.drawings import Drawing, check_size, draw_images
from prx_composer.common.errors import UserError
from prx_composer.data.icons import IconsSource
from prx_composer.data.svg import SVGError

CANDIDATES = 100
COMPARED_AT = 32  # pixels: at more, a shift by a pixel or two would count for more than what is shown
_BLUR = 1.0  # standard deviation, in pixels
TOP = (1, 5)


def comparable(images: Tensor) -> Tensor:
    """Return uint8 images (B, 3, H, W) as they are compared: fp32 (B, 3·h·w)."""
    pixels = images.cpu().float()
    if (factor := COMPARED_AT / max(pixels.shape[-2:])) < 1:
        pixels = F.interpolate(pixels, scale_factor=factor, mode="bilinear", antialias=True)
    return gaussian_blur(pixels, [7, 7], [_BLUR, _BLUR]).flatten(1)


class Subset(NamedTuple):
    """Icons of one style, among which drawings are looked for.

    Args:
        style: of all of them.
        names: the candidates; first those of `heldout`, then those of `trained`, then others.
        heldout: how many of them were kept out of training in this style, and are asked for.
        trained: how many of those that were trained on are asked for, too.
        pictures: (names, …), as `comparable` returns them.
    """

    style: str
    names: list[str]
    heldout: int
    trained: int
    pictures: Tensor

    def places(self, drawn: Tensor, asked: Iterable[int]) -> list[int]:
        """Return of every image, uint8 (B, 3, H, W), how many candidates are nearer to it than the one asked for, by number."""
        distance = torch.cdist(comparable(drawn), self.pictures, compute_mode="donot_use_mm_for_euclid_dist")
        wanted = distance[torch.arange(len(drawn)), torch.tensor(list(asked), dtype=torch.long)]
        return (distance < wanted[:, None]).sum(1).tolist()


def subsets(source: IconsSource, size: int, candidates: int = CANDIDATES) -> list[Subset]:
    """Return the icons that drawings of `size` pixels are looked for among, one subset for each style that has held-out ones.

    At most half of the candidates are held out, and as many trained ones are asked for. Names are chosen by their digests.
    """
    found = []
    for style in source.sets:
        ours = [name for name in source.shuffled_names() if style in source.icons[name]]
        heldout = [name for name in ours if source.heldout_style(name) == style][: candidates // 2]
        trained = [name for name in ours if source.heldout_style(name) != style]
        drawn = {name: picture for name in heldout if (picture := _picture(source, name, style, size)) is not None}
        count = len(drawn)
        for name in trained:
            if len(drawn) == candidates:
                break
            if (picture := _picture(source, name, style, size)) is not None:
                drawn[name] = picture
        if count:
            pictures = comparable(torch.stack(list(drawn.values())))
            found.append(Subset(style, list(drawn), count, min(count, len(drawn) - count), pictures))
    return found


def _picture(source: IconsSource, name: str, style: str, size: int) -> Tensor | None:
    try:
        image = source.picture(name, style, size)
    except SVGError:
        return None  # it is not in the data either
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def accuracies(places: list[int], name: str) -> dict[str, float]:
    """Return top-1 as `name` and top-5 as `name/top5`."""
    shares = {top: sum(place < top for place in places) / max(len(places), 1) for top in TOP}
    return {f"{name}_accuracy": shares[1], f"{name}_accuracy/top5": shares[5]}


def score_icons(
    source: IconsSource, size: int, draw: Callable[[list[str]], Tensor], images_per_pair: int = 1, candidates: int = CANDIDATES
) -> dict[str, float]:
    """Draw pairs of name and style that were kept out of training, and as many that were not, and look for them.

    Args:
        size: of the drawings, in pixels.
        draw: prompts → uint8 (B, 3, size, size), called once.
        images_per_pair: drawings of each.

    Returns:
        Top-1 and top-5 accuracy: `heldout_accuracy`, `heldout_accuracy/top5`; `trained_accuracy`, of pairs that were trained on;
        `other_style_accuracy`, of real pictures of the held-out names in the other styles: what a model would score that had only
        memorised them; and `chance_accuracy`.
    """
    asked = subsets(source, size, candidates)
    prompts = [source.caption(name, part.style) for part in asked for name in part.names[: part.heldout + part.trained]]
    drawn = draw(prompts * images_per_pair)
    places: dict[str, list[int]] = {"heldout": [], "trained": [], "other_style": []}
    chances = dict.fromkeys(TOP, 0.0)
    first = 0
    for part in asked:
        numbers = list(range(part.heldout + part.trained))
        mine = [image + repeat * len(prompts) + first for repeat in range(images_per_pair) for image in numbers]
        for number, place in zip(numbers * images_per_pair, part.places(drawn[mine], numbers * images_per_pair), strict=True):
            places["heldout" if number < part.heldout else "trained"].append(place)
        places["other_style"] += _memorised(source, size, part)
        for top in TOP:
            chances[top] += part.heldout * min(top / len(part.names), 1.0)
        first += len(numbers)
    total = max(sum(part.heldout for part in asked), 1)
    found = {key: value for name, those in places.items() for key, value in accuracies(those, name).items()}
    return found | {"chance_accuracy": chances[1] / total, "chance_accuracy/top5": chances[5] / total}


def _memorised(source: IconsSource, size: int, part: Subset) -> list[int]:
    """Return the places of the held-out names' real pictures in the other styles, all of which were trained on."""
    pictures, numbers = [], []
    for number, name in enumerate(part.names[: part.heldout]):
        for style in source.icons[name]:
            if style != part.style and (picture := _picture(source, name, style, size)) is not None:
                pictures.append(picture)
                numbers.append(number)
    return part.places(torch.stack(pictures), numbers) if pictures else []


class IconsScore(Drawing):
    """Draw pairs of name and style that the `icons` source kept out of training, and as many trained ones, and look for them.

    Every drawing is looked for among 100 icons of its style, as `score_icons` says. Logs, at an interval and at the end,
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
