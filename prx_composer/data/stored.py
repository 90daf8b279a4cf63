"""Stored columns: what was computed from samples beforehand and lies beside them, not in their shards.

<path>/<split>/encoded/<name>/<source>/manifest.json          written last: who made it, of what, how
<path>/<split>/encoded/<name>/<source>/512x512/index.json …   MDS shards; row i belongs to row i of the bucket's images

`source` is a caption column, or `image`. A row has `shape`, such as 57x2304, and `values`, the bytes of an array of that shape,
or of a text in UTF-8; both are empty if the sample could not be encoded.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer.common.errors import UserError, nearest
from prx_composer.data.contents import column_contents, fetch_if_there
from prx_composer.data.format import CAPTIONS, ENCODED, IMAGE, MANIFEST, BrokenShardError, Bucket, Manifest
from prx_composer.models.caption_format import SeveralTokenizers, cleaning_of
from prx_composer.models.encoders import HuggingFaceTextEncoder
from prx_composer.models.prompts import Captions, Wording, wordings
from prx_composer.models.several_encoders import SeveralTextEncoders

log = logging.getLogger(__name__)

RESULTS = ("error", "cut", "lost", "empty", "undecodable", "buckets")  # of a StoredColumn: what came of it, not what was asked
_OF_CAPTIONS = ("prompt", "empty", "undecodable")  # what other columns' manifests don't have
COLUMNS = {"shape": "str", "values": "bytes"}
_SAMPLED = 64  # values of every weight, for a fingerprint


@dataclass(frozen=True)
class StoredColumn:
    """A stored column: what it holds, and how it was made.

    Args:
        kind: text, features, latents or captions.
        encoder: hub id, folder or description of what made it. revision: of the hub id.
        fingerprint: of its weights and tokenizer; see `fingerprint`.
        width: channels of an embedding, a feature or a latent; 0 of captions.
        storage: bfloat16, float16, float32, or int8 with one fp32 scale per token; utf-8 of captions.
        max_tokens: text: captions were cut to so many. captions: no more were written.
        pooled: text: channels of a pooled vector, which stands before the tokens in rows of their width; None without one.
        image_size: features, latents, captions: side of the square whose area the images had.
        multiple: latents: sides of the images were multiples of this (patch size × downsampling).
        downsampling: latents: image side / latent side.
        scaling, shift: latents: (what the network gave − shift) × scaling is stored.
        data: of the column that it was made of; see `column_contents`. None: made by a version that didn't note it.
        error: int8: mean over the tokens of |stored − exact| / |exact|.
        cut, lost: text: how many captions had more than `max_tokens`, and how many tokens those lost together. captions: how many
            were not at their end after `max_tokens`.
        prompt: captions: what the model was asked.
        empty, undecodable: captions: how many are empty, and how many images could not be decoded.
        buckets: rows by bucket.
    """

    kind: str
    encoder: str
    revision: str | None
    fingerprint: str
    width: int
    storage: str
    max_tokens: int | None = None
    pooled: int | None = None
    image_size: int | None = None
    multiple: int | None = None
    downsampling: int | None = None
    scaling: float | None = None
    shift: float | None = None
    data: str | None = None
    error: float | None = None
    cut: int | None = None
    lost: int | None = None
    prompt: str | None = None
    empty: int | None = None
    undecodable: int | None = None
    buckets: dict[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the bytes that are stored; a run that goes on must have the same."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in RESULTS}

    def to_json(self) -> str:
        known = {
            key: value for key, value in dataclasses.asdict(self).items() if self.kind == CAPTIONS or key not in _OF_CAPTIONS
        }
        if self.pooled is None:
            del known["pooled"]
        return json.dumps({"version": 1, **known}, indent=1) + "\n"


def encoded_folder(path: str | Path, split: str, name: str, source: str) -> Path:
    return Path(path) / split / ENCODED / name / source


def read_column(folder: Path, kind: str, path: str, remote: bool = False) -> StoredColumn:
    """Read the manifest in a folder of `encoded_folder`.

    Args:
        path: YAML path that named it, for messages.
        remote: the data that it was made of are elsewhere, and not compared.

    Raises:
        UserError: none there (yet), another kind, newer than this package, or made of other data than lies beside it.
    """
    file, again = folder / MANIFEST, "encode"
    maker = f"prx encode {kind} RECIPE --name {folder.parent.name} --split {folder.parents[2].name}"
    if kind == CAPTIONS:
        again, maker = "caption", "prx data caption"
    if not file.exists():
        others = sorted({p.parents[1].name for p in folder.parents[1].glob(f"*/*/{MANIFEST}")})
        columns = sorted(p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}"))
        begun = f" It was begun: the same `{maker}` goes on." if folder.exists() else ""
        there = f" There is: {', '.join(others)}.{nearest(folder.parent.name, others)}" if others else ""
        there = f" What has that name is of {', '.join(columns)} alone." if columns else there
        raise UserError(f"{path}: nothing is stored in {folder}; make it with `{maker}`.{begun}{there}")
    raw = json.loads(file.read_text())
    if raw.pop("version", None) != 1:
        raise UserError(f"{path}: {file} was written by a newer version of this package.")
    column = StoredColumn(**raw)
    if column.kind != kind:
        raise UserError(f"{path}: {folder} holds {column.kind}, not {kind}.")
    if column.data is None:
        log.warning("%s doesn't say of which data it was made. If they may have changed since, encode them again.", folder)
    elif not remote and column.data != _data_there(column, folder):
        raise UserError(
            f"{path}: {folder} was made of other data than lies beside it: its column {folder.name!r} has changed. Delete that "
            f"folder and {again} again with `{maker}`."
        )
    return column


def _data_there(column: StoredColumn, folder: Path) -> str | None:
    """Return the fingerprint of what a column was made of; its own, and a warning, if a broken shard keeps it from being read."""
    try:
        return column_contents(folder.parents[2], folder.name)
    except BrokenShardError as error:
        log.warning("Whether %s was made of the data beside it is not compared: %s.", folder, error)
        return column.data


def fetch_captions(split: Path, remote: str, columns: Iterable[str]) -> None:
    """Download the manifests of caption columns that lie beside the shards of a remote split, if they do.

    Args:
        split: the local cache of `remote`, with its manifest.
        columns: that are asked for.
    """
    for name in set(columns) - {*Manifest.read(split).captions}:
        target = split / ENCODED / name / IMAGE / MANIFEST
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch_if_there(f"{remote}/{ENCODED}/{name}/{IMAGE}/{MANIFEST}", target)


def begun_captions(split: Path, column: str) -> str:
    """Return a sentence about a caption column that is only begun; "" for one that isn't."""
    folder = split / ENCODED / column
    return f" {folder} was begun: if captions are made there, the same `prx data caption` goes on." if folder.exists() else ""


