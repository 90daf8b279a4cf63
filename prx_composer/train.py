"""A recipe becomes a run: configuration → objects → composer.Trainer → one line that says where everything is."""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import DataSpec, Evaluator, Precision
from composer.utils import FSDP2Config, ParallelismConfig, dist, get_device, reproducibility
from transformers import PreTrainedTokenizerBase

from prx_composer import config, registry
from prx_composer.algorithms.progressive_resolution import check_batch_sizes
from prx_composer.callbacks.data_monitor import DataMonitor
from prx_composer.callbacks.random_step import RandomStep
from prx_composer.config import Recipe, build, build_all, split
from prx_composer.data.dataset import read_manifest
from prx_composer.data.schema import Manifest, iterate_captions
from prx_composer.data.sources import prepare
from prx_composer.distributed import GlooAverage
from prx_composer.errors import UserError
from prx_composer.models.text_encoder import load_tokenizer, train_tokenizer
from prx_composer.models.text_to_image import TextToImage
from prx_composer.optim.groups import parameter_groups
from prx_composer.run_folder import CHECKPOINT_NAME, CHECKPOINTS, TOKENIZER, as_saved, check_run_folder, save_recipe, summarise

__all__ = ["build_trainer", "main", "run"]

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Runs what the command line names; returns the exit code. What is the user's to mend is said without a traceback."""
    _set_up_logging()
    try:
        summary = run(config.load(arguments))
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)  # of every rank: another's may be the only one
        return 1
    if dist.get_global_rank() == 0:
        print(f"\n{summary}", flush=True)
    return 0


def run(recipe: Recipe) -> str:
    """Trains a recipe to its end and returns the closing line.

    Raises:
        UserError: anything in the recipe, the data or the run folder that must be mended first.
    """
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
        save_recipe(recipe, folder)
    try:
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
    config.check(recipe)
    device = get_device(None)
    dist.initialize_dist(device, timeout=recipe.dist_timeout)
    microbatch_size = recipe.device_train_microbatch_size or recipe.global_train_batch_size // dist.get_world_size()
    if recipe.precision not in (allowed := [p.value for p in Precision]):
        raise UserError(f"precision: {recipe.precision!r} is none of {', '.join(allowed)}.")
    if device.name == "cpu" and recipe.precision != "fp32":
        raise UserError(f"precision: {recipe.precision} needs a GPU, and there is none here; use precision=fp32.")
    check_batch_sizes("", recipe.global_train_batch_size, microbatch_size, dist.get_world_size())

    folder = Path(recipe.run_folder)
    with _first_on_rank_zero():
        if dist.get_global_rank() == 0:
            check_run_folder(recipe, folder)
            _prepare_data(recipe)
    if dist.get_local_rank() == 0 and dist.get_global_rank() != 0:  # nothing to do unless this node has disks of its own
        _prepare_data(recipe)
    dist.barrier()
    reproducibility.seed_all(recipe.seed)
    model = _build_model(recipe, folder)
    train_loader = _build_loader(recipe, "train_loader", model, recipe.global_train_batch_size)
    optimizer = _build_optimizer(recipe, model)
    name, arguments = split(recipe.scheduler, "scheduler")
    provided: dict[str, Any] = {
        "folder": str(folder),
        "image_size": recipe.image_size,
        "source": recipe.train_loader.get("source") or {},
    }
    loggers = build_all(registry.loggers, "loggers", {"metrics_file": {}} | recipe.loggers, **provided)
    callbacks = build_all(registry.callbacks, "callbacks", recipe.callbacks, **provided)
    options: dict[str, Any] = dict(
        run_name=recipe.run_name,
        model=model,
        optimizers=optimizer,
        schedulers=build(registry.schedulers, name, arguments, "scheduler"),
        algorithms=build_all(registry.algorithms, "algorithms", recipe.algorithms),
        callbacks=[GlooAverage(), RandomStep(), DataMonitor(), *callbacks],
        loggers=loggers,
        train_dataloader=train_loader,
        eval_dataloader=_build_evaluator(recipe, model),
        eval_interval=recipe.eval_interval,
        eval_subset_num_batches=recipe.eval_subset_num_batches,
        device_train_microbatch_size=microbatch_size,
        max_duration=recipe.max_duration,
        precision=recipe.precision,
        parallelism_config=_parallelism(recipe),
        seed=recipe.seed,
        save_folder=str(folder / CHECKPOINTS),
        save_filename=CHECKPOINT_NAME,
        save_interval=recipe.save_interval,
        save_overwrite=True,  # the folder is this run's: what a kill left half-written is written again
        save_num_checkpoints_to_keep=recipe.save_num_checkpoints_to_keep,
        autoresume=recipe.autoresume,
        progress_bar=recipe.progress_bar,
        dist_timeout=recipe.dist_timeout,
    )
    try:
        trainer = Trainer(**options)
    except UserError:
        raise
    except ValueError as error:  # Composer's word for what a configuration asks and it doesn't do
        log.debug("Composer refused the recipe", exc_info=True)
        raise UserError(str(error)) from error
    for destination in loggers:
        destination.log_hyperparameters(as_saved(recipe))
    return trainer


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
        if spec and "source" in spec:
            name, arguments = split(spec["source"], f"{key}.source")
            if "path" not in spec:
                raise UserError(f"{key}.path is missing: the folder that the source is to make the data set in.")
            source = build(registry.sources, name, arguments, f"{key}.source")
            with _at(key):
                prepare(Path(spec["path"]), source, spec["source"])
        if spec and spec["name"] == "image_caption" and not spec.get("remote"):
            with _at(key):
                read_manifest(spec["path"], spec.get("split", "train"), spec.get("captions"))


