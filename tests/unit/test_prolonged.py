"""A run that goes on with a longer duration: its average follows, and what moves is said."""

import copy
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Time

from prx_composer.callbacks.checkpointing import what_moves
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import build_trainer

Write = Callable[..., str]
Recipe = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


@pytest.fixture
def plain(tiny_recipe: Recipe) -> Recipe:
    """One stage, no algorithms, a constant rate of 1e-3, a checkpoint every two batches."""
    changes = {"algorithms": {}, "callbacks": {"lr_monitor": {}}, "image_size": 8, "preflight": False, "autoresume": True}
    return tiny_recipe | changes


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def state_of(recipe: Recipe, batch: int) -> dict[str, Any]:
    return torch.load(folder_of(recipe) / "checkpoints" / f"ba{batch}" / "rank0.pt", weights_only=False)["state"]


def rates(folder: Path) -> list[float]:
    return [next(value for key, value in row.items() if key.startswith("lr-")) for row in read_metrics(folder / "metrics.jsonl")]


def test_an_average_that_has_begun_goes_on_in_a_longer_run(plain: Recipe, write_recipe: Write) -> None:
    """To the bit it is that of a run whose average began at the same batch; it stood still for two batches."""
    plain["algorithms"] = {"ema": {"half_life": "2ba", "start": "0.5dur"}}
    path = write_recipe(plain)
    assert main([path, "max_duration=4ba"]) == 0 and main([path, "max_duration=12ba"]) == 0
    other = copy.deepcopy(plain) | {"run_name": "whole"}
    assert main([write_recipe(other, "whole.yaml"), "max_duration=12ba", "algorithms.ema.start=2ba"]) == 0
    for batch in (6, 12):
        average, expected = (state_of(recipe, batch)["callbacks"]["AverageState"]["average"] for recipe in (plain, other))
        assert all(torch.equal(average[name], expected[name]) for name in expected), batch


def test_a_rate_that_had_decayed_is_said_before_it_goes_up_again_and_the_advice_keeps_it(
    plain: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """The closed form of Composer's schedule, which lags by a step: (1 − (t − 2)/(T − 2)) · 1e-3 at t = T − 1 and T."""
    plain["scheduler"] = {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0.0}
    path = write_recipe(plain)
    assert main([path, "max_duration=10ba"]) == 0
    before, after = 1e-3 * (1 - 7 / 8), 1e-3 * (1 - 8 / 18)
    assert "learning rate" not in caplog.text
    assert main([path, "max_duration=20ba"]) == 0
    (message,) = [record.message for record in caplog.records if "The learning rate" in record.message]
    assert f"was {before:.3g} up to batch 10 and goes to {after:.3g} now (max_duration 10ba → 20ba)" in message
    assert rates(folder_of(plain))[9:11] == pytest.approx([before, after], rel=1e-3)
    advice = re.search(r"run_name=<another name>.*?'scheduler=.*?'", message)
    assert advice is not None
    assert main([path, *shlex.split(advice[0].replace("<another name>", "another")), "max_duration=4ba"]) == 0
    assert rates(folder_of(plain).with_name("another")) == pytest.approx([before] * 4)


def test_the_rate_that_was_is_the_checkpoint_s_also_where_another_one_is_allowed(
    plain: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """The message named what the new optimizer.lr would have given at the last step, as the rate that was."""
    plain["scheduler"] = {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0.0}
    path = write_recipe(plain)
    assert main([path, "max_duration=4ba"]) == 0
    assert main([path, "max_duration=8ba", "optimizer.lr=4e-3", "resume.allow=[optimizer.lr]"]) == 0
    (message,) = [record.message for record in caplog.records if "The learning rate was" in record.message]
    before, after = rates(folder_of(plain))[3:5]
    assert before == pytest.approx(1e-3 * (1 - 1 / 2)) and after == pytest.approx(4e-3 * (1 - 2 / 6))
    assert f"was {before:.3g} up to batch 4 and goes to {after:.3g} now (max_duration 4ba → 8ba and another optimizer)" in message
    assert f"optimizer.lr={before:.3g} " in message


def test_a_run_that_decays_in_its_last_part_is_prolonged_without_a_jump(
    plain: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """As the message advises: from a checkpoint before the decay."""
    plain["scheduler"] = {"name": "warmup_stable_decay", "decay": 0.2, "shape": "linear"}
    path = write_recipe(plain)
    assert main([path, "max_duration=10ba"]) == 0
    for batch in (10, 8):  # the rate of batch 9, which lies in the decay, is decided at the end of batch 8
        shutil.rmtree(folder_of(plain) / "checkpoints" / f"ba{batch}")
    assert main([path, "max_duration=20ba"]) == 0
    assert "learning rate" not in caplog.text and rates(folder_of(plain))[:16] == pytest.approx([1e-3] * 16)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "said"),
    [
        ("gradient_clipping", {"end": "0.5dur"}, "its window (0ba to 0.5dur) was over, and is open now"),
        ("gradient_clipping", {"start": "0.5dur"}, "its window (0.5dur to the end) was open, and is not begun now"),
        ("contrastive_flow_matching", {"start": "0.2dur", "end": "0.9dur"}, "(0.2dur to 0.9dur) was over, and is open now"),
        ("contrastive_flow_matching", {"start": "0.9dur"}, "was open, and is not begun now"),
        ("resolution_aware", {"end": "0.5dur"}, "was over, and is open now"),
        ("tread", {"start_block": 0, "end_block": 1, "rate": 0.5, "end": "0.5dur"}, "was over, and is open now"),
        ("ema", {"half_life": "2ba", "end": "0.5dur"}, "was over, and is open now"),
        ("ema", {"half_life": "2ba", "start": "0.5dur"}, None),
        ("gradient_clipping", {"end": "3ba"}, None),
        ("gradient_clipping", {"start": "0.3dur"}, None),
    ],
)
def test_every_window_that_a_longer_run_moves_is_named(
    algorithm: str, arguments: Recipe, said: str | None, plain: Recipe, write_recipe: Write
) -> None:
    """At batch 4 of 4, going on to 12."""
    required = {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}}
    plain["algorithms"] = {algorithm: required.get(algorithm, {}) | arguments}
    path = write_recipe(plain)
    assert main([path, "max_duration=4ba"]) == 0
    recipe = config.load([path, "max_duration=12ba"])
    trainer = build_trainer(recipe)
    before = {"max_duration": "4ba", "time_budget": None}
    found = what_moves(trainer.state, recipe, before)
    assert trainer.state.max_duration == Time.from_timestring("12ba"), "it is put back"
    trainer.close()
    assert what_moves(trainer.state, recipe, before | {"max_duration": "12ba"}) == []
    assert (len(found), said is None) in ((0, True), (1, False))
    assert said is None or (f"algorithms.{algorithm}: at batch 4 " in found[0] and said in found[0])
