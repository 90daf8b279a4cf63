"""`prx evaluate`: numbers of a trained model, or the folders that other benchmarks' scorers read."""

import logging
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from prx_composer.commands.model_cli import CodeOption
from prx_composer.common.errors import UserError, at_path

if TYPE_CHECKING:
    import torch

    from prx_composer.metrics.image_sets import DataSet, ImageFolder
    from prx_composer.metrics.scoring import Scorer
    from prx_composer.runs.opening import Trained


T = TypeVar("T", int, float)
_PROMPTS_AT_MOST = 5000
_LAYOUTS = ("geneval", "dpg")


def register(app: typer.Typer) -> None:
    """Adds the command to `prx`."""
    app.command()(evaluate)


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Run folder (runs/<run_name>), one of its checkpoints, or an exported folder.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Data set for prompts and real images. [default: the recipe's eval_loader or train_loader]"
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of --data and --reference. [default: the recipe's, or train]")] = None,
    caption: Annotated[str | None, typer.Option(help="Caption column of the data set. [default: its first]")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help='Prompts instead: one per line, or JSON lines with a "prompt". Layouts: see below.'),
    ] = None,
    num: Annotated[int | None, typer.Option("--num", min=2, help="Prompts, evenly spaced. [default: all, at most 5000]")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="DIR", help="Real images: a data set, or a folder of images. [default: the data]")
    ] = None,
    reference_num: Annotated[int | None, typer.Option(min=2, help="Real images, evenly spaced. [default: all]")] = None,
    metrics: Annotated[
        str, typer.Option(help="Of cmmd, dino_mmd, fd_dino, clip_score, fid.")
    ] = "cmmd,dino_mmd,fd_dino,clip_score",
    guidance_scale: Annotated[
        str | None, typer.Option(metavar="LIST", help="Such as 1,2.5,5. [default: as the recipe's callbacks.images, or 3.5]")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="LIST", help="Such as 10,28,50. [default: as the recipe's callbacks.images, or 28]")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="LIST", help="ema, raw, or ema,raw. [default: ema if the run has an average, else raw]")
    ] = None,
    code: CodeOption = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Each draws all prompts anew; the interval is over them.")] = "0,1,2",
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height x width in pixels, or one number. [default: as last trained]")
    ] = None,
    guidance: Annotated[str, typer.Option(help="cfg, self (routed self-guidance), or run: as the run drew.")] = "run",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, per GPU.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, or gpu. [default: a GPU if there is one]")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or bf16 (GPU). [default: bf16 on a GPU, fp32 on the CPU]")] = None,
    clip: Annotated[str | None, typer.Option(metavar="ID", help="Of cmmd: hub id or folder.")] = None,
    dino: Annotated[str | None, typer.Option(metavar="ID", help="Of dino_mmd and fd_dino: hub id or folder.")] = None,
    clip_score: Annotated[str | None, typer.Option(metavar="ID", help="Of clip_score: hub id or folder.")] = None,
    inception: Annotated[str | None, typer.Option(metavar="FILE", help="Of fid: weights of torch-fidelity.")] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="For features of real images. [default: ~/.cache/prx-composer/evaluation]")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="PATH", help="JSON to write, with a table beside it as .md. Layouts: the folder.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="geneval or dpg: measure nothing, write the folder that the benchmark's own scorer reads.")
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Of a layout; both benchmarks take 4.")] = 4,
) -> None:
    """Measure a trained model over guidance scales, steps, and averaged or raw weights, with an interval over seeds.

    Command, seeds, versions and the weights' hash stand beside every number. The same command goes on where it was stopped. On
    several GPUs, which share the prompts: composer -n 8 -m prx_composer.cli evaluate MODEL …

    --layout geneval: --prompts is GenEval's evaluation_metadata.jsonl. --layout dpg: --prompts is the folder of DPG-Bench's
    prompts (*.txt). Their scorers run in environments of their own.
    """
    from composer.utils import dist

    from prx_composer.commands.evaluate.evaluate import SEEDS_APART, Results, Sweep, image_seeds, sweep
    from prx_composer.commands.export.card import sample_settings
    from prx_composer.commands.generate import check_settings
    from prx_composer.commands.model_cli import made_folder, parse_size
    from prx_composer.metrics.image_sets import DataSet, open_images
    from prx_composer.metrics.ranks import from_rank_zero
    from prx_composer.metrics.reference import default_cache
    from prx_composer.metrics.scoring import check_metrics
    from prx_composer.models.sampling import check_seeds
    from prx_composer.recipe.config import import_code
    from prx_composer.runs.opening import choose_guidance, load_trained

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("prx_composer").setLevel(logging.INFO)
    if layout is not None and layout not in _LAYOUTS:
        raise UserError(f"--layout: {layout!r} is none of {', '.join(_LAYOUTS)}.")
    try:
        names = check_metrics([name.strip() for name in metrics.split(",") if name.strip()])
    except ValueError as error:
        raise UserError(f"--{error}") from error
    kinds = [None] if weights is None else [kind.strip() for kind in weights.split(",") if kind.strip()]
    if layout is None and output is not None and Path(output).suffix != ".json":
        raise UserError(f"--output: {output} must be a file that ends in .json; the table becomes the .md beside it.")
    if any(kind not in (None, "ema", "raw") for kind in kinds) or not kinds:
        raise UserError(f"--weights must be ema, raw, or ema,raw, not {weights!r}.")
    scales = None if guidance_scale is None else _numbers(guidance_scale, float, "--guidance-scale", 1.0)
    step_list = None if steps is None else _numbers(steps, int, "--steps", 1)
    seed_list = _numbers(seeds, int, "--seeds", 0)
    with at_path("--seeds"):
        check_seeds(image_seeds(max(seed_list), [SEEDS_APART - 1]), f"image i of seed s is drawn from s·{SEEDS_APART}+i")

    place = _start(device)
    import_code(code or [], "--code")
    trained = load_trained(model, kinds[0])  # pyright: ignore[reportArgumentType]
    _, defaults = sample_settings(trained)
    height, width = (defaults.height, defaults.width) if size is None else parse_size(size)
    plan = Sweep(scales or (defaults.guidance_scale,), step_list or (defaults.num_inference_steps,), seed_list, batch_size)
    base = replace(
        defaults,
        height=height,
        width=width,
        guidance=choose_guidance(trained.model, guidance),
        precision=precision or ("fp32" if place.type == "cpu" else "bf16"),
    )
    for settings in plan.settings(base):
        check_settings(trained.model, settings, place)
    ranks = dist.get_world_size()
    program = ["prx"] if ranks == 1 else ["composer", "-n", str(ranks), "-m", "prx_composer.cli"]
    command = shlex.join([*program, *sys.argv[1:]])
    if layout is not None:
        if len(plan.guidance_scales) * len(plan.steps) * len(kinds) > 1 or (len(seed_list) > 1 and seeds != "0,1,2"):
            raise UserError(
                "--layout: one folder is of one guidance scale, one number of steps, one kind of weights and one seed."
            )
        if prompts is None or output is None:
            raise UserError(f"--layout {layout} needs --prompts (of the benchmark) and --output (the folder to write).")
        from prx_composer.commands.evaluate.layouts import write_layout

        one = replace(base, guidance_scale=plan.guidance_scales[0], num_inference_steps=plan.steps[0])
        typer.echo(
            write_layout(
                layout,
                trained,
                prompts,
                Path(output).expanduser(),
                one,
                images_per_prompt,
                next(iter(seed_list)),
                batch_size,
                command,
                place,
            )
        )
        return

    found = _data(trained, data, split, caption, needed=prompts is None)
    texts, source = _prompts(prompts, found, num)
    scorer = _scorer(names, clip=clip, dino=dino, clip_score=clip_score, inception=inception)
    compared: DataSet | ImageFolder | None = None
    if scorer.needs_reference:
        if reference is not None:
            with at_path("--reference"):
                compared = open_images(reference, split or "train", caption)
        elif found is not None:
            compared = found
        else:
            raise UserError(
                f"{', '.join(n for n in names if n != 'clip_score')}: name real images to compare with: --reference DIR."
            )
    conditions: dict[str, Any] = {
        "metrics": names,
        "prompts": {"source": source, "count": len(texts), "sha256": _hash(texts)},
        "height": height,
        "width": width,
        "guidance": base.guidance,
        "precision": base.precision,
        "networks": scorer.description(),
    }
    folder = default_cache() if cache is None else Path(cache).expanduser()
    if compared is not None:
        count = len(compared) if reference_num is None else min(reference_num, len(compared))
        identity = from_rank_zero(compared.identity(folder) if dist.get_global_rank() == 0 else "")
        conditions["reference"] = {"source": compared.name, "count": count, "identity": identity}
    results = Results(Path(output or "evaluation.json").expanduser(), conditions)
    made_folder(str(results.path.parent))
    if compared is not None:
        scorer.compare_with(compared, reference_num, folder, batch_size, place)
    for index, kind in enumerate(kinds):
        if index:
            trained = load_trained(model, kind)  # pyright: ignore[reportArgumentType]
        choose_guidance(trained.model, guidance)
        sweep(trained, plan, base, texts, scorer, results, command, place)
    if dist.get_global_rank() == 0:
        typer.echo(results.table() + f"\n{results.path}")


