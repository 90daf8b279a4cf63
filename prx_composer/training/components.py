"""The components of a recipe, made once: on the meta device to be checked and counted, or for real to be trained."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from composer.core import Algorithm, Callback, DataSpec
from composer.loggers import LoggerDestination
from composer.utils import FSDP2Config, ParallelismConfig
from torch.optim import Optimizer

from prx_composer import registry
from prx_composer.algorithms.resolution import ProgressiveResolution
from prx_composer.common.errors import Problems, UserError
from prx_composer.data.stored import check_latent_column, check_text_column
from prx_composer.optim import parameter_groups
from prx_composer.recipe.arguments import entries, provided_by, split
from prx_composer.recipe.checks import check_parallelism
from prx_composer.recipe.config import Recipe, build
from prx_composer.registry import Registry
from prx_composer.runs.model_parts import ModelParts
from prx_composer.schedule.moments import ScheduleWindow


def build_components(recipe: Recipe, *, meta: bool, num_ranks: int = 1) -> "Components":
    """Return what makes the components of a recipe, whose code is imported.

    Args:
        meta: whether networks are made without storage; nothing is loaded or downloaded then.
        num_ranks: that share a batch.
    """
    return Components(recipe, meta, num_ranks)


@dataclass(frozen=True)
class PlannedStage:
    """A span of the run with one image size and one batch.

    Args:
        path: what comes before `image_size` and its like in the YAML path.
        image_size: side of the square whose area the images have.
        global_batch_size, microbatch_size: images per step over all ranks, and per forward pass of one.
        num_ranks: that share a batch.
        window: from when to when it lasts.
    """

    path: str
    image_size: int
    global_batch_size: int
    microbatch_size: int
    num_ranks: int
    window: ScheduleWindow

    @property
    def device_batch_size(self) -> int:
        return self.global_batch_size // self.num_ranks

    def __str__(self) -> str:
        return f"{self.image_size} px, batch {self.global_batch_size}"


class Components(ModelParts):
    """Makes every component of a recipe when it is first asked for, and gives it what its constructor declares to need.

    Attributes:
        problems: names, arguments and types that were found to be wrong before; each begins with its path. What is at such a
            path is not made.

    Every property raises a UserError that names all that is wrong with what it makes.
    """

    def __init__(self, recipe: Recipe, meta: bool, num_ranks: int):
        super().__init__(recipe.model, recipe.seed, Path(recipe.run_folder), loader=recipe.train_loader, meta=meta, compiled=True)
        self.recipe, self.num_ranks = recipe, num_ranks
        self.problems: list[str] = []
        self.provided = provided_by(vars(recipe))

    def is_wrong(self, path: str) -> bool:
        """Return whether something at or below a path is wrong, so that what is there cannot be relied on."""
        return any(problem.startswith((f"{path}.", f"{path} ", f"{path}:", f"{path}[")) for problem in self.problems)

    def each(self, kind: str, listed: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the algorithms, callbacks or loggers that can be made, by name and in order, and what is wrong with others."""
        components: Registry = getattr(registry, kind)
        made, problems = dict[str, Any](), Problems()
        for name, arguments in entries(listed, kind):
            path = f"{kind}.{name}"
            if not self.is_wrong(path):
                with problems.noted():
                    made[name] = build(components, name, arguments, path, self.provided)
        return made, problems.found

    def _all(self, kind: str, listed: dict[str, Any]) -> dict[str, Any]:
        problems = Problems()
        made, problems.found = self.each(kind, listed)
        problems.raise_any()
        return made

    @cached_property
    def algorithms(self) -> dict[str, Algorithm]:
        return self._all("algorithms", self.recipe.algorithms)

    @cached_property
    def callbacks(self) -> dict[str, Callback]:
        return self._all("callbacks", self.recipe.callbacks)

    @cached_property
    def loggers(self) -> dict[str, LoggerDestination]:
        """The recipe's, and the file of metrics, which every run has."""
        return self._all("loggers", {"metrics_file": {}} | self.recipe.loggers)

    @cached_property
    def scheduler(self) -> Any:
        return build(registry.schedulers, *split(self.recipe.scheduler, "scheduler"), "scheduler", self.provided)

    @cached_property
    def optimizer(self) -> Optimizer:
        """Of the whole model. One that declares `model` groups its parameters itself; one that declares `params` gets groups."""
        name, arguments = split(self.recipe.optimizer, "optimizer")
        groups = parameter_groups(self.model, float(arguments.get("weight_decay", 0.0)))
        return build(registry.optimizers, name, arguments, "optimizer", self.provided, model=self.model, params=groups)

    def loader(self, key: str, global_batch_size: int) -> DataSpec:
        """Return `train_loader` or `eval_loader`, over data that are there.

        Raises:
            UserError: no such data, or what was stored beside them by another text encoder or autoencoder than the model's.
        """
        name, arguments = split(getattr(self.recipe, key), key)
        arguments.pop("source", None)
        encoder = self.model.text_encoder
        spec = build(
            registry.loaders,
            name,
            arguments,
            key,
            self.provided,
            tokenizer=encoder.tokenizer,
            max_tokens=encoder.max_tokens,
            image_size=self.recipe.image_size,
            global_batch_size=global_batch_size,
            multiple=self.multiple,
            seed=self.recipe.seed,
            **({"evaluation": True, "shuffle": False} if key == "eval_loader" else {}),
        )
        dataset = getattr(spec.dataloader, "dataset", None)
        for column in getattr(dataset, "text_columns", {}).values():
            check_text_column(column, encoder, f"{key}.text_embedding")
        for column in getattr(dataset, "latent_columns", {}).values():
            check_latent_column(column, self.model.autoencoder, f"{key}.latent")
        return spec

    @cached_property
    def multiple(self) -> int | None:
        """Of which image sides must be multiples: patch size × autoencoder downsampling; None if that isn't known."""
        if not self.meta:
            return self.model.backbone.patch_size * self.model.autoencoder.downsampling
        patch_size, downsampling = getattr(self.backbone, "patch_size", None), self.downsampling
        return None if patch_size is None or downsampling is None else patch_size * downsampling

    @cached_property
    def stages(self) -> list[PlannedStage]:
        return planned_stages(self.recipe, list(self.algorithms.values()), self.num_ranks)


