"""A trained model's numbers over a sweep of settings, each with all that is needed to get it again.

First what they are measured with, from the options: prompts, real images and networks; then the sweep and its table.
"""

import datetime
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor

from prx_composer.commands.generate import DrawingSettings, draw, metadata, read_prompts, weights_hash
from prx_composer.common.distributed import from_rank_zero
from prx_composer.common.errors import UserError, at_path
from prx_composer.common.files import write_whole
from prx_composer.data.format import MANIFEST
from prx_composer.metrics.real_images import DataSet, ImageFolder, default_cache, evenly, open_images
from prx_composer.metrics.scoring import METRICS, Networks, Scorer, interval_95
from prx_composer.models.text_to_image import TextToImage
from prx_composer.runs.opening import Trained, choose_guidance

log = logging.getLogger(__name__)

SEEDS_APART = 1_000_000
"""Image i of seed s is what `prx generate --seed s·1000000+i` draws of its prompt."""
_PROMPTS_AT_MOST = 5000


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


# ------------------------------------------------------------------------------------------------------- the sweep


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
        """The settings of every combination."""
        pairs = product(self.guidance_scales, self.steps)
        return [replace(self.base, guidance_scale=scale, num_inference_steps=steps) for scale, steps in pairs]


def image_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """Return the seeds of the images of prompts with these numbers."""
    return [seed * SEEDS_APART + index for index in indices]


def drawer(model: TextToImage, prompts: list[str], seed: int, settings: DrawingSettings) -> Callable[[list[int]], Tensor]:
    """Return a function from numbers of prompts to their images, uint8 (B, 3, H, W)."""

    def draw_them(indices: list[int]) -> Tensor:
        asked = [prompts[index] for index in indices]
        drawn = draw(model, asked, image_seeds(seed, indices), settings, len(indices))
        return torch.stack([image for _, image in drawn])

    return draw_them


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

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row with these values, if it was measured already."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write both files on rank 0."""
        self.rows.append(row)
        if dist.get_global_rank() == 0:
            content = json.dumps({"conditions": self.conditions, "rows": self.rows}, indent=1, ensure_ascii=False)
            write_whole(self.path, f"{content}\n".encode())
            write_whole(self.path.with_suffix(".md"), self.table().encode())

    def table(self) -> str:
        """Return Markdown: a row per combination, then what makes it repeatable."""
        names = list(self.conditions["metrics"])
        head = ["weights", "guidance scale", "steps", *(f"{name} {METRICS[name].better}" for name in names)]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in self.rows:
            cells = [row["weights"], f"{row['guidance_scale']:g}", str(row["num_inference_steps"])]
            lines.append(f"| {' | '.join([*cells, *(_cell(row['metrics'][name]) for name in names)])} |")
        return "\n".join([*lines, "", *(f"- {line}" for line in self._notes())]) + "\n"

    def _notes(self) -> list[str]:
        conditions = self.conditions
        notes = [f"{conditions['prompts']['count']} prompts of {conditions['prompts']['source']}, one image each per seed."]
        if reference := conditions.get("reference"):
            notes.append(f"Compared with {reference['count']} images of {reference['source']}.")
        size, guidance = f"{conditions['height']}×{conditions['width']}", conditions["guidance"]
        notes.append(f"Images of {size}, guidance {guidance}, {conditions['precision']}.")
        for seeds in sorted({tuple(row["seeds"]) for row in self.rows}):
            interval = "; ± is the 95% t-interval over them" if len(seeds) > 1 else "; a single one says nothing of the spread"
            notes.append(f"Seeds {', '.join(map(str, seeds))}{interval}.")
        for kind, network in conditions["networks"].items():
            notes.append(f"{kind}: {network['name']} at {network['image_size']}, {network['fingerprint'][:12]}.")
        for weights, batch, digest in sorted({(r["weights"], r["batch"] or 0, r["weights_sha256"]) for r in self.rows}):
            notes.append(f"Weights {weights} of batch {batch}: SHA-256 {digest}.")
        for command, versions in sorted({(r["command"], json.dumps(r["versions"])) for r in self.rows}):
            said = ", ".join(f"{name} {number}" for name, number in json.loads(versions).items())
            notes.append(f"`{command}` with {said}.")
        return notes


def _cell(metric: dict[str, Any]) -> str:
    return f"{metric['mean']:.4g}" + ("" if metric["interval_95"] is None else f" ± {metric['interval_95']:.2g}")


def measure(trained: Trained, sweep: Sweep, prompts: list[str], scorer: Scorer, results: Results) -> None:
    """Measure every combination with one kind of weights; pass over those that the results have already."""
    trained.model.say_what_is_lost(prompts)
    trained.model.to(sweep.device)
    choose_guidance(trained.model, sweep.base.guidance if sweep.base.guidance in ("cfg", "self") else "run")
    digest = from_rank_zero(weights_hash(trained.model) if dist.get_global_rank() == 0 else "")
    for settings in sweep.settings:
        facts = metadata(trained, settings, digest, sweep.device)
        wanted = {key: facts[key] for key in ("weights_sha256", "guidance_scale", "num_inference_steps")}
        wanted |= {"weights": trained.weights, "seeds": list(sweep.seeds)}
        said = f"{trained.weights}, guidance scale {settings.guidance_scale:g}, {settings.num_inference_steps} steps"
        if results.find(wanted) is not None:
            log.info("%s: measured already.", said)
            continue
        begun = datetime.datetime.now(datetime.UTC)
        per_seed = []
        for seed in sweep.seeds:
            draw_them = drawer(trained.model, prompts, seed, settings)
            per_seed.append(scorer.score(draw_them, prompts, sweep.batch_size, sweep.device))
            log.info("%s, seed %d: %s", said, seed, ", ".join(f"{name} {value:.4g}" for name, value in per_seed[-1].items()))
        measured = {name: _summary([scores[name] for scores in per_seed]) for name in scorer.metrics}
        took = (datetime.datetime.now(datetime.UTC) - begun).total_seconds()
        facts["versions"] |= {name: version(name) for name in ("torchvision", "mosaicml")}
        results.add(
            facts
            | wanted
            | {"metrics": measured, "command": sweep.command, "ranks": dist.get_world_size()}
            | {"date": begun.isoformat(timespec="seconds"), "seconds": round(took, 1)}
        )


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": math.fsum(values) / len(values), "interval_95": interval_95(values), "per_seed": values}
