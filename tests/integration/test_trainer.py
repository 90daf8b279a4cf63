"""The Trainer's step against Composer's own: the same numbers, and no waiting for the device in between."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composer
import pytest
import torch
from composer.core import Callback, State
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.distributed.prepare_distributed import parallelize_composer_model
from composer.loggers import Logger, ProgressBarLogger
from host_reads import HostReads
from stacks import stack_of_24h

from prx_composer.callbacks.monitors import ProgressLines
from prx_composer.common.distributed import HostGroup
from prx_composer.data.loader import ImageCaptionLoader
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import run as train_module
from prx_composer.training.run import build_trainer, run
from prx_composer.training.trainer import Trainer

Recipe = dict[str, Any]
Write = Callable[..., str]
HOSTS_OWN = {"dataset.py:undecodable"}  # counters that live in the memory of the host


class Watched(Callback):
    """Counts reads by the host from one batch's being there to the next one's being asked for."""

    def __init__(self, batch: int):
        self.batch, self.reads, self.on = batch, HostReads(), False

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.batch:
            self.reads.__enter__()
            self.on = True

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.on:
            self.reads.__exit__(None, None, None)
            self.on = False


class Flagged(Callback):
    """Makes every implicit wait for the GPU an error, in one batch."""

    def __init__(self, batch: int):
        self.batch, self.seen = batch, False

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.batch:
            torch.cuda.set_sync_debug_mode("error")
            self.seen = True

    def batch_end(self, state: State, logger: Logger) -> None:
        torch.cuda.set_sync_debug_mode("default")


def full_stack(recipe: Recipe, tmp_path: Path, name: str = "full") -> Recipe:
    """Every algorithm and watching callback of yamls/24h.yaml, at toy size; the text encoder frozen, as there."""
    recipe = stack_of_24h(recipe) | {"run_name": name, "preflight": False, "max_duration": "4ba"}
    recipe["model"]["text_encoder"]["trainable"] = False
    recipe["callbacks"] = {"speed_monitor": {"window_size": 2}, "lr_monitor": {}, "loss_spikes": {}, "watchdog": {}}
    return recipe


def reads_of(recipe: Recipe, write_recipe: Write, **overrides: Any) -> dict[str, int]:
    trainer = build_trainer(config.load([write_recipe(recipe | overrides)]))
    watched = Watched(batch=2)
    trainer.state.callbacks.append(watched)
    trainer.fit()
    trainer.close()
    return {where: count for where, count in watched.reads.found.items() if where not in HOSTS_OWN}


def test_nothing_in_a_step_of_the_whole_stack_reads_the_device_implicitly(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    recipe = full_stack(tiny_recipe, tmp_path)
    assert reads_of(recipe, write_recipe) == {}  # but for two explicit `tolist`s, of the losses and of skip_nonfinite's flag


@pytest.mark.parametrize(("even", "times"), [(True, 0), (False, 2)])
def test_the_hosts_of_a_step_agree_on_nothing_over_gloo_where_the_loader_s_batches_are_even(
    even: bool, times: int, tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageCaptionLoader, "even", even)
    asked: list[Any] = []
    monkeypatch.setattr(HostGroup, "sums", lambda self, values: asked.append(values) or [float(value) for value in values])
    trainer = build_trainer(config.load([write_recipe(full_stack(tiny_recipe, tmp_path) | {"max_duration": "3ba"})]))
    trainer.fit()
    trainer.close()
    assert len(asked) == 3 * times
    assert trainer.state.timestamp.sample == 3 * 24 and trainer.state.timestamp.total_wct.total_seconds() > 0


def test_the_counter_sees_what_composers_own_step_reads(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "Trainer", composer.Trainer)
    reads = reads_of(full_stack(tiny_recipe, tmp_path), write_recipe)
    losses = 5  # total, flow, repa, lpips, perceptual_dino
    counts = {name.split(":")[1]: count for name, count in reads.items()}
    assert counts.get("<dictcomp>", counts.get("_train_loop")) == losses  # Python 3.12 has it in the function's own frame
    assert counts["_accumulate_time_across_ranks"] == 3 and counts["_train_microbatches"] == 1


def test_it_logs_and_learns_what_composers_own_step_does(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for name, trainer in (("ours", Trainer), ("composers", composer.Trainer)):
        monkeypatch.setattr(train_module, "Trainer", trainer)
        recipe = full_stack(tiny_recipe, tmp_path, name)
        recipe["run_folder"] = str(tmp_path / name)
        run(config.load([write_recipe(recipe)]))
        folders.append(tmp_path / name)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in folders)
    timed = ("seconds", "throughput", "time/", "checkpoint/")
    for a, b in zip(ours, theirs, strict=True):
        kept = [{key: value for key, value in row.items() if not key.startswith(timed)} for row in (a, b)]
        assert kept[0] | {"train_seconds": 0} == kept[1] | {"train_seconds": 0}
    states = [torch.load(folder / "checkpoints" / "ba4" / "rank0.pt", weights_only=False)["state"]["model"] for folder in folders]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where a wait is an error")
def test_a_step_on_a_gpu_waits_for_nothing_implicitly(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    recipe = full_stack(tiny_recipe, tmp_path) | {"precision": "amp_bf16"}
    recipe["algorithms"]["skip_nonfinite"] = False  # its read is one that it must make
    trainer = build_trainer(config.load([write_recipe(recipe)]))
    flagged = Flagged(batch=2)
    trainer.state.callbacks.append(flagged)
    trainer.fit()
    trainer.close()
    assert flagged.seen


def test_the_overridden_methods_of_composer_are_those_that_were_read() -> None:
    """Read them again when this fails: then put the new digest here."""
    methods = ("_use_closures", "_train_batch", "_train_microbatches", "_train_microbatch", "_accumulate_time_across_ranks")
    sharding = (composer.Trainer._wrap_model_for_distributed, State._apply_fsdp, generate_composer_model_policy)
    read = [getattr(composer.Trainer, method) for method in methods] + [*sharding, parallelize_composer_model]
    source = "".join(map(inspect.getsource, read))
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "c04aeb162a95a7cb"


@pytest.mark.parametrize(("terminal", "asked", "shown"), [(True, True, "bar"), (False, True, "lines"), (True, False, "")])
def test_a_terminal_gets_a_bar_and_a_file_gets_lines(
    terminal: bool, asked: bool, shown: str, tiny_recipe: Recipe, write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "_on_terminal", lambda: terminal)
    trainer = build_trainer(config.load([write_recipe(tiny_recipe | {"progress_bar": asked})]))
    names = {ProgressBarLogger: "bar", ProgressLines: "lines"}
    assert "".join(names.get(type(callback), "") for callback in trainer.state.callbacks) == shown
    trainer.close()
