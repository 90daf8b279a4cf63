"""The 24-hour recipe, its laptop-size copy and those by hardware are held against each other, key by key; launch files too."""

import dataclasses
import fnmatch
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from prx_composer.commands.convert.settings import Settings
from prx_composer.data.format import make_buckets
from prx_composer.recipe import config
from prx_composer.registry import with_size

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "yamls"
CARD = REPOSITORY / "recipes" / "speedrun_24h"

# Paths at which the mini recipe may differ, and why. Everything else is the same to the letter.
MAY_DIFFER = {
    "run_name": "it is another run",
    "time_budget": "so few steps",
    "model.compile": "compiling takes longer than the run; tests/integration/test_composition.py compiles the stack",
    "model.backbone.patch_size": "size",
    "model.backbone.bottleneck_size": "size",
    "model.backbone.hidden_size": "size",
    "model.backbone.depth": "size",
    "model.backbone.num_heads": "size",
    "model.backbone.context_in_dim": "the width of the text encoder",
    "model.flow.min_timestep": "so few steps are not spent on what is left at little noise",
    "model.text_encoder.pretrained": "random weights of the same library instead of a download",
    "model.text_encoder.config.*": "random weights",
    "model.text_encoder.tokenizer.train": "random weights have no tokenizer",
    "model.text_encoder.max_tokens": "size",
    "model.text_encoder.dtype": "a CPU computes in fp32",
    "model.text_encoder.compile": "compiling takes longer than the run",
    "*_loader.path": "data",
    "train_loader.mix.*": "data that are made on first use",
    "train_loader.source.*": "data that are made on first use",
    "train_loader.num_workers": "two cores",
    "image_size": "size",
    "global_train_batch_size": "size",
    "global_eval_batch_size": "size",
    "device_train_microbatch_size": "without accumulation",
    "max_duration": "so few steps",
    "precision": "Composer trains in fp32 on a CPU",
    "parallelism_config*": "one process has nothing to shard",
    "optimizer.lr": "so few steps",
    "optimizer.adam_lr": "so few steps",
    "scheduler.t_warmup": "so few steps",
    "algorithms.ema.smoothing": "so few steps",
    "algorithms.tread.end_block": "depth",
    "algorithms.repa.teacher.*": "random weights",
    "algorithms.repa.block": "depth",
    "algorithms.repa.weight": "a teacher of random weights has little to teach",
    "algorithms.repa.projector_hidden": "size",
    "algorithms.repa.end": "so few steps",
    "algorithms.lpips.net": "size: the smallest network",
    "algorithms.lpips.scale": "size: that network needs 17 px",
    "algorithms.lpips.random_weights": "random weights",
    "algorithms.lpips.compile": "compiling takes longer than the run",
    "algorithms.perceptual_dino.teacher.*": "random weights",
    "algorithms.perceptual_dino.image_size": "size",
    "algorithms.progressive_resolution.stages.*": "sizes, so few steps, and a second stage that is long enough for them",
    "callbacks.shapes_score.*": "a score that these data have",
    "callbacks.images.interval": "so few steps",
    "callbacks.images.num_inference_steps": "half of them",
    "callbacks.images.prompts.*": "what the data show",
    "eval_interval": "so few steps",
    "eval_subset_num_batches": "the share of the time that evaluation may take",
    "save_interval": "a shorter run",
}


