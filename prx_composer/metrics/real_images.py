"""Real images to compare with: a split of a data set, or a folder of image files, and their features.

Features are computed once: they are cached by what the set holds and what the extractor is.
"""

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

from prx_composer.common.distributed import from_rank_zero, gathered, share
from prx_composer.common.errors import UserError
from prx_composer.common.files import write_whole
from prx_composer.data.contents import FileRecord, column_contents
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import MANIFEST
from prx_composer.metrics.features import Extractor, mean_kernel, moments

log = logging.getLogger(__name__)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LOOKED_AT = 16  # images of a remote set whose bytes are part of its identity


class DataSet:
    """A split in MDS shards, with its captions.

    Args:
        path: folder of the data set.
        split: of it.
        caption: column; the first by default.
        remote: where it lies remotely; `path` is its cache then.

    Raises:
        ValueError: no such data set or caption column.
    """

    def __init__(self, path: str, split: str = "train", caption: str | None = None, remote: str | None = None):
        self._data = ImageCaptionDataset(path, split, {caption: 1.0} if caption else None, remote)
        self._split = Path(path) / split if remote is None else None
        self.name = f"{remote or path}, {split}"
        self._caption = next(iter(self._data.captions))

    def __len__(self) -> int:
        return len(self._data)

    def encoded(self, index: int) -> bytes:
        """Return the image's file."""
        return self._data.row(index)["image"]

    def caption(self, index: int) -> str:
        return self._data.row(index)[self._caption]

    def identity(self, cache: Path) -> str:
        """Return a hash of what the set holds, wherever it lies."""
        if self._split is not None:
            return column_contents(self._split, "image")
        digest = hashlib.sha256(self._data.manifest.to_json().encode())  # remote: to read all would be to download all
        for index in evenly(len(self), _LOOKED_AT):
            digest.update(self.encoded(index))
        return digest.hexdigest()


class ImageFolder:
    """All images of a folder and of the folders in it.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, path: str):
        root = Path(path).expanduser()
        self._files = sorted(file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not self._files:
            raise ValueError(f"{path} has no images ({', '.join(_SUFFIXES)}) and is no data set (it has no <split>/{MANIFEST}).")
        self.name, self._root = path, root.resolve()

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> bytes:
        return self._files[index].read_bytes()

    def identity(self, cache: Path) -> str:
        """Return a hash of what the folder holds, wherever it lies; what was read of files is kept in `cache`."""
        record = FileRecord(cache / "folders" / f"{hashlib.sha256(str(self._root).encode()).hexdigest()[:32]}.json")
        files = {str(file): file for file in self._files}
        record.keep(files)
        return hashlib.sha256(" ".join(record.contents(files).values()).encode()).hexdigest()


ImageSet = DataSet | ImageFolder


def evenly(count: int, wanted: int | None) -> list[int]:
    """Return `wanted` of the numbers below `count`, evenly spaced; all, if there are fewer."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [index * count // wanted for index in range(wanted)]


def open_images(path: str, split: str, caption: str | None = None) -> ImageSet:
    """Open a data set, if the folder has that split, or else a folder of images.

    Raises:
        ValueError: neither.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"There is no folder {path}.")
    if (root / split / MANIFEST).exists() or any(root.glob(f"*/{MANIFEST}")):
        return DataSet(str(root), split, caption)
    return ImageFolder(path)


def read_square(images: ImageSet, index: int, size: int) -> Tensor | None:
    """Return the centred square, uint8 (3, size, size); None if it cannot be decoded."""
    try:
        return decode_image(images.encoded(index), size, size)
    except UNDECODABLE:
        return None


# ------------------------------------------------------------------------------------------------------ their features


@dataclass(frozen=True)
class Reference:
    """Features of real images, which distances are measured to.

    Args:
        features: fp32 (N, D) of the images that could be decoded.
        key: of the cache.
    """

    features: Tensor
    key: str

    @cached_property
    def unit(self) -> Tensor:
        """The features, scaled to length 1."""
        return F.normalize(self.features, dim=-1)

    @cached_property
    def within(self) -> float:
        """`mean_kernel` among the features of length 1."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return mean_kernel(self.unit.to(device))

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        return moments(self.features)


def default_cache() -> Path:
    """Return the folder that features are kept in."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "prx-composer" / "evaluation"


def reference_features(
    images: ImageSet, extractor: Extractor, count: int | None, cache: Path, batch_size: int, device: torch.device
) -> Reference:
    """Return features of `count` images of the set, evenly spaced (all by default).

    All ranks compute them together, or read them if they are cached.

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
