"""Whether a drawn icon shows what was asked for in the style that was asked for, among a hundred icons of that style.

Two pictures are compared by the mean squared error of their pixels after a Gaussian blur of standard deviation 1, at their own
size or at 32 px if that is less. A drawing is found (top-1) if no other icon of the style is nearer to it than the one asked for.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from prx_composer.callbacks.drawings import Drawing, draw_images
from prx_composer.common.errors import UserError
from prx_composer.common.pages import Text, Tile, contact_sheet, picture
from prx_composer.data.icons import IconsSource
from prx_composer.data.svg import SVGError

log = logging.getLogger(__name__)

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
    """Names that are asked for in one style, and the pictures that drawings of them are looked for among.

    Args:
        style: of what is asked for.
        names: the candidates; first those of `heldout`, then those of `trained`, then others.
        heldout: how many of them were kept out of training in this style, and are asked for.
        trained: how many of those that were trained on are asked for, too.
        pictures: of every name, as `comparable` returns them: (names, F) in this style, or (names, S, F) in S styles.
    """

    style: str
    names: list[str]
    heldout: int
    trained: int
    pictures: Tensor

    @property
    def asked(self) -> list[str]:
        return self.names[: self.heldout + self.trained]

    def places(self, drawn: Tensor, asked: Iterable[int]) -> list[int]:
        """Return of every image, uint8 (B, 3, H, W), how many names are nearer to it than the one asked for, by number.

        A name is as near as the nearest of its pictures.
        """
        pictures = self.pictures.flatten(0, -2)
        distance = torch.cdist(comparable(drawn), pictures, compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance.unflatten(1, (len(self.names), -1)).amin(-1)
        wanted = distance[torch.arange(len(drawn)), torch.tensor(list(asked), dtype=torch.long)]
        return (distance < wanted[:, None]).sum(1).tolist()

    def in_every_style(self, source: IconsSource, size: int) -> "Subset":
        """Return the same with every name's pictures in all styles; one that a style lacks is shown in this style."""
        styles = [style for style in source.sets if style != self.style]
        shown = [self.pictures]
        for style in styles:
            pictures = [_picture(source, name, style, size) for name in self.names]
            shown.append(
                torch.cat(
                    [ours[None] if p is None else comparable(p[None]) for p, ours in zip(pictures, self.pictures, strict=True)]
                )
            )
        return self._replace(pictures=torch.stack(shown, 1))


