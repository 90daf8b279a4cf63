"""Which tokens which blocks see.

A router draws a `Route` once per microbatch, outside the compiled graph; the backbone gathers the kept tokens once before
the first routed block and scatters them back once after the last. Shapes depend on the token count alone, never on the draw.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Route", "Router", "merge_tokens", "select_tokens"]


@dataclass(frozen=True)
class Route:
    """Blocks `start` ≤ i < `end` see only the tokens in `kept_indices`; the others pass by unchanged.

    Args:
        start: first routed block.
        end: one past the last routed block.
        kept_indices: int64 (B, K), ascending in each row.
    """

    start: int
    end: int
    kept_indices: Tensor


class Router(Protocol):
    """What `backbone.router` must offer."""

    def draw(self, batch_size: int, num_tokens: int, generator: torch.Generator) -> Route | None:
        """Draws a route for one microbatch on the generator's device; None means that every block sees every token."""
        ...

    def tokens_per_block(self, num_tokens: int, depth: int) -> list[int]:
        """How many tokens each block sees: the FLOP count needs it."""
        ...


def select_tokens(tokens: Tensor, kept_indices: Tensor) -> Tensor:
    """(B, N, D) and (B, K) → (B, K, D)."""
    return tokens.gather(1, kept_indices[..., None].expand(-1, -1, tokens.shape[-1]))


def merge_tokens(tokens: Tensor, kept: Tensor, kept_indices: Tensor) -> Tensor:
    """Puts `kept` (B, K, D) back into a copy of `tokens` (B, N, D)."""
    return tokens.scatter(1, kept_indices[..., None].expand_as(kept), kept.type_as(tokens))
