"""Features of real images, computed once: cached by what the set holds and what the extractor is."""

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from composer.utils import dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prx_composer.common.errors import UserError
from prx_composer.common.files import write_whole
from prx_composer.metrics.distances import mean_kernel, moments
from prx_composer.metrics.features import Extractor
from prx_composer.metrics.image_sets import ImageSet, evenly, read_square
from prx_composer.metrics.ranks import from_rank_zero, gathered, share

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """What distances are measured to.

    Args:
        features: fp32 (N, D) of the images that could be decoded.
        key: of the cache.
    """

    features: Tensor
    key: str

    @cached_property
    def unit(self) -> Tensor:
        """Scaled to length 1."""
        return F.normalize(self.features, dim=-1)

    @cached_property
    def within(self) -> float:
        """The kernel's mean among those of length 1."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return mean_kernel(self.unit.to(device))

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        return moments(self.features)


def default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "prx-composer" / "evaluation"


def reference_features(
    images: ImageSet, extractor: Extractor, count: int | None, cache: Path, batch_size: int, device: torch.device
) -> Reference:
    """Features of `count` images of the set, evenly spaced (all by default), by all ranks together; read if they are cached.

    Raises:
        UserError: fewer than two images that can be decoded; a cache that cannot be written.
    """
    chosen = evenly(len(images), count)
    identity = from_rank_zero(images.identity(cache) if dist.get_global_rank() == 0 else "")
    key = hashlib.sha256(f"2 {identity} {len(chosen)} {extractor.fingerprint}".encode()).hexdigest()[:32]
    file = cache / f"{key}.safetensors"
    features = _read(file) if dist.get_global_rank() == 0 else None
    if not from_rank_zero(features is not None):
        made = _compute(images, chosen, extractor, batch_size, device)
        features = made[~made.isnan().any(1)]
        if len(features) < len(made):
            log.warning("%s: %d of %d images cannot be decoded.", images.name, len(made) - len(features), len(made))
        if dist.get_global_rank() == 0:
            _write(file, features)
    features = torch.zeros(0, 1) if features is None else features  # of other ranks, which measure nothing
    if from_rank_zero(len(features)) < 2:
        raise UserError(f"{images.name}: distances need at least two images that can be decoded.")
    return Reference(features, key)


def _compute(images: ImageSet, chosen: list[int], extractor: Extractor, batch_size: int, device: torch.device) -> Tensor:
    log.info("Features of %d images of %s by %s …", len(chosen), images.name, extractor.name)
    made = []
    mine = [chosen[index] for index in share(len(chosen))]
    for start in range(0, len(mine), batch_size):
        squares = [read_square(images, index, extractor.image_size) for index in mine[start : start + batch_size]]
        blank = torch.zeros(3, extractor.image_size, extractor.image_size, dtype=torch.uint8)
        features = extractor(torch.stack([blank if image is None else image for image in squares]).to(device))
        features[torch.tensor([image is None for image in squares], device=device)] = torch.nan
        made.append(features)
    return gathered(torch.cat(made), len(chosen))


def _read(file: Path) -> Tensor | None:
    try:
        return load(file.read_bytes())["features"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("%s cannot be read (%s); it is computed again.", file, error)
        return None


def _write(file: Path, features: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, save({"features": features.contiguous()}))
    except OSError as error:  # not worth losing the number
        log.warning("%s cannot be written (%s); it will be computed again next time.", file, error)
