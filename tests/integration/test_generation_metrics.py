"""The callback `generation_metrics`, and the folders that benchmarks' scorers read."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from conftest import train_once
from PIL import Image
from test_evaluate import CPU, networks, numbers, prx  # noqa: F401  (a fixture)
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from prx_composer.common.errors import UserError
from prx_composer.metrics.features import inception_images
from prx_composer.metrics.real_images import DataSet, read_square
from prx_composer.metrics.scoring import Networks, Scorer
from prx_composer.recipe import config
from prx_composer.training.run import run

Recipe = dict[str, Any]
Write = Callable[..., str]


def with_metrics(recipe: Recipe, networks: dict[str, Path], folder: Path) -> Recipe:  # noqa: F811
    arguments = {
        "path": recipe["train_loader"]["path"],
        "num": 20,
        "metrics": ["cmmd", "fd_dino", "clip_score"],
        "networks": {"clip": str(networks["clip"]), "clip_score": str(networks["clip"]), "dino": str(networks["dino"])},
        "interval": "4ba",
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "cache": str(folder / "cache"),
    }
    return copy.deepcopy(recipe) | {"callbacks": {"generation_metrics": arguments}, "run_name": "watched"}


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare_with_prx_evaluate(
    run_folder: Path,
    num: int,
    line: dict[str, Any],
    networks: dict[str, Path],  # noqa: F811
    folder: Path,
) -> None:
    clip = networks["clip"]
    prx(
        "evaluate", run_folder, "--metrics", "cmmd,fd_dino,clip_score", "--clip", clip, "--clip-score", clip,
        "--dino", networks["dino"], "--num", num, "--seeds", 0, "--steps", 2, "--guidance-scale", 2, "--device", "cpu",
        "--cache", folder / "cache", "--output", folder / "out" / "numbers.json",
    )  # fmt: skip
    (row,) = numbers(folder)
    assert row["weights"] == "ema"
    for name, metric in row["metrics"].items():
        assert line[f"metrics/generation/{name}"] == pytest.approx(metric["mean"], rel=1e-3, abs=1e-4), name


def test_a_run_logs_what_prx_evaluate_measures_afterwards_and_learns_the_same(
    tiny_recipe: Recipe,
    write_recipe: Write,
    networks: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = with_metrics(tiny_recipe, networks, tmp_path)
    run(config.load([write_recipe(recipe, "watched.yaml")]))
    plain = copy.deepcopy(tiny_recipe) | {"run_name": "plain"}
    run(config.load([write_recipe(plain, "plain.yaml")]))
    lines = logged(folder_of(recipe))
    found = {line["batch"]: line for line in lines if "metrics/generation/cmmd" in line}
    assert len(found) == 2, "at half and at the end"
    losses = [
        [line[key] for line in log for key in line if key == "loss/train/total"] for log in (lines, logged(folder_of(plain)))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    compare_with_prx_evaluate(folder_of(recipe), 20, found[max(found)], networks, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metrics": ["fdd"]}, "'fdd' is no metric"),
        ({"networks": {"klip": "x"}}, "networks.klip"),
        ({"networks": {"clip": "/nowhere/clip"}}, "/nowhere/clip cannot be loaded"),
        ({"path": "/nowhere"}, "There is no data set in /nowhere/train"),
        ({"image_size": 18}, "image_size: 18 is not a multiple of 4"),
    ],
)
def test_it_says_before_training_what_is_wrong(
    arguments: dict[str, Any],
    said: str,
    tiny_recipe: Recipe,
    write_recipe: Write,
    networks: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = with_metrics(tiny_recipe, networks, tmp_path)
    recipe["callbacks"]["generation_metrics"] |= arguments
    with pytest.raises(UserError, match=said) as error:
        run(config.load([write_recipe(recipe)]))
    assert "callbacks.generation_metrics" in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fid_is_torchmetrics_fid(shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in a file, on images of the size that the network reads."""
    made: dict[str, torch.Tensor] = {}
    with monkeypatch.context() as context:
        context.setattr(torch, "load", lambda *args, **kwargs: {})
        context.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, state: made.update(self.state_dict()))
        NoTrainInceptionV3("inception-v3-compat", ["2048"], "anything")
    torch.save({name: tensor.clone() for name, tensor in made.items()}, tmp_path / "inception.pth")
    data = DataSet(str(shapes_data))
    scorer = Scorer(["fid"], Networks(inception=str(tmp_path / "inception.pth")))
    scorer.compare_with(data, 6, tmp_path, 6, CPU)
    images = torch.stack([read_square(data, index * 40, 299) for index in range(6)])  # pyright: ignore[reportArgumentType]
    ours = scorer.score(lambda indices: 255 - images[indices], ["a shape"] * 6, 6, CPU)
    extractor = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "inception.pth"))
    with torch.no_grad():
        spanned = torch.linalg.qr(torch.cat([extractor(images), extractor(255 - images)]).double().T).Q

    class InTheirSpan(nn.Module):
        """Twelve images span twelve dimensions, in which distances stay: eigenvalues of 2048 × 2048 take half a minute."""

        num_features = 12

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return extractor(pixels).double() @ spanned

    metric = FrechetInceptionDistance(feature=InTheirSpan(), input_img_size=(3, 299, 299)).set_dtype(torch.float64)
    metric.update(images, real=True)
    metric.update(255 - images, real=False)
    assert ours["fid"] == pytest.approx(metric.compute().item(), rel=1e-3)


def test_weights_of_inception_that_are_none_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(OSError, match="cannot be loaded"):
        inception_images(str(tmp_path / "other.pth"))


# -------------------------------------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    return train_once(tmp_path_factory, shapes_data)


