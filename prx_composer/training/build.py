"""A recipe becomes a run: configuration → objects → composer.Trainer → one line that says where everything is."""

import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.core import DataSpec, Evaluator, Event
from composer.utils import create_interval_scheduler, dist, get_device, reproducibility
from transformers import PreTrainedTokenizerBase

from prx_composer import registry
from prx_composer.callbacks.checkpointing import Checkpointing, due_every
from prx_composer.callbacks.data_monitor import DataMonitor
from prx_composer.callbacks.finite_guard import FiniteGuard
from prx_composer.callbacks.random_step import RandomStep
from prx_composer.callbacks.resumed import NewValues
from prx_composer.common.distributed import GlooAverage
from prx_composer.common.errors import TrainingInterrupted, UserError, at_path
from prx_composer.common.secrets import redacted
from prx_composer.common.signatures import constructor
from prx_composer.data.loader import ImageCaptionLoader
from prx_composer.data.stored import check_latent_column, check_text_column
from prx_composer.models.prompts import cleaner, with_cleaning
from prx_composer.models.text_encoder import HuggingFaceTextEncoder, load_tokenizer
from prx_composer.models.text_to_image import TextToImage
from prx_composer.optim.groups import parameter_groups
from prx_composer.recipe import config
from prx_composer.recipe.arguments import split
from prx_composer.recipe.checks import precisions
from prx_composer.recipe.config import Recipe, build, build_all
from prx_composer.recipe.resume import Change
from prx_composer.recipe.sizes import check_batch_sizes
from prx_composer.runs import environment
from prx_composer.runs.checkpoints import newest_checkpoint, without_new_callbacks
from prx_composer.runs.folder import (
    CHECKPOINTS,
    TOKENIZER,
    GoingOn,
    as_saved,
    check_run_folder,
    going_on,
    record_changes,
    save_recipe,
    summarise,
)
from prx_composer.runs.frozen_parts import keep_frozen, with_kept
from prx_composer.runs.init_from import initialise
from prx_composer.runs.weights import not_finite_in
from prx_composer.schedule.clock import ClockStop, TrainingClock, clock_of
from prx_composer.schedule.moments import duration_string, for_composer, parse_duration
from prx_composer.schedule.time_budget import TimeBudget, time_budget_of, with_rehearsal
from prx_composer.training.parallelism import parallelism
from prx_composer.training.preflight import check_surroundings
from prx_composer.training.preflight.data_fit import check_data
from prx_composer.training.preflight.examine import examine
from prx_composer.training.preflight.gpus import check_gpus
from prx_composer.training.preflight.result import Result, failed, require
from prx_composer.training.preflight.step import remember_steps, try_steps_before_training
from prx_composer.training.preparation import keep_tokenizer, make_data, read_manifests, trained_tokenizer
from prx_composer.training.prolonged import say_what_moves
from prx_composer.training.signals import INTERRUPTED_EXIT_CODE, stop_on_signals, stop_with_launcher
from prx_composer.training.trainer import Trainer

log = logging.getLogger(__name__)


def report(recipe: Recipe) -> int:
    """Trains a recipe and says how it ended; returns the exit code."""
    try:
        summary = run(recipe)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)  # of every rank: another's may be the only one
        return 1
    except TrainingInterrupted as interruption:
        if dist.get_global_rank() == 0:
            print(f"\n{interruption}", flush=True)
        return INTERRUPTED_EXIT_CODE
    if dist.get_global_rank() == 0:
        print(f"\n{summary}", flush=True)
    return 0


