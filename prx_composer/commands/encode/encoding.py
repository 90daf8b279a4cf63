"""Encoding a split in parts: each rank takes some, each part is a shard that appears whole or not at all.

The manifest comes last:

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.utils import dist, get_device
from streaming import LocalDataset, MDSWriter
from torch import Tensor

from prx_composer import registry
from prx_composer.commands.data.split import open_split
from prx_composer.common.distributed import from_rank_zero
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import sync, write_whole
from prx_composer.data.contents import column_contents
from prx_composer.data.dataset import read_manifest
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.format import CAPTIONS, Bucket, CaptionedRows, Manifest, open_rows
from prx_composer.data.storage import INDEX, shards_in
from prx_composer.data.stored import (
    COLUMNS,
    RESULTS,
    StoredColumn,
    is_whole,
    manifest_path,
    pack,
    text_fingerprint,
    unpack,
    with_pooled,
)
from prx_composer.models.caption_format import format_of, text_mask
from prx_composer.models.encoders import HuggingFaceTextEncoder, VisionEncoder, teacher_features
from prx_composer.models.prompts import readings, tokenize
from prx_composer.models.several_encoders import SeveralTextEncoders
from prx_composer.recipe import config
from prx_composer.recipe.arguments import data_sets
from prx_composer.recipe.config import Recipe
from prx_composer.schedule.moments import duration_string

log = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_TELL_EVERY = 30.0  # seconds
_LARGEST = 2**32 - 1  # bytes of a shard, whose offsets are uint32


@dataclass(frozen=True)
class DataSet:
    """A data set of the recipe: its folder, its manifest, and the caption columns that are trained on."""

    path: Path
    manifest: Manifest
    captions: list[str]
    address: str = ""  # where it lies, be it remote

    def size_of(self, image_size: int, multiple: int) -> Callable[[Bucket], tuple[int, int]]:
        return lambda bucket: bucket.at(image_size, self.manifest.image_size, multiple)


def begin(
    arguments: list[str], split: str, storage: str, allowed: Sequence[str], reading: bool = False
) -> tuple[Recipe, torch.device, list[DataSet]]:
    """Load the recipe and connect the ranks. Return it with this rank's device and the data sets.

    Args:
        reading: nothing is stored. Data may be remote then, and ranks but the first have none.

    Raises:
        UserError: a storage that isn't allowed, a wrong recipe, or data that aren't there or not on a disk.
    """
    if storage not in allowed:
        raise UserError(f"--storage: {storage!r} must be {', '.join(allowed[:-1])} or {allowed[-1]}.")
    recipe = config.load(arguments)
    registry.import_code(recipe.code_paths)
    config.check(recipe)
    device = connect(recipe.dist_timeout)
    sets = _data_of(recipe, split, reading)
    return recipe, device, [] if reading and dist.get_global_rank() else sets


def connect(timeout: float) -> torch.device:
    """Connect the ranks and return this one's device.

    Args:
        timeout: seconds that ranks wait for each other.
    """
    chosen = get_device(None)
    dist.initialize_dist(chosen, timeout=timeout)
    return torch.device("cuda", torch.cuda.current_device()) if chosen.name == "gpu" else torch.device("cpu")


def _data_of(recipe: Recipe, split: str, reading: bool) -> list[DataSet]:
    with at_path("train_loader"):
        found = data_sets(recipe.train_loader)
    sets = []
    for where, spec in found.items():
        path = f"train_loader.{where}" if where else "train_loader"
        if spec.get("remote") and not reading:
            raise UserError(f"{path}.remote: encode where the data lies on a disk; then upload the folder `encoded` beside it.")
        with at_path(path):
            if remote := spec.get("remote"):
                manifest = open_split(remote, split).manifest
            else:
                manifest = read_manifest(spec["path"], split, spec.get("captions"))
        captions = list(spec.get("captions") or manifest.captions[:1])
        sets.append(DataSet(Path(spec["path"]), manifest, captions, remote or str(spec["path"])))
    return sets


# ------------------------------------------------------------------------------------------------ a split, in parts


@dataclass(frozen=True)
class Encoded:
    """What is stored of one row.

    Args:
        values: see `stored.pack`. shape: of the array. Both are empty for a sample that cannot be encoded.
        errors: sum of the relative errors of its tokens. tokens: how many they are.
        cut: tokens of its caption that were cut off; 1 for a caption that was not at its end when it had to be.
    """

    values: bytes = b""
    shape: tuple[int, ...] = ()
    errors: float = 0.0
    tokens: int = 0
    cut: int = 0


class _Part(NamedTuple):
    bucket: Bucket
    number: int

    def file(self, folder: Path, kind: str) -> Path:
        return folder / str(self.bucket) / f"part.{self.number:05d}.{kind}"


Rows = LocalDataset | CaptionedRows
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
    settings = {**column.settings, "part_size": part_size, **options}
    renamed = "--column" if column.kind == CAPTIONS else "--name"
    if problem := from_rank_zero(_claim(folder, settings, renamed) if dist.get_global_rank() == 0 else None):
        raise UserError(problem)
    if not is_whole(folder):
        parts = [_Part(b, n) for b, count in sorted(images.buckets.items()) for n in range(-(-count // part_size))]
        missing = from_rank_zero([part for part in parts if not part.file(folder, "json").exists()])
        _encode_parts(split, folder, missing, len(parts), work, part_size)
        dist.barrier()
        if dist.get_global_rank() == 0:
            _finish(folder, column, parts, images)
        dist.barrier()
    made = json.loads(manifest_path(folder).read_text())
    return replace(column, **{key: made.get(key) for key in RESULTS})


def _claim(folder: Path, settings: dict[str, Any], renamed: str) -> str | None:
    """Note the settings in the folder and remove what a killed command left; return why not, if it was begun with others.

    Args:
        renamed: option that names the column.
    """
    path = folder / _SETTINGS
    before = json.loads(path.read_text()) if path.exists() else settings
    before.setdefault("data", settings["data"])  # an earlier version didn't note it
    if before["data"] != settings["data"]:
        return (
            f"{folder} was begun with other data: the column {folder.name!r} of {folder.parents[2]} has changed since. "
            f"Delete the folder to encode it again, or give another {renamed}."
        )
    different = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    if different:
        told = ", ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in different)
        return f"{folder} was begun with other settings: {told}. Use those, another {renamed}, or delete the folder."
    write_whole(path, (json.dumps(settings, indent=1) + "\n").encode())
    for leftover in list(folder.rglob(".*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return None


def _encode_parts(split: Path, folder: Path, missing: list[_Part], of: int, work: Work, part_size: int) -> None:
    """Encode this rank's share of the missing parts."""
    rows: dict[Bucket, Rows] = {}
    manifest, ranks = Manifest.read(split), dist.get_world_size()
    begun = told = time.monotonic()
    seen = 0
    for done, part in enumerate(missing[dist.get_global_rank() :: ranks], start=1):
        if part.bucket not in rows:
            rows[part.bucket] = open_rows(split, part.bucket, manifest)
        first = part.number * part_size
        last = min(first + part_size, len(rows[part.bucket]))
        _write_part(folder, part, work(part.bucket, [rows[part.bucket][index] for index in range(first, last)]))
        seen += (last - first) * ranks
        if dist.get_global_rank() == 0 and time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic()
            left = duration_string((told - begun) / done * max(len(missing) / ranks - done, 0))
            speed = f"{seen / (told - begun):,.1f} samples/s, {left} left"
            log.info("%d of %d parts are encoded, %s.", min(of - len(missing) + done * ranks, of), of, speed)