# The same of the recipes by hardware.
BY_HARDWARE = {
    "one_gpu_24gb": {
        "run_name": "it is another run",
        "time_budget": "of its own hours",
        "model.backbone.*": "size; smaller images in smaller patches",
        "*_loader.path": "the data are the user's",
        "*_loader.text_embedding": "the encoder costs more than the denoiser",
        "model.text_encoder.compile": "it runs once, before",
        "train_loader.mix.*": "the data are the user's",
        "train_loader.num_workers": "one GPU",
        "image_size": "size",
        "global_train_batch_size": "one GPU",
        "global_eval_batch_size": "one GPU",
        "eval_subset_num_batches": "one GPU",
        "device_train_microbatch_size": "what fits, by the plan",
        "parallelism_config.fsdp.*": "one GPU",
        "optimizer.lr": "the rule",
        "optimizer.adam_lr": "the rule",
        "algorithms.tread.end_block": "depth",
        "algorithms.repa.teacher.pretrained": "a small model's",
        "algorithms.repa.block": "depth",
        "algorithms.repa.end": "the first stage's share of the time",
        "algorithms.perceptual_dino.teacher.pretrained": "a small model's",
        "algorithms.progressive_resolution.stages.*": "sizes",
    },
    "one_gpu_80gb": {
        "run_name": "it is another run",
        "time_budget": "of its own hours",
        "model.backbone.size": "size",
        "model.backbone.hidden_size": "size",
        "model.backbone.depth": "size",
        "model.backbone.num_heads": "size",
        "*_loader.path": "the data are the user's",
        "*_loader.text_embedding": "the encoder costs more than the denoiser",
        "model.text_encoder.compile": "it runs once, before",
        "train_loader.mix.*": "the data are the user's",
        "global_train_batch_size": "one GPU",
        "global_eval_batch_size": "one GPU",
        "eval_subset_num_batches": "one GPU",
        "device_train_microbatch_size": "what fits, by the plan",
        "parallelism_config.fsdp.*": "one GPU",
        "optimizer.lr": "the rule",
        "optimizer.adam_lr": "the rule",
        "algorithms.tread.end_block": "depth",
        "algorithms.repa.block": "depth",
        "algorithms.repa.end": "the first stage's share of the time",
        "algorithms.progressive_resolution.stages.*": "batches",
    },
    "eight_gpus": {
        "run_name": "it is another run",
        "time_budget": "of its own hours",
        "model.backbone.size": "a name for the same numbers",
        "model.backbone.hidden_size": "a name for the same numbers",
        "model.backbone.depth": "a name for the same numbers",
        "model.backbone.num_heads": "a name for the same numbers",
        "*_loader.path": "the data are the user's",
        "*_loader.text_embedding": "the encoder costs more than the denoiser",
        "model.text_encoder.compile": "it runs once, before",
        "train_loader.mix.*": "the data are the user's",
        "device_train_microbatch_size": "what fits, by the plan",
        "algorithms.progressive_resolution.stages.*.device_train_microbatch_size": "what fits, by the plan",
    },
}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        below = [leaves(child, f"{path}.{key}" if path else str(key)) for key, child in value.items()]
        return {p: leaf for part in below for p, leaf in part.items()}
    if isinstance(value, list) and value:
        return {p: leaf for index, child in enumerate(value) for p, leaf in leaves(child, f"{path}.{index}").items()}
    return {path: value}


def test_the_mini_recipe_differs_from_the_24h_recipe_only_where_a_reason_is_given() -> None:
    full, mini = (leaves(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())) for name in ("24h", "24h_mini"))
    differing = {path for path in full.keys() | mini.keys() if full.get(path) != mini.get(path)}
    unexplained = {path for path in differing if not any(fnmatch.fnmatch(path, pattern) for pattern in MAY_DIFFER)}
    assert not unexplained, {path: (full.get(path), mini.get(path)) for path in sorted(unexplained)}
    unused = {pattern for pattern in MAY_DIFFER if not any(fnmatch.fnmatch(path, pattern) for path in differing)}
    assert not unused, f"these are the same now: {sorted(unused)}"


@pytest.mark.parametrize("name", BY_HARDWARE)
def test_a_recipe_by_hardware_differs_from_the_24h_recipe_only_where_a_reason_is_given(name: str) -> None:
    full, ours = (leaves(yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())) for recipe in ("24h", name))
    differing = {path for path in full.keys() | ours.keys() if full.get(path) != ours.get(path)}
    unexplained = {path for path in differing if not any(fnmatch.fnmatch(path, pattern) for pattern in BY_HARDWARE[name])}
    assert not unexplained, {path: (full.get(path), ours.get(path)) for path in sorted(unexplained)}
    unused = {pattern for pattern in BY_HARDWARE[name] if not any(fnmatch.fnmatch(path, pattern) for path in differing)}
    assert not unused, f"these are the same now: {sorted(unused)}"


@pytest.mark.parametrize("name", BY_HARDWARE)
def test_a_recipe_by_hardware_has_the_learning_rate_of_the_rule_that_it_states(name: str) -> None:
    """By the square root of the batch, from the reference's; rounded to the two digits that are written."""
    full, ours = (yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()) for recipe in ("24h", name))
    assert "times the square root of batch / 1024" in (RECIPES / f"{name}.yaml").read_text()
    for key in ("lr", "adam_lr"):
        expected = full["optimizer"][key] * (ours["global_train_batch_size"] / full["global_train_batch_size"]) ** 0.5
        assert ours["optimizer"][key] == float(f"{expected:.1e}")
    depth = with_size(ours["model"])["backbone"]["depth"]
    assert ours["algorithms"]["tread"]["end_block"] == depth - 2 and ours["algorithms"]["repa"]["block"] == depth // 2 - 1
    batches = [stage["global_train_batch_size"] for stage in ours["algorithms"]["progressive_resolution"]["stages"]]
    assert batches == [ours["global_train_batch_size"], ours["global_train_batch_size"] // 2], "as the reference's"


def test_both_have_the_same_algorithms_and_callbacks_in_the_same_order_and_as_many_stages() -> None:
    full, mini = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("24h", "24h_mini"))
    assert list(full["algorithms"]) == list(mini["algorithms"])
    assert list(full["callbacks"]) == [name for name in mini["callbacks"] if name != "shapes_score"]
    stages = [recipe["algorithms"]["progressive_resolution"]["stages"] for recipe in (full, mini)]
    for of_full, of_mini in zip(*stages, strict=True):
        assert list(of_full) == list(of_mini)
    ends = [recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] for recipe in (full, mini)]
    assert ends == ["100000ba or 0.78budget", "1800ba or 0.46budget"]
    assert [full["max_duration"], mini["max_duration"]] == ["120000ba", "3300ba"]


