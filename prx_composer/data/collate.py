"""Samples → batches → microbatches, with text embeddings of valid tokens only."""

from collections.abc import Sequence
from typing import Any

import torch
from composer.core.data_spec import _default_split_batch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerBase

from prx_composer.common.errors import UserError
from prx_composer.models.prompts import CaptionCounts
from prx_composer.models.text_encoder import tokenize

PACKED = ("text_embedding", "text_position")
SEEN = ("image", "latent")


class Collator:
    """Samples → a batch: images stacked as uint8, captions tokenised, latents and features, by column, as they are stored; in
    evaluation with `counted` bool (B,): which of them are to be measured.

    Stored text embeddings come as `text_embedding` (V, C), those of the V valid tokens of all captions one after the other, and
    `text_position` int64 (V,), where each stands in the flattened (B, T).

    Args:
        max_workers: DataLoader workers that will share this object, for `counts` of captions that are cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, max_workers: int = 0):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.counts = CaptionCounts(max_workers)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = tokenize(self.tokenizer, [sample["caption"] for sample in samples], self.max_tokens, self.counts)
        seen = {name: _stack(name, [sample[name] for sample in samples]) for name in SEEN if name in samples[0]}
        features = {name: torch.stack([sample["features"][name] for sample in samples]) for name in samples[0]["features"]}
        batch = {**seen, **tokens, "sample_id": torch.tensor([sample["sample_id"] for sample in samples]), **features}
        if "counted" in samples[0]:
            batch["counted"] = torch.tensor([sample["counted"] for sample in samples])
        if "text_embedding" in samples[0]:
            batch |= self._packed(samples, tokens["attention_mask"])
        return batch

    def _packed(self, samples: list[dict[str, Any]], mask_BT: Tensor) -> dict[str, Tensor]:
        for sample, valid in zip(samples, mask_BT.sum(1).tolist(), strict=True):
            stored = len(sample["text_embedding"])
            if stored != valid:
                raise UserError(
                    f"Sample {sample['sample_id']} has {stored} stored text tokens, but its caption has {valid}: the tokenizer "
                    "is another one, or the captions have changed. Encode them again with `prx encode text`."
                )
        embedding = torch.cat([sample["text_embedding"] for sample in samples])
        return {"text_embedding": embedding, "text_position": mask_BT.flatten().nonzero().flatten()}


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    if name != "image":
        return torch.stack(tensors)
    # With channels innermost, as they are decoded: to move them here costs a quarter of the decoding, on a GPU nothing.
    return default_collate([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2)


def channels_first(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with its images contiguous as (B, 3, H, W), once it is on its device."""
    return batch | {"image": batch["image"].contiguous()} if "image" in batch else batch


def split_batch(batch: Any, microbatch_size: int | float) -> Sequence[Any]:
    """Composer's splitting, for batches with packed text embeddings too."""
    if not isinstance(batch, dict) or "text_position" not in batch:
        return _default_split_batch(batch, microbatch_size)
    width = batch["attention_mask"].shape[1]
    rest = {name: value for name, value in batch.items() if name not in PACKED}
    microbatches: list[dict[str, Any]] = list(_default_split_batch(rest, microbatch_size))  # pyright: ignore[reportArgumentType]
    valid = [int(microbatch["attention_mask"].sum()) for microbatch in microbatches]  # in the host's memory
    parts = zip(batch["text_embedding"].split(valid), batch["text_position"].split(valid), strict=True)
    first = 0
    for microbatch, (embedding, position) in zip(microbatches, parts, strict=True):
        microbatch |= {"text_embedding": embedding, "text_position": position - first * width}
        first += len(microbatch["attention_mask"])
    return microbatches