def _write_part(folder: Path, part: _Part, encoded: list[Encoded]) -> None:
    target = part.file(folder, "mds")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as temporary:
        with MDSWriter(out=f"{temporary}/mds", columns=COLUMNS, size_limit=_LARGEST) as writer:
            for row in encoded:
                writer.write({"shape": "x".join(map(str, row.shape)), "values": row.values})
        shards = shards_in(Path(temporary, "mds"))
        if len(shards) != 1:
            raise UserError(f"--part: {len(encoded)} samples are too many for one shard of at most 4 GiB; give a smaller number.")
        (entry,) = shards
        file = Path(temporary, "mds", entry["raw_data"]["basename"])
        sync(file)
        os.replace(file, target)
    entry["raw_data"]["basename"] = target.name
    sums = {"errors": sum(row.errors for row in encoded), "tokens": sum(row.tokens for row in encoded)}
    sums |= {"cut": sum(row.cut > 0 for row in encoded), "lost": sum(row.cut for row in encoded)}
    sums |= {"empty": sum(row.shape == (0,) for row in encoded), "undecodable": sum(not row.shape for row in encoded)}
    write_whole(part.file(folder, "json"), json.dumps({"shard": entry, **sums}).encode())


def _finish(folder: Path, column: StoredColumn, parts: list[_Part], images: Manifest) -> None:
    """Write the indexes, then the manifest; then remove what says which parts are done."""
    entries = {part: json.loads(part.file(folder, "json").read_text()) for part in parts}
    for bucket in images.buckets:
        index = {"version": 2, "shards": [entry["shard"] for part, entry in entries.items() if part.bucket == bucket]}
        write_whole(folder / str(bucket) / INDEX, json.dumps(index, sort_keys=True).encode())
    errors, tokens, cut, lost, empty, undecodable = (
        sum(entry.get(key, 0) for entry in entries.values())  # an earlier version didn't count what is cut
        for key in ("errors", "tokens", "cut", "lost", "empty", "undecodable")
    )
    error = round(errors / tokens, 6) if column.storage == "int8" and tokens else None
    buckets = {str(bucket): count for bucket, count in sorted(images.buckets.items())}
    column = replace(column, error=error, buckets=buckets)
    if column.kind == "text":
        column = replace(column, cut=cut, lost=lost if cut else None)
    elif column.kind == CAPTIONS:
        column = replace(column, cut=cut, empty=empty, undecodable=undecodable)
    write_whole(manifest_path(folder), column.to_json().encode())
    for part in parts:
        part.file(folder, "json").unlink()


