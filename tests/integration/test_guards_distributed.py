"""Two processes under FSDP2: what goes wrong on one of them is noticed, skipped and written down by both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.test_distributed import launch

from prx_composer.runs.folder import read_metrics

POISON = str(Path(__file__).parents[1] / "poison.py")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_is_not_finite_on_one_rank_is_skipped_on_both(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """Rank 0, which logs, sees nothing of batch 4 but a finite gradient, and nothing of batch 6: that is in rank 1's shard."""
    del tiny_recipe["algorithms"]["progressive_resolution"]
    tiny_recipe |= {"code_paths": [POISON], "image_size": 8, "max_duration": "8ba", "save_interval": "8ba"}
    tiny_recipe["parallelism_config"] = {"fsdp": {"state_dict_type": "sharded"}}
    kinds = {"3": "nan", "4": "loss", "6": "gradient", "7": "spike"}
    tiny_recipe["algorithms"] |= {"skip_nonfinite": {"limit": 3}, "poison": {"kinds": kinds, "rank": 1}}
    tiny_recipe["callbacks"] = {
        "loss_spikes": {"window": 4, "warmup": 2, "threshold": 50.0},
        "watchdog": {"timeout": 120},
        "garbage_collection": {"interval": 3},
    }
    finished = launch(write_recipe(tiny_recipe))
    assert finished.returncode == 0, finished.stderr[-3000:]

    folder = tmp_path / "runs" / "tiny"
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["guard/skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [row["batch"] for row in rows if row["loss/train/total"] is None] == [3, 4]
    assert [row["guard/loss_spikes"] for row in rows] == [0, 0, 1, 2, 2, 2, 3, 3]
    spikes = [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]
    assert [(row["batch"], len(row["ranks"])) for row in spikes] == [(3, 2), (4, 2), (7, 2)]
    ids = [set(rank["sample_id"]) for rank in spikes[2]["ranks"]]
    assert [len(ids[0]), len(ids[1]), len(ids[0] & ids[1])] == [24, 24, 0]
    assert all(len(rank["timestep"]) == 24 for rank in spikes[2]["ranks"])
    assert not (folder / "stacks").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("parallelism", "kind"), [(None, "loss"), ({"fsdp": {"state_dict_type": "sharded"}}, "gradient")])
def test_what_is_not_finite_on_one_rank_ends_both_with_the_good_checkpoint_left(
    parallelism: Any, kind: str, tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """With two microbatches a step, and without `skip_nonfinite`; under FSDP2 the gradient is in rank 1's shard alone."""
    del tiny_recipe["algorithms"]["progressive_resolution"]
    tiny_recipe |= {"code_paths": [POISON], "image_size": 8, "device_train_microbatch_size": 12, "preflight": False}
    tiny_recipe |= {"parallelism_config": parallelism, "save_num_checkpoints_to_keep": 1}
    tiny_recipe["algorithms"]["poison"] = {"kinds": {"4": kind}, "rank": 1}
    finished = launch(write_recipe(tiny_recipe))
    assert finished.returncode != 0
    what = "the loss is not finite (first poison)" if kind == "loss" else "first that of auxiliary_losses.poison.scale"
    assert what in finished.stderr + finished.stdout and "Training ended at batch 4" in finished.stderr + finished.stdout
    folder = tmp_path / "runs" / "tiny"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["ba2"]
    assert [row["batch"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