def run(recipe: Recipe) -> str:
    """Trains a recipe to its end and returns the closing line.

    Raises:
        UserError: anything in the recipe, the data or the run folder that must be mended first.
        TrainingInterrupted: a signal asked the run to stop, and it has written a checkpoint.
    """
    stop_with_launcher()
    trainer = build_trainer(recipe)
    state, folder = trainer.state, Path(recipe.run_folder)
    assert state.max_duration is not None
    if state.timestamp.get(state.max_duration.unit) >= state.max_duration:
        trainer.close()
        return (
            f"{recipe.run_name} has already been trained for {state.max_duration.to_timestring()}; nothing was changed. "
            "Train it on with a longer max_duration=…, or start another with run_name=…\n" + summarise(folder)
        )
    if dist.get_global_rank() == 0:
        say_what_moves(state, recipe, newest_checkpoint(folder))
    budget = time_budget_of(state)
    if budget is not None and budget.is_used_up:
        trainer.close()
        newest, spent = newest_checkpoint(folder), duration_string(clock_of(state).spent)
        at = f" (its newest checkpoint is {newest.path})" if newest is not None else ""
        return (
            f"{recipe.run_name} has used {spent} of its time budget of {budget}{at}: no time for another step; nothing was "
            "changed. Train it on with a longer time_budget=…, or start another with run_name=…\n" + summarise(folder)
        )
    try:
        if recipe.preflight:
            try_steps_before_training(trainer, recipe, folder)
        with _first_on_rank_zero(), at_path("run_folder"):
            if dist.get_global_rank() == 0:
                keep_frozen(recipe.model, folder)
                save_recipe(recipe, folder)
                record_changes(folder, int(state.timestamp.batch), trainer.resumed_changes)
                if recipe.preflight:
                    remember_steps(folder)
        environment.record(folder, int(state.timestamp.batch), clock_of(state).spent)
        with stop_on_signals(clock_of(state)):
            trainer.fit()
    except BaseException:
        trainer.engine.close()  # not trainer.close(), which would wait for ranks that are still training
        raise
    trainer.close()
    return summarise(folder)


def build_trainer(recipe: Recipe) -> Trainer:
    """Checks a recipe, prepares run folder and data, builds every object, and loads the newest checkpoint if there is one.

    Raises:
        UserError: as `run`.
    """
    config.import_code(recipe.code_paths)
    results, parts = examine(recipe, dist.get_world_size())
    device = get_device(None)
    if device.name == "cpu" and recipe.precision in precisions() and recipe.precision != "fp32":
        results.append(failed(f"precision: {recipe.precision} needs a GPU, and there is none here; use precision=fp32."))
    require(results)
    if recipe.preflight:
        _heed(check_gpus(recipe, dist.get_local_world_size(), dist.get_world_size()))
    dist.initialize_dist(device, timeout=recipe.dist_timeout)
    microbatch_size = recipe.device_train_microbatch_size or recipe.global_train_batch_size // dist.get_world_size()

    folder = Path(recipe.run_folder)
    with _first_on_rank_zero():
        if dist.get_global_rank() == 0:
            if recipe.preflight:
                _heed(check_surroundings(recipe, parts))
            check_run_folder(recipe, folder)
            _prepare_data(recipe)
        found = [going_on(recipe, folder, not_finite_in) if dist.get_global_rank() == 0 else GoingOn()]
    if dist.get_local_rank() == 0 and dist.get_global_rank() != 0:  # nothing to do unless this node has disks of its own
        if recipe.preflight:
            _heed(check_data(recipe, parts))
        _prepare_data(recipe)
    dist.broadcast_object_list(found, src=0)
    load_path, changes = found[0].load_path, found[0].changes
    reproducibility.seed_all(recipe.seed)
    model = _build_model(recipe, folder, initialised=load_path is None)
    train_loader = _build_loader(recipe, "train_loader", model, recipe.global_train_batch_size)
    if found[0].other_data:
        train_loader.dataloader.dataset.other_data_allowed = True  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = _build_optimizer(recipe, model)
    name, arguments = split(recipe.scheduler, "scheduler")
    provided: dict[str, Any] = {
        "folder": str(folder),
        "image_size": recipe.image_size,
        "source": recipe.train_loader.get("source") or {},
    }
    loggers = build_all(registry.loggers, "loggers", {"metrics_file": {}} | recipe.loggers, **provided)
    callbacks = build_all(registry.callbacks, "callbacks", recipe.callbacks, **provided)
    seconds = None if recipe.time_budget is None else parse_duration(recipe.time_budget)
    clock = TrainingClock(folder, seconds, recipe.dist_timeout)
    guard = FiniteGuard(folder)
    save_when = with_rehearsal(due_every(recipe.save_interval))
    options: dict[str, Any] = dict(
        run_name=recipe.run_name,
        model=model,
        optimizers=optimizer,
        schedulers=build(registry.schedulers, name, arguments, "scheduler"),
        algorithms=build_all(registry.algorithms, "algorithms", recipe.algorithms, folder=str(folder)),
        callbacks=[
            clock,
            *([] if seconds is None else [TimeBudget(seconds)]),
            NewValues(changes),
            GlooAverage(),
            RandomStep(),
            DataMonitor(),
            *callbacks,
            guard,
            Checkpointing(folder, save_when, recipe.save_num_checkpoints_to_keep, as_saved(recipe), guard.check_state),
            ClockStop(clock),
        ],
        loggers=loggers,
        train_dataloader=train_loader,
        eval_dataloader=_build_evaluator(recipe, model),
        eval_subset_num_batches=recipe.eval_subset_num_batches,
        device_train_microbatch_size=microbatch_size,
        max_duration=recipe.max_duration,
        precision=recipe.precision,
        parallelism_config=parallelism(recipe.parallelism_config, dist.get_world_size(), device.name == "gpu"),
        seed=recipe.seed,
        save_folder=str(folder / CHECKPOINTS),  # where `Checkpointing` writes
        load_path=load_path,
        load_ignore_keys=None if load_path is None else without_new_callbacks(load_path),
        progress_bar=recipe.progress_bar,
        dist_timeout=recipe.dist_timeout,
    )
    trainer = _build(options, changes)
    trainer.resumed_changes = changes
    for destination in loggers:
        destination.log_hyperparameters(redacted(as_saved(recipe)))
    return trainer


