"""Images → patch features of a teacher, or latents of an autoencoder, at the size and crop that training sees."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prx_composer.commands.encode.encoded_parts import Encoded
from prx_composer.common.errors import UserError
from prx_composer.data.buckets import Bucket
from prx_composer.data.stored import pack
from prx_composer.data.transforms import UNDECODABLE, decode_image
from prx_composer.models.vision_encoder import VisionEncoder, teacher_features


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
    """uint8 (B, 3, H, W) → the teacher's features of every `patch` × `patch` pixels, (B, H/patch, W/patch, C)."""

    def encode(image: Tensor) -> Tensor:
        rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
        return teacher_features(teacher, {"image": image}, rows, columns).unflatten(1, (rows, columns))

    return encode
