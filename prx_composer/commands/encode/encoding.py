"""Encoding in parts: each rank takes some, each part is a shard that appears whole or not at all, and the manifest comes last.

<folder>/settings.json                  what is made, written first
<folder>/<bucket>/part.00012.mds        a part's rows
<folder>/<bucket>/part.00012.json       its entry in the bucket's index: the part is done
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from streaming import LocalDataset, MDSWriter
from torch import Tensor

from prx_composer.common.errors import UserError
from prx_composer.common.files import sync, write_whole
from prx_composer.data.contents import column_contents
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import Bucket, Manifest, open_local
from prx_composer.data.stored import COLUMNS, RESULTS, StoredColumn, fingerprint, is_whole, manifest_path, pack, unpack
from prx_composer.models.prompts import readings
from prx_composer.models.text_encoder import HuggingFaceTextEncoder, tokenize
from prx_composer.models.vision_encoder import VisionEncoder, teacher_features

log = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_TELL_EVERY = 30.0  # seconds
_LARGEST = 2**32 - 1  # bytes of a shard, whose offsets are uint32


@dataclass(frozen=True)
class Encoded:
    """One row.

    Args:
        values: see `stored.pack`. shape: of the array. Both are empty for a sample that cannot be encoded.
        errors: sum of the relative errors of its tokens. tokens: how many they are.
        cut: tokens of its caption that were cut off.
    """

    values: bytes = b""
    shape: tuple[int, ...] = ()
    errors: float = 0.0
    tokens: int = 0
    cut: int = 0


@dataclass(frozen=True)
class _Part:
    bucket: Bucket
    number: int

    @property
    def stem(self) -> str:
        return f"part.{self.number:05d}"


Work = Callable[[Bucket, Sequence[dict[str, Any]]], list[Encoded]]


def encode_split(split: Path, folder: Path, column: StoredColumn, work: Work, part_size: int, **options: Any) -> StoredColumn:
    """Encode every sample of a split into `folder`, on all ranks together. Return the column as it is stored.

    Killed at any moment and started again, on any number of ranks, it goes on with the parts that are missing. What is stored
    doesn't depend on kills or ranks.

    Args:
        split: of a data set, on a disk that all ranks see.
        folder: of `encoded_folder`, named after the column that is encoded.
        column: what is made, without `error` and `buckets`.
        work: rows of a part → what is stored of each; must be a function of its input.
        part_size: samples of a part.
        options: more that decides what is stored, such as a batch size.

    Raises:
        UserError: the folder holds something made with other settings.
    """
    images = Manifest.read(split)
    column = replace(column, data=column_contents(split, folder.name))
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder, {**column.settings, "part_size": part_size, **options})
    if not is_whole(folder):
        parts = [_Part(b, n) for b, count in sorted(images.buckets.items()) for n in range(-(-count // part_size))]
        missing: list[Any] = [[part for part in parts if not _entry(folder, part).exists()]]
        dist.broadcast_object_list(missing, src=0)
        _encode_parts(split, folder, missing[0], len(parts), work, part_size)
        dist.barrier()
        if dist.get_global_rank() == 0:
            _finish(folder, column, parts, images)
        dist.barrier()
    return replace(column, **{key: json.loads(manifest_path(folder).read_text())[key] for key in RESULTS})


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    problem: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        path = folder / _SETTINGS
        before = json.loads(path.read_text()) if path.exists() else settings
        before.setdefault("data", settings["data"])  # an earlier version didn't note it
        if before["data"] != settings["data"]:
            problem[0] = (
                f"{folder} was begun with other data: the column {folder.name!r} of {folder.parents[2]} has changed since. "
                "Delete the folder to encode it again, or give another --name."
            )
        different = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
        if problem[0] is None and different:
            told = ", ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in different)
            problem[0] = f"{folder} was begun with other settings: {told}. Use those, another --name, or delete the folder."
        elif problem[0] is None:
            write_whole(path, (json.dumps(settings, indent=1) + "\n").encode())
            for leftover in list(folder.rglob(".*")):  # of a run that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])


def _encode_parts(split: Path, folder: Path, missing: list[_Part], of: int, work: Work, part_size: int) -> None:
    own = missing[dist.get_global_rank() :: dist.get_world_size()]
    rows: dict[Bucket, LocalDataset] = {}
    told = time.monotonic()
    for done, part in enumerate(own):
        if part.bucket not in rows:
            rows[part.bucket] = open_local(split / str(part.bucket))
        first = part.number * part_size
        count = min(part_size, len(rows[part.bucket]) - first)
        _write_part(folder, part, work(part.bucket, [rows[part.bucket][first + index] for index in range(count)]))
        if dist.get_global_rank() == 0 and time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic()
            log.info("%d of %d parts are encoded.", of - len(missing) + (done + 1) * dist.get_world_size(), of)


def _entry(folder: Path, part: _Part) -> Path:
    return folder / str(part.bucket) / f"{part.stem}.json"


def _write_part(folder: Path, part: _Part, encoded: list[Encoded]) -> None:
    target = folder / str(part.bucket)
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as temporary:
        with MDSWriter(out=f"{temporary}/mds", columns=COLUMNS, size_limit=_LARGEST) as writer:
            for row in encoded:
                writer.write({"shape": "x".join(map(str, row.shape)), "values": row.values})
        shards = json.loads(Path(temporary, "mds", "index.json").read_text())["shards"]
        if len(shards) != 1:
            raise UserError(f"--part: {len(encoded)} samples are too many for one shard of at most 4 GiB; give a smaller number.")
        (entry,) = shards
        file = Path(temporary, "mds", entry["raw_data"]["basename"])
        sync(file)
        os.replace(file, target / f"{part.stem}.mds")
    entry["raw_data"]["basename"] = f"{part.stem}.mds"
    sums = {"errors": sum(row.errors for row in encoded), "tokens": sum(row.tokens for row in encoded)}
    sums |= {"cut": sum(row.cut > 0 for row in encoded), "lost": sum(row.cut for row in encoded)}
    write_whole(_entry(folder, part), json.dumps({"shard": entry, **sums}).encode())


def _finish(folder: Path, column: StoredColumn, parts: list[_Part], images: Manifest) -> None:
    """Write the indexes, then the manifest; then remove what says which parts are done."""
    errors, tokens, cut, lost = 0.0, 0, 0, 0
    for bucket in images.buckets:
        entries = [json.loads(_entry(folder, part).read_text()) for part in parts if part.bucket == bucket]
        errors, tokens = errors + sum(e["errors"] for e in entries), tokens + sum(e["tokens"] for e in entries)
        cut, lost = cut + sum(e.get("cut", 0) for e in entries), lost + sum(e.get("lost", 0) for e in entries)
        index = {"version": 2, "shards": [entry["shard"] for entry in entries]}
        write_whole(folder / str(bucket) / "index.json", json.dumps(index, sort_keys=True).encode())
    error = round(errors / tokens, 6) if column.storage == "int8" and tokens else None
    buckets = {str(bucket): count for bucket, count in sorted(images.buckets.items())}
    column = replace(column, error=error, buckets=buckets, cut=cut if column.kind == "text" else None, lost=lost if cut else None)
    write_whole(manifest_path(folder), column.to_json().encode())
    for part in parts:
        _entry(folder, part).unlink()


# What is stored of captions and images: embeddings, a teacher's patch features, an autoencoder's latents.


def text_column(encoder: HuggingFaceTextEncoder, name: str, revision: str | None, storage: str) -> StoredColumn:
    """Describe what `CaptionEncoder` stores with this encoder. Raise UserError for one that is trained."""
    if encoder.trainable:
        raise UserError("model.text_encoder is trained along: embeddings that are stored would not follow it.")
    mark = fingerprint(encoder.network, encoder.tokenizer)
    return StoredColumn("text", name, revision, mark, encoder.hidden_size, storage, max_tokens=encoder.max_tokens)


class CaptionEncoder:
    """Encodes a part's captions in batches of similar length, each padded only to its own longest.

    Args:
        encoder: frozen.
        caption: column.
        storage: bfloat16 or int8.
        batch_size: captions at a time; with the part it decides the padding, and so the last bits of the result.
    """

    def __init__(self, encoder: HuggingFaceTextEncoder, caption: str, storage: str, batch_size: int, device: torch.device):
        self._encoder, self._caption, self._storage = encoder, caption, storage
        self._batch_size, self._device = batch_size, device

    def __call__(self, bucket: Bucket, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        captions = [row[self._caption] for row in rows]
        tokens = tokenize(self._encoder.tokenizer, captions, self._encoder.max_tokens)
        cut = [one.tokens - len(one.ids) for one in readings(self._encoder.tokenizer, captions, self._encoder.max_tokens)]
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        order = torch.argsort(mask.sum(1), stable=True).split(self._batch_size)
        encoded: dict[int, Encoded] = {}
        for members in order:
            used = mask[members].any(0)  # columns that are padding for none of them
            embedding = self._encoder(ids[members][:, used].to(self._device), mask[members][:, used].to(self._device)).cpu()
            for index, values, valid in zip(members.tolist(), embedding, mask[members][:, used], strict=True):
                encoded[index] = replace(self._stored(values[valid]), cut=cut[index])
        return [encoded[index] for index in range(len(rows))]

    def _stored(self, values: Tensor) -> Encoded:
        stored = pack(values, self._storage)
        if self._storage != "int8":
            return Encoded(stored, tuple(values.shape))
        row = {"shape": "x".join(map(str, values.shape)), "values": stored}
        difference = unpack(row, self._storage).float() - values.float()
        relative = difference.norm(dim=-1) / values.float().norm(dim=-1).clamp(min=1e-12)
        return Encoded(stored, tuple(values.shape), float(relative.sum()), len(values))


class ImageEncoder:
    """Encodes a part's images in batches of one bucket; what cannot be decoded is stored as nothing.

    Args:
        encode: uint8 (B, 3, H, W) → (B, …).
        size_of: bucket → height and width that images are encoded at.

    Raises:
        UserError: on encoding, for values that are not finite in `storage`.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        size_of: Callable[[Bucket], tuple[int, int]],
        storage: str,
        batch_size: int,
        device: torch.device,
    ):
        self._encode, self._size_of, self._storage = encode, size_of, storage
        self._batch_size, self._device = batch_size, device

    @torch.no_grad()
    def __call__(self, bucket: Bucket, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        encoded = [Encoded() for _ in rows]
        images: dict[int, Tensor] = {}
        for index, row in enumerate(rows):
            try:
                images[index] = decode_image(row["image"], *self._size_of(bucket))
            except UNDECODABLE:  # training counts and names it
                continue
            if len(images) == self._batch_size:
                self._flush(images, encoded)
        self._flush(images, encoded)
        return encoded

    def _flush(self, images: dict[int, Tensor], encoded: list[Encoded]) -> None:
        if images:
            made = self._encode(torch.stack(list(images.values())).to(self._device)).cpu()
            if not made.to(getattr(torch, self._storage)).isfinite().all():
                raise UserError(
                    f"What was made of an image is not finite in {self._storage}: give another --storage, or let the encoder "
                    "compute in float32 (`dtype` in the recipe); some autoencoders overflow in float16."
                )
            for index, values in zip(images, made, strict=True):
                encoded[index] = Encoded(pack(values, self._storage), tuple(values.shape))
            images.clear()


def features_of(teacher: VisionEncoder, patch: int) -> Callable[[Tensor], Tensor]:
    """Return what maps uint8 (B, 3, H, W) to features of every `patch` × `patch` pixels, (B, H/patch, W/patch, C)."""

    def encode(image: Tensor) -> Tensor:
        rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
        return teacher_features(teacher, {"image": image}, rows, columns).unflatten(1, (rows, columns))

    return encode
