"""`prx generate`: what it draws, what its files say, and what it says when something is missing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from commands import prx
from conftest import train_once
from PIL import Image
from stacks import stack_of_24h

from prx_composer.commands.generate import recipe_settings
from prx_composer.common.errors import UserError
from prx_composer.models.flow import RoutedSelfGuidance
from prx_composer.recipe import config
from prx_composer.runs.checkpoints import INDEX, MONOLITH
from prx_composer.runs.opening import choose_guidance, load_trained
from prx_composer.training.run import build_trainer, run

Recipe = dict[str, Any]
Write = Callable[..., str]
PROMPT = "a red circle on the left of a white background"
PROMPTS = [PROMPT, "a blue ring in the centre of a black background", "a green cross on the right of a grey background"]


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.array(Image.open(path)).astype(int)


def images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if path.name != "grid.png")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    """A run with an average, which its own callback drew with at its end."""
    images = {"prompts": PROMPTS, "num_inference_steps": 3, "guidance_scale": 2.0, "interval": "1dur"}
    return train_once(tmp_path_factory, shapes_data, callbacks={"images": images}, run_name="drawn")


@pytest.fixture
def trained(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "runs" / "drawn")


def test_it_draws_what_the_run_itself_drew_last(trained: Path, tmp_path: Path) -> None:
    """With the run's average, size and settings unless others are given."""
    said = prx(
        "generate", trained, *(word for prompt in PROMPTS for word in ("-p", prompt)), "--output", tmp_path, "--batch-size", 3
    )
    assert "3 images of 16×16 with ema weights of batch 8" in said
    of_run = pixels(trained / "images" / "ba000008.png")
    first = of_run[8 : 8 + 128, 8 : 8 + 128][4::8, 4::8]  # the first tile, every pixel of it enlarged eight times
    assert np.abs(first - pixels(images_in(tmp_path)[0])).max() <= 1
    assert np.abs(first - pixels(images_in(tmp_path)[1])).max() > 10
    assert (tmp_path / "grid.png").exists()


def test_a_checkpoint_is_drawn_at_the_size_that_it_was_trained_at(trained: Path) -> None:
    """The stage of 8 px ends with batch 4, which is of it."""
    sizes = [load_trained(str(trained / "checkpoints" / f"ba{batch}")).image_size for batch in (2, 4, 6, 8)]
    assert sizes == [8, 8, 16, 16]


def test_an_image_depends_on_its_prompt_and_seed_and_not_on_its_batch(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "", json.dumps({"prompt": PROMPTS[1]}), json.dumps(PROMPTS[2])]))
    options = ("--steps", 3, "--size", "16x24", "--no-grid")
    prx("generate", trained, "--prompts", tmp_path / "prompts.txt", "--seed", 5, "--output", tmp_path / "all", *options)
    prx("generate", trained, "-p", PROMPTS[1], "--seed", 6, "--output", tmp_path / "one", "--batch-size", 1, *options)
    together, alone = images_in(tmp_path / "all"), images_in(tmp_path / "one")
    assert [path.name[:10] for path in together] == ["0000-seed5", "0001-seed6", "0002-seed7"]
    assert pixels(together[1]).shape == (16, 24, 3)
    assert np.abs(pixels(together[1]) - pixels(alone[0])).max() <= 1
    assert not (tmp_path / "all" / "grid.png").exists()


