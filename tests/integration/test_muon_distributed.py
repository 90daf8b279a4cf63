"""Muon on several CPU processes."""

from pathlib import Path

import commands
import pytest


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shares_and_shards_give_the_parameters_of_one_process(ranks: int) -> None:
    script = Path(__file__).with_name("muon_ranks.py")
    finished = commands.run("composer", "-n", ranks, script, timeout=250)
    assert finished.returncode == 0, finished.stderr[-3000:]
