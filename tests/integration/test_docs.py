"""Documentation is executed: every command and snippet of README, recipes and cards, with training cut short."""

import functools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from commands import prx
from icon_sets import write_sets, write_tarball

from prx_composer.integrations.foundry_names import INSTALL, is_installed

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("docs", "recipes", "prx_composer")
PAGES = sorted([*REPOSITORY.glob("*.md"), *(page for folder in FOLDERS for page in REPOSITORY.glob(f"{folder}/**/*.md"))])
SHORT = "max_duration=6ba eval_interval=6ba save_interval=3ba"
SHORT_STAGES = "scheduler.t_warmup=2ba 'algorithms.progressive_resolution.stages[0].until=3ba' algorithms.repa.end=3ba"
SHORT_SCORE = "callbacks.shapes_score.num_inference_steps=1 callbacks.shapes_score.images_per_prompt=1"
SHORT_IMAGES = "callbacks.images.num_inference_steps=2"
SHORT_CONCEPT = "callbacks.concept_score.num_inference_steps=1 callbacks.concept_score.images_per_prompt=1"
SHORT_STYLE = "train_loader.source.trained_names=5 global_train_batch_size=4 callbacks.icons_score.num_inference_steps=1"
CAPTIONER = "HuggingFaceTB/SmolVLM-500M-Instruct"  # weights of the hub: a tiny one stands in
SHORT_COST = "--steps 1 --together 20 --stage 0"
KEPT = {  # by `ablate.py --cost`: one or two of a stack are measured
    "24h_mini": ("skip_nonfinite", "gradient_clipping", "low_precision_norm", "ema", "lpips", "perceptual_dino"),
    "custom_stack": ("gradient_clipping", "ema"),
}
# The first line of each kind is run as it is written. The others go without `uv run`, in forks of what is imported (warm.py).
KINDS = (
    "uv run composer train.py",
    "uv run prx",
    "uv run python recipes",
    "uv run --group foundry llmfoundry",
)
OWN_ORDER = "run_name=mini_fsdp"  # the whole stack on ranks that order sets each in its own way: a fork and a new interpreter
# In this process, which counts a model once for all commands that plan it: some 8 s each.
PLANS, ROOFLINES = "uv run prx plan ", "uv run python benchmarks/roofline.py "
HARDWARE = tuple(f"{PLANS}yamls/{name}.yaml --gpu" for name in ("one_gpu_24gb", "one_gpu_80gb", "eight_gpus"))  # test_hardware.py
# Not run here: what sets up the environment (CI has done it) and what runs the tests, this one among them.
ELSEWHERE = (
    "pip install uv",
    "uv sync",
    "uv run pytest",
    "uv run ruff",
    "uv run basedpyright",
    "uv run mkdocs",
    "git clone",
    "cd ",
)
FETCHES = (
    "mkdir -p data/icon_sets && npm pack",
    "mkdir -p data/fifth_set && npm pack",
)  # from a registry, which a test may not reach: tiny sets are drawn instead


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            found.append((str(page.relative_to(REPOSITORY)), block))
    return found


@functools.cache
def commands() -> list[tuple[str, str]]:
    lines = []
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip()
            line = line.removeprefix("pip install uv && ")
            if line and not line.startswith("#") and not line.startswith((*ELSEWHERE, *FETCHES)):
                lines.append((page, line))
    first: dict[str, str] = {}
    for page, line in lines:
        first.setdefault(line, page)
    return [(page, line) for line, page in first.items()]  # each once, where it is first said


