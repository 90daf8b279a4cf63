"""`prx evaluate`: its numbers, what stands beside them, and what it says when something is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
import yaml
from commands import prx
from conftest import TINY_T5, tiny_recipe_in, train_once
from PIL import Image
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from transformers import T5Config, T5EncoderModel

from prx_composer.metrics.features import ClipScore, clip_images, dino_images, frechet_distance, mmd, moments, square
from prx_composer.metrics.real_images import DataSet, ImageFolder, read_square, reference_features
from prx_composer.metrics.scoring import Networks, Scorer, interval_95
from prx_composer.recipe import config
from prx_composer.training.run import run

Recipe = dict[str, Any]
Write = Callable[..., str]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A CLIP with its tokenizer and a DINOv2, tiny, with random weights."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    clip = CLIPConfig(
        text_config=dict(layers, vocab_size=len(tokenizer), max_position_embeddings=14, eos_token_id=1, bos_token_id=0),
        vision_config=dict(layers, image_size=24, patch_size=8),
        projection_dim=8,
    )
    model = CLIPModel(clip)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # images differ by more than rounding
    model.save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    dino = Dinov2Model(Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=56, image_size=224))
    with torch.no_grad():
        for parameter in dino.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    dino.save_pretrained(root / "dino")
    return {"clip": root / "clip", "dino": root / "dino"}


@pytest.fixture
def options(networks: dict[str, Path], tmp_path: Path) -> tuple[Any, ...]:
    clip = networks["clip"]
    return (
        "--clip", clip, "--clip-score", clip, "--dino", networks["dino"], "--cache", tmp_path / "cache",
        "--output", tmp_path / "out" / "numbers.json", "--steps", 2, "--num", 20, "--device", "cpu", "--guidance-scale", 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    return train_once(tmp_path_factory, shapes_data, run_name="measured")


@pytest.fixture
def trained(measured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(measured, tmp_path / "runs" / "measured")


def numbers(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / "out" / "numbers.json").read_text())["rows"]


# ------------------------------------------------------------------------------------------------------- networks


def test_clip_features_are_those_of_transformers_own_pipeline(networks: dict[str, Path], shapes_data: Path) -> None:
    """On images that are square and of the network's size, where nothing is left to the choice of a resize."""
    from transformers import CLIPImageProcessor, CLIPModel

    data = DataSet(str(shapes_data))
    images = torch.stack([read_square(data, index, 24) for index in range(6)])  # pyright: ignore[reportArgumentType]
    model: Any = CLIPModel.from_pretrained(networks["clip"])
    processor: Any = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    pixels = processor(images=[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt")
    with torch.no_grad():
        vision = model.vision_model(**pixels).pooler_output
        expected = torch.nn.functional.normalize(model.visual_projection(vision), dim=1)
    torch.testing.assert_close(clip_images(str(networks["clip"]))(images), expected, atol=1e-5, rtol=0)


def test_clip_score_is_torchmetrics(networks: dict[str, Path], shapes_data: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model: Any = CLIPModel.from_pretrained(networks["clip"])
    tokenizer = AutoTokenizer.from_pretrained(networks["clip"])
    images_of: Any = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})

    def processor(text: Any = None, images: Any = None, **kwargs: Any) -> Any:
        if images is not None:
            return images_of(images=images, return_tensors="pt")
        return tokenizer(text, padding=True, return_tensors="pt")

    data = DataSet(str(shapes_data))
    images = torch.stack([read_square(data, index, 24) for index in range(8)])  # pyright: ignore[reportArgumentType]
    captions = [data.caption(index) for index in range(8)]
    ours = ClipScore(str(networks["clip"]))(images, captions)
    each = [torchmetrics_clip_score(i, c, lambda: (model, processor)) for i, c in zip(images, captions, strict=True)]  # type: ignore[arg-type]
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, torch.stack(each), atol=1e-3, rtol=0)


def test_a_wide_image_is_seen_by_its_centred_square() -> None:
    image = torch.zeros(1, 3, 8, 20, dtype=torch.uint8)
    image[..., 6:14] = 200
    assert (square(image, 16) == 200).all()
    assert square(image, 8).shape == (1, 3, 8, 8) and (square(image, 8) == 200).all()


# -------------------------------------------------------------------------------------------------------- scoring


def real_images(data: DataSet) -> Callable[[list[int]], Tensor]:
    """In place of a model: the data's own images, as they are stored."""
    return lambda indices: torch.stack([read_square(data, index, 16) for index in indices])  # pyright: ignore[reportArgumentType]


