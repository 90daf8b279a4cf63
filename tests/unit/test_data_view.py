"""`prx data view`: what is shown is, pixel for pixel and word for word, what the training loader makes of the data."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import encoded, picture
from PIL import Image
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.commands.data.split import open_split
from prx_composer.commands.data.view import PROBLEM, View, check_output, cut, look, subject_of, title, write_view
from prx_composer.common import pages
from prx_composer.common.errors import UserError
from prx_composer.data.format import Bucket, BucketWriter, RawSample
from prx_composer.data.loader import ImageCaptionData
from prx_composer.models.prompts import tokenize

SQUARE, WIDE = Bucket(32, 32), Bucket(24, 40)
SCRIPT = "<script>alert('&')</script>"
BROKEN = 5  # a sample id


def write(folder: Path, broken: frozenset[int] = frozenset()) -> Path:
    """16 smooth pictures, larger than their buckets, in two buckets; ids run through them bucket by bucket."""
    with BucketWriter(folder / "train", 32, ("caption", "short")) as writer:
        for index in range(16):
            bucket = WIDE if index < 8 else SQUARE  # in the order of their names
            image = encoded(picture(2 * bucket.height, 2 * bucket.width, index), "PNG")
            captions = {"caption": f"{SCRIPT} a picture of {index}", "short": f"picture {index}"}
            image = image[:100] if index in broken else image
            writer.write(bucket, RawSample(image, 2 * bucket.width, 2 * bucket.height, captions, f"key/{index}"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("view"), frozenset({BROKEN}))


def seen(path: Path, **options: Any) -> View:
    subject = subject_of([str(path)], None)
    return look(subject, open_split(subject.path, subject.split), **options)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def shown(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("image_size", [8, 16])
def test_a_recipes_view_is_its_loaders_batch(
    tiny_recipe: Any, write_recipe: Callable[..., str], tokenizer: Any, image_size: int
) -> None:
    tiny_recipe["train_loader"]["captions"] = {"caption": 1.0, "short_caption": 2.0}
    subject = subject_of([write_recipe(tiny_recipe)], None)
    view = look(subject, open_split(subject.path, subject.split), 240, image_size=image_size)
    loader: Any = ImageCaptionData(
        tokenizer, 14, image_size, 48, 4, 17, path=subject.path, captions=tiny_recipe["train_loader"]["captions"]
    ).dataloader
    trained = {}
    for batch in loader:
        for index, sample_id in enumerate(batch["sample_id"].tolist()):
            trained[sample_id] = (batch["image"][index], batch["input_ids"][index])
    assert len(view.samples) == len(trained) == 240
    for sample in view.samples:
        image, ids = trained[sample.sample_id]
        assert sample.image is not None and torch.equal(sample.image, image)
        assert tokenize(tokenizer, [sample.caption.kept], 14)["input_ids"][0].tolist() == ids.tolist()
    assert {sample.column for sample in view.samples} == {"caption", "short_caption"}


def test_by_default_a_recipe_is_shown_at_its_first_image_size_and_a_folder_as_stored(
    tiny_recipe: Any, write_recipe: Callable[..., str], data: Path
) -> None:
    subject = subject_of([write_recipe(tiny_recipe), "image_size=8"], None)
    assert {sample.size for sample in look(subject, open_split(subject.path, "train"), 4).samples} == {Bucket(8, 8)}
    assert {sample.size for sample in seen(data).samples} == {SQUARE, WIDE}
    assert {sample.size for sample in seen(data, image_size=64).samples} == {Bucket(64, 64), Bucket(48, 80)}
    halves = seen(data, image_size=16)  # all stored sides are multiples of 8, and so these are: 12x20 isn't
    assert {sample.size for sample in halves.samples} == {Bucket(16, 16)}


def test_a_picture_has_the_loaders_pixels_and_rows_of_any_shape(data: Path, tmp_path: Path) -> None:
    view = seen(data, count=16)
    write_view(view, str(tmp_path / "sheet.png"))
    drawn = pixels(Image.open(tmp_path / "sheet.png"))
    factor = pages.shown_factor(*WIDE)
    left = pages.GAP
    for column, sample in enumerate(view.samples[:8]):
        if sample.image is not None:
            large = shown(sample.image).repeat(factor, 0).repeat(factor, 1)
            x = left + column * (WIDE.width * factor + pages.GAP)
            part = drawn[left : left + large.shape[0], x : x + large.shape[1]]
            assert np.array_equal(part, large)
    assert view.samples[0].stored == WIDE and view.samples[8].stored == SQUARE
    first = shown(view.samples[8].image).repeat(factor, 0).repeat(factor, 1)  # pyright: ignore[reportArgumentType]
    tops = [
        y
        for y in range(drawn.shape[0] - len(first))
        if np.array_equal(drawn[y : y + len(first), left : left + first.shape[1]], first)
    ]
    assert len(tops) == 1 and tops[0] > WIDE.height * factor


def test_a_page_stands_alone_has_the_loaders_pixels_and_treats_captions_as_text(data: Path, tmp_path: Path) -> None:
    view = seen(data, count=16)
    write_view(view, str(tmp_path / "sheet.html"))
    page = (tmp_path / "sheet.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert(") >= 16
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    inlined = [base64.b64decode(content) for content in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    for sample, content in zip(view.samples, inlined, strict=True):
        if sample.image is not None:
            assert np.array_equal(pixels(Image.open(io.BytesIO(content))), shown(sample.image))
    assert all(f"key/{index}" in page and f"picture {index}" in page for index in range(16))


def test_an_image_that_cannot_be_decoded_is_shown_as_such_with_what_training_takes_instead(
    data: Path, tmp_path: Path, tokenizer: Any
) -> None:
    view = seen(data, count=16)
    (broken,) = [sample for sample in view.samples if sample.image is None]
    loader: Any = ImageCaptionData(tokenizer, 14, 32, 8, 4, 0, path=str(data), shuffle=False).dataloader
    used = [sample_id for batch in loader for sample_id in batch["sample_id"].tolist()]
    assert (broken.sample_id, broken.key) == (BROKEN, f"key/{BROKEN}") and broken.replacement == used[BROKEN] != BROKEN
    assert "1 cannot be decoded" in title(view)
    write_view(view, str(tmp_path / "sheet.html"))
    assert f"training shows {broken.replacement} instead" in (tmp_path / "sheet.html").read_text()
    write_view(view, str(tmp_path / "sheet.png"))
    factor = pages.shown_factor(*WIDE)
    x = pages.GAP + BROKEN * (WIDE.width * factor + pages.GAP)
    drawn = pixels(Image.open(tmp_path / "sheet.png"))
    assert {tuple(colour) for colour in drawn[8 : 8 + 24 * factor, x : x + 40 * factor].reshape(-1, 3)} == {
        (225, 225, 225),
        PROBLEM,
    }


def test_a_bucket_without_any_image_is_shown_too(tmp_path: Path) -> None:
    view = seen(write(tmp_path, frozenset(range(8))), count=16)
    assert [sample.image is None for sample in view.samples] == [True] * 8 + [False] * 8
    assert {sample.replacement for sample in view.samples[:8]} == {None}
    write_view(view, str(tmp_path / "sheet.html"))
    assert "no image of its bucket can" in (tmp_path / "sheet.html").read_text()


def test_a_caption_is_cut_where_the_tokenizer_cuts_it(tokenizer: Any) -> None:
    text = "a red circle on the left of a white background,  and a blue square"
    for max_tokens in range(3, 20):
        found = cut(text, tokenizer, max_tokens)
        kept, whole = (tokenize(tokenizer, [part], max_tokens)["input_ids"].tolist() for part in (found.kept, text))
        assert found.kept + found.lost == text and kept == whole
        assert bool(found.lost) == (found.tokens > max_tokens) and found.tokens == len(tokenizer(text)["input_ids"])
    assert cut(text, None, 0).kept == text


def test_what_is_cut_is_marked(tiny_recipe: Any, write_recipe: Callable[..., str], tmp_path: Path) -> None:
    subject = subject_of([write_recipe(tiny_recipe), "model.text_encoder.max_tokens=5"], None)
    view = look(subject, open_split(subject.path, "train"), 3)
    assert all(sample.caption.lost for sample in view.samples)
    write_view(view, str(tmp_path / "sheet.html"))
    page = (tmp_path / "sheet.html").read_text()
    for sample in view.samples:
        assert f'{sample.caption.kept}<span class="lost">{sample.caption.lost}</span>' in page
    write_view(view, str(tmp_path / "cut.png"))
    red = (pixels(Image.open(tmp_path / "cut.png")) == (255, 0, 0)).all(-1).any()
    assert red


def test_a_draw_is_seeded_and_can_be_of_one_bucket(data: Path) -> None:
    ids = [[sample.sample_id for sample in seen(data, count=5, seed=seed).samples] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2] and all(part == sorted(set(part)) for part in ids)
    square = seen(data, bucket="32x32", count=100)
    assert {sample.stored for sample in square.samples} == {SQUARE} and len(square.samples) == square.total == 8


def test_what_cannot_be_shown_is_said_before_anything_is_read(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--bucket: there is no '9x9'; the data set has 24x40, 32x32"):
        seen(data, bucket="9x9")
    for arguments in ([str(data), "image_size=3"], [str(data), str(data)], [str(data), "a.yaml"]):
        with pytest.raises(UserError, match="name one folder"):
            subject_of(arguments, None)
    for output, said in [("a.jpg", r"\.png.*\.html"), ("none/a.png", "there is no folder")]:
        with pytest.raises(UserError, match=said):
            check_output(str(tmp_path / output))
    with pytest.raises(UserError, match=rf"{data} --split train"):
        seen(data / "train")


def test_an_image_size_that_the_recipes_patches_do_not_divide_is_refused(
    tiny_recipe: Any, write_recipe: Callable[..., str]
) -> None:
    subject = subject_of([write_recipe(tiny_recipe)], None)
    with pytest.raises(UserError, match=r"--image-size: image_size 10 is not divisible by 4"):
        look(subject, open_split(subject.path, "train"), 1, image_size=10)


def test_the_data_of_a_recipe_are_made_on_first_use(tiny_recipe: Any, write_recipe: Callable[..., str], tmp_path: Path) -> None:
    tiny_recipe["train_loader"]["path"] = str(tmp_path / "made")
    output = str(tmp_path / "sheet.png")
    done = CliRunner().invoke(app, ["data", "view", write_recipe(tiny_recipe), "--output", output], catch_exceptions=False)
    assert done.exit_code == 0 and "32 of 240 samples" in done.stdout and "cut to 14 tokens" in done.stdout
    assert Image.open(output).width > 500 and (tmp_path / "made" / "train" / "manifest.json").exists()
