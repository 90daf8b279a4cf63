"""Rows of bucketed MDS folders by number, from a disk or from an object store."""

from pathlib import Path
from typing import Any

from streaming import LocalDataset, Stream, StreamingDataset

from prx_composer.data.buckets import Bucket

__all__ = ["BucketRows"]

# Of a shard's download. A connection that is lost now and then must not end a run of a day, as streaming's two retries would.
_RETRIES, _TIMEOUT = 7, 120.0  # seconds


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
            self._local = [LocalDataset(str(folder / str(bucket))) for bucket in buckets]
            self.counts = [len(part) for part in self._local]
        else:
            streams = [Stream(local=str(folder / str(bucket)), remote=f"{remote}/{bucket}") for bucket in buckets]
            self._streaming = StreamingDataset(
                streams=streams, batch_size=1, shuffle=False, download_retry=_RETRIES, download_timeout=_TIMEOUT
            )
            self.counts = [int(count) for count in self._streaming.samples_per_stream]
            self._starts = [sum(self.counts[:index]) for index in range(len(buckets))]

    def row(self, bucket: int, index: int) -> dict[str, Any]:
        """Row `index` of the bucket with that place in `buckets`."""
        if self._streaming is not None:
            return self._streaming[self._starts[bucket] + index]
        return self._local[bucket][index]
