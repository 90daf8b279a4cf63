"""Several processes: a rank or the launcher dies, a shard is damaged, the number of ranks changes."""

import copy
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import psutil
import pytest

from prx_composer.runs.checkpoints import all_checkpoints
from prx_composer.runs.folder import read_metrics

Write = Callable[..., str]
Recipe = dict[str, Any]


def start(processes: int, *arguments: str, real: bool = False) -> "subprocess.Popen[str]":
    return commands.start("composer", "-n", processes, "train.py", *arguments, real=real)


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, output[-2000:] + errors[-4000:]
    return output + errors


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses(recipe: Recipe) -> list[tuple[int, float]]:
    return [(row["batch"], row["loss/train/total"]) for row in read_metrics(folder_of(recipe) / "metrics.jsonl")]


def wait_for_batch(recipe: Recipe, batch: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not (folder_of(recipe) / "metrics.jsonl").exists() or len(losses(recipe)) < batch:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


SLOW = """
import time
from composer.core import Callback
from prx_composer import registry

@registry.callbacks.register("slow")
class Slow(Callback):
    def batch_start(self, state, logger): time.sleep(0.3)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_dies_and_the_launcher_dies_and_a_shard_is_damaged_and_the_losses_are_those_of_the_undisturbed_run(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    tiny_recipe |= {"parallelism_config": {"fsdp": {}}, "max_duration": "16ba", "autoresume": True}
    whole, killed = copy.deepcopy(tiny_recipe) | {"run_name": "whole"}, copy.deepcopy(tiny_recipe) | {"run_name": "killed"}
    finish(start(2, write_recipe(whole, "whole.yaml")))
    path = write_recipe(killed, "killed.yaml")
    slow = (f"code_paths=[{tmp_path / 'slow.py'}]", "callbacks.slow={}")

    process = start(2, path, *slow)  # a rank dies
    wait_for_batch(killed, 5, process)
    commands_of_all = [(one, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    ranks = [one for one, words in commands_of_all if {"train.py", path} < set(words) and "-n" not in words]
    assert len(ranks) == 2
    ranks[1].kill()
    begin = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - begin < 60, "the other rank does not wait for it for ever"
    assert not any(rank.is_running() for rank in ranks)

    process = start(2, path, *slow, real=True)  # the launcher dies, of which its own children must hear
    wait_for_batch(killed, 9, process)
    ranks = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    process.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    assert len(gone) == 2 and not alive, "ranks without a launcher don't train on"
    reached = losses(killed)[-1][0]
    newest = all_checkpoints(folder_of(killed) / "checkpoints")[-1]
    assert newest.batch == reached, "they stopped with a checkpoint"

    shard = max(newest.path.glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    said = finish(start(2, path))
    assert f"{newest.path.name} is damaged: {shard.name} has" in said
    assert losses(killed) == losses(whole) and len(losses(whole)) == 16


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_with_another_number_of_ranks_with_the_same_samples(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    (tmp_path / "seen.py").write_text(
        "import json, pathlib\n"
        "from composer.core import Callback\n"
        "from composer.utils import dist\n"
        "from prx_composer import registry\n"
        "@registry.callbacks.register('seen')\n"
        "class Seen(Callback):\n"
        "    def __init__(self, path: str): self.path = path\n"
        "    def batch_start(self, state, logger):\n"
        "        ids = sum(dist.all_gather_object(state.batch['sample_id'].tolist()), [])\n"
        "        if dist.get_global_rank() == 0:\n"
        "            with open(self.path, 'a') as file: print(json.dumps([int(state.timestamp.batch), sorted(ids)]), file=file)\n"
    )
    tiny_recipe |= {"parallelism_config": {"fsdp": {}}, "autoresume": True, "device_train_microbatch_size": 12}
    for stage in tiny_recipe["algorithms"]["progressive_resolution"]["stages"]:
        stage["device_train_microbatch_size"] = 12
    paths = {}
    for name in ("two", "both"):
        seen = {"code_paths": [str(tmp_path / "seen.py")], "callbacks": {"seen": {"path": str(tmp_path / name)}}}
        paths[name] = write_recipe(copy.deepcopy(tiny_recipe) | {"run_name": name} | seen, f"{name}.yaml")
    finish(start(2, paths["two"]))
    finish(start(2, paths["both"], "callbacks.stop_after.time=3ba"))
    assert "was written by 2 ranks; with 1 the samples stay the same" in finish(start(1, paths["both"]))
    assert (tmp_path / "both").read_text() == (tmp_path / "two").read_text()
    assert len((tmp_path / "two").read_text().splitlines()) == 8