def test_a_set_is_at_no_distance_from_itself_and_the_distances_are_those_of_the_features(
    networks: dict[str, Path], shapes_data: Path, tmp_path: Path
) -> None:
    data = DataSet(str(shapes_data))
    used = Networks(clip=str(networks["clip"]), dino=str(networks["dino"]))
    scorer = Scorer(["cmmd", "dino_mmd", "fd_dino"], used)
    scorer.compare_with(data, None, tmp_path, 32, CPU)
    prompts = [data.caption(index) for index in range(len(data))]
    same = scorer.score(real_images(data), prompts, 32, CPU)
    inverted = scorer.score(lambda indices: 255 - real_images(data)(indices), prompts, 32, CPU)
    # One reads images at a network's size at once, the other at 16 pixels first: they differ by roundings to whole grey levels.
    assert abs(same["fd_dino"]) < 0.01 * inverted["fd_dino"]
    drawn = 255 - real_images(data)(list(range(len(data))))
    clip, dino = clip_images(str(networks["clip"])), dino_images(str(networks["dino"]))
    real = {e.image_size: torch.stack([read_square(data, i, e.image_size) for i in range(len(data))]) for e in (clip, dino)}  # type: ignore[misc]
    assert inverted["cmmd"] == pytest.approx(mmd(clip(drawn), clip(real[24])), rel=1e-4)
    assert same["cmmd"] == pytest.approx(mmd(clip(real[24]), clip(real[24])), rel=1e-2), "of a set and itself it is below zero"
    assert mmd(clip(real[24]), clip(real[24]), unbiased=False) == pytest.approx(0, abs=1e-9)
    expected = frechet_distance(*moments(dino(drawn)), *moments(dino(real[224])))
    assert inverted["fd_dino"] == pytest.approx(expected, rel=1e-4)
    unit = [torch.nn.functional.normalize(f, dim=1) for f in (dino(drawn), dino(real[224]))]
    assert inverted["dino_mmd"] == pytest.approx(mmd(*unit), rel=1e-4, abs=1e-6)


def test_the_interval_is_students() -> None:
    """Three values: t = 4.3027 at 97.5% with two degrees of freedom (any table)."""
    assert interval_95([1.0, 2.0, 3.0]) == pytest.approx(4.3027 * 1 / 3**0.5, rel=1e-4)
    assert interval_95([1.0]) is None


