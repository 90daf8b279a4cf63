"""Where `parallelism_config` puts the weights."""

from pathlib import Path

import commands
import pytest

from prx_composer.common.errors import UserError
from prx_composer.recipe.checks import check_parallelism
from prx_composer.training.trainer import parallelism


@pytest.mark.parametrize(
    ("degree", "expected"),
    [
        (8, "(4, 8) (Replicate(), Shard(dim=0)) (28, 64)"),
        (-1, "(32,) (Shard(dim=0),) (7, 64)"),
    ],
)
def test_weights_are_sharded_within_nodes_and_replicated_over_them(degree: int, expected: str) -> None:
    finished = commands.run("python", Path(__file__).with_name("hybrid_mesh.py"), degree, 32)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.strip() == expected


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_blocks_gathered_in_bf16_or_kept_gathered_change_no_bit(ranks: int) -> None:
    finished = commands.run("composer", "-n", ranks, Path(__file__).with_name("low_weights.py"), timeout=250)
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"shard_degree: 5 must divide the 32 ranks \(1, 2, 4, 8, 16, 32\)"):
        check_parallelism({"fsdp": {"shard_degree": 5}}, 32)
    with pytest.raises(UserError, match="replicas of shards need GPUs"):
        parallelism({"fsdp": {"shard_degree": 2}}, 4, on_gpu=False)
    assert parallelism({"fsdp": {"shard_degree": 4}}, 4, on_gpu=False) is not None
    assert parallelism(None, 4) is None
