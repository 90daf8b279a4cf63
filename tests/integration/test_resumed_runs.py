"""Runs that go on: moved, with other workers, and with new values, which really hold though the checkpoint has the old ones."""

import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer.core import Timestamp
from conftest import TINY_BACKBONE, TINY_T5

from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.runs.folder import read_changes, read_metrics
from prx_composer.training import main
from prx_composer.training.run import build_trainer, run

Recipe = dict[str, Any]
Write = Callable[..., str]
POISON = str(Path(__file__).parents[1] / "poison.py")


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses(folder: Path) -> dict[int, float]:
    return {row["batch"]: row["loss/train/total"] for row in read_metrics(folder / "metrics.jsonl")}


def state_of(folder: Path, batch: int) -> Any:
    return torch.load(folder / "checkpoints" / f"ba{batch}" / "rank0.pt", weights_only=False)["state"]


# ------------------------------------------------------------------------------------------ moved, and bit for bit


def test_a_moved_run_folder_goes_on_bit_for_bit_with_moved_data_other_workers_and_another_batch_of_evaluation(
    tiny_recipe: Recipe, write_recipe: Write, shapes_data: Path, tmp_path: Path
) -> None:
    """It crashes in the middle, between checkpoints, and its folder and its data are somewhere else afterwards."""
    data = tmp_path / "data"
    shutil.copytree(shapes_data, data)
    tiny_recipe["train_loader"] |= {"path": str(data)}
    tiny_recipe["eval_loader"] = {"name": "image_caption", "path": str(data), "split": "heldout"}
    tiny_recipe |= {"scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "2ba"}, "save_interval": "3ba"}
    tiny_recipe |= {"eval_interval": "4ba", "autoresume": True, "preflight": False}
    run(config.load([write_recipe(tiny_recipe), "run_name=whole"]))
    whole = folder_of(tiny_recipe | {"run_name": "whole"})

    (tmp_path / "crash.py").write_text(
        "from composer.core import Callback\nfrom prx_composer import registry\n"
        "@registry.callbacks.register('crash')\nclass Crash(Callback):\n"
        "    def batch_end(self, state, logger):\n        if state.timestamp.batch == 5:\n            raise SystemExit(9)\n"
    )
    with pytest.raises(SystemExit):
        run(config.load([write_recipe(tiny_recipe), f"code_paths=[{tmp_path}/crash.py]", "callbacks.crash={}"]))
    assert max(losses(folder_of(tiny_recipe))) >= 3

    moved, data_moved = tmp_path / "elsewhere" / "run", tmp_path / "other disk"
    moved.parent.mkdir()
    shutil.move(folder_of(tiny_recipe), moved)
    shutil.move(data, data_moved)
    changes = [f"run_folder={moved}", f"train_loader.path={data_moved}", f"eval_loader.path={data_moved}"]
    changes += ["train_loader.num_workers=2", "eval_loader.num_workers=1", "global_eval_batch_size=10", "optimizer.eps=1e-8"]
    run(config.load([write_recipe(tiny_recipe), *changes]))

    assert losses(moved) == losses(whole) and len(losses(moved)) == 8
    expected, found = state_of(whole, 8), state_of(moved, 8)
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    (start,) = read_changes(moved)
    assert start["batch"] == 3 and set(start["changes"]) == {"eval_loader.path", "callbacks.crash", "code_paths"}


# --------------------------------------------------------------------------------------- new values, which really hold


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> tuple[Recipe, Path]:
    """A recipe with something of everything, and the folder of its run, stopped at batch 4 of 8."""
    folder = tmp_path_factory.mktemp("begun")
    encoder = {"name": "huggingface", "config": dict(TINY_T5), "tokenizer": {"train": True}, "max_tokens": 14, "trainable": True}
    recipe: Recipe = {
        "run_name": "begun",
        "run_folder": str(folder / "run"),
        "model": {"name": "text_to_image", "backbone": {"name": "prx", **TINY_BACKBONE}, "text_encoder": encoder},
        "train_loader": {"name": "image_caption", "path": str(shapes_data)},
        "image_size": 16,
        "global_train_batch_size": 24,
        "device_train_microbatch_size": 12,
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "2ba"},
        "max_duration": "8ba",
        "algorithms": {
            "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
            "ema": {"half_life": "4ba"},
            "skip_nonfinite": {"limit": 3},
            "contrastive_flow_matching": {"weight": 0.05},
        },
        "callbacks": {"loss_spikes": {"window": 60}},
        "progress_bar": False,
        "preflight": False,
        "autoresume": True,
        "save_interval": "2ba",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run(config.load([str(path), "callbacks.stop_after.time=4ba"]))
    return recipe, path


def going_on(begun: tuple[Recipe, Path], tmp_path: Path, *changes: str) -> Any:
    """The trainer of a copy of the run, about to go on from batch 4 with the changes."""
    recipe, path = begun
    if not (tmp_path / "run").exists():
        shutil.copytree(recipe["run_folder"], tmp_path / "run")
    loaded = config.load([str(path), f"run_folder={tmp_path}/run", *changes])
    trainer = build_trainer(loaded)
    assert int(trainer.state.timestamp.batch) == 4
    return trainer


def algorithm(trainer: Any, name: str) -> Any:
    return next(a for a in (*trainer.state.algorithms, *trainer.state.callbacks) if type(a).__name__ == name)


def group(trainer: Any) -> Any:
    return trainer.state.optimizers[0].param_groups[0]


def rates(trainer: Any) -> list[float]:
    return [group["lr"] for group in trainer.state.optimizers[0].param_groups]


# The rate of the fifth step: Composer asks the schedule when three are counted, 2 of them warm-up; from 1 to 0 over the other 6.
FIFTH = 1 - (3 - 2) / 6

HOLDS: dict[str, tuple[list[str], Callable[[Any], Any], Any]] = {
    "optimizer.lr": (["optimizer.lr=2e-4"], rates, [pytest.approx(2e-4 * FIFTH, rel=1e-12)] * 2),
    "optimizer.betas": (["optimizer.betas=[0.5, 0.6]"], lambda t: list(group(t)["betas"]), [0.5, 0.6]),
    "optimizer.eps": (["optimizer.eps=1e-5"], lambda t: group(t)["eps"], 1e-5),
    "optimizer.weight_decay": (["optimizer.weight_decay=0.3"], lambda t: group(t)["weight_decay"], 0.3),
    "scheduler.t_warmup": (["scheduler.t_warmup=6ba"], rates, [pytest.approx(1e-3 * 3 / 6)] * 2),
    "scheduler": (["scheduler={name: constant, alpha: 0.5}"], rates, [pytest.approx(5e-4)] * 2),
    "algorithms.gradient_clipping.clipping_threshold": (
        ["algorithms.gradient_clipping.clipping_threshold=0.01"],
        lambda t: algorithm(t, "GradientClipping").clipping_threshold,
        0.01,
    ),
    "algorithms.ema.half_life": (["algorithms.ema.half_life=1ba"], lambda t: algorithm(t, "EMA").smoothing, 0.5),
    "algorithms.contrastive_flow_matching.weight": (
        ["algorithms.contrastive_flow_matching.weight=0.01"],
        lambda t: algorithm(t, "ContrastiveFlowMatching").term.weight,
        0.01,
    ),
    "algorithms.contrastive_flow_matching.end": (
        ["algorithms.contrastive_flow_matching.end=3ba"],
        lambda t: algorithm(t, "ContrastiveFlowMatching").window.is_over(t.state),
        True,
    ),
    "algorithms.skip_nonfinite.limit": (
        ["algorithms.skip_nonfinite.limit=9"],
        lambda t: algorithm(t, "SkipNonfinite").limit,
        9,
    ),
    "train_loader.max_undecodable": (
        ["train_loader.max_undecodable=0.5"],
        lambda t: t.state.train_dataloader.dataset._max_undecodable,
        0.5,
    ),
    "train_loader.captions": (
        ["train_loader.captions={short_caption: 1.0}"],
        lambda t: {column: wording.weight for column, wording in t.state.train_dataloader.dataset.captions.items()},
        {"short_caption": 1.0},
    ),
    "model.caption_dropout": (["model.caption_dropout=0.5"], lambda t: t.state.model.caption_dropout, 0.5),
    "model.flow.timestep_shift": (["model.flow.timestep_shift=3"], lambda t: t.state.model.flow.timestep_shift, 3),
    "device_train_microbatch_size": (
        ["device_train_microbatch_size=8"],
        lambda t: t.state.device_train_microbatch_size,
        8,
    ),
    "global_train_batch_size": (
        ["global_train_batch_size=48", "device_train_microbatch_size=12"],
        lambda t: t.state.train_dataloader.global_batch_size,
        48,
    ),
    "seed": (
        ["seed=3"],
        lambda t: (t.state.rank_zero_seed, t.state.model.random.seed, t.state.train_dataloader.batch_sampler.seed),
        (3, 3, 3),
    ),
    "callbacks.loss_spikes.window": (
        ["callbacks.loss_spikes.window=70"],
        lambda t: (algorithm(t, "LossSpikes")._normal.maxlen, len(algorithm(t, "LossSpikes")._normal)),
        (70, 4),
    ),
    "max_duration": (["max_duration=16ba"], lambda t: int(t.state.max_duration.value), 16),
}


@pytest.mark.parametrize("name", HOLDS)
def test_a_new_value_holds_after_a_resume(name: str, begun: tuple[Recipe, Path], tmp_path: Path) -> None:
    changes, read, expected = HOLDS[name]
    trainer = going_on(begun, tmp_path, *changes, f"resume.allow=[{name}]")
    try:
        assert read(trainer) == expected
        assert len(trainer.state.optimizers[0].state) > 0, "its moments are those of the checkpoint"
    finally:
        trainer.close()


def test_without_a_change_the_next_rate_is_the_checkpoints_to_the_bit(begun: tuple[Recipe, Path], tmp_path: Path) -> None:
    """And what a new schedule of the same values says is the same, to the bit: it is asked as at the end of a step."""
    trainer = going_on(begun, tmp_path, "optimizer.eps=1e-7", "resume.allow=[optimizer.eps]")
    kept = rates(trainer)
    trainer.close()
    trainer = going_on(begun, tmp_path, "scheduler.scale_warmup=true", "resume.allow=[scheduler]")
    assert rates(trainer) == kept == [pytest.approx(1e-3 * FIFTH)] * 2
    trainer.close()


def test_stages_that_are_new_to_a_run_begin_with_the_one_whose_time_it_is(tiny_recipe: Recipe, write_recipe: Write) -> None:
    stages = tiny_recipe["algorithms"].pop("progressive_resolution")["stages"]
    ends = [stage | {"until": until} for stage, until in zip([stages[0], *stages], ("1ba", "2ba", "6ba"), strict=True)]
    path = write_recipe(tiny_recipe | {"autoresume": True, "max_duration": "4ba"})
    assert main([path]) == 0
    change = f"algorithms.progressive_resolution={json.dumps({'stages': [*ends, stages[0] | {'until': None}]})}"
    assert main([path, "max_duration=8ba", change, "resume.allow=[algorithms.progressive_resolution]"]) == 0
    rows = read_metrics(folder_of(tiny_recipe) / "metrics.jsonl")
    assert {row["batch"]: row["stage/image_size"] for row in rows if row["batch"] > 4} == {5: 16, 6: 16, 7: 8, 8: 8}


def test_an_average_that_is_new_to_a_run_begins_with_its_weights(begun: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, _ = begun
    shutil.copytree(recipe["run_folder"], tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints" / "ba4" / "rank0.pt"
    content = torch.load(saved, weights_only=False)
    del content["state"]["callbacks"]["AverageState"]
    content["state"]["algorithms"] = [a for a in content["state"]["algorithms"] if a[0] != "EMA"]
    torch.save(content, saved)
    index = yaml.safe_load((saved.parent / "checkpoint.json").read_text())
    from prx_composer.common.files import crc32

    index["files"]["rank0.pt"] = {"bytes": saved.stat().st_size, "crc32": crc32(saved)}
    for target in (index["recipe"], content := yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())):
        del target["algorithms"]["ema"]
    (saved.parent / "checkpoint.json").write_text(json.dumps(index))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))
    trainer = going_on(begun, tmp_path, "resume.allow=[algorithms.ema]")
    average = algorithm(trainer, "EMA").average
    assert all(torch.equal(average.average[name], weight) for name, weight in average.parameters.items())
    trainer.close()


