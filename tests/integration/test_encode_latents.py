"""Stored latents: equal to diffusers' own, trained on without an image, and refused where they don't belong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from streaming import LocalDataset
from test_encode import first_loss, invoke

from prx_composer.common.errors import UserError
from prx_composer.data.contents import column_contents
from prx_composer.data.decoding import decode_image
from prx_composer.data.sampler import SampleRequest
from prx_composer.data.sources import ShapesSource, prepare
from prx_composer.data.stored import encoded_folder, unpack
from prx_composer.models.counting import StepCounter, shape_of
from prx_composer.recipe import config
from prx_composer.training.run import build_trainer, run
from prx_composer.training.trial import check_recipe

Recipe = dict[str, Any]
Write = Callable[..., str]
SOURCE = {"name": "shapes", "image_size": 16, "images_per_scene": 2, "heldout": 30, "aspects": [[1, 1], [1, 2]], "multiple": 8}


@pytest.fixture
def recipe(tiny_recipe: Recipe, tmp_path: Path, encoder_folder: Path) -> Recipe:
    """Frozen encoders with random weights from folders; 16 px, two buckets, latents of 4 channels and half the sides."""
    save_autoencoder(tmp_path / "vae")
    prepare(tmp_path / "data", ShapesSource(**{k: v for k, v in SOURCE.items() if k != "name"}), SOURCE)
    tiny_recipe["model"] |= {
        "text_encoder": {"name": "huggingface", "pretrained": str(encoder_folder), "max_tokens": 14},
        "autoencoder": {"name": "diffusers", "pretrained": str(tmp_path / "vae")},
        "backbone": tiny_recipe["model"]["backbone"] | {"in_channels": 4},
    }
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": str(tmp_path / "data")}
    del tiny_recipe["algorithms"]["progressive_resolution"]
    return tiny_recipe | {"preflight": False, "global_train_batch_size": 24, "device_train_microbatch_size": 12}


def save_autoencoder(folder: Path, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    settings = dict(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, scaling_factor=0.7, shift_factor=0.1)
    module = AutoencoderKL(**(blocks | settings | changes)).eval()
    module.save_pretrained(folder)
    return module


def options(*changes: str) -> list[str]:
    return ["train_loader.latent=latent", *changes]


@pytest.mark.parametrize(("storage", "rounding"), [("float32", 1e-5), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_what_is_stored_is_diffusers_own_mode_of_the_pixels_that_training_sees(
    recipe: Recipe, write_recipe: Write, tmp_path: Path, storage: str, rounding: float
) -> None:
    said = invoke("latents", write_recipe(recipe), "--storage", storage, "--part", "30", "--image-size", "32")
    assert "latents of 480 images of 32 px" in said and str(tmp_path / "vae") in said
    module = AutoencoderKL.from_pretrained(tmp_path / "vae").eval()
    folder = encoded_folder(tmp_path / "data", "train", "latent", "image")
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = {"kind": "latents", "width": 4, "image_size": 32, "downsampling": 2, "scaling": 0.7, "shift": 0.1, "multiple": 8}
    assert expected.items() <= manifest.items() and manifest["buckets"].keys() == {"16x16", "8x24"}
    for bucket, size in {"16x16": (32, 32), "8x24": (16, 48)}.items():
        images, stored = (LocalDataset(str(path / bucket)) for path in (tmp_path / "data" / "train", folder))
        assert len(images) == len(stored) == manifest["buckets"][bucket]
        for index in range(0, len(images), 25):
            pixels = decode_image(images[index]["image"], *size).float()[None] / 127.5 - 1
            with torch.no_grad():
                latent = (module.encode(pixels).latent_dist.mode() - 0.1) * 0.7  # pyright: ignore
            torch.testing.assert_close(unpack(stored[index], storage).float(), latent[0], rtol=rounding, atol=1e-5)


@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_training_and_evaluation_on_stored_latents_repeat_the_losses_of_the_autoencoder_run_online(
    recipe: Recipe, write_recipe: Write, tmp_path: Path, storage: str, tolerance: float
) -> None:
    recipe["eval_loader"] = recipe["train_loader"] | {"split": "heldout"}
    file = write_recipe(recipe | {"eval_interval": "2ba", "max_duration": "4ba"})
    for split in ("train", "heldout"):
        invoke("latents", file, "--split", split, "--storage", storage)
    rows = {}
    for name, changes in {"online": [], "stored": options("eval_loader.latent=latent", "preflight=true")}.items():
        run(config.load([file, f"run_name={name}", *changes]))
        folder = Path(recipe["run_folder"].replace("${run_name}", name))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows[name] = [
            [line[key] for line in lines if key in line] for key in ("loss/train/total", "metrics/eval/validation_loss")
        ]
    for online, stored in zip(rows["online"], rows["stored"], strict=True):
        assert len(online) >= 2 and stored == pytest.approx(online, rel=tolerance)


def test_batches_bring_no_image_unless_it_is_asked_for_and_save_the_autoencoder(recipe: Recipe, write_recipe: Write) -> None:
    file = write_recipe(recipe)
    invoke("latents", file)
    seen = {}
    for name, changes in {"online": [], "stored": options(), "both": options("train_loader.images=true")}.items():
        trainer = build_trainer(config.load([file, f"run_name={name}", *changes]))
        loader: Any = trainer.state.train_dataloader
        model: Any = trainer.state.model
        batch = next(iter(loader))
        flops = StepCounter(model).count(shape_of(batch)).flops
        seen[name] = batch.keys() & {"image", "latent"}, flops, len(batch["sample_id"])
        if "latent" in batch:
            sides = {bucket: (4, bucket.height // 2, bucket.width // 2) for bucket in loader.dataset.buckets}
            assert batch["latent"].dtype == torch.bfloat16 and tuple(batch["latent"].shape[1:]) in sides.values()
        trainer.close()
    assert [keys for keys, _, _ in seen.values()] == [{"image"}, {"latent"}, {"image", "latent"}]
    assert seen["stored"][1:] == seen["both"][1:]
    assert seen["online"][1].pop("autoencoder") > 0, "which alone is what stored latents save"
    assert seen["online"][1:] == seen["stored"][1:]


def test_a_run_on_latents_never_decodes_an_image(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    """All images are damaged after they were encoded: they are refused, and a run that is told they are the same reads none."""
    file = write_recipe(recipe | {"max_duration": "2ba"})
    invoke("latents", file)
    for shard in (tmp_path / "data" / "train").glob("*/shard*.mds"):
        content = shard.read_bytes()
        shard.write_bytes(content.replace(b"\x89PNG", b"\x00\x00\x00\x00"))
    with pytest.raises(UserError, match=r"latent: .* was made of other data than lies beside it"):
        run(config.load([file, *options()]))
    manifest = encoded_folder(tmp_path / "data", "train", "latent", "image") / "manifest.json"
    now = column_contents(tmp_path / "data" / "train", "image")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"data": now}))
    assert "loss" in run(config.load([file, *options()]))
    with pytest.raises(UserError, match="can be decoded"):
        run(config.load([file, "run_name=online"]))


def test_an_image_that_could_not_be_decoded_is_counted_and_replaced(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    file = write_recipe(recipe)
    shard = next((tmp_path / "data" / "train" / "16x16").glob("shard*.mds"))
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00\x00\x00\x00", 1))
    invoke("latents", file)
    trainer = build_trainer(config.load([file, *options()]))
    dataset: Any = trainer.state.train_dataloader.dataset  # pyright: ignore
    first = dataset.buckets.index((16, 16))
    broken = sum(dataset.counts[:first])
    sample, following = (dataset[SampleRequest(broken + index, 16, 16, 0)] for index in (0, 1))
    assert sample["sample_id"] == broken + 1 and torch.equal(sample["latent"], following["latent"]) and dataset.undecodable == 1
    trainer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.6}, r"train_loader\.latent: .* by .*vae with scaling_factor 0\.7 \(model\.autoencoder: 0\.6\)\."),
        ({"shift_factor": 0.0}, r"train_loader\.latent: .*shift_factor 0\.1 \(model\.autoencoder: 0\.0\)"),
        ({}, r"train_loader\.latent: .*whose weights are not those of model\.autoencoder"),
    ],
    ids=["scaling", "shift", "weights"],
)
def test_latents_of_another_autoencoder_are_refused_by_name(
    recipe: Recipe, write_recipe: Write, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_recipe(recipe)
    invoke("latents", file)
    module = save_autoencoder(tmp_path / "vae", **changes)
    if not changes:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.01)
        module.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=message):
        build_trainer(config.load([file, *options()]))


def test_mistakes_are_said_before_training_with_path_and_remedy(recipe: Recipe, write_recipe: Write) -> None:
    from stacks import TEACHER

    repa = {"repa": {"teacher": TEACHER, "block": 1, "projector_hidden": 16}}
    stages = [{"until": "2ba", "image_size": 16}, {"image_size": 24}]
    sizes = {"global_train_batch_size": 24, "device_train_microbatch_size": 12}
    staged = {"progressive_resolution": {"stages": [stage | sizes for stage in stages]}}
    file = write_recipe(recipe)
    invoke("latents", file, "--name", "small")

    def refused(*changes: str, **keys: Any) -> str:
        loaded = config.load([write_recipe(recipe | keys, "wrong.yaml"), "train_loader.latent=small", *changes])
        with pytest.raises(UserError) as error:
            build_trainer(loaded)
        checked = [result.text for result in check_recipe(loaded, step=False) if result.mark == "✗"]
        assert len(checked) == 1, checked
        return f"{error.value}\n{checked[0]}"

    def twice(text: str, said: str) -> None:
        assert said.count(text) == 2, said

    twice("set train_loader.images: true", refused(algorithms=repa))
    twice("there are no latents of 24 px; `latent` names small (16 px). Make them with `prx encode latents --image-size 24",
          refused(algorithms=staged))  # fmt: skip
    twice("stages[1].image_size: there are no latents of 24 px", refused(algorithms=staged))
    twice("There is: small. Did you mean 'small'?", refused("train_loader.latent=smal"))
    twice(
        "train_loader.latent: model.autoencoder is pixels", refused(model=recipe["model"] | {"autoencoder": {"name": "pixels"}})
    )
    twice("train_loader.images: false leaves nothing", refused("train_loader.latent=null", "train_loader.images=false"))
    invoke("latents", file, "--name", "again")
    in_pixels = {"autoencoder": {"name": "pixels"}, "backbone": recipe["model"]["backbone"] | {"in_channels": 3}}
    pixels = write_recipe(recipe | {"model": recipe["model"] | in_pixels}, "pixels.yaml")
    with pytest.raises(UserError, match=r"latent: small and again are both of 16 px"):
        build_trainer(config.load([file, "train_loader.latent=[small,again]"]))
    with pytest.raises(UserError, match=r"model\.autoencoder: pixels has no latents to store"):
        invoke("latents", pixels, "--name", "x")
    with pytest.raises(UserError, match=r"--image-size 20: images of 20x20 cannot be cut into patches of 8"):
        invoke("latents", file, "--name", "x", "--image-size", "20")


def test_stages_take_latents_of_their_own_size_and_a_teacher_its_images(recipe: Recipe, write_recipe: Write) -> None:
    from stacks import TEACHER

    sizes = {"global_train_batch_size": 24, "device_train_microbatch_size": 12}
    stages = [{"until": "2ba", "image_size": 16}, {"image_size": 24}]
    recipe["algorithms"]["progressive_resolution"] = {"stages": [stage | sizes for stage in stages]}
    recipe["algorithms"]["repa"] = {"teacher": TEACHER, "block": 1, "projector_hidden": 16}
    recipe["train_loader"] |= {"num_workers": 1}
    file = write_recipe(recipe | {"max_duration": "4ba", "preflight": True})
    for size in ("16", "24"):
        invoke("latents", file, "--image-size", size, "--name", f"at{size}", "--storage", "float32")
    rows = []
    for name, changes in {"online": [], "stored": ["train_loader.latent=[at24,at16]", "train_loader.images=true"]}.items():
        run(config.load([file, f"run_name={name}", *changes]))
        folder = Path(recipe["run_folder"].replace("${run_name}", name))
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    online, stored = ([row["loss/train/flow"] for row in each if "loss/train/flow" in row] for each in rows)
    assert len(stored) == 4 and stored == pytest.approx(online, rel=1e-4)


def test_a_loss_that_looks_at_images_unannounced_is_named_before_the_first_step(
    recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    code = tmp_path / "brightness.py"
    code.write_text(
        "from prx_composer import registry\n"
        "from prx_composer.algorithms.base import LossTrick\n"
        "@registry.algorithms.register('looks_at_images')\n"
        "class LooksAtImages(LossTrick):\n"
        "    name = 'looks_at_images'\n"
        "    def __init__(self, weight: float = 1.0):\n"
        "        super().__init__(weight)\n"
        "    def loss(self, outputs, batch):\n"
        "        return batch['image'].float().mean() * 0\n"
    )
    recipe["algorithms"] = {"looks_at_images": {}}
    file = write_recipe(recipe | {"code_paths": [str(code)], "preflight": True, "max_duration": "1ba"})
    invoke("latents", file)
    with pytest.raises(UserError, match=r"looks at the batch's images.*set train_loader\.images: true"):
        run(config.load([file, *options()]))
    assert "loss" in run(config.load([file, *options("train_loader.images=true")]))


def test_values_that_overflow_are_not_stored(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "vae", scaling_factor=1e6)
    with pytest.raises(UserError, match=r"not finite in float16: give another --storage"):
        invoke("latents", write_recipe(recipe), "--storage", "float16")


def test_latents_and_text_stored_together_give_the_loss_of_both_run_online(recipe: Recipe, write_recipe: Write) -> None:
    file = write_recipe(recipe)
    invoke("text", file, "--storage", "float32")
    invoke("latents", file, "--storage", "float32")
    online = first_loss(file, "run_name=online")
    stored = first_loss(file, "run_name=stored", *options("train_loader.text_embedding=text"))
    assert stored["loss/train/total"] == pytest.approx(online["loss/train/total"], rel=1e-5)
