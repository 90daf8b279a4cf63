"""What is drawn for an evaluation, over a sweep of settings: numbers in a table, or folders that other scorers read.

Beside every number stands all that is needed to get it again.

GenEval (github.com/djghosh13/geneval, evaluation/evaluate_images.py) reads
<out>/00000/metadata.jsonl             the prompt's line of evaluation_metadata.jsonl
<out>/00000/samples/00000.png …        four of them

DPG-Bench (github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py) reads
<out>/<name of the prompt's file>.png  a square of 2 × 2 square images; the scorer is told their side and their number
"""

import datetime
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor

from prx_composer.commands.generate import DrawingSettings, draw, metadata, save_png, weights_hash
from prx_composer.common.distributed import from_rank_zero
from prx_composer.common.errors import UserError
from prx_composer.common.files import read_lines, read_text, write_whole
from prx_composer.common.pages import picture, render
from prx_composer.metrics.scoring import METRICS, Scorer, interval_95
from prx_composer.runs.opening import Trained, choose_guidance

log = logging.getLogger(__name__)

_DPG_TILES = 4

SEEDS_APART = 1_000_000
"""Image i of seed s is what `prx generate --seed s·1000000+i` draws of its prompt."""


@dataclass(frozen=True)
class Sweep:
    """What is drawn: every prompt with every combination of guidance scale and steps, from every seed.

    Args:
        base: settings that all combinations share.
        guidance_scales, steps: values.
        seeds: each is a set of images of its own; two or more give an interval.
        batch_size: images at a time.
        device: where.
        command: that asked for it, for the record.
    """

    base: DrawingSettings
    guidance_scales: tuple[float, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    batch_size: int
    device: torch.device
    command: str

    @property
    def settings(self) -> list[DrawingSettings]:
        """Return the settings of every combination."""
        pairs = product(self.guidance_scales, self.steps)
        return [replace(self.base, guidance_scale=scale, num_inference_steps=steps) for scale, steps in pairs]


def image_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """Return the seeds of the images of prompts with these numbers."""
    return [seed * SEEDS_APART + index for index in indices]


@dataclass
class Results:
    """What was measured: a JSON file, and a Markdown table beside it, written anew after every row.

    Args:
        path: of the JSON file.
        conditions: what all rows have in common and must, to be compared: prompts, reference, networks, image size.
        rows: one per combination of settings.
    """

    path: Path
    conditions: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Go on with a file of the same conditions, if rank 0 finds one.

        Raises:
            UserError: it is there and holds something else.
        """
        self.conditions = json.loads(json.dumps(self.conditions))
        problem: str | None = None
        if dist.get_global_rank() == 0 and self.path.exists():
            try:
                found = json.loads(self.path.read_text())
                self.rows = found["rows"]
                different = [key for key in self.conditions if found["conditions"].get(key) != self.conditions[key]]
                if different:
                    problem = f"other numbers: its {', '.join(different)} {'is' if len(different) == 1 else 'are'} different"
            except (OSError, ValueError, LookupError, AttributeError, TypeError):
                problem = "something else"
        problem, self.rows = from_rank_zero((problem, self.rows))
        if problem is not None:
            raise UserError(f"--output: {self.path} holds {problem}. Name another file, or remove it.")

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write both files on rank 0."""
        self.rows.append(row)
        if dist.get_global_rank() == 0:
            content = json.dumps({"conditions": self.conditions, "rows": self.rows}, indent=1, ensure_ascii=False)
            write_whole(self.path, f"{content}\n".encode())
            write_whole(self.path.with_suffix(".md"), self.table().encode())

    def table(self) -> str:
        """Return Markdown: a row per combination, then what makes it repeatable."""
        return render(
            "prx_composer.commands.evaluate",
            "evaluation.md.jinja",
            conditions=self.conditions,
            rows=self.rows,
            metrics=METRICS,
            drawn=sorted({tuple(row["seeds"]) for row in self.rows if "seeds" in row}),
            models=sorted({(row["weights"], row["batch"] or 0, row["weights_sha256"]) for row in self.rows}),
            commands=sorted({(row["command"], tuple(row["versions"].items())) for row in self.rows}),
        )


def _prepared(trained: Trained, sweep: Sweep, prompts: list[str]) -> str:
    """Move the model to its device and say what it cannot read of the prompts; return the hash of its weights."""
    trained.model.say_what_is_lost(prompts)
    trained.model.to(sweep.device)
    return from_rank_zero(weights_hash(trained.model) if dist.get_global_rank() == 0 else "")


def measure(trained: Trained, sweep: Sweep, prompts: list[str], scorer: Scorer, results: Results) -> None:
    """Measure every combination with one kind of weights; pass over those that the results have already."""
    digest = _prepared(trained, sweep, prompts)
    guidance = sweep.base.guidance
    choose_guidance(trained.model, guidance if guidance.partition(":")[0] in ("cfg", "self", "internal") else "run")
    for settings in sweep.settings:
        facts = metadata(trained, settings, digest, sweep.device)
        wanted = {key: facts[key] for key in ("weights_sha256", "guidance_scale", "num_inference_steps", "as_diffusers")}
        wanted |= {"weights": trained.weights, "seeds": list(sweep.seeds)}
        said = f"{trained.weights}, guidance scale {settings.guidance_scale:g}, {settings.num_inference_steps} steps"
        if any(all(row.get(key) == value for key, value in wanted.items()) for row in results.rows):
            log.info("%s: measured already.", said)
            continue
        begun = datetime.datetime.now(datetime.UTC)
        per_seed = []
        for seed in sweep.seeds:

            def draw_them(indices: list[int], seed: int = seed, settings: DrawingSettings = settings) -> Tensor:
                """Return the images of the prompts with these numbers, uint8 (B, 3, H, W)."""
                asked = [prompts[index] for index in indices]
                return torch.stack([i for _, i in draw(trained.model, asked, image_seeds(seed, indices), settings, len(asked))])

            per_seed.append(scorer.score(draw_them, prompts, sweep.batch_size, sweep.device))
            log.info("%s, seed %d: %s", said, seed, ", ".join(f"{name} {value:.4g}" for name, value in per_seed[-1].items()))
        measured = {}
        for name in scorer.metrics:
            values = [scores[name] for scores in per_seed]
            mean = math.fsum(values) / len(values)
            measured[name] = {"mean": mean, "interval_95": interval_95(values), "per_seed": values}
        took = (datetime.datetime.now(datetime.UTC) - begun).total_seconds()
        facts["versions"] |= {name: version(name) for name in ("torchvision", "mosaicml")}
        results.add(
            facts
            | wanted
            | {"metrics": measured, "command": sweep.command, "ranks": dist.get_world_size()}
            | {"date": begun.isoformat(timespec="seconds"), "seconds": round(took, 1)}
        )


_OF_DRAWING = {entry.name for entry in fields(DrawingSettings)} - {"precision"}


def measure_loss(trained: Trained, sweep: Sweep, loader: DataSpec, results: Results) -> None:
    """Measure the validation loss over a loader of evaluation, which the ranks share, unless the results have it already."""
    digest = _prepared(trained, sweep, [])
    facts = metadata(trained, sweep.base, digest, sweep.device)
    facts = {key: value for key, value in facts.items() if key not in _OF_DRAWING}
    if any(row["weights_sha256"] == digest and row["weights"] == trained.weights for row in results.rows):
        log.info("%s: measured already.", trained.weights)
        return
    begun, samples, model = datetime.datetime.now(datetime.UTC), 0, trained.model
    metrics = model.get_metrics()
    for metric in metrics.values():
        metric.to(sweep.device).reset()
    for batch in loader.dataloader:
        samples += int(loader.get_num_samples_in_batch(batch))
        on_device = {name: value.to(sweep.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        moved = loader.microbatch_transforms(on_device)
        with torch.autocast(sweep.device.type, torch.bfloat16, enabled=sweep.base.precision == "bf16"):
            errors = model.eval_forward(moved)
        for metric in metrics.values():
            model.update_metric(moved, errors, metric)
    values = {name: float(metric.compute()) for name, metric in metrics.items()}  # over all ranks
    took = (datetime.datetime.now(datetime.UTC) - begun).total_seconds()
    results.add(
        facts
        | {"metrics": {name: {"mean": value, "interval_95": None, "per_seed": [value]} for name, value in values.items()}}
        | {"samples": sum(dist.all_gather_object(samples)), "command": sweep.command, "ranks": dist.get_world_size()}
        | {"date": begun.isoformat(timespec="seconds"), "seconds": round(took, 1)}
    )


# ---------------------------------------------------------------------------------- folders that other scorers read


@dataclass(frozen=True)
class _Item:
    """A prompt of a benchmark.

    Args:
        files: that its images become, below the folder.
        content: text file beside them and what it says.
    """

    prompt: str
    files: tuple[str, ...]
    content: tuple[str, str] | None = None


def write_layout(layout: str, trained: Trained, prompts: str, folder: Path, images_per_prompt: int, sweep: Sweep) -> str:
    """Draw a benchmark's prompts, but for what is there of the same settings already; return a line about it.

    How it was drawn is in <folder>.json: the folder itself holds only what the scorer expects.

    Args:
        sweep: of a single combination; its first seed is drawn.

    Raises:
        UserError: prompts that cannot be read, a folder drawn otherwise, or a shape that the scorer cannot read.
    """
    (settings,), seed = sweep.settings, sweep.seeds[0]
    items = _geneval(Path(prompts).expanduser(), images_per_prompt) if layout == "geneval" else _dpg(Path(prompts).expanduser())
    if layout == "dpg" and settings.height != settings.width:
        raise UserError(f"--layout dpg: its scorer cuts squares; --size {settings.height}x{settings.width} is none.")
    if layout == "dpg" and images_per_prompt != _DPG_TILES:
        raise UserError(f"--layout dpg: a file holds {_DPG_TILES} images; leave --images-per-prompt out.")
    digest = _prepared(trained, sweep, [item.prompt for item in items])
    facts = metadata(trained, settings, digest, sweep.device)
    facts |= {"seed": seed, "images_per_prompt": images_per_prompt, "layout": layout}
    asked = hashlib.sha256(json.dumps([[item.prompt, item.files, item.content] for item in items]).encode()).hexdigest()
    _claim(folder, {**facts, "prompts_sha256": asked}, sweep.command)
    mine = list(enumerate(items))[dist.get_global_rank() :: dist.get_world_size()]
    todo = [(number, item) for number, item in mine if not all((folder / name).exists() for name in item.files)]
    jobs = [
        (item, image_seed)
        for number, item in todo
        for image_seed in image_seeds(seed, range(number * images_per_prompt, (number + 1) * images_per_prompt))
    ]
    images: list[Tensor] = []
    for index, image in draw(trained.model, [item.prompt for item, _ in jobs], [s for _, s in jobs], settings, sweep.batch_size):
        images.append(image)
        if len(images) == images_per_prompt:
            item, seeds = jobs[index][0], [s for _, s in jobs[index + 1 - images_per_prompt : index + 1]]
            if layout == "dpg":
                rows = [torch.cat(images[start : start + 2], 2) for start in range(0, _DPG_TILES, 2)]
                content = BytesIO()
                picture(torch.cat(rows, 1)).save(content, "PNG")
                write_whole(folder / item.files[0], content.getvalue())
            else:
                _save_each(folder, item, images, seeds, facts)
            images.clear()
    dist.barrier()
    scored = f" · its scorer is told --resolution {settings.width} --pic-num 4" if layout == "dpg" else ""
    return f"{len(items)} prompts, {images_per_prompt} images each, {trained.weights} weights · {folder}{scored}"


def _claim(folder: Path, facts: dict[str, object], command: str) -> None:
    """Write <folder>.json; refuse a folder that was drawn with something else."""
    note = folder.with_name(f"{folder.name}.json")
    problem: str | None = None
    if dist.get_global_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = json.loads(note.read_text()) if note.exists() else None
            if there is None and any(folder.iterdir()):
                problem = f"{folder} isn't empty, and there is no {note.name} that says how it was drawn"
            elif there is not None and {key: there.get(key) for key in facts} != json.loads(json.dumps(facts)):
                problem = f"{folder} was drawn with other settings, weights or prompts, see {note}"
            else:
                write_whole(note, (json.dumps(facts | {"command": command}, indent=1) + "\n").encode())
        except (OSError, ValueError, AttributeError) as error:
            problem = f"{folder} cannot be used: {error}"
    problem = from_rank_zero(problem)
    if problem is not None:
        raise UserError(f"--output: {problem}. Name another folder, or remove both.")


def _save_each(folder: Path, item: _Item, images: list[Tensor], seeds: list[int], facts: dict[str, Any]) -> None:
    for name, image, seed in zip(item.files, images, seeds, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if item.content is not None:
            write_whole(folder / item.content[0], item.content[1].encode())
        save_png(image, folder / name, {"prompt": item.prompt} | facts | {"seed": seed})


def _geneval(file: Path, images: int) -> list[_Item]:
    """Return GenEval's prompts: one for every line of its metadata."""
    try:
        lines = [line for line in read_lines(file) if line.strip()]
        read = [(line, json.loads(line)) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts: {file} cannot be read: {error}. GenEval's is prompts/evaluation_metadata.jsonl.") from error
    for number, (_, entry) in enumerate(read, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or "tag" not in entry:
            raise UserError(
                f'--prompts: {file}, line {number} has no "prompt" and "tag", as GenEval\'s evaluation_metadata.jsonl has.'
            )
    if not read:
        raise UserError(f"--prompts: {file} is empty.")
    return [
        _Item(
            entry["prompt"],
            tuple(f"{number:05d}/samples/{index:05d}.png" for index in range(images)),
            (f"{number:05d}/metadata.jsonl", line + "\n"),
        )
        for number, (line, entry) in enumerate(read)
    ]


def _dpg(folder: Path) -> list[_Item]:
    """Return DPG-Bench's prompts: one for every text file of the folder."""
    items = []
    for file in sorted(folder.glob("*.txt")):
        try:
            items.append(_Item(read_text(file).strip(), (f"{file.stem}.png",)))
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts: {file} cannot be read: {error}") from error
    if not items:
        raise UserError(f"--prompts: {folder} has no *.txt; DPG-Bench's are in dpg_bench/prompts, one file per prompt.")
    return items
