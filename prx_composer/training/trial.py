"""What `prx check` looks at: the recipe, what it needs, and a step of every stage.

The steps are taken by a trainer of one rank's share, built in a temporary folder, which never trains.
"""

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from prx_composer import registry
from prx_composer.common.errors import UnknownName, UserError
from prx_composer.data.sources import prepare
from prx_composer.models.counting import flops_of_backbone
from prx_composer.recipe.arguments import text_encoders
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import stages_of
from prx_composer.runs.checkpoints import newest_checkpoint
from prx_composer.runs.model_parts import with_kept
from prx_composer.training.components import Components, Making, unmade_sources
from prx_composer.training.preflight import Result, check_callbacks, collected, examine, failed, skipped
from prx_composer.training.preflight.pretrained import bytes_here, check_captions, is_here, references
from prx_composer.training.preflight.step import try_steps
from prx_composer.training.preflight.surroundings import check_gpus, check_surroundings
from prx_composer.training.run import build_trainer

log = logging.getLogger(__name__)

MOST_PARAMETERS = 100e6  # of the backbone, and in fp32 of every pretrained network, that are tried without a GPU …
MOST_FLOPS = 2e12  # … and work of one step of every stage: half a minute on a laptop
SAMPLES = 256  # of a data set that is still to be made


def check_config(recipe: Recipe, num_ranks: int = 1) -> list[Result]:
    """Check a recipe without data, weights or a network, and find all that is wrong.

    Every name and argument is bound against its constructor, and what costs nothing is built: the backbone without storage,
    the scheduler, algorithms and callbacks. Batches must divide over `num_ranks`, and image sizes into patches.
    """
    results, _, whole = _examine(recipe, num_ranks)
    return _judged(results, whole)


def _examine(recipe: Recipe, num_ranks: int) -> tuple[list[Result], Components, bool]:
    """Return what the recipe itself tells, its components, and whether all of its code could be imported."""
    unread = list[str]()
    for path, name in ((f"code_paths[{index}]", name) for index, name in enumerate(recipe.code_paths)):
        try:
            registry.import_code([name], path)
        except UserError as error:
            unread.append(str(error))
        except Exception as error:  # whatever the user's code raises
            log.warning("%s cannot be imported", name, exc_info=True)
            unread.append(f"{path}: importing {name} fails with {error!r}.")
    results, parts = examine(recipe, num_ranks)
    return [*map(failed, unread), *results, *check_callbacks(parts)], parts, not unread


def _judged(results: Iterable[Result], whole: bool) -> list[Result]:
    """Return the results; if not all code could be imported, a name that is unknown is no mistake yet."""
    judged = list[Result]()
    for result in results:
        if isinstance(result.text, UnknownName) and not whole:
            path, _, unknown = result.text.partition(": ")
            result = skipped(path, f"the code that cannot be imported may register it. Else {unknown}")
        judged.append(result)
    return judged


def check_recipe(recipe: Recipe, num_ranks: int = 1, step: bool = True) -> Iterator[Result]:
    """Make all checks of `prx check`, one after the other; nothing is trained or downloaded, and nothing written but `keys.npz`.

    Args:
        num_ranks: GPUs that will train it.
        step: also make one forward and backward pass of every stage, if this machine can.
    """
    found, parts, whole = _examine(recipe, num_ranks)
    yield from (results := _judged(found, whole))
    recipe = parts.recipe
    others = [
        *check_surroundings(parts),
        *check_captions(parts),
        *check_gpus(recipe, parts.algorithms.values(), 0, num_ranks),
    ]
    yield from (others := _judged(others, whole))
    if step and any(result.mark == "✗" for result in [*results, *others]):
        yield skipped("step", "what is wrong above must be mended first")
    elif step:
        yield from _try_out(recipe, parts, num_ranks)


