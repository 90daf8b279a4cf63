"""Everything is checked before the first GPU second is spent: by `prx check`, and by train.py when it starts.

pretrained.py    hub ids: a folder, in the cache, or answered for by the hub; whether captions are read whole
data_fit.py      splits, columns, shards, buckets
surroundings.py  run folder, disk, GPUs, loggers
step.py          one forward and backward pass of every stage, without a trace

A check yields what it finds, one `Result` for each line of the page. Here is what the recipe alone tells: names, arguments and
types, and sizes that must divide one another.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, get_args

from prx_composer import registry
from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import Problems, UserError, at_path, problems_of, raise_all
from prx_composer.models.caption_format import Cleaning, cleaner
from prx_composer.models.text_to_image import check_text
from prx_composer.recipe.arguments import entries, text_encoders
from prx_composer.recipe.checks import argument_problems, never_open, setting_problems
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import batch_problems, image_size_problems
from prx_composer.recipe.times import budget_notes, schedule_notes, schedule_problems
from prx_composer.runs.model_parts import UnknownNetwork
from prx_composer.training.components import Components
from prx_composer.training.trainer import low_dtype, parallelism

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """✓ is right, ! will train but should be known, ✗ must be mended, – could not be checked here."""

    mark: Literal["✓", "!", "✗", "–"]
    text: str

    def __str__(self) -> str:
        return f"{self.mark} {self.text}"


def passed(what: str, fact: str) -> Result:
    return Result("✓", f"{what}: {fact}")


def warned(what: str, fact: str) -> Result:
    return Result("!", f"{what}: {fact}")


def failed(problem: str) -> Result:
    """Return a mistake, which begins with the YAML path as the message of every UserError does."""
    return Result("✗", problem)


def skipped(what: str, reason: str) -> Result:
    return Result("–", f"{what}: not checked here, because {reason}")


Given = ParamSpec("Given")


def collected(function: Callable[Given, Iterable[Result]]) -> Callable[Given, Iterator[Result]]:
    """Decorate a check: a UserError ends it, and becomes one more result for everything that it names."""

    @functools.wraps(function)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Iterator[Result]:
        try:
            yield from function(*args, **kwargs)
        except UserError as error:
            yield from map(failed, problems_of(error))

    return checked


def require(results: Iterable[Result]) -> list[Result]:
    """Return all results, and warn of what should be known.

    Raises:
        UserError: with everything that must be mended, if anything must.
    """
    results = list(results)
    raise_all([result.text for result in results if result.mark == "✗"])
    for result in results:
        if result.mark == "!":
            log.warning("%s", result.text)
    return results


def examine(recipe: Recipe, num_ranks: int) -> tuple[list[Result], Components]:
    """Return all that can be said of a recipe without data, weights or a network, and its components on the meta device."""
    settings = setting_problems(vars(recipe), num_ranks)
    wrong = argument_problems(vars(recipe))
    batches = batch_problems(vars(recipe), num_ranks)
    parts = Components(recipe, meta=True, num_ranks=num_ranks, problems=wrong)
    results = [failed(problem) for problem in wrong]
    marks: dict[str, Literal["✓", "!", "✗", "–"]] = {"lacking": "!", "gone": "✗", "unknown": "–"}
    results += [Result(marks.get(choice.why, "✓"), choice.said) for choice in parts.text]
    if not wrong:
        counts = [f"{len(list(entries(getattr(recipe, kind), kind)))} {kind}" for kind in ("algorithms", "callbacks")]
        results.append(passed("names, arguments and types", f"model, optimizer, scheduler, {', '.join(counts)}"))
    results += [*_check_backbone(parts), *map(failed, settings), *_check_text(parts), *_check_scheduler(parts)]
    parts.algorithms, problems = parts.each("algorithms")
    results += [*map(failed, problems), *_check_images(parts), *_check_tricks(parts, settings)]
    if parts.algorithms:
        results.append(passed("algorithms", ", ".join(parts.algorithms)))
    if "progressive_resolution" not in parts.algorithms and recipe.algorithms.get("progressive_resolution"):
        parts.stages = []
        results.append(skipped("stages", "they could not be built"))
    elif not batches:
        results += _advice(parts)
    results += [*map(failed, batches), *_check_sizes(parts, divides=not batches)]
    return list(dict.fromkeys(results)), parts


@collected
def _check_backbone(parts: Components) -> Iterator[Result]:
    """Make the backbone; whoever asks for one that is wrong, or that the model doesn't have, is given None from here on."""
    try:
        parts.backbone = None if parts.is_wrong("model") or "backbone" not in parts.recipe.model else parts.backbone
    except UserError:
        parts.backbone = None
        raise
    if parts.backbone is not None:
        parameters = sum(parameter.numel() for parameter in parts.backbone.parameters())
        yield passed("model.backbone", f"{parameters / 1e6:,.1f}M parameters")


@collected
def _check_text(parts: Components) -> Iterator[Result]:
    """Check that what text encoders need is installed and, if their sizes are known here, that the backbone takes theirs."""
    for path, encoder in text_encoders(parts.recipe.model).items():
        clean: Any = encoder.get("clean")
        if clean in get_args(Cleaning):  # else its type is wrong, which is said elsewhere
            with at_path(path):
                cleaner(clean)
    yield from ()
    if parts.is_wrong("model") or parts.backbone is None:
        return
    try:
        encoder = parts.text_encoder
    except Exception as error:  # whatever a network's code raises where it has no storage
        if isinstance(error, UserError) and not isinstance(error, UnknownNetwork):
            raise
        return
    try:
        check_text(parts.backbone, encoder)
    except ValueError as error:
        raise UserError(str(error)) from error


