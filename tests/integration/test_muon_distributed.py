"""Muon on several CPU processes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from test_distributed import REPOSITORY, Recipe, Write, curve, launch


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_and_shards_give_the_parameters_of_one_process(ranks: int) -> None:
    script = Path(__file__).with_name("muon_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), str(script)]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_trains_the_same_curve_under_ddp_and_a_resumed_fsdp2(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe |= {"max_duration": "8ba", "save_interval": "8ba", "optimizer": {"name": "muon", "lr": 2e-3, "split_heads": True}}
    ddp = copy.deepcopy(tiny_recipe) | {"run_name": "ddp"}
    fsdp = copy.deepcopy(tiny_recipe) | {"run_name": "fsdp", "autoresume": True}
    fsdp["parallelism_config"] = {"fsdp": {"state_dict_type": "sharded"}}
    finished = launch(write_recipe(ddp, "ddp.yaml"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    for stop in ("4ba", "8ba"):
        finished = launch(write_recipe(fsdp, "fsdp.yaml"), f"callbacks.stop_after.time={stop}")
        assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(curve(ddp)) == len(curve(fsdp)) == 8
    assert curve(fsdp) == pytest.approx(curve(ddp), abs=1e-4)
