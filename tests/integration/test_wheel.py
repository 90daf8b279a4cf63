"""The wheel, built from the sdist, in an environment where nothing of the clone is found: recipes are there, and one trains."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from commands import REPOSITORY

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, the packages that it needs, and no network."""
    folder = tmp_path_factory.mktemp("wheel")
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    run(*hatchling, "-t", "sdist", cwd=REPOSITORY)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(*hatchling, "-t", "wheel", cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.split("-")[1] == sdist.name.removesuffix(".tar.gz").split("-")[1], "an sdist has its version"
    venv.create(folder / "environment", with_pip=False)
    bin_folder = folder / "environment" / "bin"
    (packages,) = (folder / "environment").glob("lib/*/site-packages")
    # A folder that is only on the path: the files in it that lead to the clone are not read.
    (packages / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(packages)
    (script,) = (point for point in entry_points(group="console_scripts") if point.name == "prx")
    program = f"#!{bin_folder / 'python'}\nimport sys\nfrom {script.module} import {script.attr}\nsys.exit({script.attr}())\n"
    (bin_folder / "prx").write_text(program)
    (bin_folder / "prx").chmod(0o755)
    return bin_folder


def test_a_recipe_of_the_wheel_is_copied_and_trained_in_an_empty_folder(bin_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    where = run(bin_folder / "python", "-c", "import prx_composer; print(prx_composer.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(bin_folder.parent)
    run(bin_folder / "prx", "recipes", "copy", "quickstart", cwd=tmp_path, env=environment)
    short = ["max_duration=2ba", "train_loader.source.images_per_scene=1", "train_loader.num_workers=0", "preflight=false"]
    short += ["callbacks={}", "eval_loader=null"]
    said = run(bin_folder / "prx", "train", "yamls/quickstart.yaml", *short, cwd=tmp_path, env=environment)
    assert said.strip().splitlines()[-1].endswith("prx report runs/quickstart")
    assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "ba2").exists()