@contextmanager
def _at(path: str) -> Iterator[None]:
    """What is wrong with a value of the recipe is said with its YAML path."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}") from error


def _build_loader(recipe: Recipe, key: str, model: TextToImage, global_batch_size: int, **overrides: Any) -> DataSpec:
    name, arguments = split(getattr(recipe, key), key)
    arguments = {argument: value for argument, value in arguments.items() if argument != "source"}
    return build(
        registry.loaders,
        name,
        overrides | arguments,
        key,
        tokenizer=model.text_encoder.tokenizer,
        max_tokens=model.text_encoder.max_tokens,
        image_size=recipe.image_size,
        global_batch_size=global_batch_size,
        multiple=model.backbone.patch_size * model.autoencoder.downsampling,
        seed=recipe.seed,
    )


def _build_evaluator(recipe: Recipe, model: TextToImage) -> Evaluator | None:
    if recipe.eval_loader is None:
        return None
    batch_size = recipe.global_eval_batch_size or recipe.global_train_batch_size
    check_batch_sizes("global_eval_batch_size as ", batch_size, batch_size // dist.get_world_size() or 1, dist.get_world_size())
    loader = _build_loader(recipe, "eval_loader", model, batch_size, shuffle=False)
    return Evaluator(label="eval", dataloader=loader, device_eval_microbatch_size=batch_size // dist.get_world_size())


# ----------------------------------------------------------------------------------------------------------- model


def _build_model(recipe: Recipe, folder: Path) -> TextToImage:
    name, arguments = split(recipe.model, "model")
    if "text_encoder" in arguments:
        path = "model.text_encoder"
        encoder, encoder_arguments = split(arguments.pop("text_encoder"), path)
        tokenizer_spec = encoder_arguments.pop("tokenizer", encoder_arguments.get("pretrained"))
        with dist.run_local_rank_zero_first():
            tokenizer = _build_tokenizer(tokenizer_spec, encoder_arguments.get("revision"), recipe, folder / TOKENIZER)
        arguments["text_encoder"] = build(registry.text_encoders, encoder, encoder_arguments, path, tokenizer=tokenizer)
    return build(registry.models, name, arguments, "model", seed=recipe.seed)


def _build_tokenizer(spec: Any, revision: str | None, recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The run's own tokenizer if it has one; else the one that is named, or one trained on the captions, kept with the run."""
    path = "model.text_encoder.tokenizer"
    if folder.exists():
        return load_tokenizer(str(folder))
    with _at(path):
        if isinstance(spec, str):
            tokenizer = load_tokenizer(spec, revision)
        elif isinstance(spec, dict) and spec.keys() <= {"train", "vocab_size"} and spec.get("train"):
            split_folder = Path(recipe.train_loader["path"]) / recipe.train_loader.get("split", "train")
            columns = recipe.train_loader.get("captions") or [Manifest.read(split_folder).captions[0]]
            captions = (caption for column in columns for caption in iterate_captions(split_folder, column))
            tokenizer = train_tokenizer(captions, spec.get("vocab_size", 4096))
        else:
            raise UserError(f"{path}: give a hub id or folder, or {{train: true}} to train one on the captions, not {spec!r}.")
    if dist.get_global_rank() == 0:
        partial = folder.with_name(f".{folder.name}.partial")
        tokenizer.save_pretrained(str(partial))
        partial.rename(folder)
    return tokenizer


def _build_optimizer(recipe: Recipe, model: TextToImage) -> Any:
    name, arguments = split(recipe.optimizer, "optimizer")
    constructor = inspect.signature(registry.optimizers.get(name, "optimizer").__init__).parameters
    if "model" in constructor:
        return build(registry.optimizers, name, arguments, "optimizer", model=model)
    groups = parameter_groups(model, float(arguments.get("weight_decay", 0.0)))
    return build(registry.optimizers, name, arguments, "optimizer", params=groups)


def _parallelism(recipe: Recipe) -> ParallelismConfig | None:
    """`parallelism_config: {fsdp: {…}}` is FSDP2; without it, several processes train under DDP."""
    if recipe.parallelism_config is None:
        return None
    path = "parallelism_config"
    if unknown := recipe.parallelism_config.keys() - {"fsdp"}:
        raise UserError(f"{path}.{min(unknown)}: only fsdp is supported.")
    arguments = recipe.parallelism_config.get("fsdp") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{path}.fsdp must be a mapping of arguments, such as {{}}, not {arguments!r}.")
    # Without load_monolith_rank0_only: it wraps the model after loading, when algorithms have taken hold of its parameters.
    allowed = FSDP2Config.settable_attrs() - {"device_mesh", "load_monolith_rank0_only"}
    for key in arguments:
        if key not in allowed:
            raise UserError(f"{path}.fsdp.{key}: no such argument.{registry.nearest(key, sorted(allowed))}")
    # Under amp, autocast chooses dtypes op by op. Composer's default would also round every block's and the backbone's inputs
    # to bf16, timesteps and rotary tables among them.
    settings: dict[str, Any] = {"mixed_precision": "FULL"} | arguments
    return ParallelismConfig(fsdp2=FSDP2Config(**settings))


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("prx_composer").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenisation happens in forked workers
    # A pass that a resume leaves empty (see ProgressiveResolution) is not a data set without batches.
    warnings.filterwarnings("ignore", message="No batches were trained for global rank")
