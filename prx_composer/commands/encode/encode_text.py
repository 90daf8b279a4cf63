"""Captions → embeddings of their valid tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prx_composer.commands.encode.encoded_parts import Encoded
from prx_composer.common.errors import UserError
from prx_composer.data.buckets import Bucket
from prx_composer.data.stored import StoredColumn, fingerprint, pack, unpack
from prx_composer.models.prompts import readings
from prx_composer.models.text_encoder import HuggingFaceTextEncoder, tokenize


def text_column(encoder: HuggingFaceTextEncoder, name: str, revision: str | None, storage: str) -> StoredColumn:
    """What `CaptionEncoder` stores with this encoder; raises UserError for one that is trained."""
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
