"""Captioned images in MDS shards, as samples ready for the collator. Undecodable ones are counted, named and replaced."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from prx_composer.common.errors import UserError
from prx_composer.data.batches import epoch_steps
from prx_composer.data.bucketed import BucketedDataset, SampleRequest
from prx_composer.data.buckets import Bucket
from prx_composer.data.contents import check_copy
from prx_composer.data.latents import StoredLatents, names_of
from prx_composer.data.rows import BucketRows
from prx_composer.data.schema import MANIFEST, Manifest
from prx_composer.data.storage import download
from prx_composer.data.stored import ENCODED, IMAGE, StoredColumn, encoded_folder, manifest_path, read_column, unpack
from prx_composer.data.transforms import UNDECODABLE, decode_image

log = logging.getLogger(__name__)

MIN_SEEN_FOR_RATE = 500


class UndecodableError(UserError):
    """Too many samples of a data set cannot be decoded to go on."""


def read_manifest(path: str | Path, split: str, captions: dict[str, float] | None, features: list[str] | None = None) -> Manifest:
    """The manifest of a split that has the captions and features asked for.

    Raises:
        ValueError: no such folder, no samples, no such caption or feature column, impossible weights.
    """
    folder = Path(path) / split
    if not (folder / MANIFEST).exists():
        raise ValueError(
            f"There is no data set in {folder}: it has no {MANIFEST}. "
            "Set `path` and `split` to one, or name a `source` to make it from."
        )
    manifest = Manifest.read(folder)
    for column, weight in (captions or {}).items():
        if column not in manifest.captions:
            raise ValueError(f"captions: no caption column {column!r}; the data set has {', '.join(manifest.captions)}.")
        if weight < 0 or sum((captions or {}).values()) <= 0:
            raise ValueError(f"captions: weights must be non-negative with a positive sum, not {captions}.")
    for column in features or []:
        if column not in manifest.features and not (folder / ENCODED / column / IMAGE).exists():
            there = ", ".join(manifest.features) or "none"
            raise ValueError(
                f"features: no feature column {column!r}; the data set has {there}. `prx encode features` makes one."
            )
    return manifest


class ImageCaptionDataset(BucketedDataset):
    """Random access to a split of bucketed MDS folders.

    With `remote`, download and caching are a StreamingDataset's. The order is always the batch sampler's, which makes an
    epoch independent of the number of workers and a resume exact.

    Args:
        path: folder with the splits; local, or the local cache of `remote`.
        split: name of the split.
        captions: caption column → weight of choosing it; by default the first column alone.
        features: feature columns that samples are to have: of the data set, or stored by `prx encode features`.
        text_embedding: name of embeddings that `prx encode text` has stored for these captions.
        latent: name of latents that `prx encode latents` has stored, or names, one for every image size that is trained.
        images: whether images are decoded; by default unless there are latents.
        remote: where the same layout lies remotely (`s3://…`), if anywhere.
        max_undecodable: share of samples above which training stops.
        max_workers: DataLoader workers that will share this object, for the counts.

    Raises:
        ValueError: no such folder, no samples, no such caption or feature column; neither images nor latents.
        UserError: something stored that isn't there, or belongs to other data.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        captions: dict[str, float] | None = None,
        remote: str | None = None,
        seed: int = 0,
        max_undecodable: float = 0.01,
        max_workers: int = 0,
        features: list[str] | None = None,
        text_embedding: str | None = None,
        latent: str | list[str] | None = None,
        images: bool | None = None,
    ):
        folder = Path(path) / split
        if remote is not None and (folder / MANIFEST).exists():
            check_copy(folder, f"{remote}/{split}")
        elif remote is not None:
            download(f"{remote}/{split}/{MANIFEST}", folder / MANIFEST)
        self.manifest = read_manifest(path, split, captions, features)
        self.image_size = self.manifest.image_size
        self.features = features or []
        self._feature_rows: dict[str, tuple[StoredColumn, BucketRows]] = {}
        self.captions = captions or {self.manifest.captions[0]: 1.0}
        self.buckets = sorted(self.manifest.buckets)
        self._rows = BucketRows(folder, self.buckets, None if remote is None else f"{remote}/{split}")
        self.counts = self._rows.counts
        self.text_columns = {}  # by caption
        self._text_rows: dict[str, BucketRows] = {}
        for name in self.features:
            if name not in self.manifest.features:
                at = None if remote is None else f"{remote}/{split}/{ENCODED}/{name}/{IMAGE}"
                self._feature_rows[name] = self._stored(encoded_folder(path, split, name, IMAGE), at, "features", "features")
        if text_embedding is not None:
            for caption in self.captions:
                at = f"{ENCODED}/{text_embedding}/{caption}"
                self.text_columns[caption], self._text_rows[caption] = self._stored(
                    encoded_folder(path, split, text_embedding, caption),
                    None if remote is None else f"{remote}/{split}/{at}",
                    "text",
                    "text_embedding",
                )
        self.images = not latent if images is None else images
        if not (self.images or latent):
            raise ValueError("images: false leaves nothing to train on; name stored latents in `latent`.")
        self.latents: StoredLatents | None = None
        if latent:
            if "latent" in self.features:
                raise ValueError("features: a column cannot be called 'latent' beside stored latents; encode it by another name.")
            columns = {}
            for name in names_of(latent):
                at = None if remote is None else f"{remote}/{split}/{ENCODED}/{name}/{IMAGE}"
                columns[name] = self._stored(encoded_folder(path, split, name, IMAGE), at, "latents", "latent")
            self.latents = StoredLatents(columns, self.buckets, self.image_size)
        self.latent_columns = {} if self.latents is None else self.latents.columns
        self._offsets = np.cumsum([0, *self.counts])
        self._seed = seed
        self._max_undecodable = max_undecodable
        self._counters = torch.zeros(max_workers + 1, 2, dtype=torch.int64).share_memory_()  # seen, undecodable
        self._named: set[int] = set()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def first_of(self, bucket: int) -> int:
        """The bucket's first; the others follow."""
        return int(self._offsets[bucket])

    def ids(self) -> list[NDArray[np.int64]]:
        """Every sample once, by bucket, in stored order."""
        return [first + np.arange(count) for first, count in zip(self._offsets, self.counts, strict=False)]

    def epoch_ids(self, epoch: int, batch_size: int) -> list[NDArray[np.int64]]:
        """All of them; what doesn't fill a batch is another one in every epoch."""
        return self.ids()

    def epoch_steps(self, batch_size: int) -> int:
        """How many full batches they make."""
        return epoch_steps(self.counts, batch_size, shuffle=True)

    def bucket_of(self, sample_id: int) -> int:
        """Index of the bucket that holds a sample."""
        return int(np.searchsorted(self._offsets, sample_id, side="right")) - 1

    @property
    def undecodable(self) -> int:
        """How many decodings failed so far, over all workers of this rank."""
        return int(self._counters[:, 1].sum())

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        """`image` uint8 (3, height, width) or `latent` (channels, h, w) or both, `caption`, `sample_id` (of the sample that was
        really used), `features` by column; in evaluation `counted`, whether it is to be measured."""
        bucket = self.bucket_of(request.sample_id)
        first, count = int(self._offsets[bucket]), self.counts[bucket]
        for attempt in range(count):
            sample_id = first + (request.sample_id - first + attempt) % count
            row = self.row(sample_id)
            self._count(seen=1)
            try:
                seen = self._see(row, bucket, sample_id - first, Bucket(request.height, request.width))
            except UNDECODABLE as error:
                instead = "the next of its bucket takes its place" if request.counted is None else "evaluation leaves it out"
                self._note_undecodable(sample_id, row.get("key", ""), error, instead)
                continue
            column = self.choose_caption(sample_id, request.epoch)
            features = {name: self._feature(name, row, bucket, sample_id - first) for name in self.features}
            sample = {**seen, "caption": row[column], "sample_id": sample_id, "features": features}
            if request.counted is not None:  # another sample in its place is measured in its own
                sample["counted"] = request.counted and attempt == 0
            if column in self._text_rows:
                stored = self._text_rows[column].row(bucket, sample_id - first)
                sample["text_embedding"] = unpack(stored, self.text_columns[column].storage)
            return sample
        raise UndecodableError(f"None of the {count} images of bucket {self.buckets[bucket]} can be decoded.")

    def look_at(self, request: SampleRequest) -> dict[str, Any]:
        """As `dataset[request]`, but what cannot be decoded is not counted; while no worker runs."""
        counters, named = self._counters.clone(), set(self._named)
        try:
            return self[request]
        finally:
            self._counters.copy_(counters)
            self._named = named

    def row(self, sample_id: int) -> dict[str, Any]:
        """A sample as it is stored, by column."""
        bucket = self.bucket_of(sample_id)
        return self._rows.row(bucket, sample_id - int(self._offsets[bucket]))

    def choose_caption(self, sample_id: int, epoch: int) -> str:
        """The caption column that a sample is trained with in an epoch."""
        columns = list(self.captions)
        if len(columns) == 1:
            return columns[0]
        weights = np.array(list(self.captions.values()))
        choice = np.random.default_rng([self._seed, epoch, sample_id]).choice(len(columns), p=weights / weights.sum())
        return columns[choice]

    def _stored(self, folder: Path, remote: str | None, kind: str, path: str) -> tuple[StoredColumn, BucketRows]:
        """A stored column and its rows; raises UserError, at `path`, unless it has as many as the data set."""
        if remote is not None and manifest_path(folder).exists():
            check_copy(folder, remote)
        elif remote is not None:
            download(f"{remote}/{manifest_path(folder).name}", manifest_path(folder))
        column = read_column(folder, kind, path, remote is not None)
        if column.buckets != {str(bucket): self.manifest.buckets[bucket] for bucket in self.buckets}:
            raise UserError(f"{path}: {folder} was made of other data than lies beside it; delete it and encode again.")
        return column, BucketRows(folder, self.buckets, remote)

    def _see(self, row: dict[str, Any], bucket: int, index: int, size: Bucket) -> dict[str, torch.Tensor]:
        """Image and latent of a sample; raises one of UNDECODABLE."""
        seen = {"image": decode_image(row["image"], *size)} if self.images else {}
        if self.latents is not None:
            seen["latent"] = self.latents.read(bucket, size, index)
        return seen

    def check_sizes(self, image_size: int, sizes: list[Bucket]) -> None:
        """Raises ValueError if there are latents, but none of images of these sizes, bucket by bucket."""
        if self.latents is not None:
            self.latents.check(image_size, sizes)

    def _feature(self, name: str, row: dict[str, Any], bucket: int, index: int) -> torch.Tensor:
        if name not in self._feature_rows:
            return torch.tensor(row[name])  # a copy: the row's memory is read-only
        column, rows = self._feature_rows[name]
        return unpack(rows.row(bucket, index), column.storage)

    def _count(self, seen: int = 0, undecodable: int = 0) -> None:
        worker = get_worker_info()
        row = self._counters[0 if worker is None else worker.id + 1]
        row += torch.tensor([seen, undecodable])

    def _note_undecodable(self, sample_id: int, key: str, error: Exception, instead: str) -> None:
        self._count(undecodable=1)
        if sample_id not in self._named:
            self._named.add(sample_id)
            log.warning("Sample %d (%s) cannot be decoded, %s: %s", sample_id, key, instead, error)
        seen, undecodable = self._counters.sum(0).tolist()
        if seen >= MIN_SEEN_FOR_RATE and undecodable > self._max_undecodable * seen:
            raise UndecodableError(
                f"{undecodable} of {seen} samples could not be decoded, more than train_loader.max_undecodable = "
                f"{self._max_undecodable:.2%}. Mend the data, or raise that limit if it is what you expect."
            )

    def identity(self) -> dict[str, Any]:
        return {"counts": self.counts}
