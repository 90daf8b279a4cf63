"""Scores during training and at its end."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import State
from composer.devices import DeviceCPU

from prx_composer.callbacks.drawings import ShapesScore, draw_images
from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import run as train

SCORE = {"images_per_prompt": 2, "num_inference_steps": 2}
SOURCE = {"name": "shapes", "image_size": 16, "images_per_scene": 1, "heldout": 30}


@pytest.fixture
def trained(tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]) -> Callable[..., list[dict[str, Any]]]:
    """Trains the tiny recipe with a score and returns what was logged, step by step."""

    def run(run_name: str, **score: Any) -> list[dict[str, Any]]:
        recipe = config.load([write_recipe(tiny_recipe | {"run_name": run_name, "callbacks": {"shapes_score": SCORE | score}})])
        train.run(recipe)
        return read_metrics(Path(recipe.run_folder) / "metrics.jsonl")

    return run


def test_scoring_at_an_interval_changes_neither_training_nor_the_final_score(
    trained: Callable[..., list[dict[str, Any]]],
) -> None:
    plain, scored = trained("plain"), trained("scored", interval="0.25dur")
    assert [row["batch"] for row in scored if "heldout_accuracy" in row] == [2, 4, 6, 8]
    assert [row["batch"] for row in plain if "heldout_accuracy" in row] == [8]
    for before, after in zip(plain, scored, strict=True):
        for key in before.keys() & {"loss/train/total", "loss/train/flow"}:
            assert before[key] == after[key]
    final = {key for key in plain[-1] if key.startswith("heldout_accuracy")}
    assert len(final) == 5
    assert {key: plain[-1][key] for key in final} == {key: scored[-1][key] for key in final}
    assert 0 < scored[3]["heldout_accuracy/background"] <= 1
    assert (30 * scored[3]["heldout_accuracy/background"]) % 1 == pytest.approx(0, abs=1e-9)  # one image each, not two


@pytest.mark.parametrize("reads_captions", [True, False], ids=["captions are encoded in a step", "text is stored"])
def test_drawing_leaves_a_frozen_text_encoder_where_it_was(
    reads_captions: bool, tiny_model: Callable[..., Any], tiny_batch: dict[str, torch.Tensor]
) -> None:
    """With stored text it stayed on the GPU from the first picture on: gigabytes that `prx plan` doesn't count."""
    model = tiny_model(trainable_text=False)
    state = State(model, rank_zero_seed=0, run_name="drawn", device=DeviceCPU(), precision="fp32")
    if reads_captions:
        model(tiny_batch)
    frozen = model.text_encoder._frozen
    before, drawn_on = frozen._device, list[torch.device]()
    frozen.module.register_forward_hook(lambda *_: drawn_on.append(frozen._device))
    draw_images(state, ["a red circle"], 16, 16, [0], 1, 1.0)
    assert drawn_on == [torch.device("cpu")] and frozen._device == before == (drawn_on[0] if reads_captions else None)


@pytest.mark.parametrize(("interval", "message"), [("often", "often"), ("1ep", "not 1ep"), ("0ba", "not 0ba")])
def test_an_interval_that_is_none_is_refused(interval: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesScore(SOURCE, 16, interval=interval)


def of_loader(**attributes: Any) -> Any:
    return SimpleNamespace(train_dataloader=SimpleNamespace(**attributes))


def test_a_score_is_of_drawings_at_the_size_of_the_newest_step() -> None:
    logger: Any = None
    follows, keeps = ShapesScore(SOURCE), ShapesScore(SOURCE, 32)
    for size in (8, 16):
        for score in (follows, keeps):
            score.batch_start(of_loader(image_size=size), logger)
        assert (follows.image_size, keeps.image_size) == (size, 32)


def test_where_the_loader_has_no_size_the_score_asks_for_one_before_the_first_step() -> None:
    logger: Any = None
    with pytest.raises(UserError, match=r"callbacks\.shapes_score\.image_size: give one"):
        ShapesScore(SOURCE).fit_start(of_loader(), logger)
    ShapesScore(SOURCE, 16).fit_start(of_loader(), logger)