def _build(options: dict[str, Any], changes: Sequence[Change]) -> Trainer:
    """The trainer, with the checkpoint loaded if there is one."""
    try:
        return Trainer(**options)
    except UserError:
        raise
    except (ValueError, RuntimeError, KeyError) as error:
        if asked := [str(change) for change in changes if change.rule.may == "asked"]:
            log.debug("The checkpoint could not be loaded", exc_info=True)
            why = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"resume.allow: the checkpoint {options['load_path']} does not fit what was changed, {', '.join(asked)}: {why} "
                "Go on with the old values; another run can begin from these weights with model.init_from."
            ) from error
        if not isinstance(error, ValueError):
            raise
        log.debug("Composer refused the recipe", exc_info=True)  # its word for what is asked and it doesn't do
        raise UserError(str(error)) from error


def _heed(results: Iterable[Result]) -> None:
    """Warns of what should be known; raises UserError with all that must be mended."""
    for result in require(results):
        if result.mark == "!":
            log.warning("%s", result.text)


@contextmanager
def _first_on_rank_zero() -> Iterator[None]:
    """What rank 0 finds wrong inside of this context is raised on every rank, so that none waits for it in vain."""
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages = [message]
    dist.broadcast_object_list(messages, src=0)
    if messages[0] is not None:
        raise UserError(messages[0])


# ------------------------------------------------------------------------------------------------------------ data


def _prepare_data(recipe: Recipe) -> None:
    for key in ("train_loader", "eval_loader"):
        spec = getattr(recipe, key)
        make_data(spec, key)
        if spec and spec["name"] == "image_caption":
            read_manifests(spec, key)


def _build_loader(recipe: Recipe, key: str, model: TextToImage, global_batch_size: int) -> DataSpec:
    name, arguments = split(getattr(recipe, key), key)
    arguments = {argument: value for argument, value in arguments.items() if argument != "source"}
    spec = build(
        registry.loaders,
        name,
        arguments,
        key,
        tokenizer=model.text_encoder.tokenizer,
        max_tokens=model.text_encoder.max_tokens,
        image_size=recipe.image_size,
        global_batch_size=global_batch_size,
        multiple=model.backbone.patch_size * model.autoencoder.downsampling,
        seed=recipe.seed,
        **({"evaluation": True, "shuffle": False} if key == "eval_loader" else {}),
    )
    dataset = getattr(spec.dataloader, "dataset", None)
    for column in getattr(dataset, "text_columns", {}).values():
        check_text_column(column, model.text_encoder, f"{key}.text_embedding")
    for column in getattr(dataset, "latent_columns", {}).values():
        check_latent_column(column, model.autoencoder, f"{key}.latent")
    return spec