def trained_captions(captions: Captions | None, manifest: Manifest) -> dict[str, Wording]:
    """Return the wordings of the columns that are trained on. Raise ValueError if there is none, or for an impossible one."""
    if not (captions or manifest.captions):
        raise ValueError("captions: the data set has no caption column; `prx data caption` writes one.")
    return wordings(captions or {manifest.captions[0]: 1.0})


def is_whole(folder: Path) -> bool:
    """Return whether a stored column is complete: its manifest comes last."""
    return (folder / MANIFEST).exists()


def manifest_path(folder: Path) -> Path:
    return folder / MANIFEST


def fingerprint(module: nn.Module, tokenizer: Any = None, how: Mapping[str, Any] | None = None) -> str:
    """Return what tells encoders apart: SHA-256 of values of every weight and statistic, of tokenizers, and of `how` it reads.

    Of every tensor, some values are taken, rounded to bf16. The dtype that weights are stored in makes no difference. Weights
    that were trained further differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):  # buffers: statistics of batch norms
        if not tensor.is_floating_point():
            continue
        flat = tensor.detach().flatten()
        step = max(len(flat) // _SAMPLED, 1)
        values = flat[::step][:_SAMPLED].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    several = [one for one, _ in tokenizer.parts.values()] if isinstance(tokenizer, SeveralTokenizers) else [tokenizer]
    for one in several if tokenizer is not None else ():
        vocabulary = sorted(one.get_vocab().items(), key=lambda entry: entry[1])
        digest.update(json.dumps([vocabulary, one.padding_side]).encode())
        if (cleaning := cleaning_of(one)) != "none":
            digest.update(cleaning.encode())
    if how:
        digest.update(json.dumps(how, sort_keys=True).encode())
    return digest.hexdigest()


def text_fingerprint(encoder: HuggingFaceTextEncoder | SeveralTextEncoders) -> str:
    """Return what tells text encoders apart, but for how many tokens they keep."""
    how = {key: value for key, value in getattr(encoder, "how", {}).items() if key != "cleaning"}  # which the tokenizer has
    return fingerprint(encoder.network, encoder.tokenizer, how)


def pack(values: Tensor, storage: str) -> bytes:
    """Return a tensor as bytes; int8 takes (tokens, width) alone."""
    if storage == "int8":
        scale = values.float().abs().amax(-1).clamp(min=1e-12) / 127
        whole = (values.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        return scale.numpy().tobytes() + whole.numpy().tobytes()
    stored = values.to(getattr(torch, storage)).contiguous()
    return (stored.view(torch.int16) if storage == "bfloat16" else stored).numpy().tobytes()


def unpack(row: dict[str, Any], storage: str) -> Tensor:
    """Return what `pack` was given, rounded; bf16 for bfloat16 and int8."""
    shape, stored = [int(side) for side in row["shape"].split("x")], row["values"]
    if storage == "int8":
        tokens = shape[0]
        scale = torch.from_numpy(np.frombuffer(stored, np.float32, tokens).copy())
        whole = torch.from_numpy(np.frombuffer(stored, np.int8, offset=4 * tokens).copy())
        return (whole.view(shape) * scale[:, None]).to(torch.bfloat16)
    kind = {"bfloat16": np.int16, "float16": np.float16, "float32": np.float32}[storage]
    flat = torch.from_numpy(np.frombuffer(stored, kind).copy())
    return (flat.view(torch.bfloat16) if storage == "bfloat16" else flat).view(shape)


def with_pooled(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Return pooled vector (P,) and tokens (K, C) in one array (R + K, C), R = ⌈P / C⌉."""
    width = tokens.shape[1]
    return torch.cat([F.pad(pooled, (0, -len(pooled) % width)).view(-1, width).to(tokens), tokens])


