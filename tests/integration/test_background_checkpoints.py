"""Checkpoints are written while training goes on: of the step they are of, one at a time, and whole before older ones go."""

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from conftest import train_once
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from prx_composer import registry
from prx_composer.recipe import config
from prx_composer.runs import checkpoints
from prx_composer.runs.checkpoints import all_checkpoints, newest_checkpoint, staged
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import run

Write = Callable[..., str]
Recipe = dict[str, Any]


class Held:
    """Stands in for `torch.save` and holds the writing of one batch's checkpoint back until it is let go."""

    def __init__(self, batch: int, error: Exception | None = None):
        self.batch, self.error, self.let_go, self.reached = batch, error, threading.Event(), threading.Event()
        self.save = torch.save

    def __call__(self, content: Any, file: Any, **options: Any) -> None:
        if isinstance(content, dict) and int(content["state"]["timestamp"]["Timestamp"]["batch"]) == self.batch:
            self.reached.set()
            assert self.let_go.wait(60)
            if self.error is not None:
                raise self.error
        self.save(content, file, **options)


class Watcher(Callback):
    """Calls a function after every step; registered for one test."""

    def __init__(self, function: Callable[[State], None]):
        self._function = function

    def batch_start(self, state: State, logger: Logger) -> None:
        self._function(state)


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Held]:
    def make(batch: int, error: Exception | None = None) -> Held:
        held = Held(batch, error)
        monkeypatch.setattr(checkpoints.torch, "save", held)
        return held

    return make


def train(recipe: Recipe, write_recipe: Write, watch: Callable[[State], None]) -> Path:
    registry.callbacks.register("watcher")(lambda: Watcher(watch))
    run(config.load([write_recipe(recipe | {"callbacks": {"watcher": {}}})]))
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def content_of(folder: Path, batch: int) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"ba{batch}" / "rank0.pt", weights_only=False)["state"]  # our own run's


def assert_equal(first: Any, second: Any, path: str = "") -> None:
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key, value in first.items():
            assert_equal(value, second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_equal(one, other, f"{path}/{index}")
    elif not hasattr(first, "__dict__"):
        assert first == second, path


def test_training_goes_on_while_a_checkpoint_is_written_and_the_older_one_stays_until_it_is_whole(
    tiny_recipe: Recipe, write_recipe: Write, hold: Callable[..., Held], shapes_data: Path, tmp_path_factory: Any
) -> None:
    held, seen = hold(4), dict[str, Any]()

    def watch(state: State) -> None:
        batch = int(state.timestamp.batch)
        if batch == 5:
            assert held.reached.wait(60)
            folder = Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny")) / "checkpoints"
            seen["while"] = sorted(entry.name for entry in folder.iterdir())
            held.let_go.set()

    tiny_recipe |= {"save_num_checkpoints_to_keep": 1}
    folder = train(tiny_recipe, write_recipe, watch)
    assert seen["while"] == [".ba4.partial", "ba2"], "training is at batch 5, and nothing has the new one's name"
    assert [found.batch for found in all_checkpoints(folder / "checkpoints")] == [8]
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["batch"] for row in rows] == list(range(1, 9))
    whole = train_once(tmp_path_factory, shapes_data)
    assert_equal(content_of(folder, 8)["model"], content_of(whole, 8)["model"])


def test_what_was_held_back_is_the_state_of_its_step(tiny_recipe: Recipe, write_recipe: Write, hold: Callable[..., Held]) -> None:
    held, seen = hold(2), dict[int, Any]()

    def watch(state: State) -> None:
        batch = int(state.timestamp.batch)
        if batch == 2:
            seen[batch] = copy.deepcopy({key: state.state_dict()[key] for key in ("model", "optimizers")})
        if batch == 3:
            held.let_go.set()

    folder = train(tiny_recipe | {"max_duration": "4ba"}, write_recipe, watch)
    for key, expected in seen[2].items():
        assert_equal(content_of(folder, 2)[key], expected)