def planned_stages(recipe: Recipe, algorithms: list[Any], num_ranks: int) -> list[PlannedStage]:
    """Return the stages of `progressive_resolution`, or the whole run as the only one."""
    for algorithm in algorithms:
        if isinstance(algorithm, ProgressiveResolution):
            path, starts = "algorithms.progressive_resolution.stages", ["0ba", *(stage.until for stage in algorithm.stages)]
            return [
                _stage(f"{path}[{index}].", stage, num_ranks, ScheduleWindow(start or "0ba", stage.until))
                for index, (stage, start) in enumerate(zip(algorithm.stages, starts, strict=False))
            ]
    return [_stage("", recipe, num_ranks, ScheduleWindow())]


def _stage(path: str, sizes: Any, num_ranks: int, window: ScheduleWindow) -> PlannedStage:
    batch_size: int = sizes.global_train_batch_size
    microbatch_size = sizes.device_train_microbatch_size or max(batch_size // num_ranks, 1)
    return PlannedStage(path, sizes.image_size, batch_size, microbatch_size, num_ranks, window)


# ------------------------------------------------------------------------------------------- how weights lie on the ranks


@dataclass
class HybridConfig(FSDP2Config):
    """FSDP2Config that can also ask for hybrid sharding, which Composer's own answers with "all ranks" whatever it is given.

    Args:
        shard_degree: ranks that share one copy of the weights; −1: all.
    """

    shard_degree: int = -1

    @property
    def data_parallel_shard_degree(self) -> int:
        return self.shard_degree

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return None if self.shard_degree == -1 else -1


def parallelism(config: dict[str, Any] | None, num_ranks: int, on_gpu: bool = True) -> ParallelismConfig | None:
    """Return Composer's configuration, or None for DDP.

    (left out)                    DDP: every rank has all weights
    {fsdp: {}}                    FSDP2: every rank has a shard
    {fsdp: {shard_degree: 8}}     HSDP: shards over 8 ranks, such as those of a node, and replicas of that over the others

    Args:
        config: the recipe's `parallelism_config`.
        num_ranks: of the run.
        on_gpu: replicas average their gradients over NCCL; gloo has no such operation.

    Raises:
        UserError: an unknown key, shards that the ranks don't divide into, replicas on CPUs.
    """
    if config is None:
        return None
    check_parallelism(config, num_ranks)
    arguments = config.get("fsdp") or {}
    degree, path = arguments.get("shard_degree", -1), "parallelism_config"
    if degree not in (-1, num_ranks) and not on_gpu:
        raise UserError(
            f"{path}.fsdp.shard_degree: replicas of shards need GPUs (gloo averages over no replicas); on {num_ranks} CPU "
            f"processes use {path}.fsdp.shard_degree=-1, which shards over all of them."
        )
    # Under amp, autocast chooses dtypes op by op. Composer's default would also round every block's and the backbone's inputs
    # to bf16, timesteps and rotary tables among them.
    settings: dict[str, Any] = {"mixed_precision": "FULL"} | arguments
    if degree == num_ranks:
        settings["shard_degree"] = -1
    return ParallelismConfig(fsdp2=HybridConfig(**settings))
