"""A trained model, opened for drawing: from a run folder, a checkpoint, or a folder that diffusers opens."""

import dataclasses
import logging
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from composer.core import Algorithm, Event, State, Time, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger
from torch import Tensor, nn

from prx_composer import registry
from prx_composer.common.distributed import clean_name
from prx_composer.common.errors import Problems, UserError, at_path, listed
from prx_composer.models.flow import ClassifierFreeGuidance, InternalGuidance, RoutedSelfGuidance, check_guidance_scale
from prx_composer.models.layers import merge_adapters
from prx_composer.models.text_to_image import TextToImage
from prx_composer.recipe.arguments import build, check_component, check_type, entries, split
from prx_composer.recipe.checks import OF_MODELS
from prx_composer.recipe.config import Recipe, without_code
from prx_composer.recipe.consistency import stages_of
from prx_composer.runs.checkpoints import MERGED, all_checkpoints
from prx_composer.runs.diffusers_folder import open_pipeline
from prx_composer.runs.model_parts import ModelParts
from prx_composer.runs.weights import Located, SavedState, locate, nonfinite, read_checkpoint
from prx_composer.schedule.clock import TrainingClock

log = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]
_LOSSES = "auxiliary_losses."  # where a model has what only training needs, and internal guidance its readout


@dataclass(frozen=True)
class Trained:
    """A model with its trained weights.

    Args:
        model: in eval mode, on the CPU, fp32.
        source: where it comes from.
        weights: "ema" (averaged) or "raw"; "exported" of a diffusers folder, which holds one kind.
        image_size: pixels that it was last trained at: the side of the square of a bucket's area.
        batch: after how many it was saved, if that is known.
        recipe: of the run, as its YAML gives it, if there is one.
        merged: the checkpoints that `prx average` made it of.
    """

    model: TextToImage
    source: Path
    weights: str
    image_size: int
    batch: int | None = None
    recipe: dict[str, Any] | None = None
    merged: tuple[str, ...] = ()


def load_trained(name: str, weights: Weights | None = None, merge: bool = True) -> Trained:
    """Open a trained model. Nothing in its files is executed, and nothing is written.

    A model of the user's own classes needs them registered before: by `registry.import_code`, or in any other way.

    Args:
        name: run folder, checkpoint or diffusers folder.
        weights: averaged or plain; the average by default, if the run has one.
        merge: of a run with `lora`, the adapters into the weights that they adapt.

    Raises:
        UserError: no such model, weights that are missing or damaged, not finite, or that don't belong to the recipe.
    """
    located = locate(name)
    if located.kind == "diffusers":
        if weights == "ema":
            raise UserError("--weights ema: an exported folder holds one kind of weights; leave the option out.")
        model, image_size = open_pipeline(located.path)
        _require_finite(model, located)
        return Trained(model.eval(), located.path, "exported", image_size)
    if located.checkpoint is None:
        raise UserError(
            f"{name} holds weights without the sizes of their model. Give the run folder or the exported folder that it is from; "
            "to train on from it, set model.init_from."
        )
    trained = _load_checkpoint(located, weights)
    _require_finite(trained.model, located)
    if merge:
        merge_adapters(trained.model.backbone)
    return trained


def _require_finite(model: TextToImage, located: Located) -> None:
    parts = {"backbone.": model.backbone, "text_encoder.": model.text_encoder.network, _LOSSES: model.auxiliary_losses}
    wrong = nonfinite({prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()})
    if wrong is None:
        return
    older = [] if located.checkpoint is None else all_checkpoints(located.checkpoint.path.parent)
    others = ", ".join(str(found.path) for found in older if found.path != located.path)
    remedy = f"Give another checkpoint of the run ({others}), or --weights raw or ema." if others else "It draws nothing."
    raise UserError(f"{located.path} holds no model: {wrong}. {remedy}")