def _build_evaluator(recipe: Recipe, model: TextToImage) -> Evaluator | None:
    if recipe.eval_loader is None:
        return None
    batch_size = recipe.global_eval_batch_size or recipe.global_train_batch_size
    check_batch_sizes("global_eval_batch_size as ", batch_size, batch_size // dist.get_world_size() or 1, dist.get_world_size())
    loader = _build_loader(recipe, "eval_loader", model, batch_size)
    if isinstance(loader.dataloader, ImageCaptionLoader):
        loader.dataloader.batch_sampler.keeps_shape = bool(recipe.model.get("compile"))
    # The last evaluation comes with the last batch, not after FIT_END as Composer's: its metrics belong to that batch's line.
    when = create_interval_scheduler(for_composer(recipe.eval_interval), checkpoint_events=False, final_events={Event.BATCH_END})
    microbatch_size = batch_size // dist.get_world_size()
    return Evaluator(
        label="eval",
        dataloader=loader,
        eval_interval=with_rehearsal(when, Event.BATCH_END),
        device_eval_microbatch_size=microbatch_size,
    )


# ----------------------------------------------------------------------------------------------------------- model


def _build_model(recipe: Recipe, folder: Path, initialised: bool) -> TextToImage:
    """The recipe's model, with the weights of `model.init_from` unless a checkpoint is about to give it others."""
    name, arguments = split(with_kept(recipe.model, folder), "model")
    source = arguments.pop("init_from", None)
    if "text_encoder" in arguments:
        arguments["text_encoder"] = build_text_encoder(recipe, folder)
    model = build(registry.models, name, arguments, "model", seed=recipe.seed)
    if source is not None:
        model.knows_empty_caption = True
        if initialised:
            initialise(model, source)
    return model


def build_text_encoder(recipe: Recipe, folder: Path) -> HuggingFaceTextEncoder:
    """The recipe's, with its tokenizer, which is kept in the run folder.

    Raises:
        UserError: weights or a tokenizer that cannot be had.
    """
    path = "model.text_encoder"
    name, arguments = split(with_kept(recipe.model, folder)["text_encoder"], path)
    arguments.pop("tokenizer", None)
    return build(registry.text_encoders, name, arguments, path, tokenizer=build_tokenizer(recipe, folder))


def build_tokenizer(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The recipe's, without its encoder; kept in the run folder.

    Raises:
        UserError: one that cannot be had.
    """
    _, arguments = split(recipe.model["text_encoder"], "model.text_encoder")
    spec = arguments.get("tokenizer", arguments.get("pretrained"))
    with dist.run_local_rank_zero_first():
        tokenizer = _build_tokenizer(spec, arguments.get("revision"), recipe, folder / TOKENIZER)
    with at_path("model.text_encoder"):
        return with_cleaning(tokenizer, arguments.get("clean", "none"))


def _build_tokenizer(spec: Any, revision: str | None, recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The run's own tokenizer if it has one; else the one that is named, or one trained on the captions, kept with the run."""
    path = "model.text_encoder.tokenizer"
    if folder.exists():
        return load_tokenizer(str(folder))
    with at_path(path):
        if isinstance(spec, str):
            tokenizer = load_tokenizer(spec, revision)
        elif isinstance(spec, dict) and spec.keys() <= {"train", "vocab_size"} and spec.get("train"):
            clean = cleaner(split(recipe.model["text_encoder"], path)[1].get("clean", "none"))
            tokenizer = trained_tokenizer(recipe.train_loader, spec.get("vocab_size", 4096), clean)
        else:
            raise UserError(f"{path}: give a hub id or folder, or {{train: true}} to train one on the captions, not {spec!r}.")
    keep_tokenizer(tokenizer, folder)
    return tokenizer


def _build_optimizer(recipe: Recipe, model: TextToImage) -> Any:
    name, arguments = split(recipe.optimizer, "optimizer")
    if "model" in inspect.signature(constructor(registry.optimizers.get(name, "optimizer"))).parameters:
        return build(registry.optimizers, name, arguments, "optimizer", model=model)
    groups = parameter_groups(model, float(arguments.get("weight_decay", 0.0)))
    return build(registry.optimizers, name, arguments, "optimizer", params=groups)
