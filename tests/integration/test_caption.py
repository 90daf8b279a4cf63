"""`prx data caption`: from a model that reads images to captions that training reads by name; killed, refused, only looked at."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import captioners
import commands
import pytest
import torch
from streaming import LocalDataset

from prx_composer.common.pages import picture
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.decoding import decode_image
from prx_composer.data.format import Bucket, BucketWriter, Manifest, RawSample, iterate_captions
from prx_composer.data.sampler import SampleRequest
from prx_composer.recipe import config
from prx_composer.training.run import build_trainer

Recipe = dict[str, Any]
Write = Callable[..., str]
SHORT = ("--max-new-tokens", 8, "--dtype", "float32", "--column", "long")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return captioners.write_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return captioners.write_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture
def few(tmp_path: Path, shapes_data: Path) -> Path:
    """A data set of 24 images in two buckets, one of which is no image."""
    with BucketWriter(tmp_path / "few" / "train", 16, ("caption",)) as writer:
        rows = LocalDataset(str(shapes_data / "train" / "16x16"))
        for index in range(24):
            row = rows[index * 7]
            image = row["image"][: 40 if index == 5 else None]
            writer.write(
                Bucket(16, 16) if index < 16 else Bucket(8, 32), RawSample(image, 16, 16, {"caption": "x"}, f"key-{index}")
            )
    return tmp_path / "few"


def caption(data: Path | str, model: str, *options: Any, code: int = 0) -> str:
    return commands.prx("data", "caption", data, "--model", model, *SHORT, *options, code=code)


def captions_of(data: Path, column: str = "long") -> list[str]:
    return list(iterate_captions(data / "train", column))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_captions_are_what_transformers_writes_of_each_image_alone(few: Path, llava: str, blip: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    before = files_of(few)
    caption(few, llava, "--prompt", "Describe the shape", "--column", "answered")
    caption(few, blip, "--column", "begun")
    caption(few, blip, "--column", "continued", "--prompt", "the red")
    assert {name: content for name, content in files_of(few).items() if "encoded" not in name} == before
    asked = "user : <image> Describe the shape assistant :"
    given = {"answered": (llava, {"text": asked}), "begun": (blip, {}), "continued": (blip, {"text": "the red"})}
    for column, (folder, text) in given.items():
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        written = captions_of(few, column)
        assert len(set(written)) > 5 and written[13] == ""  # buckets are in order of their height; that one is no image
        for place, sample in [(0, 16), (3, 19), (8, 0), (20, 12)]:
            bucket = few / "train" / ("8x32" if sample >= 16 else "16x16")
            row = LocalDataset(str(bucket))[sample % 16]
            inputs = processor(
                images=picture(decode_image(row["image"], *Bucket.parse(bucket.name))), return_tensors="pt", **text
            )
            inputs = {key: value for key, value in inputs.items() if key != "token_type_ids"}
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
            length = {"answered": inputs.get("input_ids", ids[None]).shape[1], "continued": 3, "begun": 0}[column]
            assert written[place] == processor.tokenizer.decode(ids[length:], skip_special_tokens=True), column


@pytest.mark.parametrize("options", [(), ("--temperature", 1.0)], ids=["greedy", "drawn"])
def test_captions_of_a_batch_are_those_of_each_image_alone(few: Path, llava: str, options: tuple[Any, ...]) -> None:
    caption(few, llava, *options, "--batch-size", 7, "--column", "many")
    caption(few, llava, *options, "--batch-size", 1, "--column", "single", "--part", 5)
    assert captions_of(few, "many") == captions_of(few, "single")
    caption(few, llava, *options, "--seed", 1, "--column", "other")
    assert (captions_of(few, "other") == captions_of(few, "many")) == (not options)


@pytest.mark.slow
def test_captioning_killed_ten_times_leaves_the_same_bytes(tmp_path: Path, shapes_data: Path, blip: str) -> None:
    data = shutil.copytree(shapes_data, tmp_path / "data")
    arguments = ["data", "caption", data, "--model", blip, *SHORT, "--part", 2, "--batch-size", 2]
    undisturbed = commands.run("prx", *arguments)
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    expected = files_of(data)
    shutil.rmtree(data / "train" / "encoded")
    for _ in range(10):
        process = commands.start("prx", *arguments, start_new_session=True)
        parts = f"{data}/train/encoded/long/image/*/*.mds"  # glob: folders vanish under it while the command works
        before = len(glob(parts))
        while process.poll() is None and len(glob(parts)) < before + 3:
            time.sleep(0.005)
        assert process.poll() is None, "it was at its end before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert "long" not in Manifest.read(data / "train").captions
    finished = commands.run("composer", "-n", 2, "-m", "prx_composer.cli", *arguments)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    assert files_of(data) == expected


def test_training_reads_the_column_by_its_name(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path, shapes_data: Path, llava: str
) -> None:
    data = shutil.copytree(shapes_data, tmp_path / "data")
    loader = {"name": "image_caption", "path": str(data), "captions": {"long": 1.0}}
    file = write_recipe(tiny_recipe | {"train_loader": loader})
    assert "✗" not in commands.prx("check", file, "--config-only")
    lacking = commands.prx("check", file, "--no-step", code=1)
    assert "captions: no caption column 'long'; the data set has caption" in lacking
    assert "Train on them: train_loader.captions: {long: 1.0}" in caption(file, llava)
    known = commands.prx("check", file, "--no-step")
    assert f"long was written by {llava}" in known
    trainer = build_trainer(config.load([file, "max_duration=2ba", "preflight=false"]))
    words: Any = trainer.state.model.text_encoder.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    batch, stored = next(iter(trainer.state.train_dataloader)), captions_of(data)
    spoken = {word for text in stored for word in text.lower().split()}
    assert spoken < words.get_vocab().keys() and "purple" not in words.get_vocab()  # it was trained on what was written
    for sample, ids in zip(batch["sample_id"].tolist(), batch["input_ids"], strict=True):
        assert torch.equal(
            ids, words(stored[sample], padding="max_length", max_length=14, truncation=True, return_tensors="pt")["input_ids"][0]
        )
    trainer.fit()
    trainer.close()


def test_written_captions_are_encoded_and_noticed_when_they_change(
    tiny_recipe: Recipe, write_recipe: Write, few: Path, encoder_folder: Path, blip: str
) -> None:
    tiny_recipe["model"]["text_encoder"] = {"name": "huggingface", "pretrained": str(encoder_folder), "max_tokens": 14}
    loader = {"name": "image_caption", "path": str(few), "captions": {"long": 1.0}}
    file = write_recipe(tiny_recipe | {"train_loader": loader})
    caption(few, blip)
    assert "24 captions by" in commands.prx("encode", "text", file)
    assert "24 of 24 samples were encoded again" in commands.prx("encode", "text", file, "--verify", 30), (
        "they lie beside the shards"
    )
    embedded = ImageCaptionDataset(str(few), captions={"long": 1.0}, text_embedding="text")
    assert len(embedded[SampleRequest(0, 8, 32, 0)]["text_embedding"]) == len(captions_of(few)[0].split()) + 1
    shutil.rmtree(few / "train" / "encoded" / "long")
    caption(few, blip, "--prompt", "under the")
    with pytest.raises(ValueError, match="its column 'long' has changed"):
        ImageCaptionDataset(str(few), captions={"long": 1.0}, text_embedding="text")


def test_what_is_cut_empty_or_undecodable_is_counted_said_and_trained_on_as_ever(few: Path, llava: str, tmp_path: Path) -> None:
    mute = shutil.copytree(llava, tmp_path / "mute")
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(mute)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as the first: padding
    model.save_pretrained(mute)
    said = caption(few, llava)
    cut = sum(len(text.split()) == 8 for text in captions_of(few))
    made = json.loads((few / "train/encoded/long/image/manifest.json").read_text())
    assert (made["cut"], made["empty"], made["undecodable"], made["prompt"]) == (
        made["cut"], 0, 1, "Describe this image in detail. Write only the description.",
    )  # fmt: skip
    assert made["cut"] >= cut > 0 and f"{made['cut']} were not at their end after --max-new-tokens 8" in said
    assert "1 images cannot be decoded and have none" in said
    assert "23 are empty" in caption(few, str(mute), "--column", "mute")
    dataset = ImageCaptionDataset(str(few), captions={"long": 1.0})
    sample = dataset[SampleRequest(13, 16, 16, 0)]
    assert sample["sample_id"] == 14 and sample["caption"] == captions_of(few)[14] and dataset.undecodable == 1


def test_some_are_looked_at_first_and_nothing_is_written(few: Path, llava: str) -> None:
    before = files_of(few)
    said = caption(few, llava, "--samples", 4)
    assert files_of(few) == before and "Nothing was written" in said and "key-16: " in said
    assert "4 of 24 looked at" in said and "all would take about" in said
    caption(few, llava)
    told = captions_of(few)
    assert f"key-16: {told[0]}" in said and f"key-4: {told[12]}" in said


def test_stats_and_view_show_what_was_written(few: Path, llava: str, tmp_path: Path) -> None:
    caption(few, llava)
    told = commands.prx("data", "stats", few)
    assert f"long of image   captions by {llava}, utf-8, up to 8 tokens" in told
    assert told.index("  caption\n") < told.index("  long\n") < told.index("Stored beside the shards")
    commands.prx("data", "view", few, "--output", tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text()
    assert "long" in page and captions_of(few)[0] in page


def test_of_a_mixture_those_are_captioned_that_have_no_such_column(
    tiny_recipe: Recipe, write_recipe: Write, few: Path, tmp_path: Path, blip: str
) -> None:
    with BucketWriter(tmp_path / "own" / "train", 16, ("long",)) as writer:
        row = LocalDataset(str(few / "train" / "16x16"))[0]
        writer.write(Bucket(16, 16), RawSample(row["image"], 16, 16, {"long": "as it came"}, "own"))
    mix = {"few": {}, "own": {}}
    file = write_recipe(
        tiny_recipe | {"train_loader": {"name": "image_caption", "path": str(tmp_path), "mix": mix, "captions": {"long": 1.0}}}
    )
    said = caption(file, blip)
    assert f"{tmp_path / 'own'}, train: left as it is" in said and captions_of(tmp_path / "own") == ["as it came"]
    assert len(captions_of(few)) == 24
    assert "came with captions of this name" in caption(tmp_path / "own", blip, code=1)


def test_what_cannot_be_captioned_is_refused_before_data_are_read(
    few: Path, llava: str, blip: str, encoder_folder: Path, tmp_path: Path
) -> None:
    assert "it is a t5 model, which does not write text about images" in caption(
        tmp_path / "nothing", str(encoder_folder), code=1
    )
    foreign = shutil.copytree(llava, tmp_path / "foreign")
    settings = json.loads((foreign / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (foreign / "config.json").write_text(json.dumps(settings))
    (foreign / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Own: pass")
    assert "Python code of its own" in caption(few, str(foreign), code=1) and not (tmp_path / "executed").exists()
    assert "came with captions of this name" in caption(few, llava, "--column", "caption", code=1)
    assert "give a plain name" in caption(few, llava, "--column", "../long", code=1)
    assert "There is no folder" in caption(tmp_path / "nothing", llava, code=1)
    assert "on a disk" in caption("s3://data/few", llava, code=1)
    assert "float64" in caption(few, llava, "--dtype", "float64", code=1)
    base = captioners.write_llava(tmp_path / "base", chat=False)
    assert "with the mark that stands for the image (<image>)" in caption(few, base, "--prompt", "Describe", code=1)
    shutil.rmtree(few / "train" / "encoded")
    assert "24 captions" in caption(few, base, "--prompt", "<image> Describe")
    assert "begun with other settings" in caption(few, base, "--prompt", "<image> a", code=1)
    assert "another --column" in caption(few, blip, code=1)


def test_images_without_captions_are_converted_captioned_and_read(tmp_path: Path, llava: str) -> None:
    from conversions import convert, jpeg

    from prx_composer.commands.convert.settings import parse_captions

    pictures, data = tmp_path / "pictures", tmp_path / "data"
    pictures.mkdir()
    for number in range(6):
        (pictures / f"{number}.jpg").write_bytes(jpeg(64, 64, number))
    (pictures / "list.jsonl").write_text("".join(f'{{"file": "{number}.jpg"}}\n' for number in range(6)))
    convert("jsonl", pictures, data, captions=parse_captions(["none"]))
    assert Manifest.read(data / "train").captions == () and "64x64" in commands.prx("data", "stats", data)
    with pytest.raises(ValueError, match="has no caption column; `prx data caption` writes one"):
        ImageCaptionDataset(str(data))
    caption(data, llava)
    sample = ImageCaptionDataset(str(data))[SampleRequest(2, 64, 64, 0)]
    assert sample["caption"] == captions_of(data)[2] != ""
