"""The plan of a run: stages laid out and fitted, data, and what a stranger types."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import REPOSITORY
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.plan import as_text
from prx_composer.commands.plan.conditions import GPUS, Conditions, Measured, find_gpu, parse_count, parse_rate
from prx_composer.commands.plan.plan import fit, make_plan
from prx_composer.commands.plan.timeline import timeline
from prx_composer.common.errors import UserError
from prx_composer.models.encoders import VisionEncoder
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.training.meta_model import MetaModel, training_state

Write = Callable[..., str]
H200 = find_gpu("h200")
FAST = dataclasses.replace(H200, link=float("inf"), network=float("inf"))  # as the reference counts: nothing waits for links
LIMIT_OF_ONE = Conditions(H200, utilisation=1.0)
LIMIT = Conditions(FAST, num_gpus=32, price=2.0, utilisation=1.0, stored_text=True)
FULL = str(REPOSITORY / "yamls" / "24h.yaml")
# One stage, one block, and of the networks beside it the text encoder and REPA's teacher alone, which are counted in seconds.
OTHERS = ("tread", "lpips", "perceptual_dino", "progressive_resolution")
SMALL = ["model.backbone.depth=1", "algorithms.repa.block=0", *(f"algorithms.{name}=false" for name in OTHERS)]


def full(*changes: str) -> Recipe:
    return config.load([FULL, *changes])


# --------------------------------------------------------------------------------------------- schedule and data


def spans(recipe: Recipe, samples: int | None = None) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in timeline(recipe, 1, samples).spans]


@pytest.mark.parametrize(
    ("until", "max_duration", "expected"),
    [
        ("4ba", "8ba", [(0, 4), (4, 8)]),
        ("0.5dur", "9ba", [(0, 5), (5, 9)]),  # half of nine is first passed after five
        ("100sp", "8ba", [(0, 3), (3, 8)]),  # of batches of 48
        ("4ba or 0.83budget", "8ba", [(0, 4), (4, 8)]),
        ("2h or 4ba", "8ba", [(0, 4), (4, 8)]),
        ("4ba", "240sp", [(0, 4), (4, 6)]),  # 4 · 48 + 2 · 24
        ("4ba", "3ba", [(0, 3)]),
    ],
)
def test_stages_in_any_unit_are_laid_out_in_steps(
    until: str, max_duration: str, expected: list[tuple[int, int]], tiny_recipe: dict[str, Any], write_recipe: Write
) -> None:
    tiny_recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = until
    assert spans(config.load([write_recipe(tiny_recipe | {"max_duration": max_duration})])) == expected


def test_an_alternative_in_time_is_named_as_left_out() -> None:
    path = "algorithms.progressive_resolution.stages[0].until"
    plan = make_plan(full(f"{path}=90000ba or 0.8budget"), LIMIT)
    assert f"{path}: 90000ba or 0.8budget is taken as 90000ba" in plan.assumptions
    with pytest.raises(UserError, match=r"stages\[0\]\.until: 0\.8budget says nothing of steps"):
        make_plan(full(f"{path}=0.8budget"), LIMIT)


def test_the_data_on_disk_says_how_many_epochs_and_bytes(
    tiny_recipe: dict[str, Any], shapes_data: Path, write_recipe: Write
) -> None:
    plan = make_plan(config.load([write_recipe(tiny_recipe)]), Conditions(H200, utilisation=1.0))
    assert plan.samples == 240 and plan.samples_from == "train_loader.path"
    assert [stage.epochs for stage in plan.stages] == [4 * 48 / 240, 4 * 24 / 240]
    shards = sum(file.stat().st_size for file in (shapes_data / "train").rglob("*.mds"))
    assert plan.stages[0].read_bytes == pytest.approx(shards / 240)

    tiny_recipe["train_loader"] = {"name": "image_caption", "path": "nowhere"}
    absent = config.load([write_recipe(tiny_recipe)])
    assert make_plan(absent, Conditions(H200, utilisation=1.0)).stages[0].epochs is None
    assert make_plan(absent, Conditions(H200, utilisation=1.0, samples=96)).stages[0].epochs == 2
    tiny_recipe["algorithms"] = {}
    epochs = config.load([write_recipe(tiny_recipe | {"max_duration": "3ep"})])
    with pytest.raises(UserError, match=r"max_duration: 3ep .* --samples"):
        make_plan(epochs, Conditions(H200, utilisation=1.0))
    assert spans(epochs, samples=240) == [(0, 15)]


def test_the_number_of_images_that_is_given_counts_and_the_other_is_said(
    tiny_recipe: dict[str, Any], write_recipe: Write
) -> None:
    path = write_recipe(tiny_recipe)
    found = prx(path, "--samples", "200k")
    assert "200.0k images (--samples; train_loader.path has 240)" in found.output
    written = json.loads(prx(path, "--samples", "96", "--json").output)
    assert [stage["epochs"] for stage in written["stages"]] == [4 * 48 / 96, 4 * 24 / 96]
    assert "(--samples)" in prx(path, "--samples", "240").output
    tiny_recipe["algorithms"] = {}
    epochs = config.load([write_recipe(tiny_recipe | {"max_duration": "3ep"})])
    assert make_plan(epochs, Conditions(H200, utilisation=1.0, samples=96)).images == 3 * 96


def test_batches_that_do_not_divide_over_the_gpus_are_refused_at_their_path() -> None:
    with pytest.raises(UserError, match=r"stages\[0\]\.global_train_batch_size: 1024 does not divide over 24 ranks"):
        make_plan(full(), dataclasses.replace(LIMIT, num_gpus=24))


# ------------------------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize("hours", [0.5, 1.9, 6])
def test_a_fitted_schedule_takes_nearly_the_time_given_and_keeps_its_proportions(hours: float) -> None:
    fitted = fit(full(), LIMIT, hours * 3600)
    again = make_plan(full(*fitted.arguments), LIMIT)  # what a user would train
    assert again == fitted.plan
    assert 0.97 * hours < again.hours <= hours
    first, second = again.stages
    assert (first.end - first.start) / (second.end - second.start) == pytest.approx(5, rel=0.01)
    assert "repa" in first.flops and "repa" not in second.flops  # its window went along
    assert first.end % 10 == 0


def test_a_fitted_schedule_moves_all_that_is_tied_to_steps_and_nothing_else(
    tiny_recipe: dict[str, Any], write_recipe: Write
) -> None:
    recipe = copy.deepcopy(tiny_recipe) | {"max_duration": "8000ba", "save_interval": "2000ba"}
    recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "4000ba or 0.8budget"
    recipe["algorithms"]["ema"] |= {"start": "2000ba"}
    recipe["algorithms"]["gradient_clipping"] |= {"start": "0.1dur", "end": f"{4000 * 48}sp"}
    recipe["scheduler"] = {"name": "cosine_with_warmup", "t_warmup": "100ba", "t_max": "8000ba"}
    loaded = config.load([write_recipe(recipe)])
    slow = Conditions(H200, utilisation=None, throughput={8: Measured(480.0), 16: Measured(240.0)}, disk=1e15)
    seconds = make_plan(loaded, slow).hours * 3600
    half = seconds / 2 + 1e-3  # the last checkpoint takes as long in half of the time
    assert fit(loaded, slow, half).changes == {
        "max_duration": "4000ba",
        "algorithms.progressive_resolution.stages[0].until": "2000ba or 0.8budget",
        "algorithms.ema.start": "1000ba",
        "algorithms.gradient_clipping.end": f"{2000 * 48}sp",
        "scheduler.t_max": "4000ba",
    }
    assert "scheduler.t_warmup=100ba" in fit(loaded, slow, half).unmoved
    assert fit(loaded, slow, 2 * seconds).changes["max_duration"] == "16000ba"
    with pytest.raises(UserError, match="too short for a step of every stage"):
        fit(loaded, slow, 0.01)


# ------------------------------------------------------------------------------------------- what a stranger types


def prx(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_table_names_what_a_reader_looks_for() -> None:
    found = prx(FULL, "--gpus", "32", "--gpu", "h200", "--price", "2.0", "--mfu", "0.33", "--samples", "8.7M")
    assert found.exit_code == 0, found.exception
    for text in ("4 nodes of 8", "33% of the reachable peak (26% of the datasheet's)", "measured", "REPA", "12.95", "yes"):
        assert text in found.output
    assert "online" in found.output and "embeddings of google/t5gemma" in prx(FULL, "--stored-text", "--gpus", "8").output


def test_without_gpus_a_recipe_is_planned_for_as_many_as_share_its_state() -> None:
    assert prx(FULL).output.startswith("24h on 8 × h200\n")
    assert prx(FULL, "parallelism_config=null").output.startswith("24h on 1 × h200\n")
    assert "shard_degree: 8 must divide the 4 ranks" in str(prx(FULL, "--gpus", "4").exception)


def test_slow_links_and_loaders_are_seen_in_the_table() -> None:
    slow = prx(FULL, "--gpus", "32", "--network", "0.5", "--loader", "20").output
    for text in ("sending that outlasts it", "waiting for data", "0.5 between nodes", "deliver: 20 images per second and node"):
        assert text in slow
    one = prx(FULL, "parallelism_config=null", "--gpus", "1").output
    assert "GB sent" not in one and "links:" not in one


def test_json_says_what_the_table_says(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert "total: " in prx(FULL, "--gpus", "32", "--json", str(file), "--fit", "5h").output
    written = json.loads(file.read_text())
    assert written["hours"] <= 5 and written["fit"]["algorithms.repa.end"].split()[0] == f"{written['stages'][0]['end']}ba"
    printed = json.loads(prx(FULL, "--gpus", "32", "--json").output)
    assert printed["stages"][1]["flops"].keys() == {"denoiser", "text encoder", "lpips", "perceptual_dino"}
    step = printed["stages"][0]["step"]
    assert step["total"] == pytest.approx(step["compute"] + step["uncovered"] + step["optimizer"] + step["exchange"])
    for stage in printed["stages"]:
        assert sum(part["seconds"] for part in stage["parts"].values()) == pytest.approx(stage["step"]["total"])
        assert stage["images_per_second_per_gpu"] == pytest.approx(stage["batch_size"] / 32 / stage["step"]["total"])
    assert printed["stages"][1]["memory"]["peak"] > printed["stages"][1]["memory"]["activations"]


def test_measured_speeds_must_cover_every_stage_and_be_of_the_same_gpu(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    stages = [{"image_size": 512, "images_per_second_per_gpu": 190.0}]
    file.write_text(json.dumps({"gpu": "h100", "stages": stages}))
    missing = prx(FULL, "--gpus", "32", "--throughput", str(file)).exception
    assert isinstance(missing, UserError) and "image_size 1024, only at 512" in str(missing)
    other = prx(FULL, "--gpus", "32", "--throughput", str(file), "--gpu", "h200").exception
    assert isinstance(other, UserError) and "measured on h100" in str(other)
    both = prx(FULL, "--gpus", "32", "--throughput", str(file), "--mfu", "0.4").exception
    assert isinstance(both, UserError) and "give one of them" in str(both)
    by_device = {"gpu": "NVIDIA H200", "stages": [*stages, {"image_size": 1024, "images_per_second_per_gpu": 60}]}
    file.write_text(json.dumps(by_device))
    assert "on 32 × h200" in prx(FULL, "--gpus", "32", "--throughput", str(file)).output
    failed = {"image_size": 512, "error": "out of memory"}
    sweep = [{**stages[0], "gpus": 1}, {**stages[0], "gpus": 8, "images_per_second_per_gpu": 150.0, "batch_per_gpu": 32}, failed]
    file.write_text(json.dumps({"gpu": "h200", "stages": [*sweep, {**by_device["stages"][1], "gpus": 1}]}))
    found = prx(FULL, "--gpus", "32", "--throughput", str(file)).output
    assert "at 512 px: 150.0 images per second and GPU, measured on 8 GPUs with 32 images each" in found
    assert "at 1024 px: 60.0 images per second and GPU, measured on 1 GPU" in found
    file.write_text(json.dumps({"gpu": "h200", "stages": [{**stages[0], "gpus": 0}]}))
    none = prx(FULL, "--gpus", "32", "--throughput", str(file)).exception
    assert isinstance(none, UserError) and "gpus and batch_per_gpu must be at least 1" in str(none)
    for options in ([], ["--gpu", "h200"]):
        file.write_text(json.dumps({"gpu": "cpu", "stages": stages}))
        cpu = prx(FULL, "--gpus", "32", "--throughput", str(file), *options).exception
        assert isinstance(cpu, UserError) and str(cpu).startswith(f"--throughput: {file} was measured on 'cpu', which is none")
    file.write_text("[]")
    broken = prx(FULL, "--gpus", "32", "--throughput", str(file)).exception
    assert isinstance(broken, UserError) and "no file of the form" in str(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.exclude=[nothing]", "optimizer: exclude: 'nothing'"),
        ("algorithms.repa.block=16", "algorithms.repa.block: 16 is no block"),
        ("algorithms.progressive_resolution.stages[1].image_size=1000", r"stages\[1\]\.image_size: .*1000.*patch_size"),
        ("max_duration=3ep", "max_duration: 3ep cannot be in epochs"),
        ("save_interval=1ep", "save_interval: 1ep of data that isn't here"),
        ("time_budget=soon", "time_budget: 'soon'"),
    ],
)
def test_what_cannot_be_planned_is_said_with_its_path(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(full(change), LIMIT)


@pytest.mark.parametrize(("budget", "says"), [("1h", "does NOT fit"), ("3h", "fits with")])
def test_the_plan_says_whether_it_fits_the_time_budget(budget: str, says: str) -> None:
    plan = make_plan(full(f"time_budget={budget}"), LIMIT)
    assert plan.fits_budget == (budget == "3h") and says in as_text(plan)
    assert fit(full(f"time_budget={budget}"), LIMIT, 1.5 * 3600).changes["time_budget"] == "1h30m"


@pytest.mark.parametrize("name", ["google/flan-t5-xl", "google/t5gemma-9b-9b-ul2", "Qwen/Qwen3-VL-2B-Instruct"])
def test_known_text_encoders_are_counted_as_wide_as_the_backbone_takes_them(name: str) -> None:
    widths = {"google/flan-t5-xl": 2048, "google/t5gemma-9b-9b-ul2": 3584, "Qwen/Qwen3-VL-2B-Instruct": 2048}
    changes = (f"model.text_encoder.pretrained={name}", f"model.backbone.context_in_dim={widths[name]}")
    plan = make_plan(full(*SMALL, "algorithms.repa=false", *changes), dataclasses.replace(LIMIT, stored_text=False))
    assert not plan.unknown and plan.stages[0].flops["text encoder"] > 5e11


def test_an_encoder_that_nothing_is_known_of_stops_the_plan_until_it_is_left_out() -> None:
    llm, vit = "model.text_encoder.pretrained=somebody/llm", "algorithms.repa.teacher.pretrained=somebody/vit"
    ways = r"Give its folder .* `hf download somebody/\w+ config.json` .* `config:`"
    with pytest.raises(
        UserError, match=rf"^model.text_encoder cannot be counted: somebody/llm .*{ways}.*--leave-out text_encoder"
    ):
        make_plan(full(llm), dataclasses.replace(LIMIT, stored_text=False))
    with pytest.raises(UserError, match=rf"^algorithms.repa.teacher cannot be counted: somebody/vit .*{ways}.*--leave-out repa"):
        make_plan(full(vit), LIMIT)
    assert make_plan(full(llm, *SMALL), LIMIT).unknown == []  # nobody runs it
    assert training_state(MetaModel(full(llm, vit))).checkpoint > 1e10  # nobody asks for it
    found = prx(FULL, llm, vit, *SMALL, "--gpus", "32", "--leave-out", "text_encoder", "--leave-out", "repa")
    assert found.exit_code == 0 and "REPA" not in found.output
    for line in ("model.text_encoder: left out, as --leave-out text_encoder says", "algorithms.repa: left out"):
        assert line in found.output
    with pytest.raises(UserError, match="--leave-out: the recipe has no 'repo' to leave out. Did you mean 'repa'?"):
        make_plan(full(), dataclasses.replace(LIMIT, leave_out=("repo",)))


def test_a_trick_of_ones_own_is_planned_like_ours(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    recipe = copy.deepcopy(tiny_recipe) | {"code_paths": [str(REPOSITORY / "recipes" / "custom_stack" / "brightness.py")]}
    recipe["algorithms"] |= {"brightness": {}}
    found = prx(write_recipe(recipe))
    assert found.exit_code == 0 and "brightness" not in found.output  # it has no matrix product, and nothing is unknown
    plain = make_plan(config.load([write_recipe(tiny_recipe)]), LIMIT_OF_ONE).stages[0]
    ours = make_plan(config.load([write_recipe(recipe)]), LIMIT_OF_ONE).stages[0]
    assert ours.flops == plain.flops and ours.memory.activations > plain.memory.activations


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("facebook/dinov2-base", 86.6),
        ("facebook/dinov2-large", 304.4),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", 303.1),
        ("google/siglip-so400m-patch14-384", 428.2),
        ("openai/clip-vit-large-patch14", 303.2),
    ],
)
def test_known_teachers_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        teacher = VisionEncoder(name)
    assert sum(p.numel() for p in teacher.module.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_no_gpu_reaches_its_datasheet() -> None:
    assert all(0.4 < gpu.reachable_tflops / gpu.datasheet_tflops < 0.95 for gpu in GPUS.values())


def test_gpus_are_found_by_the_names_that_people_and_devices_give() -> None:
    devices = ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X", "NVIDIA GeForce RTX 4090"]
    assert [find_gpu(name).name for name in devices] == ["h200", "h100", "a100-80gb", "mi300x", "rtx4090"]
    with pytest.raises(UserError, match="no 'h300'.* Did you mean"):
        find_gpu("h300")
    with pytest.raises(UserError, match="no 'NVIDIA A100-SXM4-40GB'"):
        find_gpu("NVIDIA A100-SXM4-40GB")


def test_counts_and_rates_are_read_as_people_write_them() -> None:
    assert [parse_count(text, "") for text in ("8.7M", "240k", "1,000", "1.5B")] == [8_700_000, 240_000, 1000, 1_500_000_000]
    assert [parse_rate(text, "") for text in ("1GB/s", "500 MB/s", "2.5gbps")] == [1e9, 5e8, 2.5e9]
    for wrong in ("many", "0", "-3"):
        with pytest.raises(UserError, match="--samples"):
            parse_count(wrong, "--samples")
        with pytest.raises(UserError, match="--disk"):
            parse_rate(wrong, "--disk")