def test_a_png_says_how_to_draw_it_again(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    prx(
        "generate",
        trained,
        "-p",
        "ein grüner Kreis",
        "--images-per-prompt",
        2,
        "--steps",
        2,
        "--seed",
        3,
        "--output",
        tmp_path / "a",
    )
    assert caplog.text.count("is not read whole") == 1 and "does not know 'ein', 'grüner', 'Kreis'" in caplog.text
    path = images_in(tmp_path / "a")[1]
    text: dict[str, str] = Image.open(path).text  # pyright: ignore[reportAttributeAccessIssue]
    facts = json.loads(text["prx"])
    assert text["prompt"] == facts["prompt"] == "ein grüner Kreis" and facts["seed"] == 4
    assert facts["weights"] == "ema" and facts["batch"] == 8 and torch.__version__.startswith(facts["versions"]["torch"])
    prx(
        "generate", facts["model"], "-p", facts["prompt"], "--seed", facts["seed"],
        "--size", f"{facts['height']}x{facts['width']}", "--steps", facts["num_inference_steps"],
        "--guidance-scale", facts["guidance_scale"], "--guidance", facts["guidance"],
        "--weights", facts["weights"], "--output", tmp_path / "b",
    )  # fmt: skip
    assert np.abs(pixels(images_in(tmp_path / "b")[0]) - pixels(path)).max() <= 1


def test_plain_weights_are_another_model_than_the_average(trained: Path, tmp_path: Path) -> None:
    average, plain = load_trained(str(trained)).model, load_trained(str(trained), "raw").model
    state = torch.load(trained / "checkpoints/ba8/rank0.pt", weights_only=False)["state"]
    averaged = state["callbacks"]["AverageState"]["average"]
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in state["model"].items())
    assert all(torch.equal(tensor, average.state_dict()[name]) for name, tensor in averaged.items())
    assert not torch.equal(average.backbone.img_in.weight, plain.backbone.img_in.weight)
    older = prx("generate", trained / "checkpoints" / "ba4", "-p", "x", "--steps", 1, "--size", 8, "--output", tmp_path)
    assert "8×8 with ema weights of batch 4" in older


