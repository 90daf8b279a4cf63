"""MDS shards read column by column: nothing is decoded, so nothing executes, and a column that isn't asked for isn't read.

The layout is the one that mosaicml-streaming's MDSReader reads.
"""

from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import inside
from prx_composer.data.storage import fetch, is_remote, join

if TYPE_CHECKING:
    from streaming import LocalDataset
    from streaming.base.format import Reader


def open_local(folder: Path) -> "LocalDataset":
    """Return the rows of a local MDS folder. Reading them executes nothing, whatever its index says.

    Raises:
        UserError: as `check_shards`.
    """
    from streaming import LocalDataset  # slow to import

    dataset = LocalDataset(str(folder))
    check_shards(folder, dataset.shards)
    return dataset


def check_shards(folder: Path, shards: "Iterable[Reader]") -> None:
    """Raise UserError for a column of pickles, which would be executed, and for a file that lies outside of the folder."""
    for shard in shards:
        try:
            shard.validate(allow_unsafe_types=False)
        except ValueError as error:
            raise UserError(
                f"{folder} has a column of pickled objects, which could execute code and are not read. Convert the data anew, "
                f"with text, numbers and bytes only. ({str(error).partition('. ')[0]})"
            ) from error
        with at_path(str(folder)):
            for file in (file for pair in shard.file_pairs for file in pair if file is not None):
                inside(folder, file.basename)


def encodings_of(shard: dict[str, Any]) -> dict[str, str]:
    """Column → MDS encoding, of a shard's entry in its index."""
    return dict(zip(shard["column_names"], shard["column_encodings"], strict=True))


class LinkError(ValueError):
    """A shard that lies elsewhere."""


def _is_whole(folder: str, raw: dict[str, Any]) -> bool:
    """Whether the uncompressed file of a compressed shard lies there: a `StreamingDataset` leaves only that in its cache."""
    if is_remote(folder):
        return False
    path = Path(folder) / raw["basename"]
    return path.is_file() and path.stat().st_size == raw["bytes"]


class RawShard:
    """The samples of one shard as bytes, by column.

    Args:
        folder: of the index, local or remote.
        shard: its entry in the index.
        cache: where a remote file is downloaded to.
        follow_links: open a symbolic link that leads out of the folder.

    Raises:
        ValueError: the file ends early, or its name leads out of the folder. On reading a sample, likewise.
        OSError: it is not there.
    """

    def __init__(self, folder: str, shard: dict[str, Any], cache: Path, follow_links: bool = False):
        self._names, self._fixed = shard["column_names"], shard["column_sizes"]
        raw, zipped = shard["raw_data"], shard.get("zip_data")
        if zipped and not _is_whole(folder, raw):
            from streaming.base.compression import decompress

            path = self._fetch(folder, zipped["basename"], cache, follow_links)
            self._content = np.frombuffer(decompress(shard["compression"], path.read_bytes()), np.uint8)
        else:
            self._content = np.asarray(np.memmap(self._fetch(folder, raw["basename"], cache, follow_links), mode="r"))
        self._count = int(shard["samples"])
        if len(self._content) < 4 * (self._count + 2):
            raise ValueError(f"{self._file} ends early")
        self._offsets = self._content[4 : 4 * (self._count + 2)].view(np.uint32)

    def _fetch(self, folder: str, name: str, cache: Path, follow_links: bool) -> Path:
        self._file = name
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name} leads out of {folder}")
        path = fetch(join(folder, name), cache)
        if not is_remote(folder) and not follow_links and not path.resolve().is_relative_to(Path(folder).resolve()):
            raise LinkError(f"{name} is or passes a symbolic link that leads out of {folder}")
        return path

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        return (self.read(index) for index in range(self._count))

    def read(self, index: int, columns: Container[str] | None = None) -> dict[str, bytes]:
        """The columns of a sample, all unless they are named."""
        return {
            name: self._content[begin:end].tobytes()
            for name, (begin, end) in self._spans(index).items()
            if columns is None or name in columns
        }

    def sizes(self, index: int) -> dict[str, int]:
        """Bytes of every column of a sample."""
        return {name: end - begin for name, (begin, end) in self._spans(index).items()}

    def _spans(self, index: int) -> dict[str, tuple[int, int]]:
        begin, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        if not begin <= stop <= len(self._content):
            raise ValueError(f"{self._file} ends early")
        stated = [size for size in self._fixed if not size]
        position = begin + 4 * len(stated)
        if position > stop:
            raise ValueError("a sample ends early")
        sizes = iter(np.frombuffer(self._content[begin:position].tobytes(), "<u4").tolist())
        spans = {}
        for name, size in zip(self._names, self._fixed, strict=True):
            end = position + int(size or next(sizes))
            spans[name] = position, end
            position = end
        if position > stop:
            raise ValueError("a sample ends early")
        return spans
