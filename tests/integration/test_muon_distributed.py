"""Muon on several CPU processes."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shares_and_shards_give_the_parameters_of_one_process(ranks: int) -> None:
    script = Path(__file__).with_name("muon_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), str(script)]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