@functools.cache
def as_written() -> set[str]:
    return {next(line for _, line in commands() if line.startswith(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout's recipes to run in, so that runs/ and data/ of the real one stay as they are."""
    from captioners import write_llava  # imports much

    folder = tmp_path_factory.mktemp("workshop")
    for name in ("train.py", "yamls", "recipes", "prx_composer", "benchmarks"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    write_sets(folder / "data" / "icon_sets")
    (folder / "data" / "fifth_set").mkdir()
    write_tarball(folder / "data" / "fifth_set", "flat")
    write_llava(folder / "captioner")
    return folder


def test_there_is_documentation_to_run() -> None:
    assert any("train.py yamls/quickstart.yaml" in line for _, line in commands())
    assert len(blocks("python")) >= 3


def plan(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Runs `uv run prx plan …` or `uv run python benchmarks/roofline.py …`."""
    program, *arguments = shlex.split(line)[2:]
    if program == "prx":
        assert "total" in prx(*arguments), arguments
        return
    monkeypatch.setattr(sys, "argv", list(arguments))
    monkeypatch.setattr(sys, "path", [*sys.path, str(REPOSITORY / "benchmarks")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / arguments[0]), run_name="__main__")
    assert ended.value.code == 0, arguments


@pytest.mark.docs
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("page", "line"), [pair for pair in commands() if not pair[1].startswith(HARDWARE)], ids=lambda value: value[:70]
)
def test_documented_commands_run(page: str, line: str, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--group foundry" in line and not is_installed():
        pytest.skip(f"llm-foundry isn't installed: {INSTALL}")
    *before, last = line.split(" && ")
    if last.startswith((PLANS, ROOFLINES)) and line not in as_written():
        monkeypatch.chdir(workshop)
        for command in before:
            subprocess.run(command, shell=True, check=True)
        plan(monkeypatch, last)
        return
    environment = os.environ | {"UV_PROJECT": str(REPOSITORY), "WANDB_MODE": "offline"}
    if line not in as_written() and warm.folder():
        line = re.sub(r"uv run (--group \w+ )?", "", line)
        environment["PATH"] = os.pathsep.join([warm.folder(), str(Path(sys.executable).parent), environment["PATH"]])
    if OWN_ORDER in line:
        environment[warm.REAL_RANKS] = "1"
    if "train.py" in line and "max_duration=" not in line:
        line = f"{line} {SHORT}"
    if "fifth_style" in line:
        line = f"{line} {SHORT_IMAGES} {SHORT_STYLE}"
    elif "train.py" in line and "finetune" in line:
        line = f"{line} {SHORT_CONCEPT}"
    elif "train.py" in line and "callbacks=" not in line:
        scored = not any(name in line for name in ("digits", "icons", "my_images", "mine.yaml", "shapes_score=false"))
        line = f"{line} {SHORT_IMAGES} {SHORT_SCORE if scored else ''}"
        if "digits" in line:
            line = f"{line} callbacks.digits_score.images=20"
        if "icons" in line:
            line = f"{line} callbacks.icons_score.num_inference_steps=1"
    if ("train.py" in line or "prx check" in line) and "24h_mini" in line:  # a check finds the run of the command before it
        line = f"{line} {SHORT_STAGES}"
    if "data convert" in line:  # workers are new interpreters, which other tests start
        line = f"{line} --workers 0"
    if "prior_prompts" in line:  # hundreds of images
        line = f"{line} --steps 1"
    if "--cost" in line:
        kept = next(names for recipe, names in KEPT.items() if recipe in line)
        line = " ".join([line, SHORT_COST, *(f"--keep {name}" for name in kept)])
    elif "ablate.py" in line:
        line = f"{line} {SHORT} {SHORT_SCORE} --seed 17"
    line = line.replace(f"--model {CAPTIONER}", "--model captioner --max-new-tokens 2")
    line = re.sub(r"(plain_composer.py \S+) \d+ba", r"\1 6ba", line)
    line = re.sub(r"t_warmup: \d+ba", "t_warmup: 2ba", line)
    line = re.sub(r"max_duration=\d+ba", "max_duration=6ba", line).replace("uv run ", "uv run --no-sync ")
    finished = subprocess.run(line, shell=True, cwd=workshop, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"{page}: {line}\n{finished.stdout[-2000:]}\n{finished.stderr[-3000:]}"


@pytest.mark.docs
@pytest.mark.parametrize(("page", "snippet"), blocks("python"), ids=lambda value: value[:30])
def test_documented_snippets_run(page: str, snippet: str) -> None:
    exec(compile(snippet, page, "exec"), {})


@pytest.mark.docs
def test_the_notebook_goes_from_data_to_diffusers(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, one after another in this process; committed without what they showed."""
    cells = [c for c in json.loads((REPOSITORY / "recipes/first_hour.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    shown = []
    monkeypatch.chdir(workshop / "recipes")  # where Jupyter begins
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    scope = {"display": shown.append}
    for cell in cells:
        source = "".join(cell["source"]).replace("max_duration={BATCHES}ba", f"{SHORT} {SHORT_IMAGES} {SHORT_SCORE}")
        exec(compile(source, "first_hour.ipynb", "exec"), scope)
    assert len(shown) >= 2 and scope["image"].size == (32, 32)
    assert (workshop / "runs/first_hour/report.html").exists()
