"""Work that ranks share: who does which images, and how what they made comes together."""

from typing import Any

import torch
from composer.utils import dist
from torch import Tensor


def share(count: int) -> list[int]:
    """This rank's of the numbers below `count`. All ranks get equally many, since sharded models want to be called equally often;
    where they don't divide, the last ones are repeated, and `gathered` drops them."""
    ranks, rank = dist.get_world_size(), dist.get_global_rank()
    return [min(index, count - 1) for index in range(rank, -(-count // ranks) * ranks, ranks)]


def gathered(rows: Tensor, count: int) -> Tensor:
    """The rows that ranks made of their `share`, in the order of the numbers: (count, …), on the CPU of every rank."""
    if dist.get_world_size() == 1:
        return rows[:count].cpu()
    parts = [part.cpu() for part in dist.all_gather(rows.contiguous())]
    return torch.stack(list(parts), 1).flatten(0, 1)[:count]


def from_rank_zero(value: Any) -> Any:
    """What rank 0 has, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