def test_what_algorithms_add_to_the_model_is_there_when_it_draws(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["model"]["backbone"] |= {"depth": 3}
    tiny_recipe["algorithms"] |= {"sprint": {"start_block": 1, "end_block": 1}, "resolution_aware": {}}
    trainer = build_trainer(config.load([write_recipe(tiny_recipe)]))
    trainer.fit()
    model: Any = trainer.state.model
    with torch.no_grad():
        ours = load_trained(str(folder_of(tiny_recipe)), "raw").model
        torch.testing.assert_close(ours.sample([PROMPT], 16, 16, [1], 3), model.sample([PROMPT], 16, 16, [1], 3))
    trainer.close()
    assert "sprint" in prx("export", folder_of(tiny_recipe), "--output", folder_of(tiny_recipe) / "out", code=1)


@pytest.mark.parametrize(("end", "drew"), [(None, "self"), ("4ba", "cfg")])
def test_routed_self_guidance_is_used_where_the_run_used_it_and_where_it_is_asked_for(
    tiny_recipe: Recipe, write_recipe: Write, end: str | None, drew: str, tmp_path: Path
) -> None:
    tiny_recipe["model"]["backbone"] |= {"depth": 3}
    tiny_recipe["algorithms"]["tread"] = {"start_block": 1, "end_block": 1, "self_guidance": True, "end": end}
    run(config.load([write_recipe(tiny_recipe)]))
    trained = load_trained(str(folder_of(tiny_recipe)))
    assert choose_guidance(trained.model, "run") == drew
    assert choose_guidance(trained.model, "self") == "self" and isinstance(trained.model.guidance, RoutedSelfGuidance)
    calls: list[int] = []
    trained.model.backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    trained.model.generate([PROMPT] * 2, 16, 16, num_inference_steps=3)
    choose_guidance(trained.model, "cfg")
    trained.model.generate([PROMPT] * 2, 16, 16, num_inference_steps=3)
    assert calls == [2, 2] * 3 + [4] * 3, "dense and routed; or both halves in one call"
    said = prx("generate", folder_of(tiny_recipe), "-p", PROMPT, "--steps", 1, "--guidance", "self", "--output", tmp_path)
    assert "1 image" in said


@pytest.mark.parametrize(("end", "drew"), [(None, "internal:1.5"), ("4ba", "cfg")])
def test_internal_guidance_draws_as_the_run_drew_with_its_readout_and_export_leaves_it_out(
    tiny_recipe: Recipe, write_recipe: Write, end: str | None, drew: str, tmp_path: Path
) -> None:
    tiny_recipe["model"]["backbone"] |= {"depth": 3}
    tiny_recipe["model"]["flow"] = {"min_timestep": 0.05}
    tiny_recipe["algorithms"] |= {"internal_guidance": {"scale": 1.5, "end": end}, "readouts": {}}
    trainer = build_trainer(config.load([write_recipe(tiny_recipe)]))
    trainer.fit()
    model, folder = trainer.state.model, folder_of(tiny_recipe)
    trained = load_trained(str(folder), "raw").model
    heads = [name for name in trained.state_dict() if name.startswith("auxiliary_losses.")]
    assert len(heads) == 4 and all(".internal_guidance.heads.0." in name for name in heads), "readouts are of training alone"
    assert choose_guidance(trained, "run") == drew
    expected: Any = model.sample([PROMPT], 16, 16, [1], 3)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(trained.sample([PROMPT], 16, 16, [1], 3), expected)
    trainer.close()
    averaged = load_trained(str(folder)).model
    average = torch.load(folder / "checkpoints/ba8/rank0.pt", weights_only=False)["state"]["callbacks"]["AverageState"]["average"]
    assert all(torch.equal(averaged.state_dict()[name], average[name]) for name in heads)
    assert choose_guidance(averaged, "internal") == "internal:1.5" and choose_guidance(averaged, "internal:2.5") == "internal:2.5"
    strong = averaged.sample([PROMPT], 16, 16, [1], 3)
    choose_guidance(averaged, "cfg")
    plain = averaged.sample([PROMPT], 16, 16, [1], 3)
    assert not torch.allclose(strong, plain)
    said = prx("export", folder, "--output", tmp_path / "out", "-p", PROMPT)
    assert ("internal guidance, which diffusers' pipelines don't have" in said) == (end is None)
    torch.testing.assert_close(load_trained(str(tmp_path / "out")).model.sample([PROMPT], 16, 16, [1], 3), plain)
    for name, message in (("internal:0.5", "must be a number from 1 on"), ("internal:x", "--guidance internal")):
        with pytest.raises(UserError, match=message):
            choose_guidance(averaged, name)


@pytest.mark.parametrize(("length", "half"), [("4ba", "2ba"), ("192sp", "96sp"), ("2ep", "1ep")])
def test_a_checkpoint_at_a_window_s_end_is_opened_as_its_last_step_was(
    length: str, half: str, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    """When it is written, batches, samples and epochs are those of the next step, which the window leaves out."""
    window = {"end": "0.5dur"}
    tiny_recipe["algorithms"] = {"internal_guidance": {"block": 0, "scale": 1.5} | window, "resolution_aware": window}
    tiny_recipe |= {"max_duration": length, "save_interval": half, "save_num_checkpoints_to_keep": -1, "preflight": False}
    run(config.load([write_recipe(tiny_recipe)]))
    found = sorted((folder_of(tiny_recipe) / "checkpoints").glob("ba*"), key=lambda path: int(path.name[2:]))
    for path, drew in zip((found[0], found[-1]), ("internal:1.5", "cfg"), strict=True):
        model: Any = load_trained(str(path)).model
        assert choose_guidance(model, "run") == drew, path
        assert model.backbone.resolution_embedder.active == (drew != "cfg")


def test_an_export_is_drawn_as_the_recipe_beside_it_says(trained: Path, tmp_path: Path) -> None:
    prx("export", trained, "--output", tmp_path / "out", "--no-samples")
    run_settings, settings = (recipe_settings(load_trained(str(path))) for path in (trained, tmp_path / "out"))
    assert settings == run_settings and settings[1].num_inference_steps != 28


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_nothing_in_a_checkpoint_is_executed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prx_composer.common.files import crc32

    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "theirs"
    shutil.copytree(trained, theirs)
    checkpoint = theirs / "checkpoints" / "ba8"
    content = torch.load(checkpoint / MONOLITH, weights_only=False)
    torch.save(content | {"state": content["state"] | {"callbacks": {"Evil": Malicious()}}}, checkpoint / MONOLITH)
    index = json.loads((checkpoint / INDEX).read_text())
    index["files"][MONOLITH] = {"bytes": (checkpoint / MONOLITH).stat().st_size, "crc32": crc32(checkpoint / MONOLITH)}
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert "could execute code" in prx("generate", theirs, "-p", "x", code=1)
    (checkpoint / MONOLITH).unlink()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Malicious()))
    index["files"] = {}
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert "could execute code" in prx("generate", theirs, "-p", "x", code=1)
    assert not (tmp_path / "executed").exists()


