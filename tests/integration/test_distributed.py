"""Two processes on the CPU: DDP and FSDP2 train the same curve, and resume."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prx_composer.callbacks.metrics_file import read_metrics

Write = Callable[..., str]
Recipe = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("composer")), "-n", "2", "train.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, check=False)


def curve(recipe: Recipe) -> list[float]:
    folder = Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))
    return [row["loss/train/total"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.timeout(900)
def test_ddp_and_fsdp2_train_the_same_curve_and_ema_and_fsdp2_resumes(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    tiny_recipe["max_duration"] = "20ba"
    tiny_recipe["save_interval"] = "10ba"
    tiny_recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "8ba"
    tiny_recipe["callbacks"] = {"images": {"prompts": ["a red circle"], "interval": "10ba", "num_inference_steps": 2}}
    tiny_recipe["eval_loader"] = {"name": "image_caption", "path": tiny_recipe["train_loader"]["path"], "split": "heldout"}
    for stage in tiny_recipe["algorithms"]["progressive_resolution"]["stages"]:
        stage["device_train_microbatch_size"] = stage["global_train_batch_size"] // 4
    tiny_recipe["eval_interval"] = "10ba"
    ddp = copy.deepcopy(tiny_recipe) | {"run_name": "ddp"}
    fsdp = copy.deepcopy(tiny_recipe) | {"run_name": "fsdp", "autoresume": True}
    fsdp["parallelism_config"] = {"fsdp": {"state_dict_type": "sharded"}}

    finished = launch(write_recipe(ddp, "ddp.yaml"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    for stop in ("10ba", "20ba"):
        finished = launch(write_recipe(fsdp, "fsdp.yaml"), f"max_duration={stop}")
        assert finished.returncode == 0, finished.stderr[-3000:]

    assert len(curve(ddp)) == len(curve(fsdp)) == 20
    assert curve(fsdp) == pytest.approx(curve(ddp), abs=1e-4)
    runs = tmp_path / "runs"
    images = [(runs / name / "images" / "ba000020.png").read_bytes() for name in ("ddp", "fsdp")]
    assert len(images[0]) > 0 and len(images[1]) > 0

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    sharded = next(path for path in (runs / "fsdp" / "checkpoints").rglob(".metadata") if "ba20" in str(path)).parent
    dcp_to_torch_save(sharded, tmp_path / "full.pt")
    theirs = torch.load(runs / "ddp" / "checkpoints" / "ba20-rank0.pt", weights_only=False)["state"]
    ours = torch.load(tmp_path / "full.pt", weights_only=False)["state"]
    average = theirs["callbacks"]["AverageState"]["average"]
    assert all(name.startswith(("backbone.", "text_encoder.")) for name in average), "no wrapper in a name"
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, atol=2e-4, rtol=1e-3)
    found = ours["callbacks"]["AverageState"]["average"]
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)


def test_a_mistake_under_the_launcher_exits_non_zero_with_its_message(tiny_recipe: Recipe, write_recipe: Write) -> None:
    finished = launch(write_recipe(tiny_recipe | {"global_train_batch_size": 49}))
    assert finished.returncode != 0
    assert "49 does not divide over 2 ranks; try 48" in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr
