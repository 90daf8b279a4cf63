"""`prx average`: what it makes of a run's checkpoints is their mean, stands for a decay of the rate, and opens like any run."""

import importlib
import json
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import prx
from composer.core import State, Time, Timestamp
from composer.devices import DeviceCPU
from conftest import train_once
from hostile import edited, seal, write_run
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from prx_composer.commands.average import WeightedMean, decay_shares
from prx_composer.models import TextToImage
from prx_composer.models.layers import BLOCK_LAYERS, add_adapters
from prx_composer.optim import DECAYS, WarmupStableDecay
from prx_composer.runs import weights
from prx_composer.runs.checkpoints import INDEX, MERGED, MONOLITH, all_checkpoints
from prx_composer.runs.opening import load_trained
from prx_composer.runs.pretrained_models import initialise
from prx_composer.training import main

Recipe = dict[str, Any]
Write = Callable[..., str]
Build = Callable[..., TextToImage]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    """ba2, ba4, ba6 and ba8 of a run with `ema` and a text encoder that is trained along."""
    evaluated = {"eval_loader": {"name": "image_caption", "path": str(shapes_data), "split": "heldout"}, "eval_interval": "8ba"}
    return train_once(tmp_path_factory, shapes_data, scheduler={"name": "constant"}, **evaluated)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def state_of(folder: Path, batch: int = 8) -> dict[str, Any]:
    path = folder / "checkpoints" / f"ba{batch}" / MONOLITH
    return torch.load(path, weights_only=False)["state"]  # our own run's


def average_of(folder: Path, batch: int = 8) -> Tensors:
    return state_of(folder, batch)["callbacks"]["AverageState"]["average"]


def mean_of(models: list[Tensors]) -> Tensors:
    """torch's mean, in fp64."""
    return {name: torch.stack([m[name].double() for m in models]).mean(0).to(tensor.dtype) for name, tensor in models[0].items()}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def merged(folder: Path, batch: int = 8) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / f"ba{batch}" / INDEX).read_text())[MERGED]


# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("like", sorted(DECAYS))
@pytest.mark.parametrize("batches", [range(20, 61), [20, 60], [20, 30, 45, 46, 60]])
def test_with_fixed_gradients_the_average_is_where_the_decayed_rate_ends(like: Any, batches: Any) -> None:
    """Two runs of SGD: at a constant rate, of which checkpoints are kept, and with the scheduler `warmup_stable_decay`."""
    length = batches[-1]
    generator = torch.Generator().manual_seed(0)
    between = [batch for batch in batches if batch > batches[0]]
    drawn = {batch: torch.randn(7, generator=generator, dtype=torch.float64) for batch in [batches[0], *between]}
    gradients = [drawn[min(batch for batch in drawn if batch > step)] for step in range(length)]
    schedule = WarmupStableDecay(decay=1 - batches[0] / length, shape=like)
    ends, kept = {}, {}
    for decays in (False, True):
        parameter = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        state = State(rank_zero_seed=0, run_name="test", model=torch.nn.Linear(1, 1), device=DeviceCPU(), optimizers=optimizer)
        state.max_duration = Time.from_timestring(f"{length}ba")
        for step in range(length):
            state.timestamp = Timestamp(batch=step)
            optimizer.param_groups[0]["lr"] = 0.1 * (schedule(state) if decays else 1.0)
            parameter.grad = gradients[step]
            optimizer.step()
            if not decays and step + 1 in batches:
                kept[step + 1] = {"weight": parameter.detach().clone()}
        ends[decays] = parameter.detach()
    mean = WeightedMean()
    shares = decay_shares(list(batches), like)
    for share, model in zip(shares, kept.values(), strict=True):
        mean.add(model, share)
    torch.testing.assert_close(mean.result()["weight"], ends[True], rtol=1e-12, atol=1e-12)
    assert (ends[True] - ends[False]).abs().max() > 0.1, "the decay matters"
    assert min(shares) >= 0 and sum(shares) == pytest.approx(1)


def test_the_shares_of_a_mean_are_equal_and_stand_for_a_linear_decay_too() -> None:
    """A step's rate falls from checkpoint to checkpoint by the same part."""
    shares = [share / 5 for share in decay_shares([10, 20, 30, 40, 50])]
    rates = [sum(shares[index:]) for index in range(1, 5)]
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert decay_shares([7], "cosine") == [1.0]


def test_what_is_no_number_is_the_newest_s_and_types_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    models = [
        {str(kind): torch.randn(50, generator=generator).to(kind) for kind in kinds} | {"steps": torch.tensor(index)}
        for index in range(6)
    ]
    mean = WeightedMean()
    for model in models:
        mean.add(model, 1.0)
    found = mean.result()
    assert found.pop("steps").item() == 0, "of the first that was added"
    assert_equal(found, mean_of([{name: m[name] for name in found} for m in models]))
    mean = WeightedMean()
    mean.add(models[0], 1.0)
    with pytest.raises(ValueError, match=r"torch\.float32 is \(49,\) in it and \(50,\) in the newest"):
        mean.add(models[1] | {"torch.float32": torch.zeros(49)}, 1.0)
    with pytest.raises(ValueError, match="other weights than the newest: more"):
        mean.add(models[1] | {"more": torch.zeros(1)}, 1.0)


# ------------------------------------------------------------------------------------------------------ a trained run


def test_the_average_is_torchs_mean_whatever_the_order_and_one_checkpoint_is_itself(run: Path, tmp_path: Path) -> None:
    said = prx("average", run)
    assert "ba2  0.2500" in said and f"uniform average of 4, raw weights · {run}-average" in said
    models = [state_of(run, batch)["model"] for batch in (2, 4, 6, 8)]
    assert_equal(state_of(Path(f"{run}-average"))["model"], mean_of(models))
    assert merged(Path(f"{run}-average"))["checkpoints"] == dict.fromkeys(("ba2", "ba4", "ba6", "ba8"), 0.25)
    for order in ("ba8,4ba,2", "2, 8,ba4"):
        prx("average", run, "--checkpoints", order, "--output", tmp_path / "out", "--overwrite")
        assert_equal(state_of(tmp_path / "out")["model"], mean_of([models[0], models[1], models[3]]))
    said = prx("average", run, "--last", 1, "--output", tmp_path / "one")
    assert_equal(state_of(tmp_path / "one")["model"], models[3])
    assert "One checkpoint is its own average" in said
    prx("average", run, "--from", 3, "--to", "7ba", "--output", tmp_path / "some")
    assert_equal(state_of(tmp_path / "some", 6)["model"], mean_of(models[1:3]))
    prx("average", run, "--to", "7ba", "--last", 1, "--output", tmp_path / "six")
    assert_equal(state_of(tmp_path / "six", 6)["model"], models[2])
    prx("average", run, "--to", 4, "--output", tmp_path / "small")
    assert load_trained(str(tmp_path / "small")).image_size == 8, "as its checkpoints, of the first stage"


def test_averages_are_averaged_when_they_are_asked_for(run: Path, tmp_path: Path) -> None:
    said = prx("average", run, "--weights", "ema", "--last", 2, "--output", tmp_path / "out")
    assert "ema weights" in said
    found, expected = state_of(tmp_path / "out")["model"], mean_of([average_of(run, batch) for batch in (6, 8)])
    assert_equal({name: found[name] for name in expected}, expected)
    assert {name.partition(".")[0] for name in expected} == {"backbone", "text_encoder"}, "the encoder is trained along"
    assert not torch.equal(found["backbone.img_in.weight"], state_of(run)["model"]["backbone.img_in.weight"])


def test_the_average_is_drawn_exported_and_trained_on_from_as_a_run_and_no_run_goes_on_in_it(
    run: Path, tmp_path: Path, tiny_model: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prx("average", run, "--last", 3, "--like", "cosine", "--output", out)
    shares = [share / 1.0 for share in decay_shares([4, 6, 8], "cosine")]
    models = [state_of(run, batch)["model"] for batch in (4, 6, 8)]
    opened = load_trained(str(out))
    assert opened.weights == "raw" and opened.batch == 8 and opened.merged == ("ba4", "ba6", "ba8")
    name = "backbone.blocks.1.gate_proj.weight"
    expected = sum(share * model[name].double() for share, model in zip(shares, models, strict=True))
    torch.testing.assert_close(opened.model.state_dict()[name], torch.as_tensor(expected).float())
    begun = tiny_model(seed=9)
    initialise(begun, str(out))
    assert_equal(dict(begun.backbone.state_dict()), dict(opened.model.backbone.state_dict()))
    assert torch.equal(
        begun.text_encoder.network.state_dict()["shared.weight"], state_of(out)["model"]["text_encoder.encoder.shared.weight"]
    )
    prompt = ("-p", "a red circle", "--steps", 1, "--no-grid")
    assert "1 image" in prx("generate", out, *prompt, "--output", tmp_path / "drawn")
    prx("export", out, "--output", tmp_path / "exported", "--no-samples")
    assert "merged from ba4, ba6, ba8" in (tmp_path / "exported" / "README.md").read_text()
    assert "has no averaged weights" in prx("generate", out, *prompt, "--weights", "ema", code=1)
    assert main([str(out / "config.yaml"), f"run_folder={out}", "autoresume=true", "max_duration=9ba"]) == 1
    assert "averaged weights alone, from which no run goes on" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["ba8"], "it is left as it was"
    assert "is an average already" in prx("average", out, code=1)


def test_what_is_damaged_not_finite_or_of_another_recipe_is_skipped_and_the_next_older_takes_its_place(
    run: Path, tmp_path: Path
) -> None:
    whole, last = run / "checkpoints" / "ba4", run / "checkpoints" / "ba8"
    content = (last / MONOLITH).read_bytes()
    (last / MONOLITH).write_bytes(content[:-100])
    six = run / "checkpoints" / "ba6"
    state = torch.load(six / MONOLITH, weights_only=False)
    state["state"]["model"]["backbone.img_in.weight"][0] = float("nan")
    torch.save(state, six / MONOLITH)
    seal(six, json.loads((six / INDEX).read_text()))
    said = prx("average", run, "--last", 2, "--output", tmp_path / "out")
    assert f"ba8  skipped: ba8 is damaged: {MONOLITH} has {len(content) - 100} bytes" in said
    assert "ba6  skipped: 1 of" in said and "backbone.img_in.weight" in said and str(tmp_path / "run") not in said
    assert_equal(state_of(tmp_path / "out", 4)["model"], mean_of([state_of(run, batch)["model"] for batch in (2, 4)]))
    assert set(merged(tmp_path / "out", 4)["skipped"]) == {"ba6", "ba8"}

    recipe = json.loads((whole / INDEX).read_text())["recipe"]
    edited(run / "checkpoints" / "ba2" / INDEX, recipe=recipe | {"seed": 5, "run_name": "other"})
    said = prx("average", run, "--output", tmp_path / "out", "--overwrite")
    assert "ba2  skipped: it is of another recipe than ba4: seed (5 → " in said and "run_name" not in said
    assert merged(tmp_path / "out", 4)["checkpoints"] == {"ba4": 1.0}
    change = {"batch": 2, "changes": {"seed": {"before": 5, "now": recipe["seed"], "may": "asked"}}}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    assert "ba2  0.5000" in prx("average", run, "--output", tmp_path / "out", "--overwrite"), "the run was allowed it"

    for names, why in {"ba4,ba8": "ba8 is damaged", "ba4,ba6": "NaN", "ba3": "keeps no ba3; there are ba2, ba4"}.items():
        assert why in prx("average", run, "--checkpoints", names, "--output", tmp_path / "none", code=1)
    assert not (tmp_path / "none").exists()


def test_shards_are_merged_as_a_file_is(run: Path, tmp_path: Path) -> None:
    prx("average", run, "--weights", "ema", "--output", tmp_path / "of_files")
    for checkpoint in all_checkpoints(run / "checkpoints"):
        content = torch.load(checkpoint.path / MONOLITH, weights_only=False)
        (checkpoint.path / MONOLITH).unlink()
        save_sharded(content, storage_writer=FileSystemWriter(checkpoint.path), no_dist=True)
        seal(checkpoint.path, checkpoint.index())
    assert (run / "checkpoints" / "ba8" / ".metadata").exists()
    prx("average", run, "--weights", "ema", "--output", tmp_path / "of_shards")
    found, expected = state_of(tmp_path / "of_shards"), state_of(tmp_path / "of_files")
    assert_equal(found.pop("model"), expected.pop("model"))
    assert found == expected


def test_a_run_on_s3_is_merged_one_checkpoint_at_a_time(
    s3: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (2, 4):
        shutil.rmtree(run / "checkpoints" / f"ba{batch}")
    prx("average", run, "--output", tmp_path / "local")
    for path in run.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "data", f"runs/mine/{path.relative_to(run)}")
    read, seen = weights.read_checkpoint, list[Any]()

    def counted(checkpoint: Any) -> Any:
        assert not any(reference() for reference in seen), "the one before is still in memory"
        assert len(list(checkpoint.path.parent.glob(f"ba*/{MONOLITH}"))) == 1, "or on the disk"
        state = read(checkpoint)
        seen.append(weakref.ref(state))
        return state

    monkeypatch.setattr(weights, "read_checkpoint", counted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    prx("average", "s3://data/runs/mine/", "--output", tmp_path / "remote")
    monkeypatch.undo()
    assert len(seen) == 2 and not list((tmp_path / "scratch").iterdir())
    assert_equal(state_of(tmp_path / "remote")["model"], state_of(tmp_path / "local")["model"])
    assert load_trained(str(tmp_path / "remote")).batch == 8, "its tokenizer came along"
    assert "--output: name a folder here" in prx("average", "s3://data/runs/mine", code=1)


def test_a_failure_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    prx("average", run, "--last", 2, "--output", out)
    before = state_of(out)["model"]

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("prx_composer.runs.checkpoints.sync", full)
    assert "--output: it cannot be written: No space" in prx("average", run, "--output", out, "--overwrite", code=1)
    monkeypatch.undo()
    assert_equal(state_of(out)["model"], before)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}, "no half of it stays"
    assert "holds an average; give another folder, or --overwrite" in prx("average", run, "--output", out, code=1)
    assert "is not empty and holds no average" in prx("average", run, "--output", run, "--overwrite", code=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--like", "square"), "--like must be one of uniform, linear, cosine, 1-sqrt, not 'square'"),
        (("--weights", "both"), "--weights must be raw or ema"),
        (("--checkpoints", "ba2", "--last", 2), "leave --last, --from and --to out"),
        (("--from", "1ep"), "--from: '1ep' is no checkpoint; write ba1000"),
        (("--from", "100ba"), "no checkpoint to merge among those asked for; it keeps ba2, ba4, ba6, ba8"),
    ],
)
def test_what_cannot_be_done_is_said_by_the_option(trained: Path, tmp_path: Path, arguments: Any, said: str) -> None:
    assert said in prx("average", trained, *arguments, "--output", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_said(tmp_path: Path) -> None:
    assert "is no run folder" in prx("average", tmp_path, code=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    assert "has no checkpoint yet" in prx("average", tmp_path, code=1)


def test_checkpoints_of_several_stages_are_said_and_what_acted_in_the_newest_is_kept(trained: Path, tmp_path: Path) -> None:
    assert "They are of 2 stages of progressive_resolution" in prx("average", trained, "--output", tmp_path / "both")
    assert "stages" not in prx("average", trained, "--from", "ba6", "--output", tmp_path / "last")
    saved = dict(state_of(trained)["algorithms"])
    kept = dict(state_of(tmp_path / "both")["algorithms"])
    assert {name: own["active"] for name, own in saved.items() if "active" in own} == {
        name: own["active"] for name, own in kept.items() if "active" in own
    }


def test_a_decay_that_the_recipe_has_itself_is_said(trained: Path, run: Path, tmp_path: Path) -> None:
    assert "fell by itself" not in prx("average", trained, "--output", tmp_path / "constant")
    for checkpoint in all_checkpoints(run / "checkpoints"):
        edited(checkpoint.path / INDEX, recipe=checkpoint.index()["recipe"] | {"scheduler": {"name": "cosine_with_warmup"}})
    assert "fell by itself (scheduler: cosine_with_warmup)" in prx("average", run, "--output", tmp_path / "falling")


@pytest.mark.slow
def test_the_benchmark_scores_weights_average_and_merges_of_one_run(trained: Path) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    found = importlib.import_module("quality").averages(str(trained), last=[2], like=["uniform"], images_per_prompt=1)["weights"]
    assert found.keys() == {"raw", "ema", "uniform of 2"}
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    loss = rows[-1]["metrics/eval/validation_loss"]
    assert found["ema"]["validation_loss"] == pytest.approx(loss, rel=1e-4), "as the run itself evaluated"
    assert len({scores["validation_loss"] for scores in found.values()}) == 3


def test_adapters_are_averaged_factor_by_factor_and_opened_as_adapters(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write
) -> None:
    """A and B are what is trained, so that theirs is the decay that the average stands for."""
    recipe = tiny_recipe | {"algorithms": {"lora": {"rank": 2}}}
    recipe["model"]["text_encoder"]["trainable"] = False
    models = []
    for batch in (1, 2):
        model = tiny_model(seed=3, trainable_text=False)
        add_adapters(model.backbone, 2, 2.0, BLOCK_LAYERS)
        with torch.no_grad():
            for name, parameter in model.backbone.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(batch + len(name)))
        models.append(model.state_dict())
        folder = write_run(tmp_path / f"run{batch}", recipe, model, write_recipe)
    two = shutil.copytree(folder / "checkpoints" / "ba1", tmp_path / "run1" / "checkpoints" / "ba2")
    edited(two / INDEX, batch=2, recipe=json.loads((tmp_path / "run1" / "checkpoints" / "ba1" / INDEX).read_text())["recipe"])
    prx("average", tmp_path / "run1", "--output", tmp_path / "out")
    expected = mean_of([{name: m[name] for name in models[0] if m[name].is_floating_point()} for m in models])
    opened = load_trained(str(tmp_path / "out"), merge=False).model.state_dict()
    assert sum(".lora_" in name for name in opened) > 4
    assert_equal({name: opened[name] for name in expected}, expected)
    prx("export", tmp_path / "out", "--format", "lora", "--output", tmp_path / "adapters")