def test_what_was_allowed_and_does_not_fit_the_checkpoint_is_a_message(begun: tuple[Recipe, Path], tmp_path: Path) -> None:
    """A stranger's term has weights of its own, which nobody can know."""
    with pytest.raises(
        UserError, match=r"resume.allow: the checkpoint .* does not fit what was changed, algorithms.poison"
    ) as said:
        going_on(begun, tmp_path, f"code_paths=[{POISON}]", "algorithms.poison={kinds: {}}", "resume.allow=[algorithms.poison]")
    assert "Go on with the old values" in str(said.value)


def test_other_data_begin_a_new_pass_that_goes_on_bit_for_bit(
    begun: tuple[Recipe, Path], shapes_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice of the refusal is followed; a second resume goes on in the new pass where it was."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copytree(shapes_data / "heldout", data / "train")  # 30 samples: one batch of 24 a pass
    recipe, path = begun
    finals = []
    for name, stops in (("at once", ["8ba"]), ("in two", ["5ba", "8ba"])):
        folder = tmp_path / name
        shutil.copytree(recipe["run_folder"], folder)
        changes = [f"run_folder={folder}", f"train_loader.path={data}", "global_train_batch_size=24", "save_interval=1ba"]
        assert main([str(path), *changes]) == 1
        error = capsys.readouterr().err
        assert "data ('240 samples" in error and "Traceback" not in error
        match = re.search(r"add  ('resume.allow=.*')$", error, re.MULTILINE)
        assert match is not None
        (typed,) = shlex.split(match[1])
        for index, stop in enumerate(stops):
            run(config.load([str(path), *changes, f"callbacks.stop_after.time={stop}", *([typed] if index == 0 else [])]))
        finals.append((losses(folder), state_of(folder, 8)["model"]))
        assert [start["batch"] for start in read_changes(folder) if "data" in start["changes"]] == [4]
    assert finals[0][0] == finals[1][0]
    assert all(torch.equal(finals[1][1][name], value) for name, value in finals[0][1].items())


# ---------------------------------------------------------------------------------------------- printed advice, followed


def test_what_a_run_of_lost_steps_advises_works(
    tiny_recipe: Recipe, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lower rate, as printed, goes on from the checkpoint and is kept in the run; and so does ending the term that fails."""
    del tiny_recipe["algorithms"]["progressive_resolution"]
    tiny_recipe["algorithms"] |= {"poison": {"kinds": {"5": "nan", "6": "nan"}}, "skip_nonfinite": {"limit": 2}}
    tiny_recipe |= {"code_paths": [POISON], "autoresume": True, "preflight": False, "image_size": 8}
    path = write_recipe(tiny_recipe)
    assert main([path]) == 1
    error, folder = capsys.readouterr().err, folder_of(tiny_recipe)
    match = re.search(r"(optimizer\.lr)=….*(algorithms\.<term>\.end)=<batch>ba.*('resume.allow=\[optimizer.lr\]')", error)
    assert match is not None and str(folder / "checkpoints" / "ba4") in error
    assert main([path, f"{match[1]}=1e-5"]) == 1
    refused = capsys.readouterr().err
    assert match[3] in refused, "the same line is printed there"
    shutil.copytree(folder, folder.with_name("lower"))
    assert main([path, f"run_folder={folder.with_name('lower')}", f"{match[1]}=1e-5", *shlex.split(match[3])]) == 1
    assert "Training ended at batch 6" in capsys.readouterr().err, "it was tried: this poison doesn't heal by that"
    (start,) = read_changes(folder.with_name("lower"))
    assert start["batch"] == 4 and start["changes"]["optimizer.lr"]["now"] == 1e-5
    end = match[2].replace("<term>", "poison")
    assert main([path, f"{end}=4ba", f"resume.allow=[{end}]"]) == 0
    assert max(losses(folder)) == 8 and read_metrics(folder / "metrics.jsonl")[-1]["guard/skipped_steps"] == 0


def test_a_limit_of_undecodable_images_may_be_raised_as_its_message_says(
    tmp_path: Path, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    """The message is taken from the data set itself; what it says to raise is a key that may change."""
    from prx_composer.data.dataset import ImageCaptionDataset, UndecodableError
    from prx_composer.recipe.resume import rule_of

    dataset = ImageCaptionDataset(tiny_recipe["train_loader"]["path"], max_undecodable=0.0)
    dataset._count(seen=600)
    with pytest.raises(UndecodableError, match=r"more than (train_loader\.max_undecodable) = .* raise that limit") as said:
        dataset._note_undecodable(0, "x", ValueError("bad"), "the next takes its place")
    key = re.search(r"train_loader\.\w+", str(said.value))
    assert key is not None and rule_of(key[0]).may == "logged"


def test_the_step_before_is_counted_back_within_an_epoch() -> None:
    from prx_composer.callbacks.checkpointing import _back

    def counted(now: Timestamp, steps: int) -> list[int]:
        back = _back(now, steps)
        return [int(back.batch), int(back.sample), int(back.batch_in_epoch), int(back.sample_in_epoch), int(back.epoch)]

    now = Timestamp(epoch=1, batch=7, sample=168, batch_in_epoch=2, sample_in_epoch=48)
    assert counted(now, 1) == [6, 144, 1, 24, 1] and counted(now, 2) == [5, 120, 0, 0, 1]
    assert counted(Timestamp(), 2) == [0] * 5
