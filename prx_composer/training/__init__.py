"""What train.py runs: a recipe is read and looked over in a second, and only then are torch and Composer imported."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator

from prx_composer.common.errors import UserError, problems_of, raise_all
from prx_composer.recipe.checks import first_look
from prx_composer.recipe.config import Recipe, load

_NOT_YET = "– what only the components can tell: not checked here, because what is wrong above must be mended first"


def main(arguments: list[str]) -> int:
    """Run what the command line names; return the exit code. What is the user's to mend is said without a traceback."""
    try:
        recipe = read_recipe(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        print(f"\nerror: {error}\nMore may come to light when components are built: `prx check` says it all.", file=sys.stderr)
        return 1
    _set_up_logging()
    from prx_composer.training import run as train

    return train.report(recipe)


def read_recipe(arguments: list[str], num_ranks: int) -> Recipe:
    """Read and merge a recipe, and check all that can be checked without torch and Composer.

    Raises:
        UserError: naming everything that was found to be wrong.
    """
    recipe = load(arguments, num_ranks)
    raise_all(first_look(vars(recipe), num_ranks))
    return recipe


def check_lines(arguments: list[str], num_ranks: int, config_only: bool, step: bool) -> Iterator[str]:
    """Yield what `prx check` prints, as it is found; mistakes begin with ✗.

    Args:
        config_only: only what needs no data, no weights and no network; what must be built is built only if nothing is wrong.
        step: also try one step of every stage.
    """
    try:
        recipe = load(arguments, num_ranks)
        problems = first_look(vars(recipe), num_ranks)
    except UserError as error:
        yield from (f"✗ {problem}" for problem in problems_of(error))
        yield _NOT_YET
        return
    said = [f"✗ {problem}" for problem in problems]
    yield from said
    if config_only and problems:
        yield _NOT_YET
        return
    from prx_composer.training.trial import check_config, check_recipe

    results = check_config(recipe, num_ranks) if config_only else check_recipe(recipe, num_ranks, step)
    for line in map(str, results):
        if line not in said:
            said.append(line)
            yield line


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("prx_composer").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenisation happens in forked workers
    # A pass that a resume leaves empty (see ProgressiveResolution) is not a data set without batches.
    warnings.filterwarnings("ignore", message="No batches were trained for global rank")
