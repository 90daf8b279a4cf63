"""Token routing: which image tokens which blocks see.

A router draws a `Route` once per microbatch, outside the compiled graph; the backbone gathers the kept tokens once before
the first routed block and scatters them back once after the last. Shapes depend on the token count alone, never on the draw.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Route:
    """Blocks `start` ≤ i < `end` see only the tokens in `kept_indices`; the others pass by unchanged.

    Args:
        start: first routed block.
        end: one past the last routed block.
        kept_indices: int64 (B, K), ascending in each row.
        discard: the others don't come back: they have no prediction (`end` is then the depth).
    """

    start: int
    end: int
    kept_indices: Tensor
    discard: bool = False


class Router(Protocol):
    """What `backbone.router` must offer."""

    discard: bool  # see `Route`

    def draw(self, batch_size: int, num_tokens: int, generator: torch.Generator) -> Route | None:
        """Draw a route for one microbatch on the generator's device; return None if every block sees every token."""
        ...


class TokenFusion(nn.Module):
    """Base of what fills `backbone.fusion`: instead of `merge_tokens`, and on dense passes too, it joins the two ends.

    `forward(early (B, N, D), deep (B, N or K, D), kept_indices (B, K) or None) → (B, N, D)`, where `early` is what enters
    block `start` and `deep` what leaves block `end` − 1.
    """

    def __init__(self, start: int, end: int):
        super().__init__()
        self.start, self.end = start, end


def draw_kept_indices(batch_size: int, num_tokens: int, num_kept: int, generator: torch.Generator) -> Tensor:
    """Draw a uniformly random subset of tokens for every image: int64 (B, K), ascending, on the generator's device."""
    order = torch.rand(batch_size, num_tokens, generator=generator, device=generator.device)
    return order.topk(num_kept, dim=1, sorted=False).indices.sort(dim=1).values


class RandomRouter:
    """Routes a random share of the tokens around the blocks `start` ≤ i < `end`, while `active`.

    Args:
        name: of the algorithm that owns it, for messages.
        start, end: as in `Route`.
        rate: share of tokens that skip these blocks, in (0, 1); at least one token stays.
        discard: as in `Route`.
    """

    def __init__(self, name: str, start: int, end: int, rate: float, discard: bool = False):
        self.name = name
        self.start, self.end, self.rate, self.discard = start, end, rate, discard
        self.active = True

    def draw(self, batch_size: int, num_tokens: int, generator: torch.Generator) -> Route | None:
        if not self.active:
            return None
        num_kept = max(1, num_tokens - round(self.rate * num_tokens))
        kept = draw_kept_indices(batch_size, num_tokens, num_kept, generator)
        return Route(self.start, self.end, kept, self.discard)


def select_tokens(tokens: Tensor, kept_indices: Tensor) -> Tensor:
    """Return the kept ones (B, K, D) of tokens (B, N, D)."""
    return tokens.gather(1, kept_indices[..., None].expand(-1, -1, tokens.shape[-1]))


def merge_tokens(tokens: Tensor, kept: Tensor, kept_indices: Tensor) -> Tensor:
    """Put `kept` (B, K, D) back into a copy of `tokens` (B, N, D)."""
    return tokens.scatter(1, kept_indices[..., None].expand_as(kept), kept.type_as(tokens))


def counted_pixels(route: Route | None, image: Tensor, patch_size: int) -> Tensor | None:
    """Return 1 on the pixels (B, 1, H, W) of patches that have a prediction, of images (B, C, H, W); None if all have."""
    if route is None or not route.discard:
        return None
    batch_size, _, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    counted = image.new_zeros(batch_size, rows * columns).scatter(1, route.kept_indices, 1.0)
    grid = counted.reshape(batch_size, 1, rows, columns)
    return grid.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
