"""Real images to compare with: a split of a data set, or a folder of image files."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from prx_composer.data.contents import FileRecord, column_contents
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import MANIFEST

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LOOKED_AT = 16  # images of a remote set whose bytes are part of its identity


class ImageSet(Protocol):
    """Images by number."""

    name: str

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> bytes:
        """The image's file."""
        ...

    def identity(self, cache: Path) -> str:
        """Tells sets apart by what they hold, wherever they lie; what was read of files is kept in `cache`."""
        ...


class DataSet:
    """A split in MDS shards, with its captions.

    Args:
        path: folder of the data set. split: of it.
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
        return self._data.row(index)["image"]

    def caption(self, index: int) -> str:
        return self._data.row(index)[self._caption]

    def identity(self, cache: Path) -> str:
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
        record = FileRecord(cache / "folders" / f"{hashlib.sha256(str(self._root).encode()).hexdigest()[:32]}.json")
        files = {str(file): file for file in self._files}
        record.keep(files)
        return hashlib.sha256(" ".join(record.contents(files).values()).encode()).hexdigest()


def evenly(count: int, wanted: int | None) -> list[int]:
    """`wanted` of the numbers below `count`, evenly spaced; all, if there are fewer."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int(index) for index in np.arange(wanted) * count // wanted]


def open_images(path: str, split: str, caption: str | None = None) -> DataSet | ImageFolder:
    """A data set, if the folder has that split, or else a folder of images.

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
    """uint8 (3, size, size): the centred square; None if it cannot be decoded."""
    try:
        return decode_image(images.encoded(index), size, size)
    except UNDECODABLE:
        return None
