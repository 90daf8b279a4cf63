"""What can be known about a recipe before a weight is downloaded or a process started."""

import torch

from prx_composer import config, registry
from prx_composer.algorithms.progressive_resolution import ProgressiveResolution, check_batch_sizes
from prx_composer.config import Recipe, build, build_all, split
from prx_composer.errors import UserError
from prx_composer.models.backbone import PRXBackbone

__all__ = ["check_config"]


def check_config(recipe: Recipe, num_ranks: int = 1) -> list[str]:
    """Checks a recipe without data, weights or a network; returns one line per thing that was checked.

    Every name and argument is bound against its constructor, and what costs nothing is built: the backbone without storage,
    the scheduler, the algorithms. Batches must divide over `num_ranks`, and image sizes into patches.

    Raises:
        UserError: the first thing that is wrong, with its YAML path.
    """
    config.import_code(recipe.code_paths)
    config.check(recipe)
    lines = ["names, arguments and types of every component"]

    _, arguments = split(recipe.model, "model")
    backbone = None
    if "backbone" in arguments:
        name, backbone_arguments = split(arguments["backbone"], "model.backbone")
        with torch.device("meta"):
            backbone = build(registry.backbones, name, backbone_arguments, "model.backbone")
        parameters = sum(p.numel() for p in backbone.parameters())
        lines.append(f"model.backbone: {parameters / 1e6:,.1f}M parameters")

    algorithms = build_all(registry.algorithms, "algorithms", recipe.algorithms)
    if algorithms:
        lines.append("algorithms: " + ", ".join(name for name, _ in config.entries(recipe.algorithms, "algorithms")))
    name, scheduler_arguments = split(recipe.scheduler, "scheduler")
    build(registry.schedulers, name, scheduler_arguments, "scheduler")

    batch_size = recipe.global_train_batch_size
    check_batch_sizes("", batch_size, recipe.device_train_microbatch_size or max(batch_size // num_ranks, 1), num_ranks)
    sizes = {"image_size": recipe.image_size}
    for algorithm in algorithms:
        if isinstance(algorithm, ProgressiveResolution):
            for index, stage in enumerate(algorithm.stages):
                path = f"algorithms.progressive_resolution.stages[{index}]."
                share = max(stage.global_train_batch_size // num_ranks, 1)
                check_batch_sizes(path, stage.global_train_batch_size, stage.device_train_microbatch_size or share, num_ranks)
                sizes[f"{path}image_size"] = stage.image_size
    lines.append(f"batches divide over {num_ranks} rank{'s' if num_ranks > 1 else ''}")
    if isinstance(backbone, PRXBackbone) and arguments.get("autoencoder", {"name": "pixels"}).get("name") == "pixels":
        for path, size in sizes.items():
            if size % backbone.patch_size:
                raise UserError(f"{path}: {size} is not divisible by model.backbone.patch_size {backbone.patch_size}.")
        lines.append("image sizes divide into patches: " + ", ".join(map(str, sorted(set(sizes.values())))))
    return lines
