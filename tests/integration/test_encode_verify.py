"""`prx encode … --verify n`: what is stored is what the encoder gives, or it is said what differs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import TEACHER
from test_encode import invoke
from test_encode_latents import recipe, save_autoencoder  # noqa: F401 -- a fixture
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.data.split import open_split
from prx_composer.commands.encode.encoding import Encoded
from prx_composer.commands.encode.verifying import _chosen, _difference
from prx_composer.common.errors import UserError
from prx_composer.data.contents import column_contents
from prx_composer.data.stored import encoded_folder, pack

Recipe = dict[str, Any]
Write = Callable[..., str]


def refused(*arguments: str) -> str:
    """What a verification that fails says; its exit code is not 0."""
    result = CliRunner().invoke(app, ["encode", *arguments])
    assert result.exit_code != 0 and isinstance(result.exception, UserError), result.output
    return f"{result.output}\n{result.exception}"


def flip(folder: Path, row: int, bits: int = 0xFF) -> None:
    """Invert bits of the byte with the sign and exponent of the largest bf16 value of a row of the first bucket."""
    file = next((folder / "8x24").glob("part.00000.mds"))
    content = bytearray(file.read_bytes())
    begin, end = (int.from_bytes(content[4 * (1 + number) :][:4], "little") for number in (row, row + 1))
    start = end - (end - begin) // 4 * 2  # values of two bytes each are at the row's end
    highest = max(range(start, end - 1, 2), key=lambda place: content[place + 1] & 0x7F)
    content[highest + 1] ^= bits
    file.write_bytes(content)


def test_latents_agree_with_their_autoencoder_and_with_no_other(recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:  # noqa: F811
    file, folder = write_recipe(recipe), encoded_folder(tmp_path / "data", "train", "latent", "image")
    invoke("latents", file)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = invoke("latents", file, "--verify", "20", "--batch-size", "7")
    assert f"{folder}: 20 of 480 samples were encoded again by {tmp_path / 'vae'}" in said
    numbers = re.search(r"Relative error ([\d.]+)%; rounding to bfloat16 alone makes ([\d.]+)%", said)
    assert numbers and float(numbers[1]) == pytest.approx(float(numbers[2]), abs=0.02) and 0 < float(numbers[2]) < 0.4
    drawn = re.search(r"PSNR ([\d.]+) dB against the images; the autoencoder's own is ([\d.]+) dB", said)
    assert drawn and float(drawn[1]) == pytest.approx(float(drawn[2]), abs=0.05)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, "nothing is stored"

    other = refused("latents", file, "--verify", "4", "--image-size", "32")
    assert "image_size is 16 there and 32 here" in other and "4 of 4 samples differ" in other
    flip(folder, 0)
    broken = refused("latents", file, "--verify", "9")
    assert re.search(r"1 of 9 samples differ by more than 0.0039 of the value and 0.0039 .*: 0 of 8x24 \(", broken)
    flip(folder, 0)
    invoke("latents", file, "--verify", "9")
    module = save_autoencoder(tmp_path / "vae")
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    module.save_pretrained(tmp_path / "vae")
    other = refused("latents", file, "--verify", "4")
    assert "whose weights are others" in other and "4 of 4 samples differ" in other and "is not what" in other


def test_data_that_have_changed_and_latents_that_were_never_stored_are_said(
    recipe: Recipe,  # noqa: F811
    write_recipe: Write,
    tmp_path: Path,
) -> None:
    file, folder = write_recipe(recipe), encoded_folder(tmp_path / "data", "train", "latent", "image")
    assert "make it with `prx encode latents RECIPE --name latent --split train`" in refused("latents", file, "--verify", "4")
    invoke("latents", file)
    shard = next((tmp_path / "data" / "train" / "8x24").glob("shard*.mds"))
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00\x00\x00\x00", 1))
    assert "was made of other data than lies beside it" in refused("latents", file, "--verify", "4")
    manifest = folder / "manifest.json"
    now = column_contents(tmp_path / "data" / "train", "image")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"data": now}))  # as one that doesn't look would have it
    assert "1 of 9 samples differ" in refused("latents", file, "--verify", "9")


@pytest.mark.parametrize("storage", ["bfloat16", "int8", "float16", "float32"])
def test_text_agrees_with_its_encoder_and_with_no_other(
    recipe: Recipe,  # noqa: F811
    write_recipe: Write,
    tmp_path: Path,
    storage: str,
) -> None:
    file = write_recipe(recipe)
    invoke("text", file, "--storage", storage)
    said = invoke("text", file, "--verify", "30", "--batch-size", "5")
    assert "30 of 480 samples were encoded again" in said and f"rounding to {storage} alone" in said and "PSNR" not in said
    if storage == "bfloat16":
        flip(encoded_folder(tmp_path / "data", "train", "text", "caption"), 0, 0x40)
        assert "1 of 30 samples differ" in refused("text", file, "--verify", "30")
    encoder = Path(recipe["model"]["text_encoder"]["pretrained"])
    config = T5Config.from_pretrained(encoder)
    torch.manual_seed(77)
    other = tmp_path / "other"
    T5EncoderModel(config).save_pretrained(other)
    for name in encoder.iterdir():
        if "token" in name.name or "special" in name.name:
            (other / name.name).write_bytes(name.read_bytes())
    said = refused("text", file, f"model.text_encoder.pretrained={other}", "--verify", "9")
    assert "whose weights are others" in said and "9 of 9 samples differ" in said


@pytest.mark.slow
def test_what_lies_in_an_object_store_is_verified_there(
    recipe: Recipe,  # noqa: F811
    write_recipe: Write,
    tmp_path: Path,
    s3: Any,
) -> None:
    file, data = write_recipe(recipe), tmp_path / "data"
    invoke("latents", file)
    for path in data.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "data", f"set/{path.relative_to(data)}")
    remote = ("train_loader.remote=s3://data/set", f"train_loader.path={tmp_path / 'cache'}")
    assert "s3://data/set/train/encoded/latent/image: 5 of 480 samples" in invoke("latents", file, *remote, "--verify", "5")
    assert not (tmp_path / "cache").exists()
    folder = encoded_folder(data, "train", "latent", "image")
    flip(folder, 0)
    (part,) = (folder / "8x24").glob("part.00000.mds")
    s3.upload_file(str(part), "data", "set/train/encoded/latent/image/8x24/part.00000.mds")
    assert "1 of 5 samples differ" in refused("latents", file, *remote, "--verify", "5")
    assert "cannot be fetched" in refused("latents", file, *remote, "--verify", "5", "--name", "other")


def test_features_are_verified_too(recipe: Recipe, write_recipe: Write) -> None:  # noqa: F811
    recipe["algorithms"] = {"repa": {"teacher": TEACHER, "block": 1, "projector_hidden": 16}}
    file = write_recipe(recipe)
    torch.manual_seed(3)  # of the teacher, whose weights are random
    invoke("features", file)
    torch.manual_seed(3)
    assert "3 of 480 samples" in invoke("features", file, "--verify", "3")
    torch.manual_seed(3)
    assert "image_size is 16 there and 32 here" in refused("features", file, "--verify", "3", "--image-size", "32")
    torch.manual_seed(4)
    said = refused("features", file, "--verify", "3")
    assert "whose weights are others" in said and "3 of 3 samples differ" in said


def test_samples_are_spread_from_the_first_to_the_last(recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    split = open_split(str(tmp_path / "data"), "train")
    counts = [split.manifest.buckets[bucket] for bucket in sorted(split.manifest.buckets)]
    for number in (1, 2, 7, 480, 999):
        chosen = _chosen(split, number)
        assert sum(map(len, chosen.values())) == min(number, 480) and chosen == _chosen(split, number)
    assert [rows[0] for rows in _chosen(split, 480).values()] == [0, 0]
    assert [len(rows) for rows in _chosen(split, 480).values()] == counts
    two = _chosen(split, 2)
    assert [*two.values()] == [[0], [counts[1] - 1]]


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", "int8"])
def test_what_is_only_rounded_agrees_and_one_value_that_is_not_does_not(storage: str) -> None:
    values = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    values[3, 4] = 40.0  # as the outliers of text encoders

    def compare(stored: torch.Tensor) -> bool:
        row = {"shape": b"50x24", "values": pack(stored, storage)}
        return _difference("0", row, Encoded(pack(values, "float32"), (50, 24)), storage, "text", 2**-8).agrees

    assert compare(values) and compare(values * (1 + 2**-12))
    moved = values.clone()
    moved[7, 9] += 0.1
    missing = values.clone()
    missing[20, 20] = float("nan")
    assert not compare(moved) and not compare(values * 1.02)
    assert storage == "int8" or not compare(missing)
