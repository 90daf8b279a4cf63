"""Ties every random draw of a step to (seed, rank, step), so that a resumed run repeats the uninterrupted one."""

import random

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from prx_composer.common.distributed import unwrapped
from prx_composer.models.randomness import RandomStreams, derive_seed


class RandomStep(Callback):
    """Tells the model's `RandomStreams` which step it is, and reseeds the global generators.

    Our own code draws from the streams; the global generators are for dropout layers and other people's algorithms.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        streams = getattr(unwrapped(state.model), "random", None)
        if isinstance(streams, RandomStreams):
            streams.begin_step(step)
        seed = derive_seed(state.rank_zero_seed, dist.get_global_rank(), step)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