def test_features_of_real_images_are_computed_once(
    networks: dict[str, Path], shapes_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, extractor = DataSet(str(shapes_data)), dino_images(str(networks["dino"]))
    first = reference_features(data, extractor, 12, tmp_path, 5, CPU)
    (file,) = tmp_path.glob("*.safetensors")
    caplog.clear()
    again = reference_features(DataSet(str(shapes_data)), dino_images(str(networks["dino"])), 12, tmp_path, 5, CPU)
    assert torch.equal(first.features, again.features) and "Features of" not in caplog.text
    moved = shutil.copytree(shapes_data, tmp_path / "moved")
    assert reference_features(DataSet(str(moved)), extractor, 12, tmp_path, 5, CPU).key == first.key
    assert reference_features(data, extractor, 11, tmp_path, 5, CPU).key != first.key
    assert reference_features(data, clip_images(str(networks["clip"])), 12, tmp_path, 5, CPU).key != first.key
    file.write_bytes(b"damaged")
    assert torch.equal(reference_features(data, extractor, 12, tmp_path, 5, CPU).features, first.features)
    assert "it is computed again" in caplog.text


def test_images_that_cannot_be_decoded_are_left_out_and_counted(
    networks: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    found = reference_features(ImageFolder(str(folder)), dino_images(str(networks["dino"])), None, tmp_path / "c", 2, CPU)
    assert len(found.features) == 4 and found.features.isfinite().all()
    assert "1 of 5 images cannot be decoded" in caplog.text


# -------------------------------------------------------------------------------------------------------- command


def test_a_sweep_measures_every_combination_and_says_how(trained: Path, options: tuple[Any, ...], tmp_path: Path) -> None:
    arguments = (*options, "--guidance-scale", "1,3", "--weights", "ema,raw", "--seeds", "0,4")
    said = prx("evaluate", trained, *arguments)
    rows = numbers(tmp_path)
    made = [(row["weights"], row["guidance_scale"], row["num_inference_steps"]) for row in rows]
    assert made == [("ema", 1.0, 2), ("ema", 3.0, 2), ("raw", 1.0, 2), ("raw", 3.0, 2)]
    assert len({row["weights_sha256"] for row in rows}) == 2
    assert len({row["metrics"]["cmmd"]["mean"] for row in rows}) == 4
    for row in rows:
        assert row["seeds"] == [0, 4] and row["batch"] == 8 and row["versions"]["torch"] and "command" in row
        for metric in row["metrics"].values():
            assert metric["mean"] == pytest.approx(np.mean(metric["per_seed"])) and len(set(metric["per_seed"])) == 2
            assert metric["interval_95"] == pytest.approx(12.7062 * np.std(metric["per_seed"], ddof=1) / 2**0.5, rel=1e-4)
    table = (tmp_path / "out" / "numbers.md").read_text()
    assert table in said
    assert table.splitlines()[0] == "| weights | guidance scale | steps | cmmd ↓ | dino_mmd ↓ | fd_dino ↓ | clip_score ↑ |"
    assert table.count("\n| ema |") == 2 and rows[0]["weights_sha256"] in table and "20 prompts" in table

    changed = prx("evaluate", trained, *options, "--guidance-scale", "1,3", "--num", 10, code=1)
    assert "other numbers: its prompts are different" in changed or "its prompts is different" in changed
    before = json.dumps(rows[0])
    prx("evaluate", trained, *options, "--guidance-scale", "1", "--weights", "ema", "--seeds", "0,4", "--steps", "2,3")
    rows = numbers(tmp_path)
    assert len(rows) == 5 and json.dumps(rows[0]) == before, "what was measured already is kept"


def test_a_number_is_that_of_the_images_that_prx_generate_draws(
    trained: Path, options: tuple[Any, ...], tmp_path: Path, networks: dict[str, Path]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle on the left of a white background\na blue ring in the centre of a black background\n")
    prx("evaluate", trained, *options, "--prompts", prompts, "--metrics", "clip_score", "--seeds", 3)
    drawn = tmp_path / "drawn"
    prx(
        "generate", trained, "--prompts", prompts, "--seed", 3_000_000, "--steps", 2, "--guidance-scale", 2, "--output", drawn,
        "--no-grid",
    )  # fmt: skip
    images = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in sorted(drawn.glob("*.png"))])
    expected = ClipScore(str(networks["clip"]))(images, prompts.read_text().splitlines()).mean().item()
    assert numbers(tmp_path)[0]["metrics"]["clip_score"]["mean"] == pytest.approx(expected, abs=1e-4)
    assert numbers(tmp_path)[0]["metrics"]["clip_score"]["interval_95"] is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_measure_what_one_does(trained: Path, options: tuple[Any, ...], tmp_path: Path) -> None:
    odd = (*options, "--num", 7, "--seeds", 0, "--reference-num", 11, "--batch-size", 3)
    prx("evaluate", trained, *odd)
    one = numbers(tmp_path)
    together = (*odd, "--output", tmp_path / "two" / "out" / "numbers.json", "--cache", tmp_path / "c2")
    finished = commands.run("composer", "-n", 2, "-m", "prx_composer.cli", "evaluate", trained, *together)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:]
    two = numbers(tmp_path / "two")
    assert (one[0]["ranks"], two[0]["ranks"]) == (1, 2)
    for name, metric in one[0]["metrics"].items():
        assert two[0]["metrics"][name]["mean"] == pytest.approx(metric["mean"], rel=1e-3, abs=1e-4), name


def test_it_says_what_is_missing(
    trained: Path, options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, networks: dict[str, Path]
) -> None:
    said = prx("evaluate", trained, *options, "--metrics", "cmdd", code=1)
    assert "'cmdd' is no metric" in said and "cmmd" in said
    assert "--clip" in prx("evaluate", trained, *options, "--clip", tmp_path / "nowhere", code=1)
    assert "is a dinov2; what is needed" in prx("evaluate", trained, *options, "--clip", networks["dino"], code=1)
    assert "cannot be read" in prx("evaluate", trained, *options, "--prompts", tmp_path / "none.txt", code=1)
    assert "There is no data set" in prx("evaluate", trained, *options, "--data", tmp_path, code=1)
    assert "There is no folder" in prx("evaluate", trained, *options, "--reference", tmp_path / "real", code=1)
    assert "--steps" in prx("evaluate", trained, *options, "--steps", "0", code=1)
    assert "--weights" in prx("evaluate", trained, *options, "--weights", "best", code=1)
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    assert "fid needs torch-fidelity: uv sync" in prx("evaluate", trained, *options, "--metrics", "fid", code=1)


# -------------------------------------------------------------------------------------------------- the validation loss


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path, tokenizer: Any) -> Path:
    """A run that is evaluated on stored text, with averaged weights; its data lie beside it."""
    folder = tmp_path_factory.mktemp("held_out")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {key: value for key, value in TINY_T5.items() if key != "model_type"}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    data = shutil.copytree(shapes_data, folder / "data")
    recipe = tiny_recipe_in(folder, data) | {"run_name": "run", "max_duration": "4ba", "preflight": False, "seed": 3}
    recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(folder / "encoder"), "max_tokens": 14}
    recipe["algorithms"]["progressive_resolution"]["stages"][0]["until"] = "2ba"
    recipe["model"]["flow"] = {"timestep_shift": 3.0, "min_timestep": 0.1}
    stored = {"split": "heldout", "text_embedding": "text"}
    recipe |= {"eval_loader": {"name": "image_caption", "path": str(data), **stored}, "global_eval_batch_size": 7}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    prx("encode", "text", folder / "recipe.yaml", "--split", "heldout", "--storage", "float32")
    run(config.load([str(folder / "recipe.yaml")]))
    return folder