def _load_checkpoint(located: Located, weights: Weights | None) -> Trained:
    assert located.checkpoint is not None
    with at_path(f"{located.path} cannot be read", TypeError, AttributeError):
        index = located.checkpoint.index()
        saved_recipe = index["recipe"]
        merged = tuple(map(str, (index.get(MERGED) or {}).get("checkpoints", {})))
        recipe = without_code(_as_recipe(saved_recipe, located.path), index, located.path)
    path = f"{located.path}: recipe.model"
    check_component(registry.models, *split(recipe.model, path), path, *OF_MODELS)
    state = read_checkpoint(located.checkpoint)
    if weights == "ema" and not state.average:
        raise UserError(
            f"{located.path} has no averaged weights: the recipe has no `ema`, or it had not begun. Use --weights raw."
        )
    model = build_model(recipe, located.run_folder)
    attach_algorithms(model, recipe, state, located.run_folder)
    fill(model, state.model, str(located.path))
    chosen = weights or ("ema" if state.average else "raw")
    if chosen == "ema":
        _fill_average(model, state.average, str(located.path))
    stages = [stage for _, stage in stages_of(vars(recipe))]
    # The recipe may have fewer stages by now than when an older checkpoint was written.
    last = stages[-1 if state.stage is None else min(state.stage + 1, len(stages) - 1)]
    image_size = int(last.get("image_size", recipe.image_size))
    return Trained(model.eval(), located.path, chosen, image_size, located.checkpoint.batch, saved_recipe, merged)


def _as_recipe(saved: dict[str, Any], where: Path) -> Recipe:
    known = {f.name for f in dataclasses.fields(Recipe)}
    if unknown := sorted(saved.keys() - known):
        log.warning("%s: this version has no recipe key %s; it is passed over.", where, ", ".join(unknown))
    try:
        recipe = Recipe(**{key: value for key, value in saved.items() if key in known})
    except TypeError as error:
        raise UserError(f"{where} was written by another version of prx-composer: its recipe lacks a key ({error}).") from error
    problems, hints = Problems(), typing.get_type_hints(Recipe)
    for key, value in vars(recipe).items():
        with problems.noted():
            check_type(value, hints[key], f"{where}: recipe.{key}")
    problems.raise_any()
    return recipe