def without_pooled(values: Tensor, pooled: int) -> tuple[Tensor, Tensor]:
    """Return tokens and pooled vector, of `pooled` channels, of what `with_pooled` made."""
    rows = -(-pooled // values.shape[1])
    return values[rows:], values[:rows].flatten()[:pooled]


def check_text_column(column: StoredColumn, encoder: HuggingFaceTextEncoder | SeveralTextEncoders, path: str) -> None:
    """Check that stored embeddings are those that the model's encoder would make.

    Raises:
        UserError: they are of another encoder, another tokenizer or another length, by name.
    """
    if encoder.trainable:
        raise UserError(
            f"{path}: model.text_encoder is trained along, and stored embeddings would not follow it; leave {path} out."
        )
    if column.max_tokens != encoder.max_tokens or column.width != encoder.hidden_size:
        raise UserError(
            f"{path}: stored are up to {column.max_tokens} tokens, {column.width} wide, made by {column.encoder}; "
            f"model.text_encoder makes up to {encoder.max_tokens}, {encoder.hidden_size} wide. Set max_tokens, or encode again."
        )
    if (column.pooled or 0) != (pooled := getattr(encoder, "pooled_size", 0)):
        raise UserError(
            f"{path}: stored are pooled vectors of {column.pooled or 0} channels, made by {column.encoder}; model.text_encoder "
            f"makes {pooled}. Set its pooled, or run `prx encode text` again."
        )
    if column.fingerprint != text_fingerprint(encoder):
        raise UserError(
            f"{path}: the stored embeddings were made by {column.encoder} (revision {column.revision or 'not said'}), whose "
            "weights or tokenizer, or the cleaning of whose captions (clean) and other settings, are not those of "
            "model.text_encoder. Name the same encoder and settings, or run `prx encode text` again."
        )


def latent_names(latent: str | list[str] | None) -> list[str]:
    """Return `train_loader.latent` as a list: one name for every image size."""
    return [latent] if isinstance(latent, str) else list(latent or [])


def latent_sizes(column: StoredColumn, buckets: list[Bucket], base_size: int) -> list[Bucket]:
    """Return the image sizes that were encoded, bucket by bucket; `base_size` is the data set's own."""
    assert column.image_size is not None and column.multiple is not None
    return [bucket.at(column.image_size, base_size, column.multiple) for bucket in buckets]


def latent_size_problem(
    columns: dict[str, StoredColumn], buckets: list[Bucket], base_size: int, image_size: int, sizes: list[Bucket]
) -> str | None:
    """Say what is wrong with training on images of some size from these latents, by name; None if nothing is.

    Args:
        columns: by name.
        buckets: of the data set. base_size: its image size.
        image_size: that is asked for. sizes: of every bucket then.
    """
    there = {column.image_size: name for name, column in columns.items()}
    if image_size not in there:
        told = ", ".join(f"{name} ({size} px)" for size, name in sorted(there.items(), key=lambda entry: entry[0] or 0))
        return (
            f"there are no latents of {image_size} px; `latent` names {told}. Make them with `prx encode latents --image-size "
            f"{image_size} --name NAME` and name both: latent: [{', '.join([*there.values(), 'NAME'])}]."
        )
    name = there[image_size]
    for bucket, size, stored in zip(buckets, sizes, latent_sizes(columns[name], buckets, base_size), strict=True):
        if size != stored:
            return (
                f"images of bucket {bucket} are {size} at {image_size} px, but the latents {name} were made of {stored}: with "
                f"sides that are multiples of {columns[name].multiple}. Encode them again with this recipe's patch_size."
            )
    return None


def latent_column(
    autoencoder: Any, name: str, revision: str | None, storage: str, image_size: int, multiple: int
) -> StoredColumn:
    """Describe what `prx encode latents` stores with this autoencoder. Raise UserError for one without latents or weights.

    Args:
        name: hub id, folder or description.
        image_size, multiple: see `StoredColumn`.
    """
    if (autoencoder.channels, autoencoder.downsampling) == (3, 1):
        raise UserError(
            "model.autoencoder: pixels has no latents to store: training sees the images as they are. Name an autoencoder, such "
            "as {name: diffusers, pretrained: …}."
        )
    if getattr(autoencoder, "module", None) is None:
        raise UserError(
            f"model.autoencoder: {type(autoencoder).__name__} has no `module`, the network whose weights tell latents apart; "
            "give it one to store its latents."
        )
    return StoredColumn(
        kind="latents",
        encoder=name,
        revision=revision,
        fingerprint=fingerprint(autoencoder.module),
        width=autoencoder.channels,
        storage=storage,
        image_size=image_size,
        multiple=multiple,
        downsampling=autoencoder.downsampling,
        scaling=getattr(autoencoder, "scaling", 1.0),
        shift=getattr(autoencoder, "shift", 0.0),
    )


def check_latent_column(column: StoredColumn, autoencoder: Any, path: str) -> None:
    """Check that stored latents are those that the model's autoencoder would make.

    Raises:
        UserError: they are of other channels, another size or scale, or other weights, by name.
    """
    assert column.image_size is not None and column.multiple is not None
    own = latent_column(autoencoder, "", None, column.storage, column.image_size, column.multiple)
    words = {"width": "channels", "downsampling": "downsampling", "scaling": "scaling_factor", "shift": "shift_factor"}
    pairs = {word: (getattr(column, key), getattr(own, key)) for key, word in words.items()}
    told = [f"{word} {stored} (model.autoencoder: {made})" for word, (stored, made) in pairs.items() if stored != made]
    if told:
        raise UserError(
            f"{path}: the stored latents were made by {column.encoder} with {', '.join(told)}. Name the same autoencoder, or run "
            "`prx encode latents` again."
        )
    if column.fingerprint != own.fingerprint:
        raise UserError(
            f"{path}: the stored latents were made by {column.encoder} (revision {column.revision or 'not said'}), whose weights "
            "are not those of model.autoencoder. Name the same autoencoder, or run `prx encode latents` again."
        )
