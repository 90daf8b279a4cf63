"""`prx evaluate`: numbers of a trained model, or the folders that other benchmarks' scorers read."""

import hashlib
import math
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from typer import Option, echo

from prx_composer.commands import CodeOption, ModelArgument, made_folder, show_log
from prx_composer.common.errors import UserError, at_path

if TYPE_CHECKING:
    import torch

    from prx_composer.commands.evaluate.sweep import Sweep
    from prx_composer.metrics.real_images import DataSet, ImageFolder
    from prx_composer.metrics.scoring import Scorer
    from prx_composer.runs.opening import Trained

T = TypeVar("T", int, float)
Kinds = list[Literal["ema", "raw"] | None]
_SEEDS = "0,1,2"
_PROMPTS_AT_MOST = 5000
_LAYOUTS = ("geneval", "dpg")
LOSS = "validation_loss"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `prx evaluate`."""

    model: ModelArgument
    data: Annotated[
        str | None,
        Option(metavar="DIR", help="Data set for prompts and real images. [default: the recipe's eval_loader or train_loader]"),
    ] = None
    split: Annotated[str | None, Option(help="Of --data and --reference. [default: the recipe's, or train]")] = None
    caption: Annotated[str | None, Option(help="Caption column of the data set. [default: its first]")] = None
    prompts: Annotated[
        str | None,
        Option(metavar="FILE", help='Prompts instead: one per line, or JSON lines with a "prompt". Layouts: see below.'),
    ] = None
    num: Annotated[
        int | None,
        Option(
            "--num",
            min=2,
            help="Prompts, evenly spaced; of validation_loss, samples. [default: all, of prompts at most 5000]",
        ),
    ] = None
    reference: Annotated[
        str | None, Option(metavar="DIR", help="Real images: a data set, or a folder of images. [default: the data]")
    ] = None
    reference_num: Annotated[int | None, Option(min=2, help="Real images, evenly spaced. [default: all]")] = None
    metrics: Annotated[
        str, Option(help="Of cmmd, dino_mmd, fd_dino, clip_score, fid; or validation_loss, alone: nothing is drawn for it.")
    ] = "cmmd,dino_mmd,fd_dino,clip_score"
    guidance_scale: Annotated[
        str | None, Option(metavar="LIST", help="Such as 1,2.5,5. [default: as the recipe's callbacks.images, or 3.5]")
    ] = None
    steps: Annotated[
        str | None, Option(metavar="LIST", help="Such as 10,28,50. [default: as the recipe's callbacks.images, or 28]")
    ] = None
    weights: Annotated[
        str | None, Option(metavar="LIST", help="ema, raw, or ema,raw. [default: ema if the run has an average, else raw]")
    ] = None
    code: CodeOption = field(default_factory=list)
    seeds: Annotated[str, Option(metavar="LIST", help="Each draws all prompts anew; the interval is over them.")] = _SEEDS
    size: Annotated[
        str | None, Option(metavar="HxW", help="Height x width in pixels, or one number. [default: as last trained]")
    ] = None
    guidance: Annotated[str, Option(help="cfg, self, internal, or run, as for generate.")] = "run"
    batch_size: Annotated[int, Option(min=1, help="Images at a time, per GPU.")] = 16
    device: Annotated[str | None, Option(help="cpu, or gpu. [default: a GPU if there is one]")] = None
    precision: Annotated[str | None, Option(help="fp32, or bf16 (GPU). [default: bf16 on a GPU, fp32 on the CPU]")] = None
    clip: Annotated[str | None, Option(metavar="ID", help="Of cmmd: hub id or folder.")] = None
    dino: Annotated[str | None, Option(metavar="ID", help="Of dino_mmd and fd_dino: hub id or folder.")] = None
    clip_score: Annotated[str | None, Option(metavar="ID", help="Of clip_score: hub id or folder.")] = None
    inception: Annotated[str | None, Option(metavar="FILE", help="Of fid: weights of torch-fidelity.")] = None
    cache: Annotated[
        str | None, Option(metavar="DIR", help="For features of real images. [default: ~/.cache/prx-composer/evaluation]")
    ] = None
    output: Annotated[
        str | None, Option(metavar="PATH", help="JSON to write, with a table beside it as .md. Layouts: the folder.")
    ] = None
    layout: Annotated[
        str | None, Option(help="geneval or dpg: measure nothing, write the folder that the benchmark's own scorer reads.")
    ] = None
    images_per_prompt: Annotated[int, Option(min=1, help="Of a layout; both benchmarks take 4.")] = 4


def evaluate_model(options: EvaluateOptions) -> None:
    """Measure a trained model over guidance scales, steps, and averaged or raw weights, with an interval over seeds.

    Command, seeds, versions and the weights' hash stand beside every number. The same command goes on where it was stopped. On
    several GPUs, which share the prompts: composer -n 8 -m prx_composer.cli evaluate MODEL …

    --metrics validation_loss draws nothing: it is the loss on held-out samples at eight timesteps, as a run logs it.

    --layout geneval: --prompts is GenEval's evaluation_metadata.jsonl. --layout dpg: --prompts is the folder of DPG-Bench's
    prompts (*.txt). Their scorers run in environments of their own.
    """
    from composer.utils import dist

    from prx_composer.commands.evaluate.sweep import SEEDS_APART, Sweep, image_seeds, write_layout
    from prx_composer.commands.generate import check_settings, chosen_settings
    from prx_composer.models.flow import check_seeds
    from prx_composer.registry import import_code
    from prx_composer.runs.opening import load_trained

    o = options
    show_log()
    names, kinds = _chosen(o)
    scales = () if o.guidance_scale is None else _numbers(o.guidance_scale, float, "--guidance-scale", 1.0)
    steps = () if o.steps is None else _numbers(o.steps, int, "--steps", 1)
    seeds = _numbers(o.seeds, int, "--seeds", 0)
    with at_path("--seeds"):
        check_seeds(image_seeds(max(seeds), [SEEDS_APART - 1]), f"image i of seed s is drawn from s·{SEEDS_APART}+i")
    device = _connect(o.device)
    import_code(o.code, "--code")
    trained = load_trained(o.model, kinds[0])
    base = chosen_settings(trained, device, o.size, o.guidance, o.precision)
    ranks = dist.get_world_size()
    program = ["prx"] if ranks == 1 else ["composer", "-n", str(ranks), "-m", "prx_composer.cli"]
    command = shlex.join([*program, *sys.argv[1:]])
    scales, steps = scales or (base.guidance_scale,), steps or (base.num_inference_steps,)
    sweep = Sweep(base, scales, steps, seeds, o.batch_size, device, command)
    for settings in sweep.settings:
        check_settings(trained.model, settings, device)
    if names == [LOSS]:
        _measure_loss(o, kinds, trained, sweep)
        return
    if o.layout is None:
        _measure(o, names, kinds, trained, sweep)
        return
    if len(sweep.settings) * len(kinds) > 1 or (len(seeds) > 1 and o.seeds != _SEEDS):
        raise UserError("--layout: one folder is of one guidance scale, one number of steps, one kind of weights and one seed.")
    if o.prompts is None or o.output is None:
        raise UserError(f"--layout {o.layout} needs --prompts (of the benchmark) and --output (the folder to write).")
    echo(write_layout(o.layout, trained, o.prompts, Path(o.output).expanduser(), o.images_per_prompt, sweep))


def _chosen(o: EvaluateOptions) -> tuple[list[str], Kinds]:
    """Return the metrics and the kinds of weights that are asked for; None is the model's own choice.

    Raises:
        UserError: naming the option.
    """
    from prx_composer.metrics.scoring import check_metrics

    if o.layout is not None and o.layout not in _LAYOUTS:
        raise UserError(f"--layout: {o.layout!r} is none of {', '.join(_LAYOUTS)}.")
    names = [name.strip() for name in o.metrics.split(",") if name.strip()]
    if LOSS in names:
        _check_loss_options(o, names)
    else:
        try:
            names = check_metrics(names)
        except ValueError as error:
            raise UserError(f"--{error}") from error
    if o.layout is None and o.output is not None and Path(o.output).suffix != ".json":
        raise UserError(f"--output: {o.output} must be a file that ends in .json; the table becomes the .md beside it.")
    kinds = [None] if o.weights is None else [kind.strip() for kind in o.weights.split(",") if kind.strip()]
    if any(kind not in (None, "ema", "raw") for kind in kinds) or not kinds:
        raise UserError(f"--weights must be ema, raw, or ema,raw, not {o.weights!r}.")
    return names, cast(Kinds, kinds)


def _check_loss_options(o: EvaluateOptions, names: list[str]) -> None:
    """Raise UserError for options that ask for drawn images, of which the validation loss has none."""
    if len(names) > 1:
        raise UserError(f"--metrics: {LOSS} is measured without drawing, over a whole data set; ask for it alone.")
    used = (
        "model", "data", "split", "caption", "num", "metrics", "weights", "code", "size", "batch_size", "device", "precision",
        "output",
    )  # fmt: skip
    others = (option for option in fields(o) if option.name not in used)
    given = [f"--{option.name.replace('_', '-')}" for option in others if getattr(o, option.name) != option.default]
    if given:
        raise UserError(f"--metrics {LOSS} draws nothing; leave out {', '.join(given)}.")
    if o.size is not None and not o.size.isdecimal():
        raise UserError(f"--size: for {LOSS} one number, the side of the square whose area the data's images get, not {o.size}.")


def _numbers(text: str, kind: type[T], option: str, least: T) -> tuple[T, ...]:
    """Return the numbers of a list, each once. Raise UserError for one that is smaller than `least`, or for none."""
    try:
        values = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) and value >= least for value in values):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option}: {text!r} must be {what} from {least:g} on, such as 1,2,5.")
    return tuple(dict.fromkeys(values))


def _connect(name: str | None) -> "torch.device":
    """Connect the ranks and return this one's device. Raise UserError if there is no device of that name."""
    import torch
    from composer.utils import dist, get_device

    if name not in (None, "cpu", "gpu", "cuda"):
        raise UserError(f"--device must be cpu or gpu, not {name!r}; several GPUs: composer -n 8 -m prx_composer.cli evaluate …")
    if name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("--device: there is no GPU here; use --device cpu.")
    device = get_device("gpu" if name == "cuda" else name)
    dist.initialize_dist(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.name == "gpu" else torch.device("cpu")


def _measure(o: EvaluateOptions, names: list[str], kinds: Kinds, trained: "Trained", sweep: "Sweep") -> None:
    """Measure every combination with every kind of weights, write the numbers down and print their table."""
    from composer.utils import dist

    from prx_composer.commands.evaluate.sweep import Results, measure
    from prx_composer.common.distributed import from_rank_zero
    from prx_composer.metrics.real_images import default_cache
    from prx_composer.metrics.scoring import Networks, Scorer
    from prx_composer.runs.opening import load_trained

    data = find_data(trained, o.data, o.split, o.caption, needed=o.prompts is None)
    prompts, source = _choose_prompts(o, data)
    networks = {"clip": o.clip, "dino": o.dino, "clip_score": o.clip_score, "inception": o.inception}
    try:
        scorer = Scorer(names, Networks(**{kind: name for kind, name in networks.items() if name is not None}))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{error} Each network has an option (--clip, --dino, --clip-score, --inception).") from error
    real = _find_real_images(o, scorer, data)
    cache = default_cache() if o.cache is None else Path(o.cache).expanduser()
    conditions: dict[str, Any] = {
        "metrics": scorer.metrics,
        "prompts": {"source": source, "count": len(prompts), "sha256": _hash(prompts)},
        "height": sweep.base.height,
        "width": sweep.base.width,
        "guidance": sweep.base.guidance,
        "precision": sweep.base.precision,
        "networks": scorer.description(),
    }
    if real is not None:
        count = len(real) if o.reference_num is None else min(o.reference_num, len(real))
        identity = from_rank_zero(real.identity(cache) if dist.get_global_rank() == 0 else "")
        conditions["reference"] = {"source": real.name, "count": count, "identity": identity}
    results = Results(Path(o.output or "evaluation.json").expanduser(), conditions)
    made_folder(str(results.path.parent))
    if real is not None:
        scorer.compare_with(real, o.reference_num, cache, sweep.batch_size, sweep.device)
    for index, kind in enumerate(kinds):
        measure(trained if index == 0 else load_trained(o.model, kind), sweep, prompts, scorer, results)
    if dist.get_global_rank() == 0:
        echo(results.table() + f"\n{results.path}")


def _measure_loss(o: EvaluateOptions, kinds: Kinds, trained: "Trained", sweep: "Sweep") -> None:
    """Measure the validation loss of every kind of weights as a run does, write it down and print its table."""
    from composer.utils import dist

    from prx_composer.commands.evaluate.sweep import Results, measure_loss
    from prx_composer.data.loader import ImageCaptionLoader
    from prx_composer.runs.opening import load_trained
    from prx_composer.training.components import OF_EVALUATION, loader_of

    model = trained.model
    spec = _held_out(o, trained.recipe or {})
    size = trained.image_size if o.size is None else sweep.base.height
    sizes = {"image_size": size, "global_batch_size": o.batch_size * dist.get_world_size()}
    sizes["multiple"] = model.backbone.patch_size * model.autoencoder.downsampling
    where = "--data" if o.data is not None else "the recipe's eval_loader (name other data with --data DIR)"
    loader: Any = loader_of(spec, where, trained.recipe, model, **sizes, **OF_EVALUATION)
    if o.num is not None:
        if not isinstance(loader.dataloader, ImageCaptionLoader):
            raise UserError(f"--num: {where} is not an image_caption loader, of which a part could be measured; leave --num out.")
        loader.dataloader.batch_sampler.at_most = o.num
    count = len(loader.dataloader.dataset)
    source = f"{spec.get('remote') or spec.get('path') or spec['name']}, {spec.get('split') or 'train'}"
    conditions: dict[str, Any] = {
        "metrics": list(model.get_metrics()),
        "data": {"source": source, "count": count if o.num is None else min(count, o.num), "loader": spec},
        "image_size": size,
        "noise_scale": getattr(model.flow, "noise_scale", 1.0),
        "precision": sweep.base.precision,
    }
    results = Results(Path(o.output or f"{LOSS}.json").expanduser(), conditions)
    made_folder(str(results.path.parent))
    for index, kind in enumerate(kinds):
        measure_loss(trained if index == 0 else load_trained(o.model, kind), sweep, loader, results)
    if dist.get_global_rank() == 0:
        echo(results.table() + f"\n{results.path}")


def _held_out(o: EvaluateOptions, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the loader of what the loss is measured on: the recipe's `eval_loader` with what options change, or `--data`."""
    spec = recipe.get("eval_loader") if o.data is None else {"name": "image_caption", "path": o.data}
    if not spec:
        raise UserError(f"{LOSS}: the recipe has no eval_loader; name what was kept out of training: --data DIR --split SPLIT.")
    changes = {"split": o.split, "captions": None if o.caption is None else {o.caption: 1.0}}
    spec = spec | {key: value for key, value in changes.items() if value is not None}
    if spec.get("remote") is not None and spec.get("path"):
        spec["path"] = _cached(spec["path"], spec.get("split", "train"), spec["remote"])
    return spec


def find_data(trained: "Trained", data: str | None, split: str | None, caption: str | None, needed: bool) -> "DataSet | None":
    """Return the data set that was named, or the recipe's, if it is there or needed."""
    from prx_composer.metrics.real_images import DataSet

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
            path, name, remote = spec["path"], split or spec.get("split", "train"), spec.get("remote")
            return DataSet(path if remote is None else _cached(path, name, remote), name, column, remote)
    except UserError:
        if needed:
            raise
        return None


def _cached(path: str, split: str, remote: str) -> str:
    """Return where remote data lie: at `path` if they are there, else in the cache, and not wherever somebody's recipe says."""
    from prx_composer.data.format import MANIFEST
    from prx_composer.metrics.real_images import default_cache

    return path if Path(path, split, MANIFEST).exists() else str(default_cache() / f"data-{_hash([remote])[:16]}")


def _choose_prompts(o: EvaluateOptions, data: "DataSet | None") -> tuple[list[str], str]:
    """Return the prompts and where they are from."""
    from prx_composer.commands.generate import read_prompts
    from prx_composer.metrics.real_images import evenly

    num = o.num or _PROMPTS_AT_MOST
    if o.prompts is not None:
        texts, source = read_prompts(o.prompts), o.prompts
        chosen = [texts[index] for index in evenly(len(texts), num)]
    else:
        assert data is not None
        chosen, source = [data.caption(index) for index in evenly(len(data), num)], data.name
    if len(chosen) < 2:
        raise UserError(f"{source}: a number needs at least two prompts.")
    return chosen, source


def _find_real_images(o: EvaluateOptions, scorer: "Scorer", data: "DataSet | None") -> "DataSet | ImageFolder | None":
    """Return the images to compare with: those that were named, or the prompts' data; None if no metric compares."""
    from prx_composer.metrics.real_images import open_images

    if not scorer.needs_reference:
        return None
    if o.reference is not None:
        with at_path("--reference"):
            return open_images(o.reference, o.split or "train", o.caption)
    if data is None:
        comparing = ", ".join(name for name in scorer.metrics if name != "clip_score")
        raise UserError(f"{comparing}: name real images to compare with: --reference DIR.")
    return data


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