def subsets(source: IconsSource, size: int, candidates: int = CANDIDATES) -> list[Subset]:
    """Return the icons that drawings of `size` pixels are looked for among, one subset for each style that has held-out ones.

    At most half of the candidates are held out, and as many trained ones are asked for. Names are chosen by their digests.
    """
    found = []
    for style in source.sets:
        ours = [name for name in source.shuffled_names if style in source.icons[name]]
        heldout = [name for name in ours if source.is_heldout(name, style)][: candidates // 2]
        trained = [name for name in ours if not source.is_heldout(name, style)]
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
    except (SVGError, KeyError):
        return None  # it is not in the data either
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def accuracies(places: list[int], name: str) -> dict[str, float]:
    """Return top-1 as `name` and top-5 as `name/top5`."""
    shares = {top: sum(place < top for place in places) / max(len(places), 1) for top in TOP}
    return {f"{name}_accuracy": shares[1], f"{name}_accuracy/top5": shares[5]}


def score_icons(
    source: IconsSource,
    size: int,
    draw: Callable[[list[str]], Tensor],
    images_per_pair: int = 1,
    candidates: int = CANDIDATES,
    wordings: Sequence[str] = (),
) -> dict[str, float]:
    """Draw pairs of name and style that were kept out of training, and as many that were not, and look for them.

    Args:
        size: of the drawings, in pixels.
        draw: prompts → uint8 (B, 3, size, size), called once for `caption` and once for each of the wordings.
        images_per_pair: drawings of each.
        wordings: further caption columns to ask with: `sentence`, `word`.

    Returns:
        Top-1 and top-5 accuracy: `heldout_accuracy`, `heldout_accuracy/top5`; `trained_accuracy`, of pairs that were trained on;
        `other_style_accuracy`, of real pictures of the held-out names in the other styles of the source, if it has any: what a
        model would score that had only memorised them; `chance_accuracy`; and for each wording, such as `word_accuracy`, of all
        the pairs. A prompt that names no style may be drawn in any: a name is then as near as its picture in the nearest style.
    """
    asked = subsets(source, size, candidates)
    found = dict[str, float]()
    for wording in ("caption", *wordings):
        prompts = [source.prompts(name, part.style)[wording] for part in asked for name in part.asked]
        drawn = iter(draw(prompts * images_per_pair).unflatten(0, (images_per_pair, -1)).split([len(p.asked) for p in asked], 1))
        heldout, trained = list[int](), list[int]()
        for part in asked:
            compared = part.in_every_style(source, size) if wording == "word" else part
            for images in next(drawn):
                places = compared.places(images, range(len(images)))
                heldout += places[: part.heldout]
                trained += places[part.heldout :]
        if wording == "caption":
            found |= accuracies(heldout, "heldout") | accuracies(trained, "trained")
        else:
            found |= accuracies(heldout + trained, wording)
    if memorised := [place for part in asked for place in _memorised(source, size, part)]:
        found |= accuracies(memorised, "other_style")
    total = max(sum(part.heldout for part in asked), 1)
    chances = {top: sum(part.heldout * min(top / len(part.names), 1.0) for part in asked) / total for top in TOP}
    return found | {"chance_accuracy": chances[1], "chance_accuracy/top5": chances[5]}


def _memorised(source: IconsSource, size: int, part: Subset) -> list[int]:
    """Return the places of the held-out names' real pictures in the other styles, all of which were trained on."""
    pictures, numbers = [], []
    for number, name in enumerate(part.names[: part.heldout]):
        for style in source.icons[name]:
            if style != part.style and (picture := _picture(source, name, style, size)) is not None:
                pictures.append(picture)
                numbers.append(number)
    return part.places(torch.stack(pictures), numbers) if pictures else []


def heldout_sheet(source: IconsSource, size: int, draw: Callable[[list[str]], Tensor], most: int) -> Image.Image | None:
    """Draw `most` things in every style that they have, and return a picture of the drawings.

    A thing is a few tiles: its drawings in the styles that it was trained on, in the one that was kept out, and the real one of
    that. Which things are shown, the digests of their names decide.

    Args:
        draw: prompts → uint8 (B, 3, size, size).
    """
    pairs = [(name, style) for name in source.shuffled_names for style in source.icons[name]]
    shown = [(*pair, real) for pair in pairs if source.is_heldout(*pair) and (real := _picture(source, *pair, size)) is not None]
    asked = list[tuple[str, str, Text, Tensor | None]]()
    for name, style, real in shown[:most]:
        trained = (other for other in source.icons[name] if not source.is_heldout(name, other))
        asked += [(name, other, Text("trained on", "grey"), None) for other in trained]
        asked.append((name, style, Text("never trained on", "blue"), real))
    if not asked:
        return None
    drawn, tiles = draw([source.prompts(name, style)["caption"] for name, style, *_ in asked]), list[Tile]()
    for (name, style, text, real), image in zip(asked, drawn, strict=True):
        tiles.append(Tile(picture(image), (Text(f"{name}: {style}"), text)))
        if real is not None:
            tiles.append(Tile(picture(real), (Text(f"{name}: {style}"), Text("the real one", "grey"))))
    per_thing = 1 + len(source.sets)
    return contact_sheet(tiles, per_thing * max(1, 10 // per_thing))  # short rows side by side


class IconsScore(Drawing):
    """Draw pairs of name and style that the `icons` source kept out of training, and as many trained ones, and look for them.

    Every drawing is looked for among 100 icons of its style, as `score_icons` says. Logs, at an interval and at the end,
    `heldout_accuracy`, `trained_accuracy`, `other_style_accuracy`, which memorising reaches, and `chance_accuracy`, each also as
    `…/top5`; and for each of the `wordings` how often it leads to the right thing. Every rank draws all of them, so that the
    score does not depend on their number.

    Args:
        source: the recipe's `train_loader.source`, which says what was held out.
        folder: the run folder.
        images_per_pair: with different seeds.
        candidates: icons that a drawing is looked for among.
        wordings: columns of captions to ask with besides `caption`: `sentence` and `word`.
        shown: things that `<run folder>/images/heldout_ba<batch>.png` shows, see `heldout_sheet`.
        interval, image_size, seed, num_inference_steps, guidance_scale: see `Drawing`; by default it scores at the end only.

    Raises:
        ValueError: data that isn't of the `icons` source; an interval that isn't a time.
    """

    def __init__(
        self,
        source: dict[str, Any],
        folder: str,
        image_size: int | None = None,
        interval: str = "1dur",
        images_per_pair: int = 1,
        candidates: int = CANDIDATES,
        seed: int = 1000,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        wordings: list[str] | None = None,
        shown: int = 8,
    ):
        if source.get("name") != "icons":
            raise ValueError("scores models of `train_loader.source: {name: icons, …}` only; set callbacks.icons_score=false.")
        if images_per_pair < 1 or candidates < 2:
            raise ValueError(f"images_per_pair must be at least 1 and candidates 2, not {images_per_pair} and {candidates}.")
        if unknown := sorted(set(wordings or ()) - set(IconsSource.captions)):
            raise ValueError(f"wordings are columns of captions: {', '.join(IconsSource.captions)}, not {unknown[0]!r}.")
        super().__init__(seed, 1, num_inference_steps, guidance_scale, interval, image_size)
        self._source_arguments = {key: value for key, value in source.items() if key != "name"}
        inspect.signature(IconsSource).bind(**self._source_arguments)
        self._arguments = (images_per_pair, candidates, list(wordings or ()))
        self._folder, self._shown = Path(folder) / "images", shown

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        self._source = IconsSource(**self._source_arguments)
        if not any(starmap(self._source.is_heldout, self._source.pairs)):
            raise UserError(
                "callbacks.icons_score: no pair of name and style is kept out of training; it needs two sets and "
                "train_loader.source.heldout above 0, or train_loader.source.trained_names. Set callbacks.icons_score=false to "
                "train without it."
            )

    def draw(self, state: State, logger: Logger) -> None:
        def pictures(prompts: list[str]) -> Tensor:
            return draw_images(state, prompts, self.image_size, self.image_size, self._seeds(len(prompts)), *self._sampling)

        logger.log_metrics(score_icons(self._source, self.image_size, pictures, *self._arguments))
        sheet = heldout_sheet(self._source, self.image_size, pictures, self._shown)
        if dist.get_global_rank() == 0 and sheet is not None:
            path = self._folder / f"heldout_ba{int(state.timestamp.batch):06d}.png"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                sheet.save(path)
                log.info("Drew %s", path)
            except OSError as error:  # a full disk: no reason to lose the run
                log.error("%s cannot be written: %s", path, error)
