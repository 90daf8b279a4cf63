"""The components of a recipe, made once: on the meta device to be checked and counted, or for real to be trained."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from composer.core import Algorithm, Callback, DataSpec, Evaluator, Event
from composer.loggers import LoggerDestination
from composer.utils import create_interval_scheduler, dist
from torch.optim import Optimizer

from prx_composer import registry
from prx_composer.common.errors import Problems, UserError, at_path, raise_all
from prx_composer.data.dataset import read_manifest
from prx_composer.data.loader import ImageCaptionLoader
from prx_composer.data.sources import is_made, prepare
from prx_composer.data.stored import check_latent_column, check_text_column
from prx_composer.optim import parameter_groups
from prx_composer.recipe.arguments import build, data_sets, entries, split
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.consistency import PlannedStage, planned_stages
from prx_composer.registry import BY_NAME
from prx_composer.runs.model_parts import ModelParts
from prx_composer.runs.stored_text import choose_text
from prx_composer.schedule.clock import with_rehearsal

log = logging.getLogger(__name__)


OF_EVALUATION = {"evaluation": True, "shuffle": False, "seed": 0}
"""What loaders of evaluation are given: a run's seed has no part in what it is measured on, such as which caption of several."""


def loader_of(spec: dict[str, Any], key: str, recipe: Mapping[str, Any] | None, model: Any, **given: Any) -> DataSpec:
    """Make a loader for a model, over data that are there.

    Args:
        spec: of the loader; what its `source` makes is made already.
        key: where in the YAML it is.
        recipe: its keys, if there is one, for a loader that asks for them.
        given: image_size, global_batch_size, multiple, seed; of an evaluation, those of `OF_EVALUATION`.

    Raises:
        UserError: no such data, or what was stored beside them by another text encoder or autoencoder than the model's.
    """
    name, arguments = split(spec, key)
    arguments.pop("source", None)
    encoder = model.text_encoder
    given |= {"tokenizer": encoder.tokenizer, "max_tokens": encoder.max_tokens}
    made = build(registry.loaders, name, arguments, key, recipe, **given)
    dataset = getattr(made.dataloader, "dataset", None)
    for column in getattr(dataset, "text_columns", {}).values():
        check_text_column(column, encoder, f"{key}.text_embedding")
    for column in getattr(dataset, "latent_columns", {}).values():
        check_latent_column(column, model.autoencoder, f"{key}.latent")
    return made


class Components(ModelParts):
    """Makes every component of a recipe when it is first asked for, and gives it what its constructor declares to need.

    Every property raises a UserError that names all that is wrong with what it makes.

    Args:
        recipe: whose code is imported.
        meta: whether networks are made without storage; nothing is loaded or downloaded then.
        num_ranks: that share a batch.
        problems: names, arguments and types that are known to be wrong; each begins with its path. What is at such a path is
            not made.

    Attributes:
        recipe: with what `choose_text` made of it. text: what was chosen.
    """

    def __init__(self, recipe: Recipe, *, meta: bool, num_ranks: int = 1, problems: Sequence[str] = ()):
        super().__init__(recipe.model, recipe.seed, Path(recipe.run_folder), loader=recipe.train_loader, meta=meta, compiled=True)
        self.recipe, self.text = choose_text(recipe)
        self.num_ranks, self.problems = num_ranks, list(problems)

    def is_wrong(self, path: str) -> bool:
        """Return whether something at or below a path is wrong, so that what is there cannot be relied on."""
        return any(problem.startswith((f"{path}.", f"{path} ", f"{path}:", f"{path}[")) for problem in self.problems)

    def each(self, kind: str) -> tuple[dict[str, Any], list[str]]:
        """Return the algorithms, callbacks or loggers that can be made, by name and in order, and what is wrong with others.

        Every run has a file of metrics among its loggers.
        """
        listed = getattr(self.recipe, kind) if kind != "loggers" else {"metrics_file": {}} | self.recipe.loggers
        made, problems = dict[str, Any](), Problems()
        for name, arguments in entries(listed, kind):
            path = f"{kind}.{name}"
            if not self.is_wrong(path):
                with problems.noted():
                    made[name] = build(BY_NAME[kind], name, arguments, path, vars(self.recipe))
        return made, problems.found

    def _all(self, kind: str) -> dict[str, Any]:
        made, problems = self.each(kind)
        raise_all(problems)
        return made

    @cached_property
    def algorithms(self) -> dict[str, Algorithm]:
        return self._all("algorithms")

    @cached_property
    def callbacks(self) -> dict[str, Callback]:
        return self._all("callbacks")

    @cached_property
    def loggers(self) -> dict[str, LoggerDestination]:
        return self._all("loggers")

    @cached_property
    def scheduler(self) -> Any:
        return build(registry.schedulers, *split(self.recipe.scheduler, "scheduler"), "scheduler", vars(self.recipe))

    @cached_property
    def optimizer(self) -> Optimizer:
        """Make the optimizer of the model. One that declares `model` groups its parameters; one with `params` gets groups."""
        name, arguments = split(self.recipe.optimizer, "optimizer")
        groups = parameter_groups(self.model, float(arguments.get("weight_decay", 0.0)))
        return build(registry.optimizers, name, arguments, "optimizer", vars(self.recipe), model=self.model, params=groups)

    def loader(self, key: str) -> DataSpec:
        """Return `train_loader` or `eval_loader`, over data that are there.

        Raises:
            UserError: no such data, or what was stored beside them by another text encoder or autoencoder than the model's.
        """
        in_training = key == "train_loader"
        return loader_of(
            getattr(self.recipe, key),
            key,
            vars(self.recipe),
            self.model,
            image_size=self.recipe.image_size,
            global_batch_size=self.recipe.global_train_batch_size if in_training else self.recipe.eval_batch_size,
            multiple=self.multiple,
            **({"seed": self.recipe.seed} if in_training else OF_EVALUATION),
        )

    @cached_property
    def evaluator(self) -> Evaluator | None:
        """What evaluates the run over its `eval_loader`, if it has one."""
        if self.recipe.eval_loader is None:
            return None
        loader, steps = self.loader("eval_loader"), self.recipe.eval_subset_num_batches
        if isinstance(loader.dataloader, ImageCaptionLoader):
            sampler, whole = loader.dataloader.batch_sampler, len(loader.dataloader.dataset)
            sampler.keeps_shape = bool(self.recipe.model.get("compile"))
            if steps > 0:
                steps, sampler.at_most = -1, steps * self.recipe.eval_batch_size
            if sampler.at_most is not None and sampler.at_most < whole and dist.get_global_rank() == 0:
                log.info(
                    "eval_subset_num_batches: an evaluation measures %s of %s samples (%.1f%%), evenly spaced. "
                    "Its validation_loss compares with that of the same ones alone.",
                    f"{sampler.at_most:,}", f"{whole:,}", 100 * sampler.at_most / whole,
                )  # fmt: skip
        # The last evaluation comes with the last batch, not after FIT_END as Composer's: its metrics belong to that batch's line.
        every = self.recipe.evaluate_every.for_composer()
        due = create_interval_scheduler(every, checkpoint_events=False, final_events={Event.BATCH_END})
        interval, microbatch_size = with_rehearsal(due, Event.BATCH_END), self.recipe.eval_batch_size // self.num_ranks
        return Evaluator(
            label="eval",
            dataloader=loader,
            eval_interval=interval,
            subset_num_batches=steps,
            device_eval_microbatch_size=microbatch_size,
        )

    @cached_property
    def multiple(self) -> int | None:
        """Return patch size × downsampling, of which image sides must be multiples; None if that isn't known."""
        if not self.meta:
            return self.model.backbone.patch_size * self.model.autoencoder.downsampling
        patch_size, downsampling = getattr(self.backbone, "patch_size", None), self.downsampling
        return None if patch_size is None or downsampling is None else patch_size * downsampling

    def prepare_data(self) -> None:
        """Make what the recipe's sources make, and see that all of its data are there; raise UserError for what is not."""
        for key in ("train_loader", "eval_loader"):
            spec = getattr(self.recipe, key)
            make_data(spec, key)
            if spec and spec["name"] == "image_caption":
                read_manifests(spec, key)

    @cached_property
    def stages(self) -> list[PlannedStage]:
        return planned_stages(vars(self.recipe), self.num_ranks)


