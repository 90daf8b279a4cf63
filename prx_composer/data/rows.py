"""Rows of bucketed MDS folders by number, from a disk or from an object store: samples, and what is stored beside them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streaming import Stream, StreamingDataset
from streaming.base.format import Reader
from streaming.base.world import World
from torch import Tensor

from prx_composer.common.errors import UserError
from prx_composer.data.buckets import Bucket
from prx_composer.data.contents import fetch_manifest
from prx_composer.data.format import check_shards, open_local
from prx_composer.data.stored import StoredColumn, latent_sizes, read_column, unpack

# Of a shard's download. A connection that is lost now and then must not end a run of a day, as streaming's two retries would.
_RETRIES, _TIMEOUT = 7, 120.0  # seconds

log = logging.getLogger(__name__)


class WholeStream(Stream):
    """A stream that takes no shard for downloaded which is shorter or longer than its index says, as streaming does.

    A connection that is lost in the head of an answer looks like the end of an empty one.
    """

    _sizes: Mapping[str, int] = MappingProxyType({})  # bytes by file name, once the index is there

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Return the shards, as Stream does; remove first what an earlier run left in the cache cut short."""
        shards = super().get_shards(world, True)
        check_shards(Path(self.local, self.split), shards)
        files = [file for shard in shards for pair in shard.file_pairs for file in pair if file is not None]
        self._sizes = {file.basename: file.bytes for file in files}
        if world.is_local_leader:
            for name in self._sizes:
                path = Path(self.local, self.split, name)
                if path.exists() and not self._is_whole(name, path):
                    path.unlink()
        return shards

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        for _ in range(_RETRIES):
            path = Path(super()._download_file(from_basename, to_basename))
            if self._is_whole(from_basename, path):
                return str(path)
            path.unlink()
        raise OSError(f"{self.remote}/{from_basename}: {_RETRIES} downloads in a row had another size than the index says.")

    def _is_whole(self, name: str, path: Path) -> bool:
        size, expected = path.stat().st_size, self._sizes.get(name)
        if expected in (None, size):
            return True
        log.warning("%s has %d of %d bytes; it is downloaded again.", path, size, expected)
        return False


class BucketRows:
    """The shards of every bucket below a folder.

    Args:
        folder: local, or the local cache of `remote`.
        buckets: names of folders in it.
        remote: where the same folders lie remotely, if anywhere; download and caching are then a StreamingDataset's.
    """

    def __init__(self, folder: Path, buckets: list[Bucket], remote: str | None = None):
        self._streaming: StreamingDataset | None = None
        if remote is None:  # plain files: no shared memory, no threads
            self._local = [open_local(folder / str(bucket)) for bucket in buckets]
            self.counts = [len(part) for part in self._local]
        else:
            streams = [WholeStream(local=str(folder / str(bucket)), remote=f"{remote}/{bucket}") for bucket in buckets]
            self._streaming = StreamingDataset(
                streams=streams, batch_size=1, shuffle=False, download_retry=_RETRIES, download_timeout=_TIMEOUT
            )
            self.counts = [int(count) for count in self._streaming.samples_per_stream]
            self._starts = [sum(self.counts[:index]) for index in range(len(buckets))]

    def row(self, bucket: int, index: int) -> dict[str, Any]:
        """Return row `index` of the bucket with that place in `buckets`."""
        if self._streaming is not None:
            return self._streaming[self._starts[bucket] + index]
        return self._local[bucket][index]


class StoredRows:
    """The rows of a stored column, as tensors.

    Args:
        folder: of `encoded_folder`; local, or the local cache of `remote`.
        kind: text, features or latents.
        path: YAML path that named it, for messages.
        buckets: of the data set, with their samples.
        remote: where the same folder lies remotely, if anywhere.

    Raises:
        UserError: as `read_column`, or the column has not as many rows as the data set.
    """

    def __init__(self, folder: Path, kind: str, path: str, buckets: Mapping[Bucket, int], remote: str | None = None):
        fetch_manifest(folder, remote)
        self.column = read_column(folder, kind, path, remote is not None)
        if self.column.buckets != {str(bucket): count for bucket, count in buckets.items()}:
            raise UserError(f"{path}: {folder} was made of other data than lies beside it; delete it and encode again.")
        self._rows = BucketRows(folder, sorted(buckets), remote)

    def read(self, bucket: int, index: int) -> Tensor:
        """Return what is stored of a sample. Raise ValueError if it could not be encoded."""
        row = self._rows.row(bucket, index)
        if not row["shape"]:
            raise ValueError(f"it could not be decoded when {self.column.kind} were stored")
        return unpack(row, self.column.storage)


class StoredLatents:
    """Latents of a split, by the size of the images that they were made of.

    Args:
        rows: by name.
        buckets: of the data set. base_size: its image size.

    Raises:
        ValueError: two columns of one image size.
    """

    def __init__(self, rows: dict[str, StoredRows], buckets: list[Bucket], base_size: int):
        self.columns: dict[str, StoredColumn] = {name: stored.column for name, stored in rows.items()}
        self._of_size: dict[tuple[int, Bucket], StoredRows] = {}
        for name, column in self.columns.items():
            if twice := [other for other, that in self.columns.items() if that.image_size == column.image_size and other != name]:
                raise ValueError(f"latent: {name} and {twice[0]} are both of {column.image_size} px; leave one out.")
            for index, size in enumerate(latent_sizes(column, buckets, base_size)):
                self._of_size[index, size] = rows[name]

    def read(self, bucket: int, size: Bucket, index: int) -> Tensor:
        """Return (channels, h, w) in the dtype that is stored. Raise ValueError for an image that could not be decoded."""
        return self._of_size[bucket, size].read(bucket, index)
