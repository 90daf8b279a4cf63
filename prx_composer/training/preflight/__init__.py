"""Everything is checked before the first GPU second is spent: by `prx check`, and by train.py when it starts.

examine.py     names, arguments, types; what must divide
pretrained.py  hub ids: a folder, in the cache, or answered for by the hub
data_fit.py    splits, columns, shards, buckets
captions.py    whether captions are read whole; a run says that itself, of all that it has seen
surroundings.py  run folder, disk, GPUs, loggers
step.py        one forward and backward pass of every stage, without a trace
"""

from collections.abc import Iterator

from prx_composer.recipe.config import Recipe
from prx_composer.training.components import Components
from prx_composer.training.preflight.data_fit import check_data
from prx_composer.training.preflight.pretrained import check_weights
from prx_composer.training.preflight.result import Result, guarded
from prx_composer.training.preflight.surroundings import check_loggers, check_storage


def check_surroundings(recipe: Recipe, parts: Components) -> Iterator[Result]:
    """What a recipe needs and does not contain: weights, data, room and permission to write, loggers.

    Args:
        parts: what `examine` built.
    """
    yield from guarded(check_weights(recipe, parts))
    yield from guarded(check_data(recipe, parts))
    yield from guarded(check_storage(recipe, parts))
    yield from guarded(check_loggers(recipe, parts))
