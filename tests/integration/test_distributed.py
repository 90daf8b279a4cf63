"""Two processes on the CPU: DDP and FSDP2 train the same curve, and resume."""

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from PIL import Image
from stacks import stack_of_24h

from prx_composer.runs.folder import read_metrics
from prx_composer.runs.opening import load_trained

Write = Callable[..., str]
Recipe = dict[str, Any]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.run("composer", "-n", 2, "train.py", *arguments, timeout=400)


def curve(recipe: Recipe, name: str = "loss/train/total") -> list[float]:
    folder = Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))
    return [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ddp_and_fsdp2_train_the_same_curve_with_the_24h_stack_and_fsdp2_resumes(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    tiny_recipe = stack_of_24h(tiny_recipe)
    tiny_recipe |= {"max_duration": "20ba", "save_interval": "20ba"}
    tiny_recipe["algorithms"]["gradient_clipping"]["clipping_threshold"] = 2.0  # exceeded in some steps, not in all
    tiny_recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "8ba"
    tiny_recipe["algorithms"]["repa"]["end"] = "12ba"
    tiny_recipe["algorithms"]["readouts"] = {}
    tiny_recipe["optimizer"] |= {"split_heads": True, "lr": 1e-3, "adam_lr": 1e-3}
    tiny_recipe["callbacks"] = {"images": {"prompts": ["a red circle"], "interval": "5ba", "num_inference_steps": 2}}
    tiny_recipe["eval_loader"] = {"name": "image_caption", "path": tiny_recipe["train_loader"]["path"], "split": "heldout"}
    tiny_recipe["eval_interval"] = "5ba"  # averaged weights are lent where no checkpoint follows
    ddp = copy.deepcopy(tiny_recipe) | {"run_name": "ddp"}
    fsdp = copy.deepcopy(tiny_recipe) | {"run_name": "fsdp", "autoresume": True}
    fsdp["parallelism_config"] = {"fsdp": {"state_dict_type": "sharded"}}

    finished = launch(write_recipe(ddp, "ddp.yaml"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    for stop in ("10ba", "20ba"):
        finished = launch(write_recipe(fsdp, "fsdp.yaml"), f"callbacks.stop_after.time={stop}")
        assert finished.returncode == 0, finished.stderr[-3000:]

    assert len(curve(ddp)) == len(curve(fsdp)) == 20
    assert curve(fsdp) == pytest.approx(curve(ddp), abs=1e-4)
    held_out = [curve(recipe, "metrics/eval/validation_loss") for recipe in (ddp, fsdp)]
    assert len(held_out[0]) == 4 and held_out[1] == pytest.approx(held_out[0], rel=1e-3)
    runs = tmp_path / "runs"
    drawn = [np.asarray(Image.open(runs / name / "images" / "ba000020.png"), dtype=float) for name in ("ddp", "fsdp")]
    assert np.abs(drawn[0] - drawn[1]).mean() < 1

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    sharded = runs / "fsdp" / "checkpoints" / "ba20"
    dcp_to_torch_save(sharded, tmp_path / "full.pt")
    theirs = torch.load(runs / "ddp" / "checkpoints" / "ba20" / "rank0.pt", weights_only=False)["state"]
    ours = torch.load(tmp_path / "full.pt", weights_only=False)["state"]
    average = theirs["callbacks"]["AverageState"]["average"]
    assert all(
        name.startswith(("backbone.", "text_encoder.", "auxiliary_losses.readouts.", "auxiliary_losses.repa."))
        for name in average
    ), "no wrapper in a name"
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, atol=2e-4, rtol=1e-3)
    found = ours["callbacks"]["AverageState"]["average"]
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_float8_layers_compute_the_same_in_whole_copies_in_shards_and_in_replicas_of_shards() -> None:
    pytest.importorskip("torchao", reason="the extra float8, which CI has")
    finished = commands.run("composer", "-n", 4, Path(__file__).with_name("float8_ranks.py"), timeout=250)
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_fsdp2_averages_gradients_over_ranks() -> None:
    script = Path(__file__).with_name("fsdp_gradients.py")
    finished = commands.run("composer", "-n", 2, script, timeout=200)
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.slow
def test_fsdp2_with_a_frozen_text_encoder_and_a_full_state_dict(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["model"]["text_encoder"]["trainable"] = False
    tiny_recipe["parallelism_config"] = {"fsdp": {"state_dict_type": "full"}}
    tiny_recipe["algorithms"]["internal_guidance"] = {"block": 0, "scale": 2.0}  # its readout is sharded when it draws, too
    tiny_recipe["callbacks"] = {"images": {"prompts": ["a red circle"], "interval": "2ba", "num_inference_steps": 2}}
    finished = launch(write_recipe(tiny_recipe), "max_duration=2ba", "algorithms.progressive_resolution=false")
    assert finished.returncode == 0, finished.stderr[-3000:]
    folder = Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny")) / "checkpoints"
    state = torch.load(folder / "ba2" / "rank0.pt", weights_only=False)["state"]
    average = state["callbacks"]["AverageState"]["average"]
    assert {name: value.shape for name, value in average.items()} == {name: p.shape for name, p in state["model"].items()}
    of_run = np.asarray(Image.open(folder.parent / "images" / "ba000002.png"), dtype=float)
    drawn = of_run[8 : 8 + 128, 8 : 8 + 128][4::8, 4::8]  # its only tile, every pixel of it enlarged eight times
    ours = load_trained(str(folder.parent)).model.generate(["a red circle"], 16, 16, [0], 2)[0].permute(1, 2, 0).numpy()
    assert drawn.shape == ours.shape and np.abs(drawn - ours).max() <= 1, "what one process draws"


def test_a_mistake_under_the_launcher_exits_non_zero_with_its_message(tiny_recipe: Recipe, write_recipe: Write) -> None:
    finished = launch(write_recipe(tiny_recipe | {"global_train_batch_size": 49}))
    assert finished.returncode != 0
    assert "49 does not divide over 2 ranks; try 48" in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr


def test_what_only_rank_zero_looks_at_ends_all_ranks_with_one_message(tiny_recipe: Recipe, write_recipe: Write) -> None:
    in_use = Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny"))
    in_use.mkdir(parents=True)
    (in_use / "thesis.tex").write_text("precious")
    finished = launch(write_recipe(tiny_recipe))
    assert finished.returncode != 0
    assert "already in use" in finished.stderr
    assert "Traceback" not in finished.stdout + finished.stderr and len(list(in_use.iterdir())) == 1
