"""What a machine can do to a run: stop it, kill it, fill its disk, damage its files. Nothing is lost or changes silently."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from conftest import train_once

from prx_composer.recipe import config
from prx_composer.runs import checkpoints
from prx_composer.runs.checkpoints import all_checkpoints, newest_whole_checkpoint
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import INTERRUPTED_EXIT_CODE, run

Write = Callable[..., str]
Recipe = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses(recipe: Recipe) -> list[tuple[int, float]]:
    return [(row["batch"], row["loss/train/total"]) for row in read_metrics(folder_of(recipe) / "metrics.jsonl")]


def final_weights(recipe: Recipe, batch: int = 8) -> dict[str, torch.Tensor]:
    path = folder_of(recipe) / "checkpoints" / f"ba{batch}" / "rank0.pt"
    return torch.load(path, weights_only=False)["state"]["model"]  # our own run's


def assert_same_run(recipe: Recipe, whole: Recipe) -> None:
    assert losses(recipe) == losses(whole) and len(losses(whole)) == 8
    expected, found = final_weights(whole), final_weights(recipe)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Recipe:
    """The undisturbed run of eight batches."""
    return {"run_folder": str(train_once(tmp_path_factory, shapes_data)), "run_name": "tiny"}


def stopped(recipe: Recipe, write_recipe: Write, at: str = "6ba") -> tuple[Recipe, str]:
    """Another run of the same recipe, stopped after some batches, and its recipe file."""
    parts = copy.deepcopy(recipe) | {"run_name": "parts", "autoresume": True}
    path = write_recipe(parts, "parts.yaml")
    run(config.load([path, f"callbacks.stop_after.time={at}"]))
    return parts, path


# ------------------------------------------------------------------------------------------------------ damage


def cut_short(checkpoint: Path) -> None:
    with (checkpoint / "rank0.pt").open("r+b") as file:
        file.truncate(1000)


def change_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "rank0.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "rank0.pt").unlink()


def lose_the_index(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").write_text('{"version": 1, "ba')


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_short, "rank0.pt has 1000 bytes instead of"),
        (change_a_bit, "rank0.pt was changed"),
        (lose_a_file, "rank0.pt cannot be read (No such file"),
        (lose_the_index, "checkpoint.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on_bit_for_bit(
    harm: Callable[[Path], None],
    said: str,
    tiny_recipe: Recipe,
    write_recipe: Write,
    whole: Recipe,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts, path = stopped(tiny_recipe, write_recipe)
    harm(folder_of(parts) / "checkpoints" / "ba6")
    run(config.load([path]))
    assert f"ba6 is damaged: {said}" in caplog.text
    assert (folder_of(parts) / "checkpoints" / "ba6.damaged").is_dir(), "kept for whoever wants to look"
    assert_same_run(parts, whole)


def test_when_every_checkpoint_is_damaged_nothing_is_trained(
    tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, path = stopped(tiny_recipe, write_recipe)
    for checkpoint in all_checkpoints(folder_of(parts) / "checkpoints"):
        cut_short(checkpoint.path)
    before = losses(parts)
    for _ in range(2):  # not the second time either
        assert main([path]) == 1
        said = capsys.readouterr().err
        assert "is whole: ba2.damaged, ba4.damaged, ba6.damaged. Delete these" in said and "Traceback" not in said
    assert losses(parts) == before


def test_a_checkpoint_of_another_recipe_is_refused_by_what_differs(
    tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody copies checkpoints into the folder of a run with another model."""
    parts, _ = stopped(tiny_recipe, write_recipe)
    other = copy.deepcopy(parts) | {"run_name": "other"}
    other["model"]["backbone"]["depth"] = 3
    other_path = write_recipe(other, "other.yaml")
    run(config.load([other_path, "callbacks.stop_after.time=2ba"]))
    shutil.copytree(folder_of(parts) / "checkpoints" / "ba6", folder_of(other) / "checkpoints" / "ba6")
    assert main([other_path]) == 1
    said = capsys.readouterr().err
    assert "model.backbone.depth (2 → 3)" in said and "ba6 was started with another recipe" in said and "Traceback" not in said