def test_the_next_one_waits_for_the_one_before_it_and_says_so(
    tiny_recipe: Recipe,
    write_recipe: Write,
    hold: Callable[..., Held],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, finish = hold(2), checkpoints.CheckpointWriter.finish

    def asked_for(writer: checkpoints.CheckpointWriter) -> Any:  # of what is done at once, or here, where it is due
        threading.Timer(0.2, held.let_go.set).start()
        return finish(writer)

    monkeypatch.setattr(checkpoints.CheckpointWriter, "finish", asked_for)
    folder = train(tiny_recipe | {"max_duration": "6ba"}, write_recipe, lambda state: None)
    assert "checkpoint of batch 2 was still being written when that of batch 4 was due: training waited" in caplog.text
    assert [found.batch for found in all_checkpoints(folder / "checkpoints")] == [2, 4, 6]


def test_an_error_that_is_not_the_disks_ends_training_at_the_next_step(
    tiny_recipe: Recipe, write_recipe: Write, hold: Callable[..., Held]
) -> None:
    held, reached = hold(2, TypeError("a bug")), []
    held.let_go.set()

    def watch(state: State) -> None:
        reached.append(int(state.timestamp.batch))
        if reached[-1] == 2:
            assert held.reached.wait(60)
            time.sleep(0.3)

    with pytest.raises(TypeError, match="a bug"):
        train(tiny_recipe, write_recipe, watch)
    assert reached == [0, 1, 2]


def test_an_exception_in_training_waits_for_the_checkpoint_that_is_being_written(
    tiny_recipe: Recipe, write_recipe: Write, hold: Callable[..., Held]
) -> None:
    held = hold(4)

    def watch(state: State) -> None:
        if int(state.timestamp.batch) == 5:
            threading.Timer(0.5, held.let_go.set).start()
            raise ArithmeticError("in step 5")

    with pytest.raises(ArithmeticError, match="in step 5"):
        train(tiny_recipe, write_recipe, watch)
    newest = newest_checkpoint(Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny")))
    assert newest is not None and newest.batch == 4 and checkpoints.damage(newest) is None


def test_the_state_of_a_sharded_model_is_taken_where_it_is_and_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Composer takes it, PyTorch would copy it to pageable memory before it is staged; on a CPU nobody would see that."""
    dist.initialize_dist("cpu")
    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer, offload = torch.optim.AdamW(model.parameters()), Mock(side_effect=AssertionError("copied"))
    monkeypatch.setattr("torch.distributed.checkpoint.state_dict._offload_state_dict_to_cpu", offload)
    state: Any = SimpleNamespace(model=model, optimizers=(optimizer,), fsdp_sharded_state_dict_enabled=True)
    state.serialized_attributes = names = ["model", "optimizers", "timestamp"]
    state.state_dict = lambda: dict.fromkeys(state.serialized_attributes, "Composer's")
    taken = checkpoints.content_of(state)
    assert taken.keys() == set(names) and state.serialized_attributes == names and taken["timestamp"] == "Composer's"
    weight, held = taken["model"]["weight"], cast(DTensor, model.weight)
    assert weight.to_local().data_ptr() == held.to_local().data_ptr()
    moment = taken["optimizers"]["AdamW"]["state"]["weight"]["exp_avg"]
    assert moment.to_local().data_ptr() == optimizer.state[model.weight]["exp_avg"].to_local().data_ptr()
    with pytest.raises(AssertionError, match="copied"):
        get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))


def test_a_staged_state_shares_nothing_with_what_trains() -> None:
    state: Any = OrderedDict(weight=torch.arange(6.0).view(2, 3).t(), deep=[{"moments": (torch.ones(2), [1, {2}])}])
    state._metadata = {"": {"version": 2}}  # as a module's state has it
    before, taken = copy.deepcopy(state), staged(state)
    state["weight"].zero_()
    state["deep"][0]["moments"][0].zero_()
    state["deep"][0]["moments"][1][1].add(3)
    assert_equal(taken, before)
    assert type(taken) is OrderedDict and taken._metadata == {"": {"version": 2}}  # pyright: ignore[reportAttributeAccessIssue]
