"""Captions are cleaned as diffusers' pipelines clean them, everywhere alike."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prx_composer.data.loader import Collator
from prx_composer.data.stored import fingerprint
from prx_composer.models import HuggingFaceTextEncoder
from prx_composer.models.caption_format import cleaner, formatted, with_format
from prx_composer.models.prompts import tokenize
from prx_composer.recipe import config
from prx_composer.runs.model_parts import ModelParts
from prx_composer.training.preflight import examine

CLEAN = {  # text → as PRXPixelPipeline ("basic") and PRXPipeline ("prx") read it
    "A Photo of a CAT": ("A Photo of a CAT", "a photo of a cat"),
    "a – b — c − d ~ e・f 〜 g": ("a – b — c − d ~ e・f 〜 g", "a - b - c − d e・f - g"),
    "this-is-my-cute-cat but_not_this": ("this-is-my-cute-cat but_not_this", "this is my cute cat but not this"),
    "a&amp;b &quot;c&quot; &lt;d&gt; &amp;amp; &#39;e&#39; <person> <b>": (
        "a&b \"c\" <d> & 'e' <person> <b>",
        "a;b c lt;d gt; ;amp; ;e ; person <b>",
    ),
    "schÃ¶n â€” fÃ¼r dich": ("schön — für dich", "schã¶n — fã¼r dich"),  # UTF-8 read as Latin-1
    "漢字 ㇀ ㈠ ㌀ 㐀 ䷀ 一 and words": ("漢字 ㇀ ㈠ ㌀ 㐀 ䷀ 一 and words", "and words"),
    "100%25 a+b%20c": ("100%25 a+b%20c", "100% a b c"),
    "'quoted whole'": ("'quoted whole'", "quoted whole"),
    ".hidden": (".hidden", ""),
    "a . b ... c.d,e/f": ("a . b ... c.d,e/f", "a b c. d, e f"),
    " ": ("", ""),
    "ﬁne ｆｕｌｌ width \u200b\ufeff\u00a0x": ("fine full width \u200b\xa0x", "fine full width \u200b x"),
}


def test_every_text_is_cleaned_as_the_released_pipelines_do() -> None:
    """Runs and stored embeddings have read these words: another diffusers must read the same."""
    for text, (basic, prx) in CLEAN.items():
        assert (cleaner("none")(text), cleaner("basic")(text), cleaner("prx")(text)) == (text, basic, prx)


def encoder(tokenizer: Any, clean: Any, **config: Any) -> HuggingFaceTextEncoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(model_type="t5", d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return HuggingFaceTextEncoder(tokenizer, config=sizes | config, max_tokens=14, clean=clean)


def test_training_prompts_and_stored_embeddings_read_the_same_words(tokenizer: Any) -> None:
    """Also in a loader that is given nothing but the tokenizer, and in another process of it."""
    plain, cleaning = encoder(tokenizer, "none"), encoder(tokenizer, "prx")
    dirty, clean = "a [red] circle, https://example.com/x 1234567 on the left", "a red circle, on the left"
    assert cleaner("prx")(dirty) == clean
    expected = tokenize(tokenizer, [clean], 14)["input_ids"]
    sample = {"caption": dirty, "sample_id": 0, "features": {}}
    for given, same in ((cleaning, True), (plain, False)):
        assert torch.equal(given.tokenize([dirty])["input_ids"], expected) == same
        assert torch.equal(Collator(given.tokenizer, 14)([sample])["input_ids"], expected) == same
    assert torch.equal(tokenize(pickle.loads(pickle.dumps(cleaning.tokenizer)), [dirty], 14)["input_ids"], expected)
    assert formatted(tokenizer, [dirty]) == [dirty], "the tokenizer that was given is left alone"
    assert fingerprint(plain.network, plain.tokenizer) == fingerprint(plain.network, tokenizer)
    marks = {fingerprint(plain.network, with_format(tokenizer, clean)) for clean in ("none", "basic", "prx")}
    assert len(marks) == 3, "embeddings that were stored with another cleaning are recognised"


def test_a_recipe_says_how(tiny_recipe: dict[str, Any], write_recipe: Any, tmp_path: Path) -> None:
    """A tokenizer that is trained on the captions is trained on the clean ones."""
    tiny_recipe["model"]["text_encoder"]["clean"] = "prx"
    recipe = config.load([write_recipe(tiny_recipe)])
    built = ModelParts(recipe.model, 0, tmp_path / "kept", loader=recipe.train_loader).text_encoder
    assert formatted(built.tokenizer, ["A (Red) Circle"]) == ["a red circle"]
    again = ModelParts(recipe.model, 0, tmp_path / "kept", loader=recipe.train_loader).text_encoder
    assert formatted(again.tokenizer, ["A (Red) Circle"]) == ["a red circle"], "when the run goes on, too"
    tiny_recipe["model"]["text_encoder"]["clean"] = "all"
    results, _ = examine(config.load([write_recipe(tiny_recipe)]), 1)
    (wrong,) = [result.text for result in results if result.mark == "✗"]
    assert "model.text_encoder.clean" in wrong and "'prx'" in wrong


def test_without_ftfy_it_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)  # as if it weren't installed
    assert cleaner("none")("A") == "A"
    with pytest.raises(ValueError, match="clean: prx needs ftfy, which is not installed: `pip install ftfy`"):
        cleaner("prx")


def test_a_cleaning_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="none, basic, prx or lower, not 'all'"):
        cleaner("all")  # pyright: ignore[reportArgumentType]