def test_what_a_kill_leaves_half_written_is_cleaned_up(tiny_recipe: Recipe, write_recipe: Write, whole: Recipe) -> None:
    parts, path = stopped(tiny_recipe, write_recipe)
    folder = folder_of(parts) / "checkpoints"
    shutil.copytree(folder / "ba6", folder / ".ba7.partial")
    shutil.copytree(folder / "ba4", folder / ".ba4.old")
    metrics = folder_of(parts) / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().rpartition(b'{"batch": 6')[0] + b'{"batch": 6, "loss/tr')  # killed before its line
    run(config.load([path]))
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]
    assert_same_run(parts, whole)


def test_only_the_newest_are_kept_over_restarts(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe |= {"save_num_checkpoints_to_keep": 2, "save_interval": "1ba"}
    parts, path = stopped(tiny_recipe, write_recipe, "5ba")
    assert [c.batch for c in all_checkpoints(folder_of(parts) / "checkpoints")] == [4, 5]
    run(config.load([path]))
    assert [c.batch for c in all_checkpoints(folder_of(parts) / "checkpoints")] == [7, 8]


# -------------------------------------------------------------------------------------------------------- disk


class FullDisk:
    """Stands in for `torch.save` and fails as a full disk does, after having written a part."""

    def __init__(self, batches: set[int]):
        self.batches, self.save = batches, torch.save

    def __call__(self, content: Any, file: Any, **options: Any) -> None:
        if isinstance(content, dict) and int(content["state"]["timestamp"]["Timestamp"]["batch"]) in self.batches:
            file.write(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.save(content, file, **options)


def test_training_goes_on_when_the_disk_is_full_and_the_next_checkpoint_is_written(
    tiny_recipe: Recipe, write_recipe: Write, whole: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = copy.deepcopy(tiny_recipe) | {"run_name": "parts", "autoresume": True}
    monkeypatch.setattr(checkpoints.torch, "save", FullDisk({4}))
    run(config.load([write_recipe(parts)]))
    assert "batch 4 could not be written: rank 0: [Errno 28] No space left on device. The newest is" in caplog.text
    folder = folder_of(parts) / "checkpoints"
    assert [c.batch for c in all_checkpoints(folder)] == [2, 6, 8] and len(list(folder.iterdir())) == 3
    assert_same_run(parts, whole)
    rows = read_metrics(folder_of(parts) / "metrics.jsonl")
    failures = [row["checkpoint/failures"] for row in rows if "checkpoint/failures" in row]
    assert failures[:2] == [0, 1] and failures[-1] == 0


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_the_run_can_be_ended_later(
    tiny_recipe: Recipe, write_recipe: Write, whole: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = copy.deepcopy(tiny_recipe) | {"run_name": "parts", "autoresume": True}
    path = write_recipe(parts)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.torch, "save", FullDisk({8}))
        assert main([path]) == 1
    said = capsys.readouterr().err
    assert "batch 8 could not be written" in said and "ba6" in said and "Make room" in said and "Traceback" not in said
    assert main([path]) == 0
    assert_same_run(parts, whole)


FILLER = """
from composer.core import Callback
from prx_composer import registry

@registry.callbacks.register("filler")
class Filler(Callback):
    def __init__(self, path: str): self.path = path
    def batch_start(self, state, logger):
        if int(state.timestamp.batch) != 5: return
        try:
            with open(self.path, "wb", buffering=0) as file:
                while True: file.write(bytes(4096))
        except OSError: pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system of its own")
def test_a_disk_that_is_really_full(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, whole: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a file system of its own, filled to the last byte in the sixth step."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        parts = copy.deepcopy(tiny_recipe) | {"run_name": "parts", "autoresume": True, "run_folder": str(small / "${run_name}")}
        (tmp_path / "filler.py").write_text(FILLER)
        filled = parts | {"code_paths": [str(tmp_path / "filler.py")], "callbacks": {"filler": {"path": str(small / "filler")}}}
        filled["callbacks"]["images"] = {"prompts": ["a red circle"], "interval": "7ba", "num_inference_steps": 1}
        assert main([write_recipe(filled, "filled.yaml")]) == 1, "the last checkpoint finds no room"
        said = capsys.readouterr().err
        assert "batch 8 could not be written" in said and "ba4" in said and "Traceback" not in said
        assert main([write_recipe(parts)]) == 1, "nor does a start"
        assert "run_folder: " in capsys.readouterr().err
        assert newest_whole_checkpoint(small / "parts" / "checkpoints").batch == 4  # pyright: ignore[reportOptionalMemberAccess]
        (small / "filler").unlink()
        assert main([write_recipe(parts)]) == 0
        assert_same_run(parts, whole)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# ----------------------------------------------------------------------------------------------------- signals


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_with_a_checkpoint_that_goes_on_bit_for_bit(
    number: signal.Signals, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    tiny_recipe |= {"max_duration": "400ba", "save_interval": "1dur", "autoresume": True}
    tiny_recipe["train_loader"]["num_workers"] = 1
    path = write_recipe(tiny_recipe)
    process = commands.start("python", "train.py", path)
    metrics = folder_of(tiny_recipe) / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED_EXIT_CODE == 143
    reached = read_metrics(metrics)[-1]["batch"]
    assert f"Stopped after batch {reached} ({number.name})" in output and "The same command goes on" in output
    assert [c.batch for c in all_checkpoints(folder_of(tiny_recipe) / "checkpoints")] == [reached]

    end = f"max_duration={reached + 4}ba"
    run(config.load([path, end]))
    undisturbed = copy.deepcopy(tiny_recipe) | {"run_name": "undisturbed"}
    run(config.load([write_recipe(undisturbed, "undisturbed.yaml"), end]))
    assert losses(tiny_recipe) == losses(undisturbed) and len(losses(undisturbed)) == reached + 4
    expected = final_weights(undisturbed, reached + 4)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(tiny_recipe, reached + 4).items())


def test_checkpoints_come_at_an_interval_of_training_time(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "three_seconds.py").write_text(
        "from composer.core import Callback\n"
        "from prx_composer import registry\n"
        "from prx_composer.schedule.clock import clock_of\n"
        "@registry.callbacks.register('three_seconds')\n"
        "class ThreeSeconds(Callback):\n"
        "    def batch_end(self, state, logger): clock_of(state).elapsed = 3.0 * int(state.timestamp.batch)\n"
    )
    recipe = tiny_recipe | {"code_paths": [str(tmp_path / "three_seconds.py")], "callbacks": {"three_seconds": {}}}
    run(config.load([write_recipe(recipe | {"save_interval": "7s", "max_duration": "11ba"})]))
    assert [checkpoint.batch for checkpoint in all_checkpoints(folder_of(recipe) / "checkpoints")] == [4, 7, 10, 11]
    index = json.loads((folder_of(recipe) / "checkpoints" / "ba11" / "checkpoint.json").read_text())
    assert index["ranks"] == 1 and index["recipe"]["optimizer"] == recipe["optimizer"]


def test_a_sharded_run_goes_on_with_a_callback_that_its_checkpoint_does_not_know(
    tiny_recipe: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_recipe |= {"parallelism_config": {"fsdp": {}}, "autoresume": True}
    path = write_recipe(tiny_recipe)
    run(config.load([path, "callbacks.stop_after.time=4ba"]))
    run(config.load([path, "callbacks.loss_spikes={}"]))
    assert "LossSpikes begins anew" in caplog.text
    rows = read_metrics(folder_of(tiny_recipe) / "metrics.jsonl")
    assert len(rows) == 8 and "guard/loss_spikes" in rows[-1] and "guard/loss_spikes" not in rows[3]
