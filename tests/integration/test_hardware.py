"""The recipes by hardware: each passes check and plan with the GPU that it names, trains, and is on the page as it is planned."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from stacks import REPOSITORY, at_toy_size
from test_docs import HARDWARE, plan
from test_docs import commands as documented
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import run

PAGE = REPOSITORY / "recipes" / "README.md"
RECIPES = ("one_gpu_24gb", "one_gpu_80gb", "eight_gpus")


def commands(name: str) -> dict[str, list[str]]:
    """What the head of a recipe says to type before it costs anything, by verb, without `uv run prx`."""
    text = (REPOSITORY / "yamls" / f"{name}.yaml").read_text()
    return {line.split()[0]: line.split() for line in re.findall(r"^#     uv run prx (.*)$", text, flags=re.MULTILINE)}


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Any]]:
    found = {}
    for name in RECIPES:
        result = CliRunner().invoke(app, [*commands(name)["plan"], "--json"])
        assert result.exit_code == 0, result.exception
        found[name] = json.loads(result.output)
    return found


@pytest.mark.parametrize("name", [*RECIPES, "one_gpu_256px"])
def test_the_check_of_its_configuration_passes(name: str) -> None:
    result = CliRunner().invoke(app, commands(name)["check"])
    assert result.exit_code == 0 and "✗" not in result.output, result.output


@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_the_gpu_that_it_names_and_its_time(name: str, plans: dict[str, dict[str, Any]]) -> None:
    plan = plans[name]
    assert plan["fits_budget"] and all(stage["fits"] for stage in plan["stages"]), plan["hours"]
    assert "text encoder" not in plan["stages"][0]["flops"] and "stored" in plan["text"]
    until = config.load([f"yamls/{name}.yaml"], 8).algorithms["progressive_resolution"]["stages"][0]["until"]
    share = float(re.fullmatch(r"\d+ba or ([\d.]+)budget", until)[1])  # pyright: ignore[reportOptionalSubscript]
    assert plan["stages"][0]["hours"] / plan["training_hours"] == pytest.approx(share, abs=0.01)


@pytest.mark.docs
@pytest.mark.parametrize("line", [line for _, line in documented() if line.startswith(HARDWARE)])
def test_documented_plans_run(line: str, plans: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, line)  # in the process that has counted these models for the tests around it


def row(name: str, plan: dict[str, Any]) -> str:
    """What the page says of a recipe, from its plan."""
    gpu, count, gib = plan["conditions"]["gpu"], plan["conditions"]["num_gpus"], 2**30
    stages = plan["stages"]
    cells = [
        f"[`{name}.yaml`](../yamls/{name}.yaml)",
        f"{count} × {gpu['name']}",
        f"{plan['parameters'] / 1e6:,.0f}M",
        " → ".join(f"{stage['image_size']} px" for stage in stages),
        " → ".join(f"{stage['batch_size']:,} / {stage['microbatch_size']}" for stage in stages),
        f"{plan['images'] / 1e6:.1f}M",
        " → ".join(f"{stage['images_per_second'] * count:,.0f}" for stage in stages),
        " → ".join(f"{stage['memory']['peak'] / gib:.1f}" for stage in stages) + f" of {gpu['memory_gib']:.1f}",
        f"{plan['hours']:.0f}",
        f"{plan['hours'] * count:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_page_says_what_the_plan_says(plans: dict[str, dict[str, Any]]) -> None:
    text = PAGE.read_text()
    missing = [wanted for name in RECIPES if (wanted := row(name, plans[name])) not in text.splitlines()]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_three_steps_and_both_stages_at_toy_size(
    name: str, shapes_data: Path, tmp_path: Path, write_recipe: Any
) -> None:
    run(config.load([write_recipe(at_toy_size(name, shapes_data, tmp_path), f"{name}.yaml")]))
    rows = [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss/train/total" in row]
    assert len(rows) == 3
    assert all({f"loss/train/{term}" for term in ("flow", "repa", "lpips", "perceptual_dino")} <= row.keys() for row in rows)
    assert (
        list((tmp_path / name / "images").iterdir())
        and "size" not in config.load([str(tmp_path / name / "config.yaml")]).model["backbone"]
    )
