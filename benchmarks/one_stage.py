"""One stage of a recipe as a recipe of its own, some steps long and with nothing in it that isn't a step, to be timed."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import yaml

from prx_composer import registry
from prx_composer.commands.plan.timeline import Span, Timeline
from prx_composer.common.errors import UserError
from prx_composer.models.encoder_sizes import known_config
from prx_composer.models.text_encoder import train_tokenizer
from prx_composer.recipe.arguments import entries
from prx_composer.recipe.config import Recipe

__all__ = ["batch_of_share", "closed_algorithms", "one_stage", "with_random_weights", "with_synthetic_batches", "write_recipe"]

SHAPE = "progressive_resolution"  # the algorithm that is the stages
ALWAYS: dict[str, Any] = {"start": "0ba", "end": None}


def batch_of_share(span: Span, microbatch: int, of: int) -> int:
    """Images per step of one GPU of `of`: whole microbatches, at least one."""
    whole = max(span.batch_size // of, microbatch)
    return whole - whole % microbatch


def one_stage(recipe: Recipe, line: Timeline, span: Span, batch_size: int, microbatch: int, steps: int) -> dict[str, Any]:
    """The recipe's keys, with the stage's sizes in place of `progressive_resolution`.

    Algorithms whose window is open in the middle of the stage are open from the first step to the last, the others are left
    out. Evaluation, callbacks, loggers, preflight and checkpoints but the last are off.

    Args:
        batch_size: images per step over all processes.
        steps: how long it trains.
    """
    windows = _windows(recipe)
    closed = [SHAPE, *closed_algorithms(recipe, line, span)]
    return dataclasses.asdict(recipe) | {
        "autoresume": False,
        "preflight": False,
        "time_budget": "1000h",  # never reached, but what is given as a part of it keeps its meaning
        "max_duration": f"{steps}ba",
        "scheduler": {"name": "constant"},  # a warm-up may be longer than these few steps, and is no part of what is measured
        "save_interval": "1000h",
        "progress_bar": False,
        "eval_loader": None,
        "image_size": span.image_size,
        "global_train_batch_size": batch_size,
        "device_train_microbatch_size": microbatch,
        "algorithms": {
            name: arguments | {key: ALWAYS[key] for key in windows.get(name, ())}
            for name, arguments in entries(recipe.algorithms, "algorithms")
            if name not in closed
        },
        "callbacks": {},
        "loggers": {},
    }


def closed_algorithms(recipe: Recipe, line: Timeline, span: Span) -> list[str]:
    """Those whose window isn't open in the middle of the stage."""
    middle, closed = (span.start + span.end - 1) // 2, []  # of two middle steps the first, so that a window to 0.5dur is open
    for name, window in _windows(recipe).items():
        first, last = line.window(str(window.get("start", "0ba")), window.get("end"), f"algorithms.{name}")
        if not first <= middle < last:
            closed.append(name)
    return closed


def _windows(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """`start` and `end` of the algorithms that aren't always open, as the recipe or the signature has them."""
    windows = {}
    for name, arguments in entries(recipe.algorithms, "algorithms"):
        parameters = inspect.signature(registry.algorithms.get(name, f"algorithms.{name}")).parameters
        given = {key: parameter.default for key, parameter in parameters.items()} | arguments
        window = {key: given[key] for key in ALWAYS if key in given}
        if window != {key: ALWAYS[key] for key in window}:
            windows[name] = window
    return windows


def with_synthetic_batches(
    content: dict[str, Any], folder: Path, valid_text: float, stored_text: bool, random_weights: bool
) -> dict[str, Any]:
    """The recipe with one random batch of its shapes for a loader (step_times.py), and with no need of captions or of a hub.

    Args:
        folder: where the tokenizer goes.
        valid_text: share of a caption's tokens that are no padding.
        stored_text: text embeddings come with the batch.
        random_weights: the tokenizer isn't to be downloaded either.
    """
    loader: dict[str, Any] = {"name": "synthetic", "valid_text": valid_text}
    if stored_text:
        loader["embedding_size"] = content["model"]["backbone"]["context_in_dim"]
    encoder = content["model"]["text_encoder"]
    if random_weights or isinstance(encoder.get("tokenizer"), dict):
        words = train_tokenizer(["a photograph of a lighthouse on a cliff above the sea at dawn"] * 2, 256)
        words.save_pretrained(str(folder / "words"))
        encoder["tokenizer"] = str(folder / "words")
    code = [*content["code_paths"], str(Path(__file__).with_name("step_times.py"))]
    return content | {"train_loader": loader, "code_paths": list(dict.fromkeys(code))}


def with_random_weights(content: Any) -> Any:
    """Every `pretrained:` becomes the configuration of that network: as much work, nothing to download."""
    if isinstance(content, list):
        return [with_random_weights(item) for item in content]
    if not isinstance(content, dict):
        return content
    changed = {key: with_random_weights(value) for key, value in content.items()}
    if isinstance(name := changed.get("pretrained"), str):
        known = known_config(name)
        if known is None:
            raise UserError(f"--random-weights: the sizes of {name} are not known here.")
        del changed["pretrained"]
        changed["config"] = known
    if changed.get("net") in ("vgg", "alex", "squeeze"):
        changed["random_weights"] = True
    return changed


def write_recipe(content: dict[str, Any], path: Path) -> Path:
    """As a YAML file; returns its path."""
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False))
    return path
