"""Components of one's own, in a file beside the recipe, are checked, planned, trained, resumed and exported as ours are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import prx
from conftest import TINY_BACKBONE, TINY_T5

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.runs.checkpoints import newest_checkpoint
from prx_composer.runs.folder import read_metrics
from prx_composer.runs.opening import load_trained
from prx_composer.runs.weights import read_safetensors
from prx_composer.training import main

CODE = """
import io
import json
from pathlib import Path

import torch
from composer.core import Callback, Event
from PIL import Image
from torch import nn

from prx_composer import registry
from prx_composer.algorithms.base import Trick
from prx_composer.data.format import Bucket
from prx_composer.data.format import RawSample


@registry.algorithms.register("slowed")
class Slowed(Trick):  # what it needs of the program has no default
    name = "slowed"

    def __init__(self, image_size: int, factor: float = 0.5, start: str = "0ba", end: str | None = None):
        super().__init__(start, end)
        self.factor = factor * image_size / 16

    def match(self, event, state):
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event, state, logger):
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor)


@registry.callbacks.register("diary")
class Diary(Callback):
    def __init__(self, folder: str, seed: int, source: dict, word: str = "batch"):
        self.path, self.word, self.seen = Path(folder) / "diary.jsonl", word, [seed, source["name"]]

    def batch_end(self, state, logger):
        with self.path.open("a") as file:
            file.write(json.dumps([self.word, int(state.timestamp.batch), *self.seen]) + "\\n")


@registry.sources.register("greys")
class Greys:
    captions = ("caption",)
    identity = {}

    def __init__(self, count: int, image_size: int = 16):
        self.count, self.image_size, self.buckets = count, image_size, [Bucket(image_size, image_size)]

    def samples(self):
        for index in range(self.count):
            encoded = io.BytesIO()
            Image.new("RGB", (self.image_size, self.image_size), (index % 256,) * 3).save(encoded, format="PNG")
            captions = {"caption": f"grey {index}"}
            yield "train", RawSample(encoded.getvalue(), self.image_size, self.image_size, captions, str(index))


@registry.optimizers.register("momentum")
class Momentum(torch.optim.SGD):
    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.9):
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)


@registry.backbones.register("convolutions")
class Convolutions(nn.Module):
    router = None

    def __init__(self, in_channels: int, context_in_dim: int, patch_size: int = 2, width: int = 8):
        super().__init__()
        self.in_channels, self.context_in_dim, self.patch_size = in_channels, context_in_dim, patch_size
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.text = nn.Linear(context_in_dim + 1, width)
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def num_tokens(self, height: int, width: int) -> int:
        return height * width // self.patch_size**2

    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_mask=None, route=None, return_taps=False):
        time = timestep.expand(len(hidden_states))[:, None]
        text = self.text(torch.cat([encoder_hidden_states.mean(1), time], 1))
        sample = self.last(torch.relu(self.first(hidden_states) + text[..., None, None]))
        return (sample, {}) if return_taps else sample