def _start(device: str | None) -> "torch.device":
    import torch
    from composer.utils import dist, get_device

    if device not in (None, "cpu", "gpu", "cuda"):
        raise UserError(
            f"--device must be cpu or gpu, not {device!r}; several GPUs: composer -n 8 -m prx_composer.cli evaluate …"
        )
    if device in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("--device: there is no GPU here; use --device cpu.")
    chosen = get_device("gpu" if device == "cuda" else device)
    dist.initialize_dist(chosen)
    return torch.device("cuda", torch.cuda.current_device()) if chosen.name == "gpu" else torch.device("cpu")


def _numbers(text: str, kind: type[T], option: str, least: T) -> tuple[T, ...]:
    try:
        values = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(math.isfinite(value) and value >= least for value in values):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option}: {text!r} must be {what} from {least:g} on, such as 1,2,5.")
    return tuple(dict.fromkeys(values))


def _data(trained: "Trained", data: str | None, split: str | None, caption: str | None, needed: bool) -> "DataSet | None":
    """The data set that was named, or the recipe's, if it is there or needed."""
    from prx_composer.metrics.image_sets import DataSet

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
            return DataSet(_place(spec["path"], name, remote), name, column, remote)
    except UserError:
        if needed:
            raise
        return None


def _place(path: str, split: str, remote: str | None) -> str:
    """Where remote data of a run's recipe lie or are downloaded to: not wherever somebody's recipe says."""
    from prx_composer.data.format import MANIFEST
    from prx_composer.metrics.reference import default_cache

    if remote is None or Path(path, split, MANIFEST).exists():
        return path
    return str(default_cache() / f"data-{_hash([remote])[:16]}")


def _prompts(file: str | None, data: "DataSet | None", num: int | None) -> tuple[list[str], str]:
    """The prompts and where they are from."""
    from prx_composer.commands.generate import read_prompts
    from prx_composer.metrics.image_sets import evenly

    if file is not None:
        texts = read_prompts(file)
        chosen, source = [texts[index] for index in evenly(len(texts), num or _PROMPTS_AT_MOST)], file
    else:
        assert data is not None
        chosen, source = [data.caption(index) for index in evenly(len(data), num or _PROMPTS_AT_MOST)], data.name
    if len(chosen) < 2:
        raise UserError(f"{source}: a number needs at least two prompts.")
    return chosen, source


def _scorer(names: list[str], **given: str | None) -> "Scorer":
    from prx_composer.metrics.scoring import Networks, Scorer

    try:
        return Scorer(names, Networks(**{kind: name for kind, name in given.items() if name is not None}))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{error} Each network has an option (--clip, --dino, --clip-score, --inception).") from error


def _hash(texts: list[str]) -> str:
    import hashlib

    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