def build_model(recipe: Recipe, run_folder: Path) -> TextToImage:
    """Return the recipe's model before its first step, not compiled, with the run's tokenizer; random numbers are the run's.

    Raises:
        UserError: weights or a tokenizer that cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # an encoder with frozen random weights is in no checkpoint
        return ModelParts(recipe.model, recipe.seed, run_folder).model


# ------------------------------------------------------------------------------------------------------ algorithms


def attach_algorithms(model: TextToImage, recipe: Recipe, saved: SavedState, run_folder: Path) -> None:
    """Attach those algorithms that change what the model draws (`shapes_sampling`), as they were at the checkpoint."""
    values = vars(recipe) | {"run_folder": run_folder}
    shaping: list[Algorithm] = [
        build(registry.algorithms, name, arguments, f"algorithms.{name}", values)
        for name, arguments in entries(recipe.algorithms, "algorithms")
        if getattr(registry.algorithms.get(name, f"algorithms.{name}"), "shapes_sampling", False)
    ]
    if not shaping:
        return
    clock = TrainingClock(run_folder, recipe.budget)
    clock.elapsed, clock.fraction = (float(saved.clock.get(name, 0.0)) for name in ("elapsed", "fraction"))
    state = State(
        rank_zero_seed=recipe.seed,
        run_name=recipe.run_name,
        model=model,
        device=DeviceCPU(),
        max_duration=Time.from_timestring(recipe.max_duration),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
        callbacks=[clock],
        algorithms=shaping,
    )
    last: dict[str, Any] = {unit: int(saved.timestamp.get(unit, 0)) for unit in ("batch", "epoch", "sample")}
    last["batch"] = max(last["batch"] - 1, 0)  # windows go by the last step's beginning
    for event, timestamp in ((Event.INIT, Timestamp()), (Event.BATCH_START, Timestamp(**last))):
        state.timestamp = timestamp
        for algorithm in shaping:
            if algorithm.match(event, state):
                algorithm.apply(event, state, Logger(state))
    for trick in shaping:  # what the checkpoint says goes before what its time says, which is of the next step
        active, trick = saved.was_active(trick), cast("Any", trick)
        if active is not None and active != trick.active:
            trick.active = active
            trick.set_active(model, active)


def choose_guidance(model: TextToImage, name: str) -> str:
    """Set `model.guidance`; return its name.

    Args:
        name: "cfg", "self", "internal" at the recipe's scale, "internal:1.6" at another, or "run" for what the run drew with.

    Raises:
        UserError: a guidance that the model was not trained for, or no such name.
    """
    if name == "cfg":
        model.guidance = ClassifierFreeGuidance()
    elif name == "self":
        router: Any = model.backbone.router
        if router is None:
            raise UserError(
                "--guidance self: routed self-guidance is for models trained with `tread`, opened from their run folder or "
                "checkpoint; use --guidance cfg."
            )
        router.active = True
        model.guidance = RoutedSelfGuidance(router)
    elif name.partition(":")[0] == "internal":
        model.guidance = _internal_guidance(model, name.partition(":")[2])
    elif name != "run":
        raise UserError(f"--guidance: {name!r} is none of run, cfg, self, internal.")
    if isinstance(model.guidance, InternalGuidance):
        return f"internal:{model.guidance.scale:g}"
    chosen = type(model.guidance)
    return {ClassifierFreeGuidance: "cfg", RoutedSelfGuidance: "self"}.get(chosen, chosen.__name__)


def _internal_guidance(model: TextToImage, scale: str) -> InternalGuidance:
    """Return the internal guidance of a model that has been attached one, at a scale, or else at the recipe's."""
    if "internal_guidance" not in model.auxiliary_losses:
        raise UserError(
            "--guidance internal is for models trained with `internal_guidance`, opened from their run folder or checkpoint; "
            "use --guidance cfg."
        )
    trick: Any = model.auxiliary_losses["internal_guidance"].trick
    trick.set_active(model, True)
    if not scale:
        return trick.guidance
    with at_path("--guidance internal"):
        check_guidance_scale(float(scale), "the scale")
        return InternalGuidance(trick.predict_both, float(scale), trick.interval)


# --------------------------------------------------------------------------------------------------------- weights


def fill(module: nn.Module, saved: dict[str, Tensor], source: str) -> None:
    """Give a module the weights of the same names. What only training needs (other losses' heads, teachers) is passed over.

    Raises:
        UserError: names or shapes that differ, by name.
    """
    saved = {clean_name(name): tensor for name, tensor in saved.items()}
    own = module.state_dict()
    if wrong := [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]:
        raise UserError(f"{source} does not fit the model: {listed(wrong)}.")
    strange = [name for name in saved if name not in own and name.startswith(("backbone.", "text_encoder."))]
    missing = [name for name in own if name not in saved]
    if strange or missing:
        said = [*(f"{name} is not in the model" for name in strange), *(f"{name} is not there" for name in missing)]
        raise UserError(
            f"{source} does not fit the model: {listed(said)}. If an algorithm of the recipe adds them, its class must say "
            "shapes_sampling = True, so that it is attached here too."
        )
    module.load_state_dict({name: saved[name] for name in own if name in saved}, strict=False)


@torch.no_grad()
def _fill_average(model: nn.Module, average: dict[str, Tensor], source: str) -> None:
    parameters = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    average = {name: tensor for name, tensor in average.items() if name in parameters or not name.startswith(_LOSSES)}
    if different := sorted(average.keys() ^ parameters.keys()):
        raise UserError(f"{source}: the averaged weights are of another model; names that differ: {listed(different)}.")
    for name, tensor in average.items():
        parameters[name].copy_(tensor)