"""
KINDS = {"algorithms": "slowed", "callbacks": "diary", "sources": "greys", "optimizers": "momentum", "backbones": "convolutions"}
BACKBONES = {
    "four": {"name": "prx", **TINY_BACKBONE},
    "backbone": {"name": "convolutions", "in_channels": 3, "context_in_dim": 24},
}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the code and two recipes: four.yaml and backbone.yaml."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "own.py").write_text(CODE)
    encoder = {"name": "huggingface", "config": TINY_T5, "tokenizer": {"train": True}, "max_tokens": 6, "trainable": True}
    recipe: dict[str, Any] = {
        "run_folder": str(folder / "runs" / "${run_name}"),
        "code_paths": [str(folder / "own.py")],
        "train_loader": {"name": "image_caption", "path": str(folder / "greys"), "source": {"name": "greys", "count": 48}},
        "image_size": 16,
        "global_train_batch_size": 12,
        "optimizer": {"name": "momentum", "lr": 0.01},
        "max_duration": "4ba",
        "save_interval": "2ba",
        "algorithms": {"slowed": {}, "ema": {"half_life": "2ba"}},
        "callbacks": {"diary": {}, "speed_monitor": {"window_size": 2}},
        "progress_bar": False,
        "autoresume": True,
    }
    for name, backbone in BACKBONES.items():
        recipe |= {"run_name": name, "model": {"name": "text_to_image", "backbone": backbone, "text_encoder": encoder}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    yield folder
    for kind, name in KINDS.items():
        registry.catalogue.REGISTRY.pop(("prx_composer", kind, name), None)


def losses(run: Path) -> list[float]:
    return [row["loss/train/total"] for row in read_metrics(run / "metrics.jsonl") if "loss/train/total" in row]


@pytest.fixture(scope="module", params=list(BACKBONES))
def run(request: pytest.FixtureRequest, stranger: Path) -> Path:
    """A run of one of the recipes that was checked, stopped after two batches and gone on with."""
    recipe, folder = str(stranger / f"{request.param}.yaml"), stranger / "runs" / request.param
    said = prx("check", recipe)
    assert "✗" not in said and "✓ step: forward and backward pass of 12 × 16x16" in said
    assert main([recipe, "max_duration=2ba"]) == 0
    assert main([recipe]) == 0
    return folder


def test_an_algorithm_a_callback_a_source_and_an_optimizer_go_on_bit_for_bit(run: Path, stranger: Path) -> None:
    whole = f"{run.name}_whole"
    assert main([str(stranger / f"{run.name}.yaml"), f"run_name={whole}"]) == 0
    assert losses(run) == losses(run.with_name(whole)) and len(losses(run)) == 4
    theirs, ours = (newest_checkpoint(folder) for folder in (run, run.with_name(whole)))
    assert theirs is not None and ours is not None and theirs.batch == ours.batch == 4


@pytest.mark.parametrize("recipe", BACKBONES)
def test_the_plan_counts_an_algorithm_a_source_an_optimizer_and_a_backbone(stranger: Path, recipe: str) -> None:
    said = prx("plan", stranger / f"{recipe}.yaml")
    assert "denoiser" in said
    assert "slowed" not in said, "nothing is said of a trick that is counted"
    assert "momentum" not in said or "taken to keep" in said


def test_what_a_component_declares_it_is_given(run: Path, stranger: Path) -> None:
    lines = [json.loads(line) for line in (run / "diary.jsonl").read_text().splitlines()]
    assert lines == [["batch", index, 17, "greys"] for index in (1, 2, 3, 4)], "the run's folder and seed, and its source"
    recipe = str(stranger / f"{run.name}.yaml")
    others = [f"run_name={run.name}_slower", "algorithms.slowed.image_size=1", "max_duration=2ba"]
    assert main([recipe, *others]) == 0, "a recipe may set it instead"
    first, second = losses(run.with_name(f"{run.name}_slower"))
    assert first == losses(run)[0] and second != losses(run)[1]


def test_a_run_is_exported(run: Path, stranger: Path, tmp_path: Path) -> None:
    code = ["--code", stranger / "own.py"] if run.name == "backbone" else []
    said = prx("export", run, "--output", tmp_path / "out", "--no-samples", *code)
    trained = load_trained(str(run))
    if run.name == "four":
        opened = load_trained(str(tmp_path / "out")).model
        written = {f"backbone.{name}": tensor for name, tensor in opened.backbone.state_dict().items()}
    else:
        assert "diffusers has no class for the backbone" in said
        written = read_safetensors(tmp_path / "out" / "model.safetensors")
    own = trained.model.backbone.state_dict()
    assert all(torch.equal(written[f"backbone.{name}"], tensor) for name, tensor in own.items()) and own


def test_a_misspelt_argument_of_ones_own_component_is_answered_as_of_ours(stranger: Path) -> None:
    recipe = config.load([str(stranger / "four.yaml"), "callbacks.diary.wrod=day", "optimizer.momentum=much"])
    registry.import_code(recipe.code_paths)
    with pytest.raises(UserError) as refusal:
        config.check(recipe)
    assert "callbacks.diary.wrod: no such argument. Did you mean 'word'" in str(refusal.value)
    assert "optimizer.momentum: expected a number, not 'much'" in str(refusal.value)
