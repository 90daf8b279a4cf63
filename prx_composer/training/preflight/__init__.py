"""Everything is checked before the first GPU second is spent: by `prx check`, and by train.py when it starts.

config.py   names, arguments, types; what must divide
weights.py  hub ids: a folder, in the cache, or answered for by the hub
data.py     splits, columns, shards, buckets
captions.py whether captions are read whole; a run says that itself, of all that it has seen
storage.py  run folder and disk      loggers.py, gpus.py
step.py     one forward and backward pass of every stage (probe.py: without a trace)
"""

import logging
from collections.abc import Iterator

from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.training.preflight.captions import check_captions
from prx_composer.training.preflight.data_fit import check_data
from prx_composer.training.preflight.disk import check_storage
from prx_composer.training.preflight.examine import Parts, check_callbacks, examine
from prx_composer.training.preflight.gpus import check_gpus
from prx_composer.training.preflight.logger_access import check_loggers
from prx_composer.training.preflight.pretrained import check_weights
from prx_composer.training.preflight.result import Result, failed, guarded, skipped
from prx_composer.training.preflight.trial import try_out

log = logging.getLogger(__name__)


def check_config(recipe: Recipe, num_ranks: int = 1) -> list[Result]:
    """Checks a recipe without data, weights or a network; finds all that is wrong.

    Every name and argument is bound against its constructor, and what costs nothing is built: the backbone without storage,
    the scheduler, algorithms and callbacks. Batches must divide over `num_ranks`, and image sizes into patches.
    """
    return _examine(recipe, num_ranks)[0]


def _examine(recipe: Recipe, num_ranks: int) -> tuple[list[Result], Parts | None]:
    try:
        config.import_code(recipe.code_paths)
    except Exception as error:  # whatever the user's code raises; what it registers may be named anywhere
        if not isinstance(error, UserError):
            log.warning("code_paths cannot be imported", exc_info=True)
        problem = str(error) if isinstance(error, UserError) else f"code_paths: importing them fails with {error!r}."
        return [failed(problem), skipped("the rest", "it may need that code")], None
    results, parts = examine(recipe, num_ranks)
    return [*results, *check_callbacks(recipe, parts)], parts


def check_recipe(recipe: Recipe, num_ranks: int = 1, step: bool = True) -> Iterator[Result]:
    """All checks, as `prx check` makes them, one after the other; nothing is written, trained or downloaded.

    Args:
        num_ranks: GPUs that will train it.
        step: also make one forward and backward pass of every stage, if this machine can.
    """
    results, parts = _examine(recipe, num_ranks)
    yield from results
    if parts is None:
        return
    right = all(result.mark != "✗" for result in results)
    others = [*guarded(check_captions(recipe, parts)), *guarded(check_gpus(recipe, 0, num_ranks))]
    for result in [*check_surroundings(recipe, parts), *others]:
        right = right and result.mark != "✗"
        yield result
    if step and right:
        yield from guarded(try_out(recipe, parts, num_ranks))
    elif step:
        yield skipped("step", "what is wrong above must be mended first")


def check_surroundings(recipe: Recipe, parts: Parts) -> Iterator[Result]:
    """What a recipe needs and does not contain: weights, data, room and permission to write, loggers.

    Args:
        parts: what `examine` built.
    """
    yield from guarded(check_weights(recipe, parts))
    yield from guarded(check_data(recipe, parts))
    yield from guarded(check_storage(recipe, parts))
    yield from guarded(check_loggers(recipe, parts))
