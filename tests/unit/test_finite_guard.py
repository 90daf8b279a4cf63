"""What is not finite ends a run where it is first seen, and never becomes a checkpoint."""

import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer.algorithms.ema import AverageState
from prx_composer.common.errors import UserError
from prx_composer.optim import bad_tensor
from prx_composer.recipe import config
from prx_composer.runs.checkpoints import Checkpoint, _sealed, newest_whole_checkpoint
from prx_composer.runs.folder import read_metrics
from prx_composer.runs.weights import not_finite_in
from prx_composer.training import main
from prx_composer.training.run import build_trainer

Write = Callable[..., str]
Recipe = dict[str, Any]
POISON = str(Path(__file__).parents[1] / "poison.py")


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


@pytest.fixture
def unguarded(tiny_recipe: Recipe) -> Recipe:
    """One stage, two microbatches a step, a checkpoint every two of six steps; nothing in it asks for a guard."""
    del tiny_recipe["algorithms"]["progressive_resolution"]
    tiny_recipe["algorithms"]["poison"] = {"kinds": {}}
    changes = {"code_paths": [POISON], "max_duration": "6ba", "image_size": 8, "preflight": False}
    return tiny_recipe | changes | {"save_num_checkpoints_to_keep": 1}


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def checkpoints(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in (folder_of(recipe) / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("kind", "batch", "first"),
    [
        ("nan", 4, "the loss is not finite (first poison)"),
        ("loss", 3, "the loss is not finite (first poison)"),
        ("gradient", 4, "the gradient is not finite (first that of auxiliary_losses.poison.scale)"),
    ],
)
def test_the_run_ends_at_the_batch_with_its_last_good_checkpoint_untouched(
    kind: str, batch: int, first: str, unguarded: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a recipe that doesn't ask for it; batch 4 would be a checkpoint too, and the only one that is kept."""
    unguarded["algorithms"]["poison"]["kinds"] = {batch: kind}
    unguarded["callbacks"] = {"loss_spikes": {}}
    assert main([write_recipe(unguarded)]) == 1
    error, folder = capsys.readouterr().err, folder_of(unguarded)
    assert f"Training ended at batch {batch}: {first}" in error and "Traceback" not in error
    assert str(folder / "checkpoints" / "ba2") in error and "skip_nonfinite" in error and "optimizer.lr" in error
    assert checkpoints(unguarded) == ["ba2"]
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["batch"] for row in rows] == list(range(1, batch + 1)), "the line of that batch is written"
    assert (rows[-1]["loss/train/total"] is None) == (kind != "gradient")
    assert kind == "gradient" or read_metrics(folder / "spikes.jsonl")[0]["batch"] == batch


def test_before_the_first_checkpoint_there_is_none_to_name(
    unguarded: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    unguarded["algorithms"]["poison"]["kinds"] = {1: "gradient"}
    assert main([write_recipe(unguarded)]) == 1
    assert "at batch 1" in (error := capsys.readouterr().err) and "no checkpoint before it" in error


def test_the_advice_can_be_followed(unguarded: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    unguarded["algorithms"]["poison"]["kinds"] = {4: "nan"}
    path = write_recipe(unguarded)
    assert main([path]) == 1
    error = capsys.readouterr().err.replace("<another name>", "another")
    in_place = re.search(r"with (autoresume=true) (algorithms.skip_nonfinite={}) ", error)
    lower = re.search(
        r"optimizer.lr=….* ('resume.allow=.*?') . Or in another run: (run_name=another) (model.init_from=\S+)", error
    )
    assert in_place is not None and lower is not None
    assert main([path, lower[2], lower[3], in_place[2]]) == 0, capsys.readouterr().err
    rows = read_metrics(folder_of(unguarded).with_name("another") / "metrics.jsonl")
    assert rows[-1]["batch"] == 6 and rows[-1]["guard/skipped_steps"] == 1
    assert main([path, in_place[1], "optimizer.lr=1e-5", *shlex.split(lower[1])]) == 1
    assert "Training ended at batch 4" in capsys.readouterr().err, "allowed and tried; this poison is not healed by that"
    assert main([path, in_place[1], in_place[2]]) == 0, capsys.readouterr().err
    rows = read_metrics(folder_of(unguarded) / "metrics.jsonl")
    assert [row["batch"] for row in rows] == list(range(1, 7)) and rows[-1]["guard/skipped_steps"] == 1


class Spoil(Callback):
    """Makes one number of the weights, of the average or of the optimizer's moments NaN after a batch."""

    def __init__(self, what: str, batch: int = 4):
        self.what, self.batch = what, batch

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) != self.batch:
            return
        tensors: dict[str, Any] = {
            "weight": lambda: next(state.model.parameters()),
            "average": lambda: next(
                tensor
                for callback in state.callbacks
                if isinstance(callback, AverageState)
                for _, tensor in callback.kept_tensors()
            ),
            "moment": lambda: next(iter(state.optimizers[0].state.values()))["exp_avg_sq"],
        }
        with torch.no_grad():
            tensors[self.what]().view(-1)[-1] = float("inf")


@pytest.mark.parametrize(
    ("what", "said", "skip"),
    [("weight", "the weight ", True), ("average", "the average of ", False), ("moment", "the optimizer's exp_avg_sq of ", False)],
)
def test_no_checkpoint_is_written_of_a_state_that_is_not_finite(
    what: str, said: str, skip: bool, unguarded: Recipe, write_recipe: Write
) -> None:
    """Also where `skip_nonfinite` looks after losses and gradients: it cannot mend weights."""
    if skip:
        unguarded["algorithms"]["skip_nonfinite"] = {}
    trainer = build_trainer(config.load([write_recipe(unguarded)]))
    trainer.state.callbacks.insert(0, Spoil(what))
    with pytest.raises(UserError, match=f"at batch 4: {said}.* is not finite, and no checkpoint of it is written") as error:
        trainer.fit()
    trainer.engine.close()
    assert checkpoints(unguarded) == ["ba2"] and str(folder_of(unguarded) / "checkpoints" / "ba2") in str(error.value)


def test_a_run_never_goes_on_from_a_checkpoint_that_is_not_finite(
    unguarded: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one that was written before there was this guard."""
    path = write_recipe(unguarded | {"autoresume": True, "save_num_checkpoints_to_keep": -1})
    assert main([path, "max_duration=4ba"]) == 0
    newest = folder_of(unguarded) / "checkpoints" / "ba4"
    index = json.loads((newest / "checkpoint.json").read_text())
    assert index.pop("finite") is True
    content = torch.load(newest / "rank0.pt", weights_only=False)
    next(value for value in content["state"]["model"].values() if value.is_floating_point()).view(-1)[0] = float("nan")
    torch.save(content, newest / "rank0.pt")
    index["files"]["rank0.pt"] = _sealed(newest / "rank0.pt")
    (newest / "checkpoint.json").write_text(json.dumps(index))
    assert main([path]) == 0
    assert "is not finite. It is kept as ba4.damaged" in caplog.text and "Going on from" in caplog.text
    rows = read_metrics(folder_of(unguarded) / "metrics.jsonl")
    assert [row["batch"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(row["loss/train/total"] for row in rows)
    shutil.rmtree(newest.with_name("ba6"))
    shutil.rmtree(newest.with_name("ba2"))
    (newest.with_name("ba4")).rename(newest.with_name("ba5"))
    assert newest_whole_checkpoint(newest.parent, not_finite_in) == Checkpoint(newest.with_name("ba5"), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_first_bad_tensor_is_named_and_a_good_one_never(dtype: torch.dtype) -> None:
    """Of hundreds, so that the device is asked more than once; the largest number that there is, is one."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(3, 2, generator=generator).to(dtype) for _ in range(600)]
    tensors[7][0, 0] = torch.finfo(dtype).max
    named = [(str(index), tensor) for index, tensor in enumerate(tensors)]
    named += [("empty", torch.zeros(0)), ("whole numbers", torch.ones(2, dtype=torch.int64))]
    assert bad_tensor(named) is None and bad_tensor([]) is None
    for index, value in ((599, float("nan")), (300, float("-inf")), (256, float("inf")), (3, float("nan"))):
        tensors[index][2, 1] = value
        assert bad_tensor(named) == str(index)
