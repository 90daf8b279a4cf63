"""`prx check` as its user sees it, and the steps that are tried before training: what they find, and that they leave no trace."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from stacks import stack_of_24h
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.models.encoders import train_tokenizer
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main, trial
from prx_composer.training.preflight.step import RECORD, try_steps
from prx_composer.training.run import build_trainer, run

Write = Callable[..., str]
Recipe = dict[str, Any]

RUNNING_MEAN = """
import torch
from composer.core import Algorithm, Event
from torch import nn
from prx_composer import registry
from prx_composer.models import AuxiliaryLoss

class Normalised(AuxiliaryLoss):
    '''A loss with a BatchNorm's buffers, a dropout's global random draws, and no sense for large batches.'''
    def __init__(self, largest):
        super().__init__(0.1)
        self.norm, self.largest = nn.BatchNorm2d(3, affine=False), largest
    def forward(self, outputs, batch):
        if len(outputs.clean) > self.largest:
            raise torch.OutOfMemoryError("out of memory")
        return nn.functional.dropout(self.norm(outputs.prediction) - outputs.clean, 0.5).square().mean()

@registry.algorithms.register("normalised")
class NormalisedLoss(Algorithm):
    def __init__(self, largest: int = 100):
        self.largest = largest
    def match(self, event, state):
        return event == Event.INIT
    def apply(self, event, state, logger):
        state.model.auxiliary_losses["normalised"] = Normalised(self.largest)