@collected
def _try_out(recipe: Recipe, parts: Components, num_ranks: int) -> Iterator[Result]:
    """Build the model and make one forward and backward pass of every stage, if this machine can do that in moderate time."""
    if (reason := _why_not(recipe, parts)) is not None:
        yield skipped("step", reason)
        return
    with tempfile.TemporaryDirectory(prefix="prx-check-") as temporary:
        reduced = _one_rank(recipe, num_ranks, Path(temporary))
        trainer = build_trainer(reduced)
        try:
            for result in try_steps(trainer, reduced):
                if result.mark == "✗" and recipe.parallelism_config is not None and "out of memory" in result.text:
                    result = skipped("step", "one GPU cannot hold the weights that the run will shard; train.py tries it then")
                yield result
        finally:
            trainer.close()


def _why_not(recipe: Recipe, parts: Components) -> str | None:
    """Return why the steps are not tried here, in words; None if they are."""
    later = "; train.py tries it before the first step"
    if recipe.autoresume and recipe.model.get("init_from") and newest_checkpoint(Path(recipe.run_folder)) is not None:
        return f"the run goes on from a checkpoint, and what model.init_from names may be gone{later}"
    wanted = references(parts)
    if torch.cuda.is_available():
        away = [reference.name for reference in wanted if not is_here(reference)]
        return f"it would download {', '.join(away)}" if away else None
    if recipe.precision != "fp32":
        what = "it needs a GPU"
    elif large := [one.name for one in wanted if bytes_here(one) > 4 * MOST_PARAMETERS]:
        what = f"without a GPU {large[0]} takes too long"
    elif parts.multiple is None:
        return "the model has no backbone with a patch_size"
    else:
        parameters = sum(parameter.numel() for parameter in parts.backbone.parameters())
        tokens = sum(int(one.get("max_tokens", 256)) for one in text_encoders(recipe.model).values())
        work = 0.0
        for stage in parts.stages:  # of square images
            side = stage.image_size * parts.backbone.patch_size // parts.multiple
            work += stage.microbatch_size * flops_of_backbone(parts.backbone, side, side, tokens)
        if parameters <= MOST_PARAMETERS and work <= MOST_FLOPS:
            return None
        what = f"{parameters / 1e6:,.0f}M parameters and {work / 1e12:,.1f} TFLOP take too long without a GPU"
    return what + later


def _one_rank(recipe: Recipe, num_ranks: int, folder: Path) -> Recipe:
    """Return the same run with one rank's share of every batch, and nothing that reaches out of `folder`."""
    algorithms = copy.deepcopy(recipe.algorithms)
    stages: list[Any] = stages_of({"algorithms": algorithms})[1:]
    for _, stage in stages:
        stage["global_train_batch_size"] //= num_ranks
    changes: dict[str, Any] = {
        "run_folder": str(folder / "run"),
        "model": with_kept(recipe.model, Path(recipe.run_folder)),
        "global_train_batch_size": recipe.global_train_batch_size // num_ranks,
        "global_eval_batch_size": recipe.eval_batch_size // num_ranks,
        "algorithms": algorithms,
        "loggers": {},
        "parallelism_config": None,
        "autoresume": False,
        "progress_bar": False,
        "preflight": False,
        "code_paths": [],  # imported already
    }
    unmade = unmade_sources(recipe.train_loader, "train_loader")
    if unmade:
        changes |= {"train_loader": _with_trial_data(recipe.train_loader, unmade, folder), "eval_loader": None}
    elif unmade_sources(recipe.eval_loader, "eval_loader"):
        changes["eval_loader"] = None
    return dataclasses.replace(recipe, **changes)


def _with_trial_data(loader: dict[str, Any], unmade: list[Making], folder: Path) -> dict[str, Any]:
    """Return the loader over a few samples of what is still to be made, and make them in `folder`."""
    loader = copy.deepcopy(loader)
    for index, making in enumerate(unmade):
        path = folder / f"data{index}"
        try:
            prepare(path, making.source, making.spec, limit=SAMPLES)
        except (OSError, ValueError) as error:
            raise UserError(f"{making.key}.source: {error}") from error
        _, _, name = making.key.partition(".mix.")
        (loader["mix"][name] if name else loader)["path"] = str(path)
    return loader
