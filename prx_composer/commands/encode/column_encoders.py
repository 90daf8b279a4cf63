"""What is stored of captions and images: embeddings, a teacher's patch features, an autoencoder's latents."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prx_composer.commands.encode.encoded_parts import Encoded
from prx_composer.common.errors import UserError
from prx_composer.data.buckets import Bucket
from prx_composer.data.decoding import UNDECODABLE, decode_image
from prx_composer.data.stored import StoredColumn, fingerprint, pack, unpack
from prx_composer.models.prompts import readings
from prx_composer.models.text_encoder import HuggingFaceTextEncoder, tokenize
from prx_composer.models.vision_encoder import VisionEncoder, teacher_features


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
