"""What a person with a wheel, or with a clone, is told: extras, recipes, and what `prx env` prints."""

import ast
import json
import os
import platform
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import REPOSITORY, prx

from prx_composer.commands import recipes
from prx_composer.common import installation
from prx_composer.common.errors import UserError
from prx_composer.recipe import config

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_an_extra_is_added_by_uv_in_a_clone_and_beside_a_wheel_by_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.clone() == REPOSITORY
    assert installation.adding("trackers") == "uv sync --inexact --extra trackers"
    assert installation.training() == ["composer", "train.py"]
    monkeypatch.setattr(installation, "clone", lambda: None)
    assert installation.adding("lora").endswith("pip install 'peft>=0.17'")
    assert {name: len(packages) for name, packages in installation.extras().items()} == {
        name: len(packages) for name, packages in PROJECT["optional-dependencies"].items()
    }
    assert installation.training() == ["composer", "-m", "prx_composer.cli", "train"]


def test_every_extra_that_a_message_names_is_one() -> None:
    named = {
        argument.value
        for file in (REPOSITORY / "prx_composer").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("adding", "require")
        for argument in node.args[:1]
        if isinstance(argument, ast.Constant)
    }
    assert len(named) >= 8 and named <= PROJECT["optional-dependencies"].keys()


def test_what_lacks_of_an_extra_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installation.require("data", "prx data convert")
    monkeypatch.setattr(installation, "version_of", lambda package: None if package == "pyarrow" else "1")
    with pytest.raises(UserError, match=r"^prx data convert needs pyarrow: uv sync --inexact --extra data$"):
        installation.require("data", "prx data convert")
    said = prx(
        "data", "convert", "--source", "parquet", "--caption", "c", "--input", tmp_path, "--output", tmp_path / "out", code=1
    )
    assert said == "prx data convert needs pyarrow: uv sync --inexact --extra data"


# --------------------------------------------------------------------------------------------------------------- prx env

SMI = """#!/bin/sh
echo "NVIDIA H200, 143771 MiB, 550.54.15"
echo "NVIDIA H200, 143771 MiB, 550.54.15"
"""


def test_env_says_what_is_installed_and_nobody_s_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCH_ACCESS_TOKEN", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_HOME", str(Path.home() / "hub"))
    text = prx("env")
    assert "2 × NVIDIA H200, 143771 MiB, driver 550.54.15" in text
    assert f"torch is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}" in text  # pyright: ignore[reportAttributeAccessIssue]
    assert f"Python {platform.python_version()}" in text and torch.__version__.split("+")[0] in text
    assert "NCCL_DEBUG=INFO" in text and "HF_HOME=~/hub" in text
    assert "secret" not in text and str(Path.home()) + os.sep not in text
    found = json.loads(prx("env", "--json"))
    assert found["environment"]["NCCL_DEBUG"] == "INFO" and len(found["gpus"]) == 2
    assert found["extras"]["lora"].keys() == {"peft"}
    monkeypatch.setenv("PATH", str(tmp_path.parent))  # neither git nor nvidia-smi
    found = json.loads(prx("env", "--json"))
    assert found["gpus"] is None and found["commit"] is None


# ----------------------------------------------------------------------------------------------------------- prx recipes


def test_every_recipe_is_listed_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [file.relative_to(REPOSITORY / "yamls").with_suffix("").as_posix() for file in (REPOSITORY / "yamls").rglob("*.yaml")]
    lines = dict(line.split(maxsplit=1) for line in prx("recipes").splitlines() if line and not line.startswith("prx "))
    assert lines.keys() == set(files)
    assert all(len(about) > 20 for about in lines.values())
    assert lines["quickstart"].startswith("From nothing to a text-to-image model in minutes on a laptop")


def test_a_copied_recipe_has_what_it_is_based_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = config.load([str(REPOSITORY / "yamls" / "24h_next_mini.yaml")])
    monkeypatch.chdir(tmp_path)
    said = prx("recipes", "copy", "24h_next_mini", "ablations/tread")
    assert said.splitlines()[-1] == "yamls/ablations/tread.yaml" and "yamls/24h.yaml" in said
    assert config.load(["yamls/24h_next_mini.yaml"]) == here
    prx("recipes", "copy", "architectures/published/microdit_512")
    assert Path("yamls/architectures/published/microdit.py").is_file(), "code of a recipe's own comes with it"
    prx("recipes", "copy", "ablations")
    assert len(list(Path("yamls/ablations").iterdir())) == len(list((REPOSITORY / "yamls" / "ablations").iterdir()))


def test_a_recipe_of_one_s_own_is_not_written_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "Did you mean 'quickstart'?" in prx("recipes", "copy", "quickstrat", "--output", tmp_path, code=1)
    prx("recipes", "copy", "quickstart", "--output", tmp_path)
    prx("recipes", "copy", "quickstart", "--output", tmp_path)  # the same once more
    mine = tmp_path / "yamls" / "quickstart.yaml"
    mine.write_text("seed: 3\n")
    assert "is there already, and another" in prx("recipes", "copy", "quickstart", "--output", tmp_path, code=1)
    assert mine.read_text() == "seed: 3\n"


def test_the_recipes_of_a_wheel_lie_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installation, "_PACKAGE", tmp_path / "site-packages" / "prx_composer")
    assert installation.clone() is None and installation.commit() is None
    assert installation.recipes() == tmp_path / "site-packages" / "prx_composer" / "yamls"
    assert recipes.installation is installation
