"""What an evaluation begins with, each from its options: numbers, device, prompts, real images and networks."""

import hashlib
import math
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from composer.utils import dist, get_device

from prx_composer.commands.drawing import DrawingSettings, read_prompts
from prx_composer.commands.evaluate.sweep import SEEDS_APART, image_seeds
from prx_composer.common.distributed import from_rank_zero
from prx_composer.common.errors import UserError, at_path
from prx_composer.data.format import MANIFEST
from prx_composer.metrics.real_images import DataSet, ImageFolder, default_cache, evenly, open_images
from prx_composer.metrics.scoring import Networks, Scorer, check_metrics
from prx_composer.models.flow import check_seeds
from prx_composer.runs.opening import Trained

T = TypeVar("T", int, float)
_PROMPTS_AT_MOST = 5000
_LAYOUTS = ("geneval", "dpg")


def check_choices(
    layout: str | None, metrics: str, output: str | None, weights: str | None
) -> tuple[list[str], list[Literal["ema", "raw"] | None]]:
    """Return the metrics and the kinds of weights that are asked for; None is the model's own choice.

    Raises:
        UserError: naming the option.
    """
    if layout is not None and layout not in _LAYOUTS:
        raise UserError(f"--layout: {layout!r} is none of {', '.join(_LAYOUTS)}.")
    try:
        names = check_metrics([name.strip() for name in metrics.split(",") if name.strip()])
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if layout is None and output is not None and Path(output).suffix != ".json":
        raise UserError(f"--output: {output} must be a file that ends in .json; the table becomes the .md beside it.")
    kinds = [None] if weights is None else [kind.strip() for kind in weights.split(",") if kind.strip()]
    if any(kind not in (None, "ema", "raw") for kind in kinds) or not kinds:
        raise UserError(f"--weights must be ema, raw, or ema,raw, not {weights!r}.")
    return names, cast(list[Literal["ema", "raw"] | None], kinds)


def parse_lists(
    guidance_scale: str | None, steps: str | None, seeds: str
) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]:
    """Return guidance scales and numbers of steps, both empty where none are given, and seeds.

    Raises:
        UserError: naming the option.
    """
    scales = () if guidance_scale is None else _numbers(guidance_scale, float, "--guidance-scale", 1.0)
    counts = () if steps is None else _numbers(steps, int, "--steps", 1)
    drawn = _numbers(seeds, int, "--seeds", 0)
    with at_path("--seeds"):
        check_seeds(image_seeds(max(drawn), [SEEDS_APART - 1]), f"image i of seed s is drawn from s·{SEEDS_APART}+i")
    return scales, counts, drawn


def _numbers(text: str, kind: type[T], option: str, least: T) -> tuple[T, ...]:
    try:
        values = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) and value >= least for value in values):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option}: {text!r} must be {what} from {least:g} on, such as 1,2,5.")
    return tuple(dict.fromkeys(values))


def start(device: str | None) -> torch.device:
    """Return this rank's device, with the ranks connected. Raise UserError if there is no device of that name."""
    if device not in (None, "cpu", "gpu", "cuda"):
        raise UserError(
            f"--device must be cpu or gpu, not {device!r}; several GPUs: composer -n 8 -m prx_composer.cli evaluate …"
        )
    if device in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("--device: there is no GPU here; use --device cpu.")
    chosen = get_device("gpu" if device == "cuda" else device)
    dist.initialize_dist(chosen)
    return torch.device("cuda", torch.cuda.current_device()) if chosen.name == "gpu" else torch.device("cpu")


def find_data(trained: Trained, data: str | None, split: str | None, caption: str | None, needed: bool) -> DataSet | None:
    """Return the data set that was named, or the recipe's, if it is there or needed."""
    if data is not None:
        with at_path("--data"):
            return DataSet(data, split or "train", caption)
    recipe = trained.recipe or {}
    spec = recipe.get("eval_loader") or recipe.get("train_loader") or {}
    if not spec.get("path"):
        if needed:
            raise UserError("What is to be drawn? Name a data set with --data DIR, or a file with --prompts FILE.")
        return None
    try:
        column = caption or next(iter(spec.get("captions") or {}), None)
        with at_path("the recipe's data; name others with --data DIR or --prompts FILE"):
            name, remote = split or spec.get("split", "train"), spec.get("remote")
            return DataSet(_local_path(spec["path"], name, remote), name, column, remote)
    except UserError:
        if needed:
            raise
        return None


def _local_path(path: str, split: str, remote: str | None) -> str:
    """Return where data of a run's recipe lie, or are downloaded to: not wherever somebody's recipe says."""
    if remote is None or Path(path, split, MANIFEST).exists():
        return path
    return str(default_cache() / f"data-{_hash([remote])[:16]}")


def choose_prompts(file: str | None, data: DataSet | None, num: int | None) -> tuple[list[str], str]:
    """Return the prompts and where they are from."""
    if file is not None:
        texts = read_prompts(file)
        chosen, source = [texts[index] for index in evenly(len(texts), num or _PROMPTS_AT_MOST)], file
    else:
        assert data is not None
        chosen, source = [data.caption(index) for index in evenly(len(data), num or _PROMPTS_AT_MOST)], data.name
    if len(chosen) < 2:
        raise UserError(f"{source}: a number needs at least two prompts.")
    return chosen, source


def make_scorer(names: list[str], **networks: str | None) -> Scorer:
    """Return a scorer with the networks that are named, the usual ones elsewhere."""
    try:
        return Scorer(names, Networks(**{kind: name for kind, name in networks.items() if name is not None}))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{error} Each network has an option (--clip, --dino, --clip-score, --inception).") from error


def find_real_images(
    scorer: Scorer, reference: str | None, split: str | None, caption: str | None, data: DataSet | None
) -> DataSet | ImageFolder | None:
    """Return the images to compare with: those that were named, or the prompts' data; None if no metric compares."""
    if not scorer.needs_reference:
        return None
    if reference is not None:
        with at_path("--reference"):
            return open_images(reference, split or "train", caption)
    if data is None:
        comparing = ", ".join(name for name in scorer.metrics if name != "clip_score")
        raise UserError(f"{comparing}: name real images to compare with: --reference DIR.")
    return data


def describe(
    scorer: Scorer,
    prompts: list[str],
    source: str,
    base: DrawingSettings,
    real: DataSet | ImageFolder | None,
    reference_num: int | None,
    cache: Path,
) -> dict[str, Any]:
    """Return what all numbers of this evaluation have in common, and must have to be compared."""
    conditions: dict[str, Any] = {
        "metrics": scorer.metrics,
        "prompts": {"source": source, "count": len(prompts), "sha256": _hash(prompts)},
        "height": base.height,
        "width": base.width,
        "guidance": base.guidance,
        "precision": base.precision,
        "networks": scorer.description(),
    }
    if real is not None:
        count = len(real) if reference_num is None else min(reference_num, len(real))
        identity = from_rank_zero(real.identity(cache) if dist.get_global_rank() == 0 else "")
        conditions["reference"] = {"source": real.name, "count": count, "identity": identity}
    return conditions


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
