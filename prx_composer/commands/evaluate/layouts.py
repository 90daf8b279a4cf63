"""Image folders as the scorers of GenEval and DPG-Bench read them.

GenEval (github.com/djghosh13/geneval, evaluation/evaluate_images.py):
<out>/00000/metadata.jsonl             the prompt's line of evaluation_metadata.jsonl
<out>/00000/samples/00000.png …        four of them

DPG-Bench (github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py):
<out>/<name of the prompt's file>.png  a square of 2 × 2 square images; the scorer is told their side and their number
"""

import hashlib
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from PIL import Image
from torch import Tensor

from prx_composer.commands.evaluate.sweep import Sweep, image_seeds
from prx_composer.commands.generate import draw, metadata, save_png, weights_hash
from prx_composer.common.distributed import from_rank_zero
from prx_composer.common.errors import UserError
from prx_composer.common.files import read_lines, read_text, write_whole
from prx_composer.runs.opening import Trained

_DPG_TILES = 4


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
    trained.model.say_what_is_lost([item.prompt for item in items])
    trained.model.to(sweep.device)
    digest = from_rank_zero(weights_hash(trained.model) if dist.get_global_rank() == 0 else "")
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
                _save_grid(folder, item, images)
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


def _save_grid(folder: Path, item: _Item, images: list[Tensor]) -> None:
    rows = [torch.cat(images[start : start + 2], 2) for start in range(0, _DPG_TILES, 2)]
    content = BytesIO()
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy()).save(content, "PNG")
    write_whole(folder / item.files[0], content.getvalue())


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