# -------------------------------------------------------------------------------------------------- data sets that a source makes


@dataclass(frozen=True)
class Making:
    """A data set that a source makes.

    Args:
        key: where in the recipe its data set is named: train_loader, eval_loader or train_loader.mix.NAME.
        path: the folder to be.
        source: makes it.
        spec: the source as the recipe has it.
    """

    key: str
    path: Path
    source: Any
    spec: dict[str, Any]

    def is_made(self) -> bool:
        """Return whether it is there. Raise UserError for a folder that holds other data."""
        with at_path(f"{self.key}.source"):
            return is_made(self.path, self.source, self.spec)

    def make(self) -> None:
        """Make it, unless it is there already. Raise UserError for what is wrong with what the source reads."""
        with at_path(f"{self.key}.source"):
            prepare(self.path, self.source, self.spec)


def sources_of(spec: dict[str, Any] | None, key: str) -> list[Making]:
    """Return the data sets of a loader that are made from a source.

    Args:
        spec: the loader's configuration.
        key: where in the YAML it is.

    Raises:
        UserError: a source that cannot be built, or no folder to make a data set in.
    """
    spec = spec or {}
    if spec.get("source") and spec.get("mix"):
        raise UserError(f"{key}.source is of one data set; with {key}.mix, give it to a data set of the mixture.")
    if spec.get("source") and not spec.get("path"):
        raise UserError(f"{key}.path is missing: the folder that the source is to make the data set in.")
    if not spec.get("source") and (not spec.get("mix") or not str(spec.get("name", "image_caption")).endswith("image_caption")):
        return []
    made = []
    for where, arguments in data_sets(spec).items():
        if arguments.get("source"):
            path = f"{key}.{where}" if where else key
            name, options = split(arguments["source"], f"{path}.source")
            source = build(registry.sources, name, options, f"{path}.source")
            made.append(Making(path, Path(arguments["path"]), source, arguments["source"]))
    return made


def unmade_sources(spec: dict[str, Any] | None, key: str) -> list[Making]:
    """Return those of `sources_of` that are still to be made. Raise UserError as that, and for a folder of other data."""
    return [making for making in sources_of(spec, key) if not making.is_made()]


def make_data(spec: dict[str, Any] | None, key: str) -> None:
    """Make a loader's data sets that have a source and are not there yet. Raise UserError for data that cannot be made."""
    for making in sources_of(spec, key):
        making.make()


def read_manifests(spec: dict[str, Any], key: str) -> None:
    """Raise UserError if an `image_caption` loader's data isn't there, or isn't what the loader asks for."""
    with at_path(key):
        for part in data_sets(spec).values():
            if not part.get("remote"):
                read_manifest(part["path"], part.get("split", "train"), part.get("captions"))
