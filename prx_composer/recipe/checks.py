"""What a recipe itself tells of its mistakes: all of them, at once, before anything is imported.

`first_look` reads constructors from their source (`common/outlines.py`). The same checks run again over the imported classes in
`training/preflight`, which then makes what it can.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prx_composer import registry
from prx_composer.common.errors import Problems, UnknownName, UserError, nearest, problems_of
from prx_composer.common.outlines import CannotTell, constants, outline
from prx_composer.recipe.arguments import check_component, data_sets, entries, provided_by, split, text_encoders
from prx_composer.recipe.consistency import batch_problems, downsampling_of, image_size_problems
from prx_composer.recipe.resume import check_allowed
from prx_composer.recipe.times import phases_of, schedule_problems, time_problems, weight_steps
from prx_composer.registry import BY_KEY, BY_NAME, missing_code
from prx_composer.schedule.moments import BUDGET, DURATION, EPOCH, SECONDS, Moment, Point, ScheduleWindow, parse_duration

Values = Mapping[str, Any]

# What every component of a kind is called with, which a recipe cannot give; and what a recipe gives beside its arguments.
OF_MODELS = (
    ("seed",),
    {
        "init_from": "weights to begin with: a run folder, one of its checkpoints, an export, any folder that diffusers opens, "
        "or a file of safetensors. The backbone must be of their sizes; `prx import` writes both."
    },
)
_OF_LOADERS = (
    ("tokenizer", "max_tokens", "image_size", "global_batch_size", "multiple", "seed", "evaluation"),
    {"source": "what makes the data in `path` when they aren't there yet: a source and its arguments."},
)
OF_KEY = {
    "model": OF_MODELS,
    "optimizer": (("model", "params"), {}),
    "scheduler": ((), {}),
    "train_loader": _OF_LOADERS,
    "eval_loader": _OF_LOADERS,
}
OF_OURS = ("folder", "source")  # a stranger's component may have settings of these names
_SCHEDULE = {"scheduler", "max_duration", "time_budget", "algorithms", "global_train_batch_size"}
_SEEDS = 2**32  # NumPy takes no others, nor does Composer
_PRECISIONS = {  # what others call Composer's
    "bf16": "amp_bf16", "bfloat16": "amp_bf16", "amp_bfloat16": "amp_bf16", "bf16-mixed": "amp_bf16",
    "fp16": "amp_fp16", "float16": "amp_fp16", "half": "amp_fp16", "16": "amp_fp16", "amp": "amp_fp16", "16-mixed": "amp_fp16",
    "float32": "fp32", "float": "fp32", "32": "fp32", "full": "fp32", "no": "fp32", "fp8": "amp_fp8", "float8": "amp_fp8",
}  # fmt: skip


def first_look(values: Values, num_ranks: int) -> list[str]:
    """Return all that is wrong, as far as it can be known without importing torch or Composer; each begins with its path.

    Args:
        values: keys of a recipe whose values are of the right type; others may be left out.
    """
    code = values.get("code_paths", [])
    missing = [problem for index, name in enumerate(code) for problem in missing_code(name, f"code_paths[{index}]")]
    readable = len(missing) == len(code)  # files that are there may add components, and put others in the place of ours
    problems = argument_problems(values, imports=False) if readable else time_problems(values)
    problems = [problem for problem in problems if not (missing and isinstance(problem, UnknownName))] + missing
    if not any(problem.startswith("scheduler") for problem in problems) and values.keys() >= _SCHEDULE:
        problems += schedule_problems(values)
    problems += setting_problems(values, num_ranks) + batch_problems(values, num_ranks)
    return list(dict.fromkeys(problems + (_image_sizes(values) if readable else [])))


def argument_problems(values: Values, imports: bool = True) -> list[str]:
    """Return what is wrong with names and arguments of components, and with times; what the program supplies counts as given."""
    problems, filled = Problems(), provided_by(values)
    for key, components in BY_KEY.items():
        if values.get(key) is not None:
            (provided, also), defaulted = OF_KEY[key], () if key == "model" else filled
            with problems.noted():
                check_component(components, *split(values[key], key), key, provided, also, defaulted, imports=imports)
    for kind, components in BY_NAME.items():
        for name, given in values.get(kind, {}).items():
            reserved = OF_OURS if name in components.builtin else ()
            with problems.noted():
                for _, arguments in entries({name: given}, kind):
                    check_component(components, name, arguments, f"{kind}.{name}", reserved, (), filled, imports=imports)
    for key in ("train_loader", "eval_loader"):
        spec, parts = values.get(key) or {}, {}
        try:
            parts = data_sets(spec) if spec.get("name") == "image_caption" else {}
        except UserError as error:
            problems.found.extend(f"{key}.{problem}" for problem in problems_of(error))
        for where, part in parts.items():
            if isinstance(listed := part.get("skip"), str) and not Path(listed).expanduser().is_file():
                own = f"{where}." if where and "skip" in spec["mix"][where.removeprefix("mix.")] else ""
                problems.found.append(f"{key}.{own}skip: there is no file {listed}, with one key of a sample on each line.")
            if where and part.get("source"):
                path = f"{key}.{where}.source"
                with problems.noted():
                    check_component(registry.sources, *split(part["source"], path), path, imports=imports)
    model = values.get("model", {})
    if not isinstance(model.get("init_from"), str | None):
        problems.found.append(f"model.init_from: expected a string or null, not {model['init_from']!r}.")
    backbone, lora = model.get("backbone"), values.get("algorithms", {}).get("lora", False)
    ours = isinstance(backbone, dict) and registry.backbones.is_packaged(str(backbone.get("name")))
    if ours and lora is not False and not model.get("init_from"):  # a backbone of this package begins with random weights
        problems.found.append(
            "algorithms.lora: adapters are trained on the weights of another model, which stay as they are, and model.init_from "
            "names none: they would stay random. Set model.init_from (prx import writes it), or algorithms.lora=false."
        )
    problems.found = list(dict.fromkeys(problems.found))  # a list that data sets share is missing once
    said = {problem.partition(": ")[0] for problem in problems.found}  # a number for a time is of a wrong type: no time either
    times = [*time_problems(values), *mixture_problems(values)]
    return problems.found + [problem for problem in times if problem.partition(": ")[0] not in said]


def mixture_problems(values: Values) -> list[str]:
    """Return what is wrong with the times of a mixture in this run; what is wrong in itself is said by `phases_of`."""
    loader, problems = values.get("train_loader") or {}, list[str]()
    try:
        total, budget = Point.parse(values["max_duration"]), values.get("time_budget")
        if loader.get("name") != "image_caption" or len(phases_of(loader.get("mix") or {})) == 1:
            return []
    except (KeyError, ValueError, AttributeError, TypeError):  # said elsewhere
        return []
    if total.unit == EPOCH:
        problems.append(
            f"max_duration: {total.text} cannot be in epochs where train_loader.mix changes, which begins one; use ba."
        )
    if loader.get("shuffle") is False:
        problems.append("train_loader.shuffle: false goes through all samples in stored order, whatever weights and until say.")
    for _, path, step in weight_steps(loader["mix"]):
        points = Moment(step["until"]).points if step.get("until") else ()
        if budget is None and any(point.unit == BUDGET for point in points):
            problems.append(
                f"train_loader.{path}.until: {step['until']} is a part of the time budget, and the recipe has none; set "
                "time_budget=24h, say."
            )
        elif points and (end := _end_before(step["until"], values)):
            problems.append(
                f"train_loader.{path}.until: {step['until']} is not before the end of the run ({end}); leave it out, or give an "
                "earlier time."
            )
    return problems


def _end_before(text: str, values: Values) -> str | None:
    """Return what ends the run at a moment at the latest, in words; None if it may come before."""
    total, budget = Point.parse(values["max_duration"]), values.get("time_budget")
    lengths = {DURATION: 1.0, BUDGET: 1.0, SECONDS: parse_duration(budget) if budget else math.inf, total.unit: total.value}
    if any(point.value < lengths.get(point.unit, math.inf) for point in Moment(text).points):
        return None
    return f"max_duration: {total.text}" + (f", time_budget: {budget}" if budget else "")


def never_open(window: ScheduleWindow, values: Values) -> str | None:
    """Say why a window never opens in a run; None if it may."""
    if window.end is not None and window.end.surely_by(window.start):
        return f"it never begins, since its end ({window.end}) is not after its start ({window.start})."
    try:
        end = _end_before(window.start.text, values)
    except ValueError:  # of the length of the run, which is said elsewhere
        return None
    return end and f"it never begins, since its start ({window.start}) is not before the end of the run ({end})."


def setting_problems(values: Values, num_ranks: int) -> list[str]:
    """Return what is wrong with settings of no component: the seed, the number of checkpoints, precision, sharding."""
    problems = Problems()
    if not 0 <= (seed := values.get("seed", 0)) < _SEEDS:
        problems.found.append(f"seed: {seed} lies outside of 0 … {_SEEDS - 1}, which are the seeds there are.")
    if (kept := values.get("save_num_checkpoints_to_keep", -1)) < 1 and kept != -1:
        problems.found.append(
            f"save_num_checkpoints_to_keep: {kept} would leave none to go on from; give at least 1, or -1 to keep all."
        )
    if (measured := values.get("eval_subset_num_batches", -1)) < 1 and measured != -1:
        problems.found.append(f"eval_subset_num_batches: {measured} would measure nothing; give at least 1, or -1 for all.")
    problems.found.extend(_number_problems(values))
    with problems.noted():
        check_precision(values.get("precision", "fp32"))
    with problems.noted():
        check_parallelism(values.get("parallelism_config"), num_ranks)
    if values.get("parallelism_config") is not None and values.get("model", {}).get("compile") is True:
        problems.found.append(
            "model.compile: true compiles the backbone as one graph, which FSDP2 cannot shard; use model.compile=blocks, or "
            "parallelism_config=null."
        )
    with problems.noted():
        check_allowed(values.get("resume", {}))
    return problems.found


def _number_problems(values: Values) -> Iterator[str]:
    """Yield the numbers that mean nothing where they stand, though they are of the right type."""
    for key, value in (values.get("optimizer") or {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"optimizer.{key}: {value} is no number to train with."
    for path, encoder in text_encoders(values.get("model") or {}).items():
        if isinstance(tokens := encoder.get("max_tokens"), int) and tokens < 1:
            yield f"{path}.max_tokens: {tokens} would leave nothing of any caption; give at least 1."
    for key in ("train_loader", "eval_loader"):
        share = (values.get(key) or {}).get("max_undecodable")
        if isinstance(share, int | float) and not 0 <= share <= 1:
            yield f"{key}.max_undecodable: {share} must be a share of the samples, 0 … 1, such as 0.05 for 5%."
    if (folder := values.get("save_folder")) is not None and "://" not in folder:
        yield (
            f"save_folder: {folder} is not remote. Checkpoints are kept in run_folder, which may be any folder; save_folder is "
            "for a copy of the newest one in an object store, such as s3://bucket/runs/NAME."
        )
    if not values.get("dist_timeout", 1) > 0:
        yield f"dist_timeout: {values['dist_timeout']} must be a number of seconds, more than 0."


# --------------------------------------------------------------------------------------- precision, sharding, sizes


def precisions() -> list[str]:
    """Return Composer's precisions; none if its source is written in another way than it was."""
    try:
        return list(constants("composer.core.precision", "Precision").values())
    except CannotTell:
        return []


