"""Captions as training words them: up to the first sentence, tags in another order and fewer, the same for one draw."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import encode, gradient

from prx_composer.commands.data.split import open_split
from prx_composer.commands.data.view import Subject, look, write_view
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.format import Bucket, BucketWriter, RawSample
from prx_composer.data.loader import ImageCaptionData
from prx_composer.data.sampler import SampleRequest
from prx_composer.models.prompts import Wording, first_sentence, not_to_be_stored, wordings
from prx_composer.recipe import config
from prx_composer.training.trial import check_recipe

SQUARE = Bucket(16, 16)
TAGS = "sks, a cat, outdoors, soft light, 50mm"
LONG = "A cat sits on a wall. Behind it the sun sets over the sea, and a boat goes by."


@pytest.fixture
def data(tmp_path: Path) -> str:
    image = encode(gradient(16, 16))
    with BucketWriter(tmp_path / "data" / "train", 16, ("long", "tags")) as writer:
        for index in range(60):
            writer.write(SQUARE, RawSample(image, 16, 16, {"long": f"Picture {index}. {LONG}", "tags": TAGS}, f"key-{index}"))
    return str(tmp_path / "data")


def read(dataset: ImageCaptionDataset, epoch: int, samples: range = range(60)) -> list[str]:
    return [dataset[SampleRequest(sample, 16, 16, epoch)]["caption"] for sample in samples]


# ------------------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (LONG, "A cat sits on a wall."),
        ("One sentence alone.", "One sentence alone."),
        ("no end at all, only words", "no end at all, only words"),
        ("Is it a cat? It is!", "Is it a cat?"),
        ('He says "stop." Then he goes.', 'He says "stop."'),
        ("A portrait of Dr. Smith by J. R. Tolkien. Oil.", "A portrait of Dr. Smith by J. R. Tolkien."),
        ("A drink, e.g. Coke, costs 3.50 dollars. Cheap.", "A drink, e.g. Coke, costs 3.50 dollars."),
        ("Wow... what a cat. It sleeps.", "Wow... what a cat."),
        ("a heading\n\nThe text begins here. It goes on.", "a heading"),
        ("\n  Begins late. Ends.", "Begins late."),
        ("一只猫坐在墙上。太阳落山了。", "一只猫坐在墙上。"),
        ("दीवार पर बिल्ली। सूरज डूबता है।", "दीवार पर बिल्ली।"),
        ("هل هذه قطة؟ نعم.", "هل هذه قطة؟"),
        ("... Then comes more. And more.", "... Then comes more."),
        ("", ""),
        ("...", "..."),
    ],
)
def test_a_text_ends_after_its_first_sentence(text: str, first: str) -> None:
    assert first_sentence(text) == first and first_sentence(first) == first


def test_first_sentences_come_in_their_share_and_nothing_else_is_changed() -> None:
    wording = Wording(first_sentence=0.3)
    texts = [wording.of(LONG, 7, epoch, sample) for epoch in range(10) for sample in range(200)]
    assert {*texts} == {LONG, "A cat sits on a wall."} and abs(texts.count(LONG) / 2000 - 0.7) < 0.04
    assert {Wording(first_sentence=1.0).of(LONG, 0, 0, sample) for sample in range(50)} == {"A cat sits on a wall."}
    assert Wording().of("odd ,text ,,", 0, 0, 0) == "odd ,text ,,"


@pytest.mark.parametrize(
    "text", ["一只猫，户外，晴天，草地", "猫、屋外、晴れ、草", "قطة، في الخارج، عشب، شمس", "a cat, outside, sun, grass"]
)
def test_tags_of_any_script_are_shuffled_and_written_with_their_own_comma(text: str) -> None:
    comma = next(sign for sign in "，、،," if sign in text)
    tags = [tag.strip() for tag in text.split(comma)]
    drawn = [Wording(shuffle=True, keep=1).of(text, 0, 0, sample) for sample in range(20)]
    assert len({*drawn}) > 3 and text in drawn
    for one in drawn:
        found = [tag.strip() for tag in one.split(comma)]
        assert sorted(found) == sorted(tags) and found[0] == tags[0]


def test_tags_are_shuffled_and_dropped_evenly_and_kept_where_they_are_to_be() -> None:
    tags = TAGS.split(", ")
    shuffled = [Wording(shuffle=True).of(TAGS, 0, 0, sample).split(", ") for sample in range(2000)]
    assert all(sorted(found) == sorted(tags) for found in shuffled)
    firsts = Counter(found[0] for found in shuffled)
    assert min(firsts.values()) > 330 and len(firsts) == 5, "each a fifth of the time"
    dropped = [Wording(drop=0.25).of(TAGS, 0, 0, sample).split(", ") for sample in range(2000)]
    assert all(found == [tag for tag in tags if tag in found] and found for found in dropped), "in their order"
    left = Counter(tag for found in dropped for tag in found)
    assert all(abs(left[tag] / 2000 - 0.75) < 0.04 for tag in tags)
    kept = [Wording(shuffle=True, drop=0.5, keep=2).of(TAGS, 0, 0, sample).split(", ") for sample in range(500)]
    assert all(found[:2] == tags[:2] for found in kept) and {len(found) for found in kept} == {2, 3, 4, 5}
    none = Counter(Wording(drop=1.0).of(TAGS, 0, 0, sample) for sample in range(500))
    assert none.keys() == {*tags}, "one tag stays, any of them"
    assert Wording(shuffle=True, drop=0.5).of(" , ", 0, 0, 0) == " , " and Wording(shuffle=True).of("one", 0, 0, 0) == "one"


# --------------------------------------------------------------------------------------------------- training


def test_a_draw_belongs_to_seed_epoch_and_sample(data: str, tokenizer: Any) -> None:
    captions: Any = {"long": {"weight": 2.0, "first_sentence": 0.5}, "tags": {"shuffle": True, "drop": 0.2}}
    dataset = ImageCaptionDataset(data, captions=captions)
    first = read(dataset, 0)
    assert first == read(dataset, 0) == read(ImageCaptionDataset(data, captions=captions), 0)
    assert first != read(dataset, 1) and first != read(ImageCaptionDataset(data, captions=captions, seed=1), 0)
    plain = ImageCaptionDataset(data, captions={"long": 2.0, "tags": 1.0})
    assert [dataset.choose_caption(i, 3) for i in range(60)] == [plain.choose_caption(i, 3) for i in range(60)]
    batches = []
    for workers in (0, 2):
        spec = ImageCaptionData(tokenizer, 40, 16, 12, 4, 0, path=data, captions=captions, num_workers=workers)
        batches.append([batch["input_ids"] for batch in spec.dataloader])
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True)) and len(batches[0]) == 5


def test_a_plain_number_is_a_weight_and_leaves_texts_as_they_are(data: str) -> None:
    plain = ImageCaptionDataset(data, captions={"long": 2.0, "tags": 1.0})
    mapped = ImageCaptionDataset(data, captions={"long": {"weight": 2.0}, "tags": {"weight": 1.0}})
    assert read(plain, 2) == read(mapped, 2) and {TAGS} == {text for text in read(plain, 2) if "Picture" not in text}


def test_the_count_of_cut_captions_is_of_what_is_read(data: str, tokenizer: Any) -> None:
    def told(captions: Any) -> str:
        spec = ImageCaptionData(tokenizer, 8, 16, 60, 4, 0, path=data, captions=captions)
        collator: Any = next(iter(spec.dataloader)) and spec.dataloader.collate_fn  # pyright: ignore[reportAttributeAccessIssue]
        return collator.counts.told(8) or ""

    assert told({"long": 1.0}).startswith("60 of 60 captions")
    assert "captions" not in told({"long": {"first_sentence": 1.0}})


# ------------------------------------------------------------------------------------------- what looks at data


def test_prx_data_view_shows_what_training_reads(data: str, tmp_path: Path) -> None:
    captions: Any = {"long": {"first_sentence": 0.5}, "tags": {"shuffle": True}}
    dataset = ImageCaptionDataset(data, captions=captions, seed=3)
    view = look(Subject(data, "train", {"path": data, "captions": captions}, seed=3), open_split(data, "train"), 60)
    assert [seen.caption.kept for seen in view.samples] == read(dataset, 0)
    changed = [seen for seen in view.samples if f"{seen.column} as stored" in seen.others]
    assert 20 < len(changed) < 60 and all(seen.column not in seen.others for seen in view.samples)
    write_view(view, str(tmp_path / "view.html"))
    assert "tags as stored: sks, a cat, outdoors" in (tmp_path / "view.html").read_text()


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], data: str) -> dict[str, Any]:
    tiny_recipe["train_loader"] = {"name": "image_caption", "path": data, "captions": {"long": {"first_sentence": 1.0}}}
    return tiny_recipe | {"algorithms": {}}


def test_a_check_counts_the_captions_that_training_reads(recipe: dict[str, Any], write_recipe: Callable[..., str]) -> None:
    def said(captions: str) -> str:
        loaded = config.load([write_recipe(recipe), f"train_loader.captions={captions}", "model.text_encoder.max_tokens=8"])
        (result,) = [result for result in check_recipe(loaded, 1, step=False) if "looked at" in result.text]
        return result.text

    assert "60 of 60 captions" in said("{long: 1.0}")
    assert "60 looked at are read whole" in said("{long: {first_sentence: 1.0}}")


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (
            {"long": {"first": 0.3}},
            r"captions.long.first: unknown; a caption column has weight, first_sentence, shuffle, drop, keep",
        ),
        ({"long": {"first_sentence": 1.5}}, r"captions.long.first_sentence: expected a share from 0 to 1, not 1.5"),
        ({"long": {"drop": True}}, r"captions.long.drop: expected a share from 0 to 1, not True"),
        ({"long": {"shuffle": 1}}, r"captions.long.shuffle: expected true or false, not 1"),
        ({"long": {"keep": -1}}, r"captions.long.keep: expected a number of tags, 0 or more, not -1"),
        ({"long": "much"}, r"captions.long.weight: expected a number, not 'much'"),
        ({"long": {"weight": 0}, "tags": 0}, r"captions: weights must be numbers from 0 on with a positive sum"),
        ({"long": {"weight": float("nan")}, "tags": 1}, r"captions: weights must be numbers from 0 on with a positive sum"),
        ({"long": {"weight": float("inf")}, "tags": 1}, r"captions: weights must be numbers from 0 on with a positive sum"),
        ({"lang": {"weight": 1}}, r"captions: no caption column 'lang'; the data set has long, tags"),
    ],
)
def test_a_wrong_setting_is_said_by_its_path(
    captions: Any, message: str, data: str, recipe: dict[str, Any], write_recipe: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match=message):
        ImageCaptionDataset(data, captions=captions)
    recipe["train_loader"]["captions"] = captions
    results = list(check_recipe(config.load([write_recipe(recipe)]), 1, step=False))
    assert any(
        "train_loader" in result.text and message.partition(":")[0] in result.text for result in results if result.mark == "✗"
    )


def test_stored_embeddings_cannot_follow(data: str, recipe: dict[str, Any], write_recipe: Callable[..., str]) -> None:
    captions: Any = {"tags": {"weight": 2.0, "shuffle": True, "drop": 0.1}, "long": 1.0}
    message = r"captions.tags: with shuffle: true, drop: 0.1 its texts are other ones .* tags: 2, or leave text_embedding out"
    with pytest.raises(ValueError, match=message):
        ImageCaptionDataset(data, captions=captions, text_embedding="text")
    assert not_to_be_stored({"tags": 2.0, "long": {"weight": 1.0, "keep": 2}}) is None
    recipe["train_loader"] |= {"captions": captions, "text_embedding": "text"}
    path = write_recipe(recipe)
    (failed,) = [result for result in check_recipe(config.load([path]), 1, step=False) if "stored embeddings" in result.text]
    assert failed.mark == "✗" and failed.text.startswith("train_loader.captions.tags: with shuffle: true")
    from prx_composer.commands.encode import TextOptions, store_text

    with pytest.raises(UserError, match="train_loader." + message):
        store_text(TextOptions(recipe=[path, "train_loader.text_embedding=null"]))


def test_wordings_are_by_column() -> None:
    assert wordings({"a": 2, "b": {"drop": 0.5}}) == {"a": Wording(weight=2), "b": Wording(drop=0.5)}
