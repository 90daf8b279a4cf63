"""Several text encoders as one: their tokens one after another or side by side, their pooled vectors in a row.

Shape suffixes: B batch, T tokens that are read, K tokens that the backbone is given, C width, P width of the pooled vector.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_composer.models.caption_format import SeveralTokenizers
from prx_composer.models.prompts import Reading, readings, tokenize


class SeveralTextEncoders(nn.Module):
    """Text encoders that read the same captions, such as SD3's two of CLIP and T5.

    Args:
        encoders: by names of your own, in the order of the pipeline that draws with them.
        tokens: whose tokens the backbone is given, one after another; a list in this list has its encoders' channels side by
            side. Narrower ones are filled up with zeros. By default those of all, one after another. Whose name isn't there gives
            its pooled vector alone. `[[clip_l, clip_g], t5]` is SD3's, `[t5]` FLUX's. Pooled vectors stand side by side.

    Raises:
        ValueError: a name that is no encoder's or stands twice, encoders side by side with different `max_tokens`, and one that
            gives neither tokens nor a pooled vector.
    """

    null_input_ids: Tensor
    null_attention_mask: Tensor

    def __init__(self, encoders: dict[str, Any], tokens: list[Any] | None = None):
        super().__init__()
        self.encoders, self.rows = nn.ModuleDict(encoders), _rows(encoders, tokens)
        self.tokenizer = SeveralTokenizers({name: (one.tokenizer, one.max_tokens) for name, one in encoders.items()}, self.rows)
        self.trainable = any(one.trainable for one in encoders.values())
        self.max_tokens = sum(encoders[row[0]].max_tokens for row in self.rows)
        self.hidden_size = max(sum(encoders[name].hidden_size for name in row) for row in self.rows)
        self.pooled_size = sum(getattr(one, "pooled_size", 0) for one in encoders.values())
        for part in ("input_ids", "attention_mask"):
            null = torch.cat([getattr(one, f"null_{part}") for one in encoders.values()], 1)
            self.register_buffer(f"null_{part}", null, persistent=False)

    @property
    def network(self) -> nn.Module:
        """The encoders' own networks, trained or frozen, by name."""
        return nn.ModuleDict({name: one.network for name, one in self.encoders.items()})  # pyright: ignore[reportArgumentType]

    @property
    def how(self) -> dict[str, Any]:
        """What its embeddings depend on beside weights, tokenizers and `max_tokens`."""
        return {"tokens": self.rows} | {name: getattr(one, "how", {}) for name, one in self.encoders.items()}

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return `input_ids` int64 and `attention_mask` bool, both (B, T), of all encoders one after another."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    def readings(self, texts: list[str]) -> list[Reading]:
        """Return what the encoder that reads most is given of each text."""
        return readings(self.tokenizer, texts, self.max_tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return embeddings (B, K, C) of what `tokenize` gives; if any encoder pools, them and the pooled vectors (B, P)."""
        lengths, embedding, pooled = self.tokenizer.lengths(), dict[str, Tensor](), list[Tensor]()
        parts = zip(self.encoders.items(), input_ids.split(lengths, 1), attention_mask.split(lengths, 1), strict=True)
        for (name, encoder), ids, mask in parts:
            made = encoder(ids, mask)
            embedding[name], *own = made if isinstance(made, tuple) else (made,)
            pooled += own
        rows = [torch.cat([embedding[name] for name in row], -1) for row in self.rows]
        joined = torch.cat([F.pad(row, (0, self.hidden_size - row.shape[-1])) for row in rows], 1)
        return (joined, torch.cat(pooled, -1)) if pooled else joined


def _rows(encoders: dict[str, Any], tokens: Sequence[Any] | None) -> tuple[tuple[str, ...], ...]:
    given: Iterable[Any] = encoders if tokens is None else tokens
    rows = tuple(tuple(row) if isinstance(row, list | tuple) else (row,) for row in given)
    named = [name for row in rows for name in row]
    if unknown := [name for name in named if name not in encoders]:
        raise ValueError(f"tokens: there is no encoder {unknown[0]!r}; encoders has {', '.join(encoders)}.")
    if not named or len({*named}) < len(named):
        raise ValueError("tokens: name every encoder whose tokens the backbone is given, and each once.")
    for row in rows:
        if len({encoders[name].max_tokens for name in row}) > 1:
            raise ValueError(f"tokens: {', '.join(row)} are side by side, so that they need the same max_tokens.")
    for name, encoder in encoders.items():
        if name not in named and not getattr(encoder, "pooled_size", 0):
            raise ValueError(f"encoders.{name} gives neither tokens nor a pooled vector; name it in tokens, or set its pooled.")
    return rows


def parts_of(encoder: Any) -> tuple[list[Any], list[list[int]]]:
    """Return the text encoders that make up one, in order: itself, or several; and the `tokens` of these, by number."""
    if not isinstance(encoder, SeveralTextEncoders):
        return [encoder], [[0]]
    names = list(encoder.encoders)
    return [*encoder.encoders.values()], [[names.index(name) for name in row] for row in encoder.rows]
