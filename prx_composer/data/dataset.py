"""Captioned images in MDS shards, from a disk or from an object store, as samples ready for the collator.

What cannot be decoded is counted, named and replaced.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from prx_composer.common.errors import UserError
from prx_composer.data.contents import KEYS, LeftOut, SkipList, fetch_if_there, fetch_manifest, key_hashes
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import CAPTIONS, ENCODED, IMAGE, MANIFEST, BrokenShardError, Bucket, Manifest
from prx_composer.data.rows import BucketRows, StoredRows
from prx_composer.data.sampler import BucketedDataset, SampleRequest
from prx_composer.data.stored import (
    begun_captions,
    encoded_folder,
    fetch_captions,
    latent_names,
    latent_size_problem,
    latent_sizes,
    trained_captions,
    without_pooled,
)
from prx_composer.models.prompts import Captions, not_to_be_stored, wordings

log = logging.getLogger(__name__)


def leave_out(skip: SkipList, folder: Path, remote: str | None = None, rows: BucketRows | None = None) -> LeftOut:
    """Return what a skip list leaves out of a split; its keys are read once, see `key_hashes`.

    Args:
        folder: of the split; local, or the local cache of `remote`.
        rows: of the split, if `remote` is given.

    Raises:
        UserError: as `key_hashes`; nothing would be left.
    """
    if remote is not None and not (folder / KEYS).exists():
        fetch_if_there(f"{remote}/{KEYS}", folder / KEYS)
    hashes = key_hashes(folder, None if rows is None else rows.keys())
    left_out = skip.find(hashes)
    if left_out.samples == sum(map(len, hashes)):
        raise UserError(f"skip: {skip.path} leaves out all {left_out.samples:,} samples of {folder}; none is left to train on.")
    return left_out


MIN_SEEN_FOR_RATE = 500
_NEAR = 3  # samples in a row that cannot be decoded, before one from elsewhere takes the place


class UndecodableError(UserError):
    """Too many samples of a data set cannot be decoded to go on."""


def read_manifest(path: str | Path, split: str, captions: Captions | None, features: list[str] | None = None) -> Manifest:
    """Return the manifest of a split that has the captions and features asked for.

    Raises:
        ValueError: no such folder, no samples, no such caption or feature column, impossible weights or wordings.
    """
    folder = Path(path) / split
    if not (folder / MANIFEST).exists():
        raise ValueError(
            f"There is no data set in {folder}: it has no {MANIFEST}. "
            "Set `path` and `split` to one, or name a `source` to make it from. `prx data convert` makes one of parquet files, "
            "tars, or JSON lines beside images."
        )
    manifest = Manifest.read(folder)
    weights = {column: wording.weight for column, wording in wordings(captions or {}).items()}
    for column, weight in weights.items():
        if column not in manifest.captions:
            known = manifest.captions
            there = f"; the data set has {', '.join(known)}. `captions: null` trains on {known[0]}" if known else ""
            raise ValueError(f"captions: no caption column {column!r}{there}.{begun_captions(folder, column)}")
        if not (0 <= weight < math.inf and sum(weights.values()) > 0):
            raise ValueError(f"captions: weights must be numbers from 0 on with a positive sum, not {weights}.")
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
        path, split, captions, remote, max_undecodable, features, text_embedding, latent, images, skip: as a recipe gives them to
            `ImageCaptionData`.
        seed: of choices.
        max_workers: DataLoader workers that will share this object, for the counts.

    Attributes:
        left_out: what `skip` leaves out, if there is one.

    Raises:
        ValueError: no such folder, no samples, no such caption or feature column; neither images nor latents.
        UserError: something stored that isn't there, or belongs to other data; a skip list that leaves nothing.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        captions: Captions | None = None,
        remote: str | None = None,
        seed: int = 0,
        max_undecodable: float = 0.01,
        max_workers: int = 0,
        features: list[str] | None = None,
        text_embedding: str | None = None,
        latent: str | list[str] | None = None,
        images: bool | None = None,
        skip: str | None = None,
    ):
        folder, remote = Path(path) / split, None if remote is None else f"{remote}/{split}"
        fetch_manifest(folder, remote)
        if remote is not None:
            fetch_captions(folder, remote, captions or {})
        self.manifest = read_manifest(path, split, captions, features)
        buckets = sorted(self.manifest.buckets)
        self._rows = BucketRows(folder, buckets, remote)
        self.left_out = None if skip is None else leave_out(SkipList.read(skip), folder, remote, self._rows)
        places = None if self.left_out is None else [self.left_out.places]
        super().__init__(self.manifest.image_size, buckets, [self._rows.counts], places)

        def stored(kind: str, key: str, name: str, source: str = IMAGE) -> StoredRows:
            there = None if remote is None else f"{remote}/{ENCODED}/{name}/{source}"
            return StoredRows(encoded_folder(path, split, name, source), kind, key, self.manifest.buckets, there)

        self.captions = trained_captions(captions, self.manifest)
        self._written = {name: stored(CAPTIONS, "captions", name) for name in self.captions if name in self.manifest.beside}
        if text_embedding is not None and (problem := not_to_be_stored(captions or {})):
            raise ValueError(problem)
        self.features = features or []
        beside = [name for name in self.features if name not in self.manifest.features]
        self._features = {name: stored("features", "features", name) for name in beside}
        self._texts = (
            {} if text_embedding is None else {c: stored("text", "text_embedding", text_embedding, c) for c in self.captions}
        )
        self.text_columns = {caption: rows.column for caption, rows in self._texts.items()}
        self.images = not latent if images is None else images
        if not (self.images or latent):
            raise ValueError("images: false leaves nothing to train on; name stored latents in `latent`.")
        if latent and "latent" in self.features:
            raise ValueError("features: a column cannot be called 'latent' beside stored latents; encode it by another name.")
        latents = {name: stored("latents", "latent", name) for name in latent_names(latent)}
        self.latent_columns = {name: rows.column for name, rows in latents.items()}
        self._latents: dict[tuple[int, Bucket], StoredRows] = {}  # by bucket, and by size of the images that they were made of
        for name, rows in latents.items():
            same = [other for other in latents if latents[other].column.image_size == rows.column.image_size]
            if len(same) > 1:
                raise ValueError(f"latent: {same[0]} and {same[1]} are both of {rows.column.image_size} px; leave one out.")
            for index, size in enumerate(latent_sizes(rows.column, self.buckets, self.image_size)):
                self._latents[index, size] = latents[name]
        self._seed = seed
        self._max_undecodable = max_undecodable
        self._counters = torch.zeros(max_workers + 1, 2, dtype=torch.int64).share_memory_()  # seen, undecodable
        self._named = set[int | str]()

    @property
    def undecodable(self) -> int:
        return int(self._counters[:, 1].sum())

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        """Return `image` uint8 (3, height, width) or `latent` (channels, h, w) or both, `caption`, and `features` by column.

        `sample_id` is that of the sample that was really used. In evaluation `counted` says whether it is to be measured.
        """
        _, bucket, place = self.locate(request.sample_id)
        first, step, stepping = request.sample_id - place, 1, "the next"
        count, skipped = self.stored[0][bucket], self.skipped[0][bucket]
        for attempt in range(count + _NEAR):
            index = (place + attempt * step) % count
            if attempt and index in skipped:
                continue
            sample_id, row = first + index, {}
            column = self.choose_caption(sample_id, request.epoch)
            self._count(seen=1)
            try:
                row = self._rows.row(bucket, index)
                if column in self._written:
                    row |= {column: self._written[column].text(bucket, index)}
                seen = self._read(row, bucket, index, column, request)
            except UNDECODABLE as error:
                if stepping == "the next" and (isinstance(error, BrokenShardError) or attempt + 1 >= _NEAR):
                    # The next ones are in the same shard, or the same damage: go on anywhere in the bucket, through all of it.
                    draw = np.random.default_rng([self._seed, request.epoch, request.sample_id, 2])
                    step, stepping = coprime(int(draw.integers(1, max(count, 2))), count), "another"
                    place = int(draw.integers(count)) - attempt * step
                instead = f"{stepping} of its bucket takes its place" if request.counted is None else "evaluation leaves it out"
                self._note_undecodable(sample_id, row.get("key", ""), error, instead)
                continue
            sample = {**seen, "caption": self.read_caption(row, column, sample_id, request.epoch), "sample_id": sample_id}
            if request.counted is not None:  # another sample in its place is measured in its own
                sample["counted"] = request.counted and attempt == 0
            return sample
        raise UndecodableError(f"None of the {count} images of bucket {self.buckets[bucket]} can be decoded.")

    def _read(self, row: dict[str, Any], bucket: int, index: int, column: str, request: SampleRequest) -> dict[str, Any]:
        """Return what a sample has beside its caption, of its row and of what is stored beside the images."""
        found: dict[str, Any] = {}
        if self.images:
            found["image"] = decode_image(row["image"], request.height, request.width)
        if self.latent_columns:
            found["latent"] = self._latents[bucket, Bucket(request.height, request.width)].read(bucket, index)
        found["features"] = {
            # A copy of what is in the row, whose memory is read-only.
            name: self._features[name].read(bucket, index) if name in self._features else torch.tensor(row[name])
            for name in self.features
        }
        if column in self._texts:
            found["text_embedding"] = self._texts[column].read(bucket, index)
            if pooled := self._texts[column].column.pooled:
                found["text_embedding"], found["text_pooled"] = without_pooled(found["text_embedding"], pooled)
        return found

    def look_at(self, request: SampleRequest) -> dict[str, Any]:
        counters, named = self._counters.clone(), set(self._named)
        try:
            return self[request]
        finally:
            self._counters.copy_(counters)
            self._named = named

    def row(self, sample_id: int) -> dict[str, Any]:
        """Return a sample as it is stored, by column."""
        _, bucket, place = self.locate(sample_id)
        return self._rows.row(bucket, place) | {name: rows.text(bucket, place) for name, rows in self._written.items()}

    def choose_caption(self, sample_id: int, epoch: int) -> str:
        """Return the caption column that a sample is trained with in an epoch."""
        columns = list(self.captions)
        if len(columns) == 1:
            return columns[0]
        weights = np.array([wording.weight for wording in self.captions.values()])
        choice = np.random.default_rng([self._seed, epoch, sample_id]).choice(len(columns), p=weights / weights.sum())
        return columns[choice]

    def read_caption(self, row: Mapping[str, Any], column: str, sample_id: int, epoch: int) -> str:
        """Return what training reads of a row's caption in an epoch."""
        return self.captions[column].of(row[column], self._seed, epoch, sample_id)

    def check_sizes(self, image_size: int, sizes: list[Bucket]) -> None:
        columns = self.latent_columns
        if columns and (problem := latent_size_problem(columns, self.buckets, self.image_size, image_size, sizes)):
            raise ValueError(problem)

    def _count(self, seen: int = 0, undecodable: int = 0) -> None:
        worker = get_worker_info()
        row = self._counters[0 if worker is None else worker.id + 1]
        row += torch.tensor([seen, undecodable])

    def _note_undecodable(self, sample_id: int, key: str, error: Exception, instead: str) -> None:
        self._count(undecodable=1)
        named = str(error.file) if isinstance(error, BrokenShardError) else sample_id
        if named not in self._named:
            self._named.add(named)
            log.warning("Sample %d (%s) cannot be decoded, %s: %s", sample_id, key, instead, error)
        seen, undecodable = self._counters.sum(0).tolist()
        if seen >= MIN_SEEN_FOR_RATE and undecodable > self._max_undecodable * seen:
            raise UndecodableError(
                f"{undecodable} of {seen} samples could not be decoded, more than train_loader.max_undecodable = "
                f"{self._max_undecodable:.2%}. Mend the data, or raise that limit if it is what you expect."
            )

    def identity(self) -> dict[str, Any]:
        if self.left_out is None:
            return {"counts": self.counts}
        return {"counts": self.counts, "skip": f"those of {self.left_out.skip.digest}"}


def coprime(number: int, count: int) -> int:
    """Return the first from a number on by which steps through `count` places, around and around, come to all of them."""
    while math.gcd(number, count) != 1:
        number += 1
    return number