def test_what_is_wrong_is_one_clear_message(trained: Path, tmp_path: Path) -> None:
    def wrong(*arguments: Any) -> str:
        return prx("generate", *arguments, code=1)

    assert "There is no nowhere. Give a run folder" in wrong("nowhere", "-p", "x")
    assert "no config.yaml" in wrong(tmp_path, "-p", "x")
    assert 'Give --prompt "…"' in wrong(trained)
    assert "nearest is 16x20" in wrong(trained, "-p", "x", "--size", "17x19")
    assert "no size" in wrong(trained, "-p", "x", "--size", "large")
    assert "bf16 is for GPUs" in wrong(trained, "-p", "x", "--device", "cpu", "--precision", "bf16")
    assert "no device" in wrong(trained, "-p", "x", "--device", "tpuu")
    assert "ema or raw" in wrong(trained, "-p", "x", "--weights", "best")
    assert "trained with `tread`" in wrong(trained, "-p", "x", "--guidance", "self")
    assert "a number from 1 on" in wrong(trained, "-p", "x", "--guidance-scale", "0.5")
    assert "cannot be read" in wrong(trained, "--prompts", tmp_path / "none.txt")
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps({'prompt': 'x'})}\n{json.dumps({'words': 'x'})}\n")
    assert 'line 2 must have a "prompt"' in wrong(trained, "--prompts", tmp_path / "bad.jsonl")
    if not torch.cuda.is_available():
        assert "use --device cpu" in wrong(trained, "-p", "x", "--device", "cuda")

    empty, old, damaged, lost = (tmp_path / name for name in ("empty", "old", "damaged", "lost"))
    empty.mkdir()
    shutil.copy(trained / "config.yaml", empty)
    assert "no checkpoint yet" in wrong(empty, "-p", "x")
    shutil.copytree(empty, old)
    (old / "checkpoints").mkdir()
    (old / "checkpoints" / "ep0-ba8-rank0.pt").write_bytes(b"")
    assert "checkpoints of another form (ep0-ba8-rank0.pt" in wrong(old, "-p", "x")
    shutil.copytree(trained, damaged)
    for path in (damaged / "checkpoints").glob("ba*/rank0.pt"):
        path.write_bytes(path.read_bytes()[:100])
    assert "No checkpoint in" in wrong(damaged, "-p", "x") and "is damaged: rank0.pt has 100 bytes" in wrong(
        damaged / "checkpoints" / "ba8", "-p", "x"
    )
    shutil.copytree(trained / "checkpoints" / "ba8", lost / "ba8")
    assert "model.text_encoder.tokenizer: it was trained with the run" in wrong(lost / "ba8", "-p", "x")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sharded_run_begun_from_an_export_is_drawn_with_in_one_process(
    tiny_recipe: Recipe, write_recipe: Write, trained: Path, tmp_path: Path
) -> None:
    """FSDP2 on two processes with a learning rate of zero: what comes out is, shard by shard, what went in."""
    prx("export", trained, "--output", tmp_path / "out", "--no-samples")
    tiny_recipe["model"]["init_from"] = str(tmp_path / "out")
    tiny_recipe |= {"parallelism_config": {"fsdp": {"state_dict_type": "sharded"}}, "max_duration": "2ba"}
    tiny_recipe["optimizer"] = {"name": "adamw", "lr": 0.0}
    finished = commands.run("composer", "-n", 2, "train.py", write_recipe(tiny_recipe))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:]
    assert list((folder_of(tiny_recipe) / "checkpoints" / "ba2").glob("__1_*.distcp")), "it is sharded"
    begun = load_trained(str(tmp_path / "out")).model
    for weights in ("ema", "raw"):
        ended = load_trained(str(folder_of(tiny_recipe)), weights).model  # pyright: ignore[reportArgumentType]
        for name, tensor in begun.backbone.state_dict().items():
            torch.testing.assert_close(ended.backbone.state_dict()[name], tensor, atol=1e-7, rtol=0)


def test_a_run_with_the_whole_stack_of_the_24_hour_recipe_is_drawn_with_and_exported(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    """Its checkpoint carries routing, teachers' projectors, Muon's state and an average of all that is trained."""
    recipe = stack_of_24h(tiny_recipe)
    run(config.load([write_recipe(recipe)]))
    assert "24×24 with ema weights of batch 6" in prx("generate", folder_of(recipe), "-p", PROMPT, "--output", tmp_path / "drawn")
    prx("export", folder_of(recipe), "--output", tmp_path / "out", "-p", PROMPT)
    ours, theirs = load_trained(str(folder_of(recipe))).model, load_trained(str(tmp_path / "out")).model
    torch.testing.assert_close(theirs.sample([PROMPT], 24, 24, [1], 3), ours.sample([PROMPT], 24, 24, [1], 3))
