"""A recipe becomes a run: configuration → objects → composer.Trainer → one line that says where everything is."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from composer.core import Callback, Precision, State
from composer.utils import dist, get_device, is_notebook, reproducibility

from prx_composer import registry
from prx_composer.algorithms.gradients import FiniteGuard
from prx_composer.callbacks.checkpointing import Checkpointing, NewValues, RandomStep, say_what_moves
from prx_composer.callbacks.monitors import DataMonitor, ProgressLines
from prx_composer.common.distributed import GlooAverage, from_rank_zero, unwrapped
from prx_composer.common.errors import TrainingInterrupted, UserError, at_path, raise_all, redacted
from prx_composer.models.compiling import graphs_kept_in
from prx_composer.models.layers import cudnn_first, cudnn_problem
from prx_composer.recipe.checks import precisions
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.resume import Change
from prx_composer.runs.checkpoints import newest_checkpoint
from prx_composer.runs.copies import Copier, take_up
from prx_composer.runs.folder import (
    CHECKPOINTS,
    COMPILED,
    GoingOn,
    as_saved,
    check_run_folder,
    going_on,
    record_changes,
    record_environment,
    save_recipe,
    summarise,
)
from prx_composer.runs.model_parts import keep_frozen
from prx_composer.runs.pretrained_models import initialise
from prx_composer.runs.stored_text import choose_text, leaves_text_open, with_choices
from prx_composer.runs.weights import not_finite_in
from prx_composer.schedule.clock import ClockStop, TimeBudget, TrainingClock, clock_of, time_budget_of
from prx_composer.schedule.moments import duration_string
from prx_composer.training.components import Components
from prx_composer.training.preflight import examine, failed, require
from prx_composer.training.preflight.data_fit import check_data
from prx_composer.training.preflight.step import remember_steps, try_steps_before_training
from prx_composer.training.preflight.surroundings import check_gpus, check_surroundings
from prx_composer.training.trainer import Trainer, parallelism

log = logging.getLogger(__name__)


def report(recipe: Recipe) -> int:
    """Train a recipe and say how it ended; return the exit code."""
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
    """Train a recipe to its end: check, build, fit; return the closing line.

    Raises:
        UserError: anything in the recipe, the data or the run folder that must be mended first.
        TrainingInterrupted: a signal asked the run to stop, and it has written a checkpoint.
    """
    stop_with_launcher()
    recipe = with_text_chosen(recipe)
    trainer = build_trainer(recipe)
    state, folder = trainer.state, Path(recipe.run_folder)
    if nothing_to_do := _nothing_to_do(state, recipe, folder):
        trainer.close()
        return f"{nothing_to_do}\n{summarise(folder)}"
    try:
        with chosen_attention(recipe, state), graphs_kept_in(folder / COMPILED):
            if recipe.preflight:
                try_steps_before_training(trainer, recipe, folder)
            with _raised_on_every_rank(), at_path("run_folder"):
                if dist.get_global_rank() == 0:
                    keep_frozen(recipe.model, folder)
                    save_recipe(recipe, folder)
                    record_changes(folder, int(state.timestamp.batch), trainer.resumed_changes)
                    if recipe.preflight:
                        remember_steps(folder)
            record_environment(folder, int(state.timestamp.batch), clock_of(state).spent)
            with stop_on_signals(clock_of(state)):
                trainer.fit()
    except BaseException:
        trainer.engine.close()  # not trainer.close(), which would wait for ranks that are still training
        raise
    trainer.close()
    return summarise(folder)


@contextmanager
def chosen_attention(recipe: Recipe, state: State) -> Iterator[None]:
    """Have what is computed inside of this context on a GPU use `model.attention: cudnn`, and say if it has no such kernel."""
    if recipe.model.get("attention") != "cudnn" or state.device.name != "gpu":
        yield
        return
    model: Any = unwrapped(state.model)
    backbone, side = model.backbone, recipe.image_size // model.autoencoder.downsampling
    heads = backbone.config.get("num_heads") or backbone.config["num_attention_heads"]
    dtype = torch.float16 if state.precision == Precision.AMP_FP16 else torch.bfloat16
    tokens = backbone.num_tokens(side, side), model.text_encoder.max_tokens
    problem = cudnn_problem(heads, backbone.hidden_size // heads, *tokens, device=torch.device("cuda"), dtype=dtype)
    if problem is not None and dist.get_global_rank() == 0:
        log.warning("model.attention: cudnn does not attend here (%s); the next of PyTorch's kernels does.", problem)
    with cudnn_first():
        yield


def _nothing_to_do(state: State, recipe: Recipe, folder: Path) -> str | None:
    """Return why no step is left, in words; if some are, say what another length of the run moves."""
    assert state.max_duration is not None
    if state.timestamp.get(state.max_duration.unit) >= state.max_duration:
        return (
            f"{recipe.run_name} has already been trained for {state.max_duration.to_timestring()}; nothing was changed. "
            "Train it on with a longer max_duration=…, or start another with run_name=…"
        )
    if dist.get_global_rank() == 0:
        say_what_moves(state, recipe, newest_checkpoint(folder))
    budget = time_budget_of(state)
    if budget is None or not budget.is_used_up:
        return None
    newest, spent = newest_checkpoint(folder), duration_string(clock_of(state).spent)
    at = f" (its newest checkpoint is {newest.path})" if newest is not None else ""
    return (
        f"{recipe.run_name} has used {spent} of its time budget of {budget}{at}: no time for another step; nothing was "
        "changed. Train it on with a longer time_budget=…, or start another with run_name=…"
    )


def build_trainer(recipe: Recipe) -> Trainer:
    """Check a recipe, prepare run folder and data, build every component, and load the newest checkpoint if there is one.

    Raises:
        UserError: as `run`.
    """
    registry.import_code(recipe.code_paths)
    device, recipe = get_device(None), with_text_chosen(recipe)
    results, checked = examine(recipe, dist.get_world_size())
    if device.name == "cpu" and recipe.precision in precisions() and recipe.precision != "fp32":
        results.append(failed(f"precision: {recipe.precision} needs a GPU, and there is none here; use precision=fp32."))
    if recipe.preflight:
        results += check_gpus(recipe, checked.algorithms.values(), dist.get_local_world_size(), dist.get_world_size())
    require(results)
    dist.initialize_dist(device, timeout=recipe.dist_timeout)
    found, saved = _prepare(recipe, checked), as_saved(recipe)
    reproducibility.seed_all(recipe.seed)
    return _build(recipe, saved, found, on_gpu=device.name == "gpu")


def with_text_chosen(recipe: Recipe) -> Recipe:
    """Return the recipe with what rank 0 makes of a loader's `text_embedding` that is left open, and say it once.

    Raises:
        UserError: the run began with stored embeddings that are gone.
    """
    if not leaves_text_open(recipe):
        return recipe
    dist.initialize_dist(get_device(None), timeout=recipe.dist_timeout)
    chosen = from_rank_zero(choose_text(recipe)[1] if dist.get_global_rank() == 0 else [])
    raise_all([choice.said for choice in chosen if choice.why == "gone"])
    for choice in chosen:
        if dist.get_global_rank() == 0 and choice.why != "unknown":
            log.log(logging.WARNING if choice.why == "lacking" else logging.INFO, "%s", choice.said)
    return with_choices(recipe, chosen)


def _prepare(recipe: Recipe, checked: Components) -> GoingOn:
    """Check run folder and data, make data that have a source, and return what the run goes on from; on all ranks alike."""
    folder = Path(recipe.run_folder)
    with _raised_on_every_rank():
        if dist.get_global_rank() == 0:
            if recipe.preflight:
                require(check_surroundings(checked))
            if recipe.save_folder is not None:
                with at_path("save_folder", Exception):  # every store has its own
                    take_up(recipe.save_folder, folder, recipe.autoresume)
            check_run_folder(recipe, folder)
            checked.prepare_data()
        found = going_on(recipe, folder, not_finite_in) if dist.get_global_rank() == 0 else GoingOn()
    if dist.get_local_rank() == 0 and dist.get_global_rank() != 0:  # nothing to do unless this node has disks of its own
        if recipe.preflight:
            require(check_data(checked))
        checked.prepare_data()
    return from_rank_zero(found)


@contextmanager
def _raised_on_every_rank() -> Iterator[None]:
    """Raise what rank 0 finds wrong inside of this context on every rank, so that none waits for it in vain."""
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    if (message := from_rank_zero(message)) is not None:
        raise UserError(message)


# ----------------------------------------------------------------------------------------------------------- build


def _build(recipe: Recipe, saved: dict[str, Any], found: GoingOn, on_gpu: bool) -> Trainer:
    """Build everything in an order that decides the random numbers: model, loader, optimizer, loggers, callbacks, algorithms."""
    folder, num_ranks = Path(recipe.run_folder), dist.get_world_size()
    components = Components(recipe, meta=False, num_ranks=num_ranks)
    model = components.model
    if found.load_path is None and recipe.model.get("init_from") is not None:
        initialise(model, recipe.model["init_from"])
    train_loader = components.loader("train_loader")
    if found.other_data:
        train_loader.dataloader.dataset.other_data_allowed = True  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = components.optimizer
    loggers = list(components.loggers.values())
    options: dict[str, Any] = dict(
        run_name=recipe.run_name,
        model=model,
        optimizers=optimizer,
        loggers=loggers,
        callbacks=_callbacks(recipe, found, list(components.callbacks.values()), saved),
        schedulers=components.scheduler,
        algorithms=list(components.algorithms.values()),
        train_dataloader=train_loader,
        eval_dataloader=components.evaluator,
        device_train_microbatch_size=recipe.device_train_microbatch_size or recipe.global_train_batch_size // num_ranks,
        max_duration=recipe.max_duration,
        precision=recipe.precision,
        parallelism_config=parallelism(recipe.parallelism_config, num_ranks, on_gpu),
        seed=recipe.seed,
        save_folder=str(folder / CHECKPOINTS),  # where `Checkpointing` writes
        load_path=found.load_path,
        load_ignore_keys=found.ignored,
        progress_bar=recipe.progress_bar and _on_terminal(),
        dist_timeout=recipe.dist_timeout,
    )
    trainer = _loaded(options, found.changes)
    trainer.resumed_changes = found.changes
    for destination in loggers:
        destination.log_hyperparameters(redacted(saved))
    return trainer


def _on_terminal() -> bool:
    """Return whether a bar can move where Composer draws it."""
    return sys.stderr.isatty() or is_notebook()


def _callbacks(recipe: Recipe, found: GoingOn, own: list[Callback], saved: dict[str, Any]) -> list[Callback]:
    """Return the recipe's callbacks between those that every run has: the clock comes first, checkpoints come after the guard."""
    folder, budget = Path(recipe.run_folder), recipe.budget
    clock, guard = TrainingClock(folder, budget, recipe.dist_timeout), FiniteGuard(folder)
    return [
        clock,
        *([] if budget is None else [TimeBudget(budget)]),
        NewValues(found.changes),
        GlooAverage(),
        RandomStep(),
        DataMonitor(),
        *([ProgressLines()] if recipe.progress_bar and not _on_terminal() else []),
        *own,
        guard,
        Checkpointing(
            folder,
            recipe.save_every,
            recipe.save_num_checkpoints_to_keep,
            saved,
            guard.check_state,
            recipe.dist_timeout,
            None if recipe.save_folder is None else Copier(folder, recipe.save_folder),
        ),
        ClockStop(clock),
    ]


def _loaded(options: dict[str, Any], changes: Sequence[Change]) -> Trainer:
    """Return the trainer, with the checkpoint loaded if there is one."""
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


# ---------------------------------------------------------------------------------------------------------- asked to stop


INTERRUPTED_EXIT_CODE = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1


@contextmanager
def stop_on_signals(clock: TrainingClock) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 (a cluster's warning) and Ctrl-C ask the run to stop; a second Ctrl-C stops at once."""
    owner = os.getpid()
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data worker that inherited the handler: it ends as it would without
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and clock.asked:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        clock.request_stop(signal.Signals(number).name)

    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller's business
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_launcher() -> None:
    """Ask the kernel for SIGTERM when Composer's launcher dies, which would leave its ranks training on alone (Linux)."""
    if sys.platform != "linux" or "LOCAL_RANK" not in os.environ:
        return
    try:
        parent = psutil.Process().parent()
        if parent is not None and any(os.path.basename(part) in ("composer", "composer.cli") for part in parent.cmdline()[:3]):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (psutil.Error, OSError, AttributeError):
        log.debug("The launcher could not be watched", exc_info=True)
