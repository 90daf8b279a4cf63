"""What an export says of itself: code that runs, and nothing of the machine it was made on; prompts as diffusers reads them."""

import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor
from diffusers.pipelines.prx.pipeline_prx_pixel import PRXPixelPipeline
from hostile import command, write_run

from prx_composer.commands.export.card import Card, fenced, inline, public_command, public_name, without_places, write_card
from prx_composer.commands.export.pipeline import write_adapters, write_pipeline
from prx_composer.commands.generate import recipe_settings
from prx_composer.models import TextToImage
from prx_composer.models.layers import BLOCK_LAYERS, add_adapters
from prx_composer.runs.diffusers_folder import pipeline_prompt
from prx_composer.runs.opening import Trained, load_trained

Recipe = dict[str, Any]
Build = Callable[..., TextToImage]
Write = Callable[..., str]
PROMPTS = (
    *("a red circle", "", "  blank around  ", "fish &amp; chips", "fish &amp;amp; chips", "fish & chips", "&lt;b&gt; &#39;"),
    *("a cat’s “eye”", "sch√∂n", "schÃ¶n", "l’œuvre ﬁne", "ＦＵＬＬ　ｗｉｄｔｈ", "line\u2028break\x85here", "tab\there"),
    *("&nbsp;x&copy", "&notanentity;", "日本語", "e\u0301", "\ufeffmark", "&amp;lt;", "a\r\nb", "\x1b[31mred\x1b[0m"),
    *("100% &#x1F600; 😀", "&amp"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ prompts


def test_a_prompt_is_mended_as_diffusers_own_function_mends_it() -> None:
    """Examples, and a thousand texts of pieces that it changes."""
    draw = random.Random(0)
    pieces = [*PROMPTS, *(chr(code) for code in range(0x20, 0x2FFF, 7) if unicodedata.category(chr(code)) != "Cn")]
    drawn = (draw.choices(PROMPTS, k=2) + draw.choices(pieces, k=draw.randrange(3)) for _ in range(1000))
    texts = [*PROMPTS, *pieces, *("".join(parts) for parts in drawn)]
    oracle = TextPreprocessor().basic_clean
    assert [pipeline_prompt(text) for text in texts] == [oracle(text) for text in texts]
    assert sum(pipeline_prompt(text) != text for text in texts) > 300


@pytest.mark.parametrize("prompt", ["a red &amp; blue circle", "a &#114;ed circle"])
def test_an_export_is_drawn_with_as_the_pipeline_draws_and_a_run_as_it_was_trained(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write, prompt: str
) -> None:
    tiny_recipe |= {"algorithms": {}, "callbacks": {"images": {"prompts": [prompt, "a red circle"], "num_inference_steps": 2}}}
    run = write_run(tmp_path / "run", tiny_recipe, tiny_model(seed=3), write_recipe)
    said = command("export", run, "--output", tmp_path / "out")
    trained, opened = load_trained(str(run)).model, load_trained(str(tmp_path / "out")).model
    for model in (trained, opened):
        model.flow = replace(model.flow, clamp_sampling=True)
    pipeline: Any = PRXPixelPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    theirs: Any = pipeline(
        prompt, height=16, width=16, num_inference_steps=2, guidance_scale=2.0, use_resolution_binning=False,
        output_type="pt", generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    torch.testing.assert_close(opened.sample([prompt], 16, 16, [1], 2, 2.0), theirs, atol=1e-4, rtol=0)
    assert (trained.sample([prompt], 16, 16, [1], 2, 2.0) - theirs).abs().max() > 1e-3
    trained.clean_prompt = pipeline_prompt
    torch.testing.assert_close(trained.sample([prompt], 16, 16, [1], 2, 2.0), theirs, atol=1e-4, rtol=0)
    assert "HTML entities become" in (tmp_path / "out" / "README.md").read_text() and said


def test_an_export_says_which_of_its_prompts_the_pipeline_changes(
    tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run", tiny_recipe | {"algorithms": {}}, tiny_model(seed=3), write_recipe)
    command("export", run, "--output", tmp_path / "out", "-p", "fish &amp; chips", "-p", "a red circle")
    assert "1 of 2 prompts" in caplog.text and "'fish &amp; chips' to 'fish & chips'" in caplog.text
    caplog.clear()
    command("export", run, "--output", tmp_path / "out", "--overwrite", "-p", "a red circle", "--no-samples")
    assert "prompts" not in caplog.text


# ------------------------------------------------------------------------------------------------------------ the cards


@pytest.fixture
def elsewhere(tmp_path: Path, tiny_recipe: Recipe, tiny_model: Build, write_recipe: Write) -> Path:
    """A run whose recipe is full of paths and of a person's secrets."""
    home = tmp_path / "alice"
    tiny_recipe |= {"algorithms": {}, "variables": {"notes": [f"{home}/notes.txt", "s3://bucket/x"], "api_key": "hunter2"}}
    tiny_recipe["train_loader"] |= {"path": f"{home}/shapes"}
    tiny_recipe["callbacks"] = {"images": {"prompts": ["a red circle", "/imagine a circle"], "num_inference_steps": 2}}
    return write_run(home / "run", tiny_recipe, tiny_model(seed=3), write_recipe)


def test_no_file_of_an_export_names_a_path_of_this_machine(elsewhere: Path, tmp_path: Path, monkeypatch: Any) -> None:
    arguments = ["export", str(elsewhere), "--output", str(tmp_path / "out"), "--name=shapes"]
    monkeypatch.setattr("sys.argv", ["prx", *arguments])
    command(*arguments)
    found = {
        str(file.relative_to(tmp_path / "out"))
        for file in (tmp_path / "out").rglob("*")
        if file.is_file() and any(word in file.read_bytes() for word in (str(tmp_path).encode(), b"alice/", b"hunter2"))
    }
    assert not found
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["train_loader"]["path"] == "shapes" and recipe["variables"]["notes"] == ["notes.txt", "s3://bucket/x"]
    assert recipe["callbacks"]["images"]["prompts"][1] == "/imagine a circle"
    assert "prx export run --output out --name=shapes" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_adapters_runs_and_names_what_diffusers_has(tmp_path: Path, tiny_model: Build) -> None:
    """Its code gives the adapted model; every method that it names in words is one of diffusers or peft."""
    base = tmp_path / "alice" / "base"
    base.mkdir(parents=True)
    write_pipeline(Trained(tiny_model(seed=3, trainable_text=False).eval(), Path("nowhere"), "raw", 16), base)
    model = tiny_model(seed=3, trainable_text=False).eval()
    add_adapters(model.backbone, 2, 2.0, BLOCK_LAYERS)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (tmp_path / "lora").mkdir()
    trained = Trained(model, Path("nowhere"), "raw", 16, recipe={"model": {"init_from": str(base)}})
    write_adapters(trained, tmp_path / "lora", "<script>\n# Title", "other")
    for file in (tmp_path / "lora").iterdir():
        assert b"alice" not in file.read_bytes(), file
    card = (tmp_path / "lora" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "other" and "base_model" not in head, "a name that the hub doesn't have is none of its ids"
    assert "\n# &lt;script&gt; # Title\n" in card and "load_lora" not in card.replace("load_lora_adapter(", "")
    assert ("load_lora_adapter" in card) == hasattr(PRXTransformer2DModel, "load_lora_adapter")
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("PATH_OR_HUB_ID_OF_base", str(base)).replace("THIS_FOLDER", str(tmp_path / "lora")), scope)
    text = model.encode_prompts(["a red circle"], torch.device("cpu"))
    noised, timestep = torch.randn(1, 3, 16, 24), torch.rand(1)
    with torch.no_grad():
        ours = model.backbone(noised, timestep, text.embedding, attention_mask=text.mask)
        theirs = scope["pipe"].transformer(noised, timestep, text.embedding, attention_mask=text.mask).sample
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


HOSTILE = "x\n```\n<script>alert(1)</script>\n---\nlicense: mit\n# Other"


def test_a_card_holds_no_markup_of_the_run(tmp_path: Path, tiny_model: Build) -> None:
    recipe = {"run_name": HOSTILE, "optimizer": {"name": HOSTILE}, "algorithms": {HOSTILE: {}}, "seed": HOSTILE}
    recipe |= {"train_loader": {"path": HOSTILE, "captions": {HOSTILE: 1.0}}, "callbacks": {"images": {"prompts": [HOSTILE]}}}
    trained = Trained(tiny_model().eval(), Path("nowhere"), "raw", 16, recipe=recipe)
    prompts, settings = recipe_settings(trained)
    write_card(trained, tmp_path, Card(HOSTILE, None, HOSTILE, "0", settings, prompts))
    outside, fence = [], ""
    for line in (tmp_path / "README.md").read_text().splitlines():
        ticks = re.match(r" {0,3}(`{3,})", line)
        if ticks and not fence:
            fence = ticks[1]
        elif fence and re.fullmatch(rf" {{0,3}}{fence}`* *", line):
            fence = ""
        elif not fence:
            outside.append(line)
    assert not fence and not any("<script>" in line or line.startswith("# Other") for line in outside)
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert "license" not in head


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/alice/runs/x", ("x", False)),
        ("~/runs/x/", ("x", False)),
        ("C:\\Users\\alice\\x", ("x", False)),
        ("file:///home/alice/x", ("x", False)),
        ("runs/x", ("runs/x", False)),
        ("Photoroom/prx-512-t2i", ("Photoroom/prx-512-t2i", False)),
        ("/home/me/.cache/huggingface/hub/models--Photoroom--prx-512-t2i/snapshots/0a1b", ("Photoroom/prx-512-t2i", True)),
        ("s3://bucket/x", ("s3://bucket/x", False)),
        ("/", ("/", False)),
    ],
)
def test_others_know_a_path_by_its_name(path: str, shown: tuple[str, bool]) -> None:
    assert public_name(path) == shown
    assert without_places({"a": [path], "prompts": [path]}) == {"a": [shown[0]], "prompts": [path]}
    assert public_command(["prx", path, f"--output={path}", "a=b"]) == ["prx", shown[0], f"--output={shown[0]}", "a=b"]


def test_text_stays_where_it_is_put() -> None:
    assert inline("a\n\n# b `c` <i>&") == "a # b 'c' &lt;i&gt;&amp;"
    assert fenced("a\n````\nb\n", "yaml") == "`````yaml\na\n````\nb\n`````"