def logged(folder: Path) -> dict[str, float]:
    """What the run logged at its end."""
    last = json.loads((folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {key.removeprefix("metrics/eval/"): value for key, value in last.items() if key.startswith("metrics/eval/")}


def losses(output: Path) -> dict[str, float]:
    (row,) = json.loads(output.read_text())["rows"]
    assert row["samples"] == 30
    return {name: metric["mean"] for name, metric in row["metrics"].items()}


@pytest.mark.parametrize(("batch_size", "online"), [(1, False), (2, True), (7, False), (64, True)])
def test_the_validation_loss_is_that_of_the_run_with_any_batch_and_with_text_stored_or_read_anew(
    held_out: Path, tmp_path: Path, batch_size: int, online: bool
) -> None:
    named = ("--data", held_out / "data", "--split", "heldout") if online else ()
    output, measure = tmp_path / "loss.json", ("--metrics", "validation_loss", "--device", "cpu")
    said = prx("evaluate", held_out / "runs" / "run", *measure, *named, "--batch-size", batch_size, "--output", output)
    found = losses(output)
    assert len(found) == 9 and found == pytest.approx(logged(held_out), rel=1e-6)
    assert said.startswith("| weights | validation_loss ↓ | validation_loss_t0.0625 ↓ |") and "\n| ema | " in said
    assert "30 samples of" in said and "heldout, every one once at each timestep" in said


def test_an_exported_model_has_the_validation_loss_of_its_run(held_out: Path, tmp_path: Path) -> None:
    exported, output = tmp_path / "exported", tmp_path / "loss.json"
    prx("export", held_out / "runs" / "run", "--output", exported, "--no-samples")
    measure = ("--metrics", "validation_loss", "--device", "cpu", "--output", output)
    assert "has no eval_loader; name what was kept out" in prx("evaluate", exported, *measure, code=1)
    said = prx("evaluate", exported, *measure, "--data", held_out / "data", "--split", "heldout")
    assert "- Weights exported: SHA-256" in said, "of which batch they are, an export doesn't say"
    assert losses(output) == pytest.approx(logged(held_out), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_validation_loss_is_the_same_on_any_number_of_ranks(held_out: Path, tmp_path: Path, ranks: int) -> None:
    output = tmp_path / "loss.json"
    measure = ("--metrics", "validation_loss", "--device", "cpu", "--batch-size", 4, "--output", output)
    finished = commands.run("composer", "-n", ranks, "-m", "prx_composer.cli", "evaluate", held_out / "runs" / "run", *measure)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:]
    assert json.loads(output.read_text())["rows"][0]["ranks"] == ranks
    assert losses(output) == pytest.approx(logged(held_out), rel=1e-6)


def test_a_sweep_of_weights_is_measured_once_each_and_what_asks_for_drawings_is_refused(
    held_out: Path, trained: Path, tmp_path: Path
) -> None:
    model, output = held_out / "runs" / "run", tmp_path / "loss.json"
    measure = ("--metrics", "validation_loss", "--device", "cpu", "--output", output)
    prx("evaluate", model, *measure, "--weights", "ema,raw")
    rows = json.loads(output.read_text())["rows"]
    assert [row["weights"] for row in rows] == ["ema", "raw"] and "guidance_scale" not in rows[0]
    assert rows[0]["metrics"] != rows[1]["metrics"]
    prx("evaluate", model, *measure, "--weights", "raw")
    assert json.loads(output.read_text())["rows"] == rows, "what was measured already is kept"
    assert "other numbers" in prx("evaluate", model, *measure, "--data", held_out / "data", code=1), "of another split"
    some = tmp_path / "some.json"
    said = prx("evaluate", model, *measure, "--num", 10, "--output", some)
    (part,) = json.loads(some.read_text())["rows"]
    assert part["samples"] == 10 and part["metrics"] != rows[0]["metrics"] and "10 samples of" in said

    said = prx("evaluate", model, "--metrics", "validation_loss,cmmd", code=1)
    assert "validation_loss is measured without drawing" in said
    said = prx("evaluate", model, *measure, "--steps", "5", "--seeds", "1", "--images-per-prompt", 2, code=1)
    assert "draws nothing; leave out --steps, --seeds, --images-per-prompt" in said
    assert "--size" in prx("evaluate", model, *measure, "--size", "16x24", code=1)
    assert "has no eval_loader" in prx("evaluate", trained, *measure, code=1)
    assert "There is no data set" in prx("evaluate", model, *measure, "--data", tmp_path / "nowhere", code=1)