def check_precision(precision: str) -> None:
    """Raise UserError for a precision that Composer doesn't have, with the spelling that is meant."""
    allowed = precisions()
    if precision in allowed or not allowed:
        return
    meant = _PRECISIONS.get(precision.lower(), precision.lower())
    hint = f" Write precision={meant}." if meant in allowed else ""
    if meant == "amp_fp8":
        hint = " For matrix products in 8 bits: precision=amp_bf16 and algorithms.float8={}."
    raise UserError(f"precision: {precision!r} is none of {', '.join(allowed)}.{hint}")


# The mesh follows from `shard_degree`: Composer makes it. load_monolith_rank0_only wraps the model after loading, when algorithms
# have taken hold of its parameters.
_NOT_OURS = frozenset({"device_mesh", "load_monolith_rank0_only"})

# WEIGHTS is this package's own (`training.trainer.HybridConfig`), the others are Composer's, which reads them in any case.
_MIXED_PRECISIONS = ("FULL", "WEIGHTS", "DEFAULT", "PURE")


def check_parallelism(config: dict[str, Any] | None, num_ranks: int) -> None:
    """Raise UserError for an unknown key of `parallelism_config`, and for shards that the ranks don't divide into."""
    if config is None:
        return
    path = "parallelism_config"
    problems = Problems()
    problems.found.extend(f"{path}.{key}: only fsdp is supported." for key in sorted(config.keys() - {"fsdp"}, key=str))
    arguments = config.get("fsdp") or {}
    if not isinstance(arguments, dict):
        problems.found.append(f"{path}.fsdp must be a mapping of arguments, such as {{}}, not {arguments!r}.")
        arguments = {}
    allowed = sharding_keys()
    for key in arguments:
        if allowed and key not in allowed:
            problems.found.append(f"{path}.fsdp.{key}: no such argument.{nearest(key, allowed)}")
    degree = arguments.get("shard_degree", -1)
    if not isinstance(degree, int) or isinstance(degree, bool) or (degree != -1 and (degree < 1 or num_ranks % degree)):
        fitting = ", ".join(str(d) for d in range(1, num_ranks + 1) if num_ranks % d == 0)
        problems.found.append(
            f"{path}.fsdp.shard_degree: {degree!r} must divide the {num_ranks} ranks ({fitting}), or be -1 for all of them."
        )
    problems.found.extend(_gather_problems(arguments, num_ranks if degree == -1 else degree))
    problems.raise_any()