@pytest.mark.parametrize(
    ("name", "below", "changed"), [("24h_next", "24h", {"model"}), ("24h_next_mini", "24h_mini", {"max_duration"})]
)
def test_the_next_recipe_has_all_of_the_reference_s_but_what_it_changes(name: str, below: str, changed: set[str]) -> None:
    old, new = (vars(config.load([str(RECIPES / f"{recipe}.yaml")])) for recipe in (below, name))
    assert {key for key in old if old[key] != new[key]} == {"run_name", "optimizer", "algorithms", "run_folder", *changed}
    assert {key for key in old["model"] if old["model"][key] != new["model"][key]} <= {"flow"}
    assert list(new["algorithms"]) == [*old["algorithms"], "timestep_phases", "readouts"]
    config.check(config.load([str(RECIPES / f"{name}.yaml")]))


def test_the_next_mini_sees_three_fifths_of_the_mini_s_images() -> None:
    old, new = (config.load([str(RECIPES / f"{recipe}.yaml")]) for recipe in ("24h_mini", "24h_next_mini"))
    batches = [int(str(recipe.max_duration).removesuffix("ba")) for recipe in (new, old)]
    assert batches[0] / batches[1] <= 0.6
    stages = [recipe.algorithms["progressive_resolution"]["stages"] for recipe in (new, old)]
    assert {stage["global_train_batch_size"] for stages in stages for stage in stages} == {old.global_train_batch_size}


def test_every_value_of_the_next_recipe_has_its_evidence_beside_it() -> None:
    told = -1  # how deep the key is indented whose comment is for all below it
    for line in (RECIPES / "24h_next.yaml").read_text().splitlines():
        depth = len(line) - len(line.lstrip())
        told = told if depth > told else -1
        key, _, value = line.strip().partition(":")
        if not line or line.startswith(("#", "base", "run_name")) or not (value or told >= 0):
            continue
        if "#" in line and told < 0:
            told = depth if not value.split("#")[0].strip() else -1
        elif value.split("#")[0].strip():
            assert told >= 0, f"{key} has no evidence"


def test_every_value_of_the_24h_recipe_can_be_traced() -> None:
    """The header names the source of what has no comment; sections of our own say so."""
    text = (RECIPES / "24h.yaml").read_text()
    assert "Every value's source is Photoroom's PRX blog, part 3" in text
    for ours in ("seed", "eval_loader", "skip_nonfinite", "callbacks", "eval_interval", "save_interval"):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{ours}:"))
        assert "ours" in line, line


def test_the_card_and_the_recipe_name_as_many_buckets_as_their_data_are_converted_into() -> None:
    """By the commands of DATA.md, which leave the sizes to their defaults."""
    settings = {f.name: f.default for f in dataclasses.fields(Settings)}
    commands = [line for line in (CARD / "DATA.md").read_text().splitlines() if "prx data convert" in line]
    assert commands and not any(option in line for line in commands for option in ("--base-size", "--patch", "--bucket"))
    made = make_buckets(settings["image_size"], settings["multiple"], settings["bucket_aspect"])
    for text in ((CARD / "README.md").read_text(), (RECIPES / "24h.yaml").read_text()):
        assert re.findall(r"(\d+) aspect buckets", text) == [str(len(made))]
    full = yaml.safe_load((RECIPES / "24h.yaml").read_text())
    assert settings["multiple"] == full["model"]["backbone"]["patch_size"]


def test_the_24h_recipe_has_the_reference_s_timesteps_guidance_and_date() -> None:
    text = (RECIPES / "24h.yaml").read_text()
    full = yaml.safe_load(text)
    assert full["model"]["flow"]["shift_uniform"] is False
    assert full["algorithms"]["tread"]["self_guidance"] and full["callbacks"]["images"]["guidance_scale"] == 3.5
    assert "part 3 (3 March 2026)" in text and "July" not in text


def test_launch_files_name_the_recipe_and_its_shape() -> None:
    folder = REPOSITORY / "recipes" / "speedrun_24h"
    subprocess.run(["bash", "-n", str(folder / "slurm.sh")], check=True)
    slurm = (folder / "slurm.sh").read_text()
    sky = yaml.safe_load((folder / "sky.yaml").read_text())
    recipe = yaml.safe_load((RECIPES / "24h.yaml").read_text())
    assert "#SBATCH --nodes=4" in slurm and "#SBATCH --gpus-per-node=8" in slurm and sky["num_nodes"] == 4
    assert sky["resources"]["accelerators"] == "H200:8" and recipe["parallelism_config"]["fsdp"]["shard_degree"] == 8
    for text in (slurm, sky["run"]):
        assert "train.py yamls/24h.yaml" in text and "--base_rank" in text and "--master_addr" in text
