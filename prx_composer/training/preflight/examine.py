"""What is known from the recipe alone: names, arguments and types, and sizes that must divide one another."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from composer.core import Algorithm

from prx_composer import registry
from prx_composer.algorithms.alignment import AlignmentAlgorithm
from prx_composer.algorithms.progressive_resolution import ProgressiveResolution
from prx_composer.common.errors import Problems, UserError, at_path
from prx_composer.models.backbone import PRXBackbone
from prx_composer.models.prompts import Cleaning, cleaner
from prx_composer.recipe import config
from prx_composer.recipe.arguments import entries, split
from prx_composer.recipe.checks import setting_problems
from prx_composer.recipe.config import Recipe, build
from prx_composer.recipe.schedule_checks import schedule_problems
from prx_composer.recipe.sizes import batch_problems, downsampling_of, image_size_problems
from prx_composer.schedule.moments import ScheduleWindow
from prx_composer.training.parallelism import parallelism
from prx_composer.training.preflight.result import Result, failed, guarded, passed, skipped, warned


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


def planned_stages(recipe: Recipe, algorithms: list[Any], num_ranks: int) -> list[PlannedStage]:
    """The stages of `progressive_resolution`, or the whole run as the only one."""
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


@dataclass
class Parts:
    """What of a recipe could be built without data and weights; other checks go on from there.

    Attributes:
        backbone: on the meta device, without storage.
        algorithms: by name.
        stages: that are trained.
        multiple: of which image sides must be multiples (patch size × autoencoder downsampling), if it is known.
        problems: names, arguments and types that are wrong; each begins with its path.
    """

    backbone: Any = None
    algorithms: dict[str, Algorithm] = field(default_factory=dict)
    stages: list[PlannedStage] = field(default_factory=list)
    multiple: int | None = None
    problems: list[str] = field(default_factory=list)

    def is_wrong(self, path: str) -> bool:
        """Whether something at or below a path is, so that what is there cannot be relied on."""
        return any(problem.startswith((f"{path}.", f"{path} ", f"{path}:", f"{path}[")) for problem in self.problems)


def examine(recipe: Recipe, num_ranks: int) -> tuple[list[Result], Parts]:
    """Everything that can be said of a recipe without data, weights or a network, and the parts that it says it of."""
    problems = Problems()
    with problems.noted():
        config.check(recipe)
    parts = Parts(problems=problems.found)
    results = [failed(problem) for problem in problems.found]
    if not problems.found:
        counts = [f"{len(list(entries(getattr(recipe, kind), kind)))} {kind}" for kind in ("algorithms", "callbacks")]
        results.append(passed("names, arguments and types", f"model, optimizer, scheduler, {', '.join(counts)}"))
    if not parts.is_wrong("model"):
        results.extend(guarded(_check_backbone(recipe, parts)))
    results.extend(map(failed, setting_problems(vars(recipe), num_ranks)))
    results.extend(guarded(_check_cleaning(recipe)))
    if not parts.is_wrong("scheduler"):
        results.extend(guarded(_check_scheduler(recipe)))
    built = Problems()
    for name, arguments in entries(recipe.algorithms, "algorithms"):
        path = f"algorithms.{name}"
        if not parts.is_wrong(path):
            with built.noted():
                parts.algorithms[name] = build(registry.algorithms, name, arguments, path, folder=recipe.run_folder)
    results.extend(map(failed, built.found))
    if not parts.is_wrong("train_loader"):
        results.extend(_check_latents(recipe, parts))
    results.extend(_check_fit(recipe, parts, num_ranks))
    if parts.algorithms:
        results.append(passed("algorithms", ", ".join(parts.algorithms)))
    stages_known = "progressive_resolution" in parts.algorithms or not recipe.algorithms.get("progressive_resolution")
    if stages_known:
        parts.stages = planned_stages(recipe, list(parts.algorithms.values()), num_ranks)
    else:
        results.append(skipped("stages", "they could not be built"))
    results.extend(_check_batches(recipe, parts.stages, num_ranks))
    results.extend(_check_image_sizes(recipe, parts))
    return list(dict.fromkeys(results)), parts


def _check_backbone(recipe: Recipe, parts: Parts) -> Iterator[Result]:
    _, arguments = split(recipe.model, "model")
    if "backbone" not in arguments:
        return
    name, backbone_arguments = split(arguments["backbone"], "model.backbone")
    with torch.device("meta"):
        parts.backbone = build(registry.backbones, name, backbone_arguments, "model.backbone")
    parameters = sum(parameter.numel() for parameter in parts.backbone.parameters())
    yield passed("model.backbone", f"{parameters / 1e6:,.1f}M parameters")


def _check_cleaning(recipe: Recipe) -> Iterator[Result]:
    encoder = recipe.model.get("text_encoder")
    clean: Any = encoder.get("clean") if isinstance(encoder, dict) else None
    if clean in get_args(Cleaning):  # else its type is wrong, which is said elsewhere
        with at_path("model.text_encoder"):
            cleaner(clean)
    yield from ()


def _check_scheduler(recipe: Recipe) -> Iterator[Result]:
    name, arguments = split(recipe.scheduler, "scheduler")
    build(registry.schedulers, name, arguments, "scheduler")
    yield from map(failed, schedule_problems(vars(recipe)))


def check_callbacks(recipe: Recipe, parts: Parts) -> Iterator[Result]:
    """Builds the callbacks one by one and lets them go again."""
    provided = {
        "folder": recipe.run_folder, "image_size": recipe.image_size, "source": recipe.train_loader.get("source") or {}
    }  # fmt: skip
    names = []
    problems = Problems()
    for name, arguments in entries(recipe.callbacks, "callbacks"):
        path = f"callbacks.{name}"
        if not parts.is_wrong(path):
            with problems.noted():
                build(registry.callbacks, name, arguments, path, **provided)
                names.append(name)
    yield from map(failed, problems.found)
    if names:
        yield passed("callbacks", ", ".join(names))
    if recipe.model.get("caption_dropout") == 0 and not recipe.model.get("init_from"):
        for name, arguments in entries({name: recipe.callbacks[name] for name in names}, "callbacks"):
            taken = inspect.signature(registry.callbacks.get(name, f"callbacks.{name}")).parameters.get("guidance_scale")
            scale = arguments.get("guidance_scale", None if taken is None else taken.default)
            if isinstance(scale, int | float) and scale != 1:
                yield warned(
                    f"callbacks.{name}.guidance_scale",
                    f"{scale} leads away from what the model draws without a caption, and with model.caption_dropout: 0 it never "
                    "learns that. Set it to 1, or model.caption_dropout to 0.1.",
                )


def _check_latents(recipe: Recipe, parts: Parts) -> Iterator[Result]:
    """Whether latents that come with the data have an autoencoder, and who looks at images has them."""
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
        if getattr(algorithm, "needs_image", False):
            stored = ", or name features that `prx encode features` stored" if isinstance(algorithm, AlignmentAlgorithm) else ""
            yield failed(
                f"algorithms.{name} looks at images, which train_loader.latent leaves out; set train_loader.images: true to have "
                f"them decoded beside the latents{stored}."
            )


def _check_fit(recipe: Recipe, parts: Parts, num_ranks: int) -> Iterator[Result]:
    """Asks algorithms that can tell, by `check_fit`, whether they go with the backbone, the others, and the sharding."""
    try:
        wrapped = parallelism(recipe.parallelism_config, num_ranks)
    except UserError:  # said by `setting_problems`
        wrapped = None
    problems = Problems()
    for algorithm in parts.algorithms.values():
        check = getattr(algorithm, "check_fit", None)
        if check is not None and parts.backbone is not None:
            with problems.noted():
                check(parts.backbone, parts.algorithms.values(), None if wrapped is None else wrapped.fsdp2)
    yield from map(failed, problems.found)


# ---------------------------------------------------------------------------------------------------------- sizes


def _check_batches(recipe: Recipe, stages: list[PlannedStage], num_ranks: int) -> Iterator[Result]:
    problems = batch_problems(vars(recipe), num_ranks)
    yield from map(failed, problems)
    if not problems and stages:
        shares = [f"{s.global_batch_size} = {s.device_batch_size // s.microbatch_size} × {s.microbatch_size}" for s in stages]
        ranks = f" × {num_ranks} ranks" if num_ranks > 1 else ""
        yield passed("batches divide into microbatches", ", ".join(share + ranks for share in dict.fromkeys(shares)))


def _check_image_sizes(recipe: Recipe, parts: Parts) -> Iterator[Result]:
    if not isinstance(parts.backbone, PRXBackbone):
        if parts.backbone is not None:
            yield skipped("image sizes", "the backbone is not of this package")
        return
    patch_size, downsampling = parts.backbone.patch_size, _downsampling(recipe)
    if downsampling is None:
        yield skipped("image sizes", "what the autoencoder divides them by is known only from its weights")
        return
    parts.multiple = patch_size * downsampling
    problems = image_size_problems(vars(recipe), patch_size, downsampling)
    yield from map(failed, problems)
    if not problems and parts.stages:
        of = ", ".join(str(size) for size in sorted({stage.image_size for stage in parts.stages}))
        yield passed("image sizes divide into patches", f"{of} px, patches of {patch_size}")


def _downsampling(recipe: Recipe) -> int | None:
    """Of the autoencoder, from its configuration if that is in the recipe, in a folder, or in the cache."""
    spec = split(recipe.model, "model")[1].get("autoencoder") or {"name": "pixels"}
    name, arguments = split(spec, "model.autoencoder")
    if name == "pixels":
        return 1
    if name != "diffusers":
        return None
    from prx_composer.models.autoencoder import stored_config

    settings = arguments.get("config")
    if settings is None and arguments.get("pretrained"):
        settings = stored_config(arguments)
    if settings is None:
        return None
    return downsampling_of(settings)