# ------------------------------------------------------------------------------ what is stored of captions and images


def text_column(
    encoder: HuggingFaceTextEncoder | SeveralTextEncoders, name: str, revision: str | None, storage: str
) -> StoredColumn:
    """Describe what `CaptionEncoder` stores with this encoder. Raise UserError for one that is trained."""
    if encoder.trainable:
        raise UserError("model.text_encoder is trained along: embeddings that are stored would not follow it.")
    given = "text", name, revision, text_fingerprint(encoder), encoder.hidden_size, storage
    return StoredColumn(*given, max_tokens=encoder.max_tokens, pooled=getattr(encoder, "pooled_size", 0) or None)


@dataclass(frozen=True)
class CaptionEncoder:
    """Encodes a part's captions in batches of similar length, each padded only to its own longest, where one encoder reads them.

    Args:
        encoder: frozen.
        caption: column.
        storage: bfloat16, float16, float32 or int8.
        batch_size: captions at a time; with the part it decides the padding, and so the last bits of the result.
    """

    encoder: HuggingFaceTextEncoder | SeveralTextEncoders
    caption: str
    storage: str
    batch_size: int
    device: torch.device

    def __call__(self, bucket: Bucket, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        captions = [row[self.caption] for row in rows]
        tokens = tokenize(self.encoder.tokenizer, captions, self.encoder.max_tokens)
        cut = [one.tokens - len(one.ids) for one in readings(self.encoder.tokenizer, captions, self.encoder.max_tokens)]
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        order = torch.argsort(mask.sum(1), stable=True).split(self.batch_size)
        encoded: dict[int, Encoded] = {}
        whole = isinstance(self.encoder, SeveralTextEncoders) or format_of(self.encoder.tokenizer).skipped > 0
        for members in order:
            used = mask[members].any(0) | whole  # columns that are padding for none of them
            made: Any = self.encoder(ids[members][:, used].to(self.device), mask[members][:, used].to(self.device))
            embedding, *pooled = (part.cpu() for part in (made if isinstance(made, tuple) else (made,)))
            masks = text_mask(self.encoder.tokenizer, mask[members][:, used])
            for index, values, valid, *own in zip(members.tolist(), embedding, masks, *pooled, strict=True):
                kept = values[valid] if not own else with_pooled(values[valid], own[0])
                encoded[index] = replace(self._stored(kept), cut=cut[index])
        return [encoded[index] for index in range(len(rows))]

    def _stored(self, values: Tensor) -> Encoded:
        _check_finite("a caption", values if self.storage == "int8" else values.to(getattr(torch, self.storage)), self.storage)
        stored = pack(values, self.storage)
        if self.storage != "int8":
            return Encoded(stored, tuple(values.shape))
        row = {"shape": "x".join(map(str, values.shape)), "values": stored}
        difference = unpack(row, self.storage).float() - values.float()
        relative = difference.norm(dim=-1) / values.float().norm(dim=-1).clamp(min=1e-12)
        return Encoded(stored, tuple(values.shape), float(relative.sum()), len(values))


def _check_finite(what: str, values: Tensor, storage: str) -> None:
    if not values.isfinite().all():
        raise UserError(
            f"What was made of {what} is not finite in {storage}: give another --storage, or let the encoder compute in float32 "
            "(`dtype` in the recipe); some networks overflow in float16."
        )


@dataclass(frozen=True)
class ImageEncoder:
    """Encodes a part's images in batches of one bucket; what cannot be decoded is stored as nothing.

    Args:
        encode: uint8 (B, 3, H, W) → (B, …).
        size_of: bucket → height and width that images are encoded at.

    Raises:
        UserError: on encoding, for values that are not finite in `storage`.
    """

    encode: Callable[[Tensor], Tensor]
    size_of: Callable[[Bucket], tuple[int, int]]
    storage: str
    batch_size: int
    device: torch.device

    @torch.no_grad()
    def __call__(self, bucket: Bucket, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
        encoded = [Encoded() for _ in rows]
        images = self.decoded(bucket, rows)
        while batch := dict(islice(images, self.batch_size)):
            made = self.encode(torch.stack(list(batch.values())).to(self.device)).cpu()
            _check_finite("an image", made.to(getattr(torch, self.storage)), self.storage)
            for index, values in zip(batch, made, strict=True):
                encoded[index] = Encoded(pack(values, self.storage), tuple(values.shape))
        return encoded

    def decoded(self, bucket: Bucket, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Tensor]]:
        """Yield number and image, uint8 (3, H, W), of every row that can be decoded."""
        return decoded_images(rows, self.size_of(bucket))


def decoded_images(rows: Sequence[dict[str, Any]], size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """Yield number and image, uint8 (3, H, W) of height and width `size`, of the rows whose image can be decoded."""
    for index, row in enumerate(rows):
        try:
            yield index, decode_image(row["image"], *size)
        except UNDECODABLE:  # training counts and names it
            continue


def features_of(teacher: VisionEncoder, patch: int) -> Callable[[Tensor], Tensor]:
    """Return what maps uint8 (B, 3, H, W) to features of every `patch` × `patch` pixels, (B, H/patch, W/patch, C)."""

    def encode(image: Tensor) -> Tensor:
        rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
        return teacher_features(teacher, {"image": image}, rows, columns).unflatten(1, (rows, columns))

    return encode
