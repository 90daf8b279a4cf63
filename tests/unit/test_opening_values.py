"""What a stranger's run, export or data names leads nowhere else, looks nothing up and is no markup."""

import functools
import json
import operator
from pathlib import Path
from typing import Any

import pytest
from hostile import Place, command, edited, pickled_rows

from prx_composer.commands.evaluate import find_data
from prx_composer.commands.report import write_page
from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.runs.checkpoints import INDEX
from prx_composer.runs.diffusers_folder import RECIPE
from prx_composer.runs.opening import load_trained
from prx_composer.runs.pretrained_models import write_fragment
from prx_composer.runs.weights import read_safetensors

Recipe = dict[str, Any]


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "/etc/hostname", "a/../../b", "..\\b", ""])
def test_no_index_leads_out_of_its_folder(place: Place, name: str) -> None:
    checkpoint, transformer = place.run / "checkpoints" / "ba1", place.exported / "transformer"
    edited(checkpoint / INDEX, files={name: {"bytes": 0, "crc32": 0}})
    with pytest.raises(UserError, match="leads out of that folder"):
        load_trained(str(checkpoint))
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="leads out of that folder"):
        read_safetensors(transformer)
    index.unlink()
    text = place.exported / "text_encoder"
    (text / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    with pytest.raises(UserError, match="leads out of that folder"):
        load_trained(str(place.exported))
    data = pickled_rows(place)
    shards = json.loads((data / "train" / "16x16" / "index.json").read_text())
    shards["shards"][0]["column_encodings"] = ["bytes"] * 6
    shards["shards"][0]["raw_data"]["basename"] = name
    (data / "train" / "16x16" / "index.json").write_text(json.dumps(shards))
    with pytest.raises(ValueError, match="leads out of that folder"):
        ImageCaptionDataset(str(data), "train")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algorithms", 5), ("code_paths", 5), ("callbacks", [1]), ("image_size", "x"), ("seed", "x"), ("time_budget", [3]),
        ("model.caption_dropout", "a"), ("model.flow", "z"), ("model.strange", 1), ("model.backbone.depth", "deep"),
    ],
)  # fmt: skip
def test_a_recipe_in_a_checkpoint_that_is_none_is_said_with_its_key(place: Place, key: str, value: Any) -> None:
    """It ended in a traceback."""

    def changed(index: dict[str, Any]) -> None:
        *above, last = key.split(".")
        functools.reduce(operator.getitem, above, index["recipe"])[last] = value

    place.change(changed)
    with pytest.raises(UserError, match=rf"ba1: recipe\.{key}: "):
        load_trained(str(place.run))


def test_a_stranger_s_recipe_reads_nothing_of_the_opener_s_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they wrote stays what they wrote; and no recipe that `prx import` writes looks anything up."""
    monkeypatch.setenv("SECRET", "of-the-opener")
    place.change(lambda index: index["recipe"].update(run_name="${oc.env:SECRET}", variables={"x": "${oc.env:SECRET}"}))
    command("export", place.run, "--output", "out", "--no-samples")
    write_page(str(place.run))
    written = [file.read_text() for file in (place.path / "out" / RECIPE, place.path / "out" / "README.md")]
    written.append((place.run / "report.html").read_text())
    assert all("oc.env" in text and "of-the-opener" not in text for text in written)
    edited(place.exported / "model_index.json", text_encoder_reference=None)
    for file in (place.exported / "text_encoder").iterdir():
        file.unlink()
    (place.exported / "text_encoder_reference.json").write_text(json.dumps({"pretrained": "${oc.env:SECRET}"}))
    with pytest.raises(UserError, match=r"model\.text_encoder\.pretrained would be '\${oc.env:SECRET}'"):
        write_fragment(str(place.exported), place.path / "base.yaml")


def test_remote_data_of_a_run_are_not_downloaded_to_where_its_recipe_says(
    place: Place, shapes_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.path / "cache"))
    chosen = place.path / "chosen"
    place.change(lambda index: index["recipe"].update(train_loader={"path": str(chosen), "remote": str(shapes_data)}))
    trained = load_trained(str(place.run))
    found = find_data(trained, None, None, None, needed=True)
    assert found is not None and found.caption(0) and not chosen.exists()


SCRIPT = "</title></td><script>alert(1)</script><img src=x onerror=alert(1)>\"'"


def test_a_page_about_a_run_holds_no_markup_of_the_run(place: Place) -> None:
    def everywhere(index: dict[str, Any]) -> None:
        recipe = index["recipe"]
        recipe |= {"run_name": SCRIPT, "optimizer": {"name": SCRIPT, SCRIPT: SCRIPT}}
        recipe |= {"callbacks": {"images": {"prompts": [SCRIPT]}}, "algorithms": {SCRIPT: {SCRIPT: SCRIPT}}}

    place.change(everywhere)
    (place.run / "metrics.jsonl").write_text(
        "".join(json.dumps({"batch": n, "seconds": n, SCRIPT: 1.0, "loss/train/total": 1.0}) + "\n" for n in (1, 2, 3))
    )
    (place.run / "spikes.jsonl").write_text(json.dumps({"batch": SCRIPT, "loss": SCRIPT, "median": SCRIPT}) + "\n")
    start = dict.fromkeys(("time", "batch", "system", "python", "cuda", "command", "cpus"), SCRIPT)
    start |= {"ranks": 1, "devices": {SCRIPT: 1}, "versions": {SCRIPT: SCRIPT}}
    (place.run / "environment.jsonl").write_text(json.dumps(start) + "\n")
    write_page(str(place.run))
    page = (place.run / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") > 10
