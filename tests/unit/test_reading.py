"""Prompts and captions that a text encoder does not read whole are said, and files of texts come back as they were written."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from prx_composer.commands.data.split import open_split
from prx_composer.commands.data.statistics import statistics
from prx_composer.commands.encode.encoding import CaptionEncoder, encode_split, text_column
from prx_composer.commands.evaluate.sweep import _dpg, _geneval
from prx_composer.commands.generate import check_prompt, read_prompts, save_captions
from prx_composer.commands.plan.conditions import read_throughput
from prx_composer.common.errors import UserError
from prx_composer.data.format import Manifest, iterate_captions
from prx_composer.data.loader import Collator
from prx_composer.data.sources import FolderSource, prepare
from prx_composer.data.stored import encoded_folder, read_column
from prx_composer.metrics.features import ClipScore
from prx_composer.models import HuggingFaceTextEncoder, TextToImage
from prx_composer.models.caption_format import with_format
from prx_composer.models.encoders import train_tokenizer
from prx_composer.models.prompts import CaptionCounts, readings, tokenize, what_is_lost
from prx_composer.recipe import config
from prx_composer.training.components import Components
from prx_composer.training.preflight.pretrained import check_captions
from prx_composer.training.run import run

CORPUS = ["a red circle on the left of a white background", "two blue squares, and a small dot", "playing players play"] * 3


def fast(model: Any, trainer: Any, before: Any, unknown: str | None, ends: tuple[str, str] = ("<s>", "</s>")) -> Any:
    """A tokenizer of CORPUS of that kind, with a token at either end."""
    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = before
    tokenizer.train_from_iterator(CORPUS, trainer)
    numbers = [(end, tokenizer.token_to_id(end)) for end in ends]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{ends[0]} $A {ends[1]}", special_tokens=numbers)  # pyright: ignore[reportCallIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=ends[0], eos_token=ends[1], unk_token=unknown
    )


def tokenizers(kind: str) -> Any:
    special: dict[str, Any] = {"special_tokens": ["<pad>", "<s>", "</s>", "<unk>"], "vocab_size": 300}
    if kind == "words":
        return train_tokenizer(CORPUS)
    if kind == "unigram":
        return fast(models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **special), pre_tokenizers.Metaspace(), "<unk>")  # pyright: ignore[reportCallIssue]
    if kind == "pieces":
        trainer = trainers.WordPieceTrainer(**special)
        return fast(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.BertPreTokenizer(), "<unk>")  # pyright: ignore[reportCallIssue]
    special |= {"vocab_size": 400, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(**special)
    return fast(models.BPE(), trainer, pre_tokenizers.ByteLevel(), "</s>")  # its end stands for the unknown too, as CLIP's


def random_text(rng: random.Random) -> str:
    words = [
        "red",
        "circle",
        "playing",
        "playful",
        "zebra",
        "🦓",
        "squares,",
        "日本",
        "é",
        "e\u0301",
        "on",
        "x" * 9,
        "\u2028",
        "-",
    ]
    return " ".join(rng.choice(words) for _ in range(rng.randint(0, 12)))


@pytest.mark.parametrize("kind", ["words", "unigram", "pieces", "bytes"])
def test_what_is_cut_is_what_is_missing_from_the_whole_texts_tokens(kind: str) -> None:
    tokenizer, rng = tokenizers(kind), random.Random(0)
    texts = ["", *(random_text(rng) for _ in range(150))]
    for limit in (2, 5, 9):
        counts = CaptionCounts()
        batch = tokenize(tokenizer, texts, limit, counts)
        found, strange = readings(tokenizer, texts, limit), 0
        for text, one, ids, mask in zip(texts, found, batch["input_ids"], batch["attention_mask"], strict=True):
            whole = tokenizer(text)["input_ids"]
            assert (one.tokens, one.read is not None) == (len(whole), len(whole) > limit)
            assert list(one.ids) == ids[mask].tolist()  # what the model sees
            if one.read is not None:
                assert text.startswith(one.read)
                ends = len(tokenizer("")["input_ids"])
                assert len(tokenizer(one.read)["input_ids"]) >= min(limit, ends)
                if kind == "words" or (kind == "pieces" and "e\u0301" not in text):  # of which a part is read alike alone
                    assert tokenizer(one.read)["input_ids"] == list(one.ids)
            strange += 0 if kind == "bytes" else list(one.ids).count(tokenizer.unk_token_id)
            assert bool(one.unknown) == (kind != "bytes" and tokenizer.unk_token_id in one.ids)
        lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
        lost = [length - limit for length in lengths if length > limit]
        said = counts.told(limit)
        assert said is not None and f"{len(lost):,} of 151 captions ({len(lost) / 151:.1%})" in said
        assert f"they lose {sum(lost) / len(lost):.1f} tokens" in said
        assert (f"; {strange:,} of {int(batch['attention_mask'].sum()):,} tokens" in said) == (strange > 0)


def test_unknown_words_are_named_as_they_stand_in_the_text() -> None:
    expected = {"words": ("zebra", "🦓"), "pieces": ("zebra", "🦓"), "unigram": ("zebra", "🦓"), "bytes": ()}
    for kind, words in expected.items():
        (one,) = readings(tokenizers(kind), ["a red zebra on a 🦓 on a zebra"], 60)
        assert one.unknown == words and one.read is None
    assert readings(tokenizers("words"), ["a red circle <unk>"], 60)[0].unknown == ()  # it knows that one


def test_captions_that_cleaning_takes_away_are_counted_and_named() -> None:
    tokenizer = with_format(tokenizers("bytes"), clean="prx")
    chinese, mixed = "一只橘猫坐在木桌上", "a red circle 圆"
    counts = CaptionCounts()
    tokenize(tokenizer, [chinese, mixed, ""], 60, counts)
    assert "1 of 3 captions lose more than half of their letters to model.text_encoder.clean" in str(counts.told(60))
    gone, whole, empty = readings(tokenizer, [chinese, mixed, ""], 60)
    assert (gone.is_whole, whole.is_whole, empty.is_whole) == (False, True, True)
    assert "model.text_encoder.clean leaves '' of it" in what_is_lost([gone], 60)[0]
    counts = CaptionCounts()
    tokenize(with_format(tokenizers("bytes"), clean="basic"), [chinese, mixed], 60, counts)
    assert counts.told(60) is None  # as the message says


def test_a_slow_tokenizer_and_one_that_cuts_on_the_left_say_the_same(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "on", "white"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    slow: Any = BertTokenizer(str(tmp_path / "vocab.txt"))
    texts = ["a red circle on white", "a zebra", "red"]
    assert [(one.tokens, one.read, one.unknown) for one in readings(slow, texts, 5)] == [
        (7, "a red circle", ()), (4, None, ("zebra",)), (3, None, ())
    ]  # fmt: skip
    counts = CaptionCounts()
    tokenize(slow, texts, 5, counts)
    assert "1 of 3 captions" in str(counts.told(5)) and "they lose 2.0 tokens" in str(counts.told(5))
    left = tokenizers("words")
    left.truncation_side = "left"
    (one,) = readings(left, ["a red circle on the left"], 4)
    assert one.read == "on the left" and "only 'on the left'" in what_is_lost([one], 4)[0]


def test_prompts_that_differ_after_the_cut_draw_the_same_picture_and_are_named_once(
    tiny_model: Callable[..., TextToImage], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    start = "a large red circle on the left and a small blue square on the"
    kept = model.text_encoder.readings([start + " left"])[0].read
    assert kept is not None and start.startswith(kept)
    prompts = [start + " left", start + " right of a zebra", "a blue zebra", "a red circle"]
    images = model.generate(prompts, 16, 16, seeds=[1, 1, 1, 1], num_inference_steps=2)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    said = [record.getMessage() for record in caplog.records]
    assert sum("is not read whole" in line for line in said) == 3 and not any("'a red circle'" in line for line in said)
    assert all(f"up to '{kept}'" in line for line in said[:2])
    assert "does not know 'zebra'" in said[2] and "What is cut off changes nothing in a picture" in said[3]
    assert said[4].startswith("Unknown words") and "2 prompts are read alike and draw the same picture" in said[5]
    caplog.clear()
    model.generate(prompts, 16, 16, num_inference_steps=1)
    assert not caplog.records


def test_prompts_are_read_as_they_are_cleaned() -> None:
    pytest.importorskip("ftfy")
    tokenizer = with_format(tokenizers("words"), "prx")
    first, second = readings(tokenizer, ["A RED (CIRCLE) on the left of a white background", "two squares"], 7)
    assert first.text.startswith("A RED (") and first.read == "a red circle on the left" and second.read is None
    assert list(first.ids) == tokenize(tokenizer, [first.text], 7)["input_ids"][0].tolist()
    assert "up to 'a red circle on the left'." in what_is_lost([first, second], 7)[0]


def test_of_many_prompts_some_are_named_and_all_are_counted() -> None:
    found = readings(train_tokenizer(CORPUS), [f"a red circle {'on ' * index}" for index in range(100)], 8)
    said = what_is_lost(found, 8)
    assert said[20] == "So it is with 75 more of 100 prompts: 75 are cut, the others have unknown words." and len(said) == 23


def test_clip_score_says_which_share_of_the_prompts_it_cuts(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import CLIPConfig, CLIPModel

    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    text = dict(layers, vocab_size=len(tokenizer), max_position_embeddings=6, eos_token_id=1, bos_token_id=0)
    vision = dict(layers, image_size=24, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    score = ClipScore(str(tmp_path))
    for _ in range(2):
        score.say_what_is_cut(["a red circle", "a red circle on the left of a blue square", "a blue square on the left"])
    assert [r.getMessage() for r in caplog.records] == [
        f"clip_score: 2 of 3 prompts have more than 6 tokens; {tmp_path} compares images with their beginnings only."
    ]


# ------------------------------------------------------------------------------------------------------- training


def test_workers_count_every_caption_that_they_cut(tokenizer: Any) -> None:
    captions = ["a red circle"] * 30 + ["a red circle on the left and a zebra"] * 10
    samples = [{"caption": text, "sample_id": index, "features": {}} for index, text in enumerate(captions)]
    collator = Collator(tokenizer, 6, max_workers=2)
    for _ in DataLoader(samples, batch_size=5, collate_fn=collator, num_workers=2):  # pyright: ignore[reportArgumentType]
        pass
    assert collator.counts.captions == 40
    plain = len(tokenizer(captions[-1])["input_ids"]) - 6
    assert f"10 of 40 captions (25.0%) have more than model.text_encoder.max_tokens: 6 and are cut; they lose {plain}.0" in str(
        collator.counts.told(6)
    )


def test_a_run_says_once_how_many_captions_it_cuts(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_recipe["model"]["text_encoder"]["max_tokens"] = 6
    images = {"prompts": ["a red zebra", "a red circle"], "interval": "1ba", "num_inference_steps": 1}
    changes = {
        "algorithms": {},
        "max_duration": "2ba",
        "save_interval": "2ba",
        "preflight": False,
        "callbacks": {"images": images},
    }
    run(config.load([write_recipe(tiny_recipe | changes)]))
    lines = [record.getMessage() for record in caplog.records]
    zebra = [index for index, line in enumerate(lines) if "'a red zebra' is not read whole" in line]
    drawn = [index for index, line in enumerate(lines) if line.startswith("Drew ")]
    assert len(zebra) == 1 and zebra[0] < drawn[0] and len(drawn) == 2
    said = [line for line in lines if "captions" in line]
    assert len(said) == 1 and re.match(r"train_loader: so far, \d+ of 96 captions \(\d", said[0])


def test_check_says_it_of_evenly_spaced_captions_and_nothing_of_whole_ones(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], shapes_data: Path
) -> None:
    captions = list(iterate_captions(shapes_data / "train", "caption"))
    tokenizer: Any = train_tokenizer(captions)
    limit = 9
    tiny_recipe["model"]["text_encoder"]["max_tokens"] = limit
    (said,) = check_captions(Components(config.load([write_recipe(tiny_recipe)]), meta=True))
    cut = sum(len(tokenizer(text)["input_ids"]) > limit for text in captions)  # 240: all are looked at
    assert said.mark == "!" and f"{cut} of 240 captions ({cut / 240:.1%})" in said.text
    tiny_recipe["model"]["text_encoder"]["max_tokens"] = 40
    (said,) = check_captions(Components(config.load([write_recipe(tiny_recipe)]), meta=True))
    assert said.mark == "✓" and "240 looked at are read whole, in 40 tokens" in said.text


def test_stats_count_unknown_words(shapes_data: Path) -> None:
    captions = list(iterate_captions(shapes_data / "train", "caption"))
    few: Any = train_tokenizer(captions, vocab_size=8)
    found = statistics(open_split(str(shapes_data), "train"), tokenizer=few, max_tokens=30)["captions"]["caption"]
    ids = [token for text in captions for token in few(text)["input_ids"]]
    assert (found["unknown"], found["tokens_together"]) == (ids.count(few.unk_token_id), len(ids)) and found["unknown"] > 0


def test_stored_embeddings_say_how_many_captions_were_cut(tmp_path: Path, tokenizer: Any) -> None:
    folder = photos(tmp_path / "photos", ["a red circle", "a blue square on the left", "a dot", "a red circle on the left"])
    prepare(tmp_path / "data", FolderSource(str(folder), image_size=16, multiple=4), {})
    encoder = HuggingFaceTextEncoder(
        tokenizer, config={"model_type": "t5", "d_model": 8, "d_kv": 4, "num_heads": 2}, max_tokens=5
    )
    target = encoded_folder(tmp_path / "data", "train", "text", "caption")
    column = text_column(encoder, "some", None, "bfloat16")
    made = encode_split(
        tmp_path / "data/train", target, column, CaptionEncoder(encoder, "caption", "bfloat16", 2, torch.device("cpu")), 2
    )
    lengths = [len(tokenizer(text)["input_ids"]) for text in iterate_captions(tmp_path / "data/train", "caption")]
    assert made.cut == sum(length > 5 for length in lengths) == 2
    assert made.lost == sum(max(0, length - 5) for length in lengths)
    assert read_column(target, "text", "").cut == 2
    (stored,) = statistics(open_split(str(tmp_path / "data"), "train"))["stored"]
    assert stored["cut"] == 2


# ----------------------------------------------------------------------------------------------- files of texts


def photos(
    folder: Path, captions: list[str] | None = None, name: str = "caption", encode: str = "utf-8", end: str = "\n"
) -> Path:
    """A folder to train on."""
    captions = captions or [f"a picture of number {index}" for index in range(4)]
    folder.mkdir()
    lines = [json.dumps({"file": f"{i}.png", name: text}, ensure_ascii=False) for i, text in enumerate(captions)]
    for index in range(len(captions)):
        Image.fromarray(np.full((16, 16, 3), 20 * index, np.uint8)).save(folder / f"{index}.png")
    (folder / "captions.jsonl").write_bytes(end.join(lines).encode(encode))
    return folder


def random_prompt(rng: random.Random) -> str:
    """With what breaks readers: ends of lines of all kinds, quotes, braces, blanks at the ends, marks, emoji."""
    pieces = [
        "\u2028",
        "\u2029",
        "\x85",
        "\x0b",
        "\f",
        "\x1c",
        "\r",
        "\n",
        '"',
        "{",
        "}",
        "\\",
        " ",
        "\t",
        "\ufeff",
        "🦓",
        "e\u0301",
        "a",
        "[",
        "#",
        "'",
    ]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 10)))


def test_what_generate_writes_is_read_back_as_prompts_and_as_a_folder(tmp_path: Path) -> None:
    rng = random.Random(0)
    prompts = ["", "\ufeff", " a cat ", '"quoted"', '{"prompt": "x"}', *(random_prompt(rng) for _ in range(200))]
    folder = tmp_path / "drawn"
    folder.mkdir()
    names = [f"{index}.png" for index in range(len(prompts))]
    for name in names:
        Image.new("RGB", (16, 16)).save(folder / name)
    save_captions(names, prompts, folder / "captions.jsonl")
    assert read_prompts(str(folder / "captions.jsonl")) == prompts
    assert [sample.captions["caption"] for _, sample in FolderSource(str(folder), 16, 4).samples()] == prompts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_file_of_texts_is_read_whatever_the_editor(tmp_path: Path, encoding: str, end: str) -> None:
    captions = ["first\u2028second", "next\x85line", "plain", "grün"]
    source = FolderSource(str(photos(tmp_path / "photos", captions, encode=encoding, end=end)), 16, 4)
    assert [sample.captions for _, sample in source.samples()] == [{"caption": text} for text in captions]
    (tmp_path / "prompts.txt").write_bytes(end.join([*captions, ""]).encode(encoding))
    assert read_prompts(str(tmp_path / "prompts.txt")) == captions
    lines = [json.dumps({"tag": "single", "prompt": text}, ensure_ascii=False) for text in captions]
    (tmp_path / "geneval.jsonl").write_bytes(end.join(lines).encode(encoding))
    items = _geneval(tmp_path / "geneval.jsonl", 1)
    assert [(item.prompt, item.content and item.content[1]) for item in items] == [
        (text, line + "\n") for text, line in zip(captions, lines, strict=True)
    ]
    (tmp_path / "a.txt").write_bytes(f"grün\u2028blau{end}".encode(encoding))
    (tmp_path / "prompts.txt").unlink()
    assert [item.prompt for item in _dpg(tmp_path)] == ["grün\u2028blau"]
    (tmp_path / "speeds.json").write_bytes(b'{"gpu": "h200", "stages": [{"image_size": 8, "images_per_second_per_gpu": 2}]}')
    (tmp_path / "speeds.json").write_bytes((tmp_path / "speeds.json").read_bytes().decode().encode(encoding))
    assert read_throughput(str(tmp_path / "speeds.json"))[1][8].images_per_second == 2


def test_a_prompt_that_is_no_unicode_text_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('"a cat"\n{"prompt": "a \\ud83e cat"}\n')
    with pytest.raises(UserError, match=r"line 2 is no Unicode text: .*at place 2"):
        read_prompts(str(tmp_path / "prompts.jsonl"))
    with pytest.raises(UserError, match="--prompt is no Unicode text"):
        check_prompt("caf\udce9", "--prompt")
    (tmp_path / "prompts.jsonl").write_text("{red|blue} car\n")
    with pytest.raises(UserError, match="begins as JSON and is none") as refused:
        read_prompts(str(tmp_path / "prompts.jsonl"))
    (tmp_path / "prompts.jsonl").write_text(str(refused.value).rpartition("brace: ")[2] + "\n")  # as advised
    assert read_prompts(str(tmp_path / "prompts.jsonl")) == ["{red|blue} car"]


def test_captions_called_text_are_trained_on_and_drawn(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", name="text")
    prepare(tmp_path / "data", FolderSource(str(folder), image_size=16, multiple=4), {})
    assert Manifest.read(tmp_path / "data" / "train").captions == ("text",)
    assert read_prompts(str(folder / "captions.jsonl"))[1] == "a picture of number 1"


def test_of_several_texts_the_caption_is_the_one_that_is_called_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = photos(tmp_path / "photos")
    rows = [{"file_name": f"{i}.png", "license": "cc", "caption": f"number {i}"} for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "captions.jsonl").unlink()
    with pytest.raises(ValueError, match=r"There is metadata\.jsonl: set captions_file") as refused:
        FolderSource(str(folder), 16, 4)
    assert "no " in str(refused.value)
    source = FolderSource(str(folder), 16, 4, captions_file="metadata.jsonl")
    assert source.captions == ("caption", "license")
    prepare(tmp_path / "data", source, {})
    assert "columns caption, license, which all become caption columns; training takes caption" in caplog.text