"""


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


@pytest.fixture
def stack(tiny_recipe: Recipe, tmp_path: Path) -> Recipe:
    """The 24-hour stack at toy size, and a loss that has all the state that a loss can have."""
    (tmp_path / "normalised.py").write_text(RUNNING_MEAN)
    recipe = stack_of_24h(tiny_recipe) | {"code_paths": [str(tmp_path / "normalised.py")], "save_num_checkpoints_to_keep": 2}
    recipe["algorithms"]["normalised"] = {}
    recipe["algorithms"]["tread"]["end"] = "5ba"
    return recipe


def check(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.splitlines()


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses(recipe: Recipe) -> list[dict[str, float]]:
    rows = read_metrics(folder_of(recipe) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name.startswith("loss/")} for row in rows]


def everything_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- prx check


def test_a_right_recipe_has_a_page_without_a_cross_and_the_check_leaves_nothing(
    stack: Recipe, write_recipe: Write, tmp_path: Path, shapes_data: Path
) -> None:
    path = write_recipe(stack)
    before = everything_below(tmp_path), everything_below(shapes_data)
    code, lines = check(path)
    assert code == 0 and {line[0] for line in lines} == {"✓"}, lines
    for what in ("model.backbone", "train_loader", "run_folder", "disk", "GPUs"):
        assert any(line.startswith(f"✓ {what}: ") for line in lines), what
    (step,) = [line for line in lines if line.startswith("✓ step: ")]
    assert step.endswith("6 × 16x16, 6 × 24x24, 6 × 24x24 without routing"), "tread ends inside of the second stage"
    assert (everything_below(tmp_path), everything_below(shapes_data)) == before

    code, lines = check(path, "--no-step")
    assert code == 0 and not any("step" in line.split(":")[0] for line in lines)
    code, lines = check(path, "--config-only")
    assert code == 0 and not any(line.startswith(("✓ train_loader", "✓ disk")) for line in lines)


def test_what_is_wrong_in_different_places_is_on_one_page(stack: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, lines = check(
        write_recipe(stack | {"train_loader": {"name": "image_caption", "path": "/nowhere"}}),
        "optimizer.lrr=1",
        "algorithms.repa.teacher=org/absent",
        f"run_folder={tmp_path}/file/run",
        "image_size=18",
    )
    wrong = [line for line in lines if line.startswith("✗")]
    assert code == 1 and len(wrong) == 5, lines
    for path in ("optimizer.lrr", "train_loader", "algorithms.repa.teacher", "run_folder", "image_size"):
        assert any(line.startswith(f"✗ {path}: ") for line in wrong), path
    assert lines[-1].startswith("– step: "), "which needs all of it"
    code, lines = check(write_recipe(stack), "sead=1", "image_size=large")
    assert code == 1 and [line.split(":")[0] for line in lines] == [
        "✗ sead",
        "✗ image_size",
        "– what only the components can tell",
    ]


def test_the_step_is_tried_on_data_that_are_not_made_yet(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    loader = tiny_recipe["train_loader"] | {"path": str(tmp_path / "later")}
    code, lines = check(write_recipe(tiny_recipe | {"train_loader": loader}))
    assert code == 0 and lines[-1] == "✓ step: forward and backward pass of 24 × 8x8, 12 × 16x16"
    assert not (tmp_path / "later").exists()


def test_a_model_that_is_too_large_for_this_machine_is_not_tried(tiny_recipe: Recipe, write_recipe: Write) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, lines = check(write_recipe(tiny_recipe), "model.backbone.hidden_size=2048", "model.backbone.num_heads=16")
    assert code == 0 and lines[-1].startswith("– step: not checked here, because ") and "TFLOP" in lines[-1]


def test_a_small_encoder_in_a_folder_is_tried_and_a_large_one_is_not(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    train_tokenizer(["a red circle"]).save_pretrained(tmp_path / "encoder")
    sizes: dict[str, Any] = dict(d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(T5Config(vocab_size=64, **sizes)).save_pretrained(tmp_path / "encoder")
    encoder = {"name": "huggingface", "pretrained": str(tmp_path / "encoder"), "max_tokens": 14}
    tiny_recipe["model"]["text_encoder"] = encoder
    path = write_recipe(tiny_recipe)
    code, lines = check(path)
    assert code == 0 and lines[-1].startswith("✓ step: forward and backward pass of ")
    monkeypatch.setattr(trial, "MOST_PARAMETERS", 1000)
    assert check(path)[1][-1].startswith(f"– step: not checked here, because without a GPU {tmp_path / 'encoder'} takes too long")


# -------------------------------------------------------------------------------------------- what the steps find


def test_a_loss_that_fails_in_the_second_stage_is_found_before_the_first_step(
    tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unlike the first stage, the second has lpips, which needs images of 17 px."""
    tiny_recipe["algorithms"]["lpips"] = {"net": "squeeze", "random_weights": True, "scale": 1.0, "start": "4ba"}
    path = write_recipe(tiny_recipe)
    code, lines = check(path)
    message = "algorithms.lpips: images of 16×16 px at scale 1.0 are 16×16, but net: squeeze needs 17 px a side"
    assert code == 1 and any(line.startswith(f"✗ {message}") for line in lines)
    assert main([path]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (folder_of(tiny_recipe) / "metrics.jsonl").exists()
    assert main([path, "algorithms.lpips.scale=2", "max_duration=1ba"]) == 0, "the mended recipe runs"


def test_all_stages_that_run_out_of_memory_are_named_with_a_microbatch_that_divides(
    stack: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = stack["algorithms"]["progressive_resolution"]["stages"]
    stages[1] = {"image_size": 24, "global_train_batch_size": 12, "device_train_microbatch_size": 12}
    assert main([write_recipe(stack), "algorithms.normalised.largest=5"]) == 1
    error = capsys.readouterr().err
    path = "algorithms.progressive_resolution.stages"
    assert f"✗ {path}[0].device_train_microbatch_size: out of memory in a step of 6 × 16x16 (16 px)" in error
    assert f"✗ {path}[1].device_train_microbatch_size: out of memory in a step of 12 × 24x24 (24 px)" in error
    assert "Set it to 4." in error and "Set it to 6." in error and "Traceback" not in error
    assert not (folder_of(stack) / "config.yaml").exists(), "the folder is still free"


BROKEN = """
from prx_composer import registry
from prx_composer.algorithms.base import LossTrick


@registry.algorithms.register("edges")
class Edges(LossTrick):
    name = "edges"

    def loss(self, outputs, batch):
        return (outputs.prediction - outputs.clean[..., :5]).mean()
"""


def test_what_fails_in_somebodys_loss_is_named_once_with_its_line(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Though it fails in every stage."""
    (tmp_path / "edges.py").write_text(BROKEN)
    tiny_recipe |= {"code_paths": [str(tmp_path / "edges.py")]}
    tiny_recipe["algorithms"]["edges"] = {"weight": 1.0}
    assert main([write_recipe(tiny_recipe)]) == 1
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "RuntimeError" in line and "step" in line]
    assert "step: RuntimeError: The size of tensor a" in line and "(edges.py, line 11), in a step of " in line
    assert line.count("16x16") == 1 and line.count("8x8") == 1
    assert sum(bool(record.exc_info) for record in caplog.records) <= 1


# ------------------------------------------------------------------------------------------- what the steps leave


def test_trying_the_steps_changes_nothing_of_a_trainer(stack: Recipe, write_recipe: Write) -> None:
    trainer = build_trainer(config.load([write_recipe(stack)]))
    model: Any = trainer.state.model

    def snapshot() -> dict[str, Any]:
        losses = {name: (loss.active, loss.training) for name, loss in model.auxiliary_losses.named().items()}
        dataset = trainer.state.train_dataloader.dataset
        return {
            "weights": {name: value.clone() for name, value in model.state_dict().items()},
            "gradients": [parameter.grad for parameter in model.parameters()],
            "flags": (losses, model.backbone.taps, model.backbone.router.active, model.guidance, model.training),
            "streams": (model.random.step, model.random.microbatch),
            "generator": torch.get_rng_state(),
            "data": (dataset._counters.clone(), dataset.start_sample),
            "optimizer": len(trainer.state.optimizers[0].state),
        }

    before = snapshot()
    assert "✗" not in {result.mark for result in try_steps(trainer, config.load([write_recipe(stack)]))}
    after = snapshot()
    trainer.close()
    assert "auxiliary_losses.normalised.norm.running_mean" in before["weights"]
    assert all(torch.equal(after["weights"][name], value) for name, value in before["weights"].items())
    assert all(gradient is None for gradient in after["gradients"])
    assert torch.equal(after["generator"], before["generator"]) and torch.equal(after["data"][0], before["data"][0])
    for key in ("flags", "streams", "optimizer"):
        assert after[key] == before[key], key


def test_losses_are_the_same_to_the_bit_with_and_without_and_on_a_resume(
    stack: Recipe, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    plain = copy.deepcopy(stack) | {"run_name": "plain", "preflight": False}
    run(config.load([write_recipe(plain)]))
    assert not (folder_of(plain) / RECORD).exists()
    tried = copy.deepcopy(stack) | {"run_name": "tried", "autoresume": True}
    path = write_recipe(tried)
    with caplog.at_level(logging.INFO, logger="prx_composer"):
        run(config.load([path, "callbacks.stop_after.time=3ba"]))
        assert "Preflight: ✓ step" in caplog.text
        caplog.clear()
        run(config.load([path, "callbacks.stop_after.time=5ba"]))
        assert "Preflight" not in caplog.text, "as many ranks on the same device: the steps are known to fit"
        (folder_of(tried) / RECORD).write_text('{"ranks": 7}')
        run(config.load([path]))
        assert "Preflight: ✓ step: forward and backward pass of 6 × 24x24" in caplog.text, "only what is to come"
    assert losses(tried) == losses(plain) and len(losses(plain)) == 6
    states = [
        torch.load(folder_of(recipe) / "checkpoints" / "ba6" / "rank0.pt", weights_only=False)["state"]["model"]
        for recipe in (plain, tried)
    ]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_losses_are_the_same_to_the_bit_on_two_ranks_under_ddp_and_fsdp2(
    stack: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    del stack["algorithms"]["normalised"]  # ranks have different means, which is nothing to compare
    stack |= {"run_folder": str(tmp_path / "runs" / "${run_name}"), "autoresume": True}
    script = Path(__file__).with_name("preflight_ranks.py")
    finished = commands.run("composer", "-n", 2, script, write_recipe(stack), tmp_path / "runs", timeout=500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "ddp: the same 5 steps" in finished.stdout and "fsdp: the same 5 steps" in finished.stdout
