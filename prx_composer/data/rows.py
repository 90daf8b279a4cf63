"""The rows of a data set and of what is stored beside it, from a disk or from an object store."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streaming import Stream, StreamingDataset
from streaming.base.format import Reader
from streaming.base.world import World
from torch import Tensor

from prx_composer.common.errors import UserError
from prx_composer.data.contents import fetch_manifest
from prx_composer.data.format import CAPTIONS, Bucket, check_shards, open_local, read_row
from prx_composer.data.stored import read_column, unpack

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

    def row(self, bucket: int, index: int) -> dict[str, Any]:
        """Return row `index` of the bucket with that place in `buckets`. Raise BrokenShardError if its shard cannot be read."""
        if self._streaming is not None:
            return self._streaming[sum(self.counts[:bucket]) + index]
        return read_row(self._local[bucket], index)

    def keys(self) -> Iterator[Iterator[str]] | None:
        """Return the keys of all rows by bucket, which fetches every shard; None if the shards are here."""
        if self._streaming is None:
            return None
        return ((str(self.row(bucket, index)["key"]) for index in range(count)) for bucket, count in enumerate(self.counts))


class StoredRows:
    """The rows of a stored column, as tensors.

    Args:
        folder: of `encoded_folder`; local, or the local cache of `remote`.
        kind: text, features, latents or captions.
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
            again = "caption" if kind == CAPTIONS else "encode"
            raise UserError(f"{path}: {folder} was made of other data than lies beside it; delete it and {again} again.")
        self._rows = BucketRows(folder, sorted(buckets), remote)

    def read(self, bucket: int, index: int) -> Tensor:
        """Return what is stored of a sample. Raise ValueError if it could not be encoded."""
        row = self._rows.row(bucket, index)
        if not row["shape"]:
            raise ValueError(f"it could not be decoded when {self.column.kind} were stored")
        return unpack(row, self.column.storage)

    def text(self, bucket: int, index: int) -> str:
        """Return the caption that is stored of a sample; "" if its image could not be decoded."""
        return self._rows.row(bucket, index)["values"].decode()