@collected
def _check_scheduler(parts: Components) -> Iterator[Result]:
    if not parts.is_wrong("scheduler"):
        _ = parts.scheduler
        yield from map(failed, schedule_problems(vars(parts.recipe)))
        yield from (Result("!", note) for note in schedule_notes(vars(parts.recipe)))
        yield from (Result("!", note) for note in budget_notes(vars(parts.recipe)))


@collected
def check_callbacks(parts: Components) -> Iterator[Result]:
    """Build the callbacks one by one and let them go again."""
    recipe = parts.recipe
    made, problems = parts.each("callbacks")
    yield from map(failed, problems)
    if made:
        yield passed("callbacks", ", ".join(made))
    if recipe.model.get("caption_dropout") == 0 and not recipe.model.get("init_from"):
        for name, arguments in entries({name: recipe.callbacks[name] for name in made}, "callbacks"):
            taken = inspect.signature(registry.callbacks.get(name, f"callbacks.{name}")).parameters.get("guidance_scale")
            scale = arguments.get("guidance_scale", None if taken is None else taken.default)
            if isinstance(scale, int | float) and scale != 1:
                yield warned(
                    f"callbacks.{name}.guidance_scale",
                    f"{scale} leads away from what the model draws without a caption, and with model.caption_dropout: 0 it never "
                    "learns that. Set it to 1, or model.caption_dropout to 0.1.",
                )


@collected
def _check_images(parts: Components) -> Iterator[Result]:
    """Check that latents that come with the data have an autoencoder, and that who looks at images has them."""
    recipe = parts.recipe
    if parts.is_wrong("train_loader"):
        return
    autoencoder = (recipe.model.get("autoencoder") or {}).get("name", "pixels")
    for key in ("train_loader", "eval_loader"):
        spec = getattr(recipe, key) or {}
        if spec.get("latent") and autoencoder == "pixels":
            yield failed(f"{key}.latent: model.autoencoder is pixels, so that training is on images; leave {key}.latent out.")
        elif spec.get("images") is False and not spec.get("latent"):
            yield failed(f"{key}.images: false leaves nothing to train on; name stored latents in {key}.latent.")
    if not recipe.train_loader.get("latent") or recipe.train_loader.get("images"):
        return
    for name, algorithm in parts.algorithms.items():
        if isinstance(algorithm, Trick) and algorithm.needs_image:
            yield failed(
                f"algorithms.{name} looks at images, which train_loader.latent leaves out; set train_loader.images: true to have "
                f"them decoded beside the latents{algorithm.instead_of_images}."
            )


@collected
def _check_tricks(parts: Components, settings: list[str]) -> Iterator[Result]:
    """Ask tricks whether they go with the recipe, the others and the backbone; and look at how blocks are gathered.

    Args:
        settings: what is wrong with those of no component; a wrong sharding is none.
    """
    wrong = any(problem.startswith("parallelism_config") for problem in settings)
    wrapped = None if wrong else parallelism(parts.recipe.parallelism_config, parts.num_ranks)
    sharding, problems = None if wrapped is None else wrapped.fsdp2, Problems()
    for trick in parts.algorithms.values():
        if isinstance(trick, Trick):
            others = [other for other in parts.algorithms.values() if other is not trick]
            with problems.noted():
                trick.check(parts.recipe, others, parts.backbone)
            if not parts.is_wrong("model"):
                with problems.noted():
                    trick.check_flow(parts.flow)
    problems.raise_any()
    if sharding is not None and low_dtype(sharding.mixed_precision, parts.recipe.precision) is not None:
        norms = parts.algorithms.get("low_precision_norm")
        if not (isinstance(norms, Trick) and norms.window.start.is_beginning and norms.window.end is None):
            yield warned(
                "parallelism_config.fsdp.mixed_precision",
                "WEIGHTS rounds the gains of the blocks' norms, which autocast leaves in fp32. Add "
                "algorithms.low_precision_norm={}, which rounds them itself: beside it, WEIGHTS changes no prediction.",
            )


@collected
def _advice(parts: Components) -> Iterator[Result]:
    """Ask tricks what should be known of them at the image sizes of this run, and say what of a schedule never comes."""
    windows = {stage.path.rstrip("."): stage.window for stage in parts.stages}
    for trick in parts.algorithms.values():
        if isinstance(trick, Trick):
            windows |= {f"algorithms.{name}": window for name, window in trick.windows.items()}
            yield from (warned(f"algorithms.{trick.name}", said) for said in trick.advise(parts.stages))
    for path, window in windows.items():
        if said := never_open(window, vars(parts.recipe)):
            yield warned(path, said)


@collected
def _check_sizes(parts: Components, divides: bool) -> Iterator[Result]:
    """Say how the batches of every stage divide, if they do, and whether its images can be cut into patches."""
    if divides and parts.stages:
        shares = [
            f"{s.global_batch_size} = {s.device_batch_size // s.microbatch_size} × {s.microbatch_size}" for s in parts.stages
        ]
        ranks = f" × {parts.num_ranks} ranks" if parts.num_ranks > 1 else ""
        yield passed("batches divide into microbatches", ", ".join(share + ranks for share in dict.fromkeys(shares)))
    if parts.backbone is None:
        return
    patch_size, downsampling = getattr(parts.backbone, "patch_size", None), parts.downsampling
    if not isinstance(patch_size, int):
        yield skipped("image sizes", "the backbone has no patch_size")
    elif downsampling is None:
        yield skipped("image sizes", "what the autoencoder divides them by is known only from its weights")
    elif problems := image_size_problems(vars(parts.recipe), patch_size, downsampling):
        yield from map(failed, problems)
    elif parts.stages:
        of = ", ".join(str(size) for size in sorted({stage.image_size for stage in parts.stages}))
        yield passed("image sizes divide into patches", f"{of} px, patches of {patch_size}")