def test_geneval_finds_its_metadata_and_four_samples_of_every_prompt(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As its evaluate_images.py looks for them."""
    entries = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
        {"tag": "counting", "include": [{"class": "bowl", "count": 3}], "prompt": "a photo of three bowls"},
    ]
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    arguments = (
        "evaluate",
        trained,
        "--layout",
        "geneval",
        "--prompts",
        metadata,
        "--steps",
        2,
        "--size",
        "16x24",
        "--device",
        "cpu",
    )
    prx(*arguments, "--output", tmp_path / "geneval")
    assert caplog.text.count("is not read whole") == 3 and "does not know 'photo', 'bench'" in caplog.text
    assert sorted(path.name for path in (tmp_path / "geneval").iterdir()) == ["00000", "00001", "00002"]
    for number, entry in enumerate(entries):
        folder = tmp_path / "geneval" / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == entry
        samples = sorted((folder / "samples").iterdir())
        assert [sample.name for sample in samples] == [f"{index:05d}.png" for index in range(4)]
        images = [np.array(Image.open(sample)) for sample in samples]
        assert images[0].shape == (16, 24, 3) and len({image.tobytes() for image in images}) == 4
    removed = tmp_path / "geneval" / "00001" / "samples" / "00002.png"
    before = removed.read_bytes()
    removed.unlink()
    untouched = tmp_path / "geneval" / "00000" / "samples" / "00000.png"
    written = untouched.stat().st_mtime_ns
    prx(*arguments, "--output", tmp_path / "geneval")
    assert (
        np.abs(np.array(Image.open(removed)).astype(int) - np.array(Image.open(_saved(before, tmp_path))).astype(int)).max() <= 1
    )
    assert untouched.stat().st_mtime_ns == written, "what is there is kept"
    assert "other settings" in prx(*arguments, "--output", tmp_path / "geneval", "--guidance-scale", 5, code=1)
    metadata.write_text(metadata.read_text().replace("red cow", "blue cow"))
    assert "weights or prompts" in prx(*arguments, "--output", tmp_path / "geneval", code=1), "images of another prompt"


def _saved(content: bytes, folder: Path) -> Path:
    (folder / "before.png").write_bytes(content)
    return folder / "before.png"


def test_dpg_bench_finds_a_grid_under_the_name_of_the_prompts_file(trained: Path, tmp_path: Path) -> None:
    """Its scorer cuts squares of --resolution pixels, left to right and top to bottom."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "1.txt").write_text("a red circle on the left of a white background\n")
    (prompts / "midjourney12.txt").write_text("a blue ring in the centre of a black background")
    said = prx(
        "evaluate", trained, "--layout", "dpg", "--prompts", prompts, "--steps", 2, "--output", tmp_path / "dpg", "--seeds", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert "--resolution 16 --pic-num 4" in said
    assert sorted(path.name for path in (tmp_path / "dpg").iterdir()) == ["1.png", "midjourney12.png"]
    facts = json.loads((tmp_path / "dpg.json").read_text())
    assert facts["seed"] == 2 and facts["weights_sha256"] and facts["versions"]
    grid = np.array(Image.open(tmp_path / "dpg" / "midjourney12.png")).astype(int)
    assert grid.shape == (32, 32, 3)
    drawn = tmp_path / "drawn"
    prx(
        "generate", trained, "-p", "a blue ring in the centre of a black background", "--images-per-prompt", 4, "--steps", 2,
        "--seed", 2_000_004, "--output", drawn, "--no-grid",
    )  # fmt: skip
    tiles = [grid[:16, :16], grid[:16, 16:], grid[16:, :16], grid[16:, 16:]]
    for tile, path in zip(tiles, sorted(drawn.glob("*.png")), strict=True):
        assert np.abs(tile - np.array(Image.open(path))).max() <= 1


def test_a_layout_says_what_is_wrong_with_its_prompts(trained: Path, tmp_path: Path) -> None:
    common = ("evaluate", trained, "--output", tmp_path / "out", "--device", "cpu", "--layout")
    assert "is none of geneval, dpg" in prx(*common, "coco", "--prompts", tmp_path, code=1)
    assert "has no *.txt" in prx(*common, "dpg", "--prompts", tmp_path, code=1)
    (tmp_path / "lines.txt").write_text('{"prompt": "a bench"}\n')
    assert 'line 1 has no "prompt" and "tag"' in prx(*common, "geneval", "--prompts", tmp_path / "lines.txt", code=1)
    assert "needs --prompts" in prx(*common, "geneval", code=1)
    assert "cuts squares" in prx(*common, "dpg", "--prompts", tmp_path, "--size", "16x24", code=1)
    assert "one guidance scale" in prx(*common, "dpg", "--prompts", tmp_path, "--guidance-scale", "1,2", code=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_of_a_sharded_model_log_what_one_process_measures_of_its_checkpoint(
    tiny_recipe: Recipe,
    write_recipe: Write,
    networks: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """21 prompts: ranks that had different numbers of batches would wait for each other forever."""
    recipe = with_metrics(tiny_recipe, networks, tmp_path) | {"max_duration": "4ba", "save_interval": "4ba"}
    recipe["callbacks"]["generation_metrics"] |= {"num": 21, "batch_size": 4}
    recipe["parallelism_config"] = {"fsdp": {}}
    finished = commands.run("composer", "-n", 2, "train.py", write_recipe(recipe))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:]
    (line,) = (line for line in logged(folder_of(recipe)) if "metrics/generation/cmmd" in line)
    compare_with_prx_evaluate(folder_of(recipe), 21, line, networks, tmp_path)