def _gather_problems(arguments: dict[str, Any], shards: Any) -> Iterator[str]:
    """Yield what is wrong with how `parallelism_config.fsdp` has weights gathered, of so many shards."""
    mixed, reshard = arguments.get("mixed_precision", "FULL"), arguments.get("reshard_after_forward", True)
    if not isinstance(mixed, str) or mixed.upper() not in _MIXED_PRECISIONS:
        yield f"parallelism_config.fsdp.mixed_precision: {mixed!r} is none of {', '.join(_MIXED_PRECISIONS)}."
    if isinstance(reshard, bool) or not isinstance(shards, int):
        return
    if not isinstance(reshard, int) or not 1 < reshard < shards or shards % reshard:
        fitting = ", ".join(str(n) for n in range(2, shards) if shards % n == 0)
        yield (
            f"parallelism_config.fsdp.reshard_after_forward: {reshard!r} must be true, false"
            f"{f', or a number of neighbours that divides the {shards} shards ({fitting})' if fitting else ''}."
        )


def sharding_keys() -> list[str]:
    """Return what `parallelism_config.fsdp` takes."""
    try:
        return sorted(inspect.signature(outline("prx_composer.training.trainer", "HybridConfig")).parameters.keys() - _NOT_OURS)
    except CannotTell:
        return []


def _image_sizes(values: Values) -> list[str]:
    """Return the image sizes that don't divide into patches, where the recipe alone tells the patches' size."""
    model = values.get("model", {})
    backbone, autoencoder = model.get("backbone"), model.get("autoencoder") or {"name": "pixels"}
    if not isinstance(backbone, dict) or backbone.get("name") != "prx" or not isinstance(autoencoder, dict):
        return []
    try:
        parameters = inspect.signature(registry.backbones.described("prx", "model.backbone", imports=False)).parameters
    except CannotTell:
        return []
    patch_size, config = backbone.get("patch_size", parameters["patch_size"].default), autoencoder.get("config")
    downsampling = 1 if autoencoder.get("name") == "pixels" else None
    if autoencoder.get("name") == "diffusers" and isinstance(config, dict):
        downsampling = downsampling_of(config)
    if not isinstance(patch_size, int) or patch_size < 1 or downsampling is None:
        return []
    return image_size_problems(values, patch_size, downsampling)
