"""The base of all tricks: what it promises to whoever checks, plans or draws, and to a stranger who builds on it."""

import logging
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Event, State, Timestamp
from composer.devices import DeviceCPU

from prx_composer import registry
from prx_composer.algorithms.base import LossTrick, Trick
from prx_composer.common.errors import UserError
from prx_composer.models import TextToImage
from prx_composer.optim import AdamW
from prx_composer.recipe import config
from prx_composer.recipe.consistency import planned_stages
from prx_composer.recipe.evidence import Evidence, hurting
from prx_composer.runs.folder import read_metrics
from prx_composer.schedule.moments import ScheduleWindow
from prx_composer.training.components import Components
from prx_composer.training.preflight import examine
from prx_composer.training.preflight.pretrained import check_weights
from prx_composer.training.preflight.step import is_sometimes_dense
from prx_composer.training.run import run
from prx_composer.training.trial import check_config

Build = Callable[..., TextToImage]
Recipe = dict[str, Any]
Write = Callable[..., str]

TEACHER = "facebook/dinov2-small"  # in the table of known encoders
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ema": {"half_life": "4ba"},
    "deferred_masking": {"mixer_blocks": 1},
    "float8": {"emulate": True},
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
    "irepa": {"teacher": TEACHER, "block": 1},
    "perceptual_dino": {"teacher": TEACHER},
    "progressive_resolution": {"stages": [{"image_size": 16, "global_train_batch_size": 8}]},
    "repa": {"teacher": TEACHER, "block": 1, "adapter": {"depth": 1}},
    "sprint": {"start_block": 0, "end_block": 0},
    "timestep_phases": {"phases": [{"logit_mean": 0.8}]},
    "tread": {"start_block": 0, "end_block": 0, "self_guidance": True},
}

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "algorithm.md"


def test_every_trick_is_attached_to_a_model_without_storage_and_nothing_is_fetched(
    tiny_recipe: Recipe, write_recipe: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pytest.importorskip("torchao", reason="the extra float8, which CI has")
    tiny_recipe["model"]["text_encoder"]["trainable"] = False
    trained = {"internal_guidance", "irepa", "lora", "readouts", "repa", "resolution_aware", "sprint"}
    for name in registry.algorithms.builtin:
        tiny_recipe["algorithms"] = {name: ARGUMENTS.get(name, {})}
        parts = Components(config.load([write_recipe(tiny_recipe)]), meta=True)
        model, trick = parts.model, parts.algorithms[name]
        assert isinstance(trick, Trick) and trick.name == name
        before = set(dict(model.named_parameters()))
        guidance = model.guidance
        with torch.device("meta"):
            trick.attach(model, None)
        assert all(parameter.is_meta for parameter in model.parameters()), name
        assert (set(dict(model.named_parameters())) != before) == (name in trained), name
        frozen = [getattr(trick, "network", None), getattr(getattr(trick, "encoder", None), "_frozen", None)]
        assert all(parameter.is_meta for one in frozen if one is not None for parameter in one.module.parameters()), name
        for active in (True, True, False, False):
            trick.set_active(model, active)
        assert model.backbone.taps == () and model.guidance is guidance, name


class Halved(Trick):
    """A stranger's: what it was told, in order."""

    name = "halved"
    experimental = True

    def __init__(self, start: str = "0ba", end: str | None = None):
        super().__init__(start, end)
        self.told: list[Any] = []

    def attach(self, model: Any, optimizer: Any) -> None:
        if self.window.start.text == "9ba":
            raise ValueError("nine is too late")
        self.told.append("attach")

    def set_active(self, model: Any, active: bool) -> None:
        assert isinstance(model, TextToImage)
        self.told.append(active)

    def release(self) -> None:
        self.told.append("release")


def begin(model: Any, *tricks: Trick, batches: int = 0) -> State:
    state = State(model=model, rank_zero_seed=0, run_name="test", device=DeviceCPU(), max_duration="10ba")
    state.optimizers, state.algorithms = AdamW(model), list(tricks)
    for event in (Event.INIT, *[Event.BATCH_START] * batches):
        for trick in tricks:
            if trick.match(event, state):
                trick.apply(event, state, None)  # pyright: ignore[reportArgumentType]
        if event == Event.BATCH_START:
            state.timestamp = state.timestamp.to_next_batch(1)
    return state


@pytest.mark.parametrize(
    ("start", "end", "told"),
    [
        ("0ba", None, ["attach", True]),
        ("0ba", "2ba", ["attach", True, False, "release"]),
        ("1ba", "3ba", ["attach", False, True, False, "release"]),
    ],
)
def test_a_trick_is_told_when_its_window_opens_and_closes_and_nothing_twice(
    start: str, end: str | None, told: list[Any], tiny_model: Build
) -> None:
    trick = Halved(start, end)
    begin(tiny_model(), trick, batches=6)
    assert trick.told == told


def test_what_attaching_finds_wrong_has_the_tricks_path_and_what_is_experimental_is_said(
    tiny_model: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"^algorithms\.halved: nine is too late"):
        begin(tiny_model(), Halved("9ba"))
    with caplog.at_level(logging.WARNING):
        begin(tiny_model(), Halved(), batches=3)
    assert [record.message for record in caplog.records].count(
        "algorithms.halved is experimental: what it is good for has not been measured yet."
    ) == 1


class Scaled(LossTrick):
    """A loss with a parameter of its own."""

    name = "scaled"

    def build(self, model: Any) -> dict[str, Any]:
        return {"scale": torch.nn.Parameter(torch.randn(3))}

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return self.term.scale.square().sum() * outputs.prediction.square().mean()


def test_a_loss_is_weighted_in_its_window_and_its_first_weights_are_the_seeds(
    tiny_model: Build, tiny_batch: dict[str, torch.Tensor]
) -> None:
    scales = []
    for global_seed in (0, 1):
        model = tiny_model()
        torch.manual_seed(global_seed)
        state = begin(model, Scaled(0.5, end="2ba"), batches=2)
        scale = model.get_parameter("auxiliary_losses.scaled.scale")
        scales.append(scale.detach().clone())
        assert any(scale is parameter for group in state.optimizers[0].param_groups for parameter in group["params"])
        outputs = model(tiny_batch)
        expected = 0.5 * scale.square().sum() * outputs.prediction.square().mean()
        torch.testing.assert_close(model.loss(outputs, tiny_batch)["scaled"], expected)
        state.algorithms[0].apply(Event.BATCH_START, state, None)  # pyright: ignore[reportArgumentType]
        assert model.loss(outputs, tiny_batch)["scaled"] == 0
    assert torch.equal(*scales)
    with pytest.raises(UserError, match=r"algorithms\.scaled is there twice"):
        begin(tiny_model(), Scaled(1.0), Scaled(1.0))


CODE = """
from prx_composer import registry
from prx_composer.algorithms.base import Trick
from prx_composer.common.errors import UserError

@registry.algorithms.register("choosy")
class Choosy(Trick):
    name = "choosy"
    needs_image = True
    instead_of_images = ", or leave choosy out"

    def check(self, recipe, others, backbone=None):
        if any(getattr(other, "name", None) == "ema" for other in others):
            raise UserError(f"algorithms.choosy cannot be combined with ema at a depth of {backbone.depth}.")

    def find_weights(self, timeout):
        raise UserError("algorithms.choosy: its weights cannot be had.")
"""


def test_a_strangers_trick_is_checked_as_ours_are(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    code = tmp_path / "choosy.py"
    code.write_text(CODE)
    tiny_recipe["algorithms"]["choosy"] = {}

    def problems(*changes: str) -> list[str]:
        recipe = config.load([write_recipe(tiny_recipe | {"code_paths": [str(code)]}), *changes])
        return [result.text for result in check_config(recipe, 1) if result.mark == "✗"]

    (problem,) = problems()
    assert problem.startswith("algorithms.choosy cannot be combined with ema at a depth of 2")
    found = problems("algorithms.ema=false", "model.autoencoder={name: diffusers, pretrained: x}", "train_loader.latent=vae")
    assert any(
        "algorithms.choosy looks at images" in text and text.endswith("the latents, or leave choosy out.") for text in found
    )
    recipe = config.load([write_recipe(tiny_recipe | {"code_paths": [str(code)]})])
    answers = [result.text for result in check_weights(examine(recipe, 1)[1])]
    assert "algorithms.choosy: its weights cannot be had." in answers


# ---------------------------------------------------------------------------------------- which trick at which resolution


@pytest.mark.parametrize(
    ("size", "against"), [(31, []), (64, []), (127, []), (128, [256]), (256, [256]), (383, [256]), (512, []), (4096, [])]
)
def test_what_was_measured_at_the_nearest_size_speaks_against_a_trick(size: int, against: list[int]) -> None:
    of = {"measure": "FID", "without": 18.0, "source": "someone"}
    toy = Evidence(image_size=32, measure="accuracy", without=0.9, having=0.95, higher_is_better=True, source="here")
    worse, better = Evidence(image_size=256, having=21.0, **of), Evidence(image_size=1024, having=14.0, **of)
    assert [one.image_size for one in hurting([worse, toy, better], size)] == against and not hurting([], size)


ADVISED = """
from prx_composer import registry
from prx_composer.algorithms.base import Trick
from prx_composer.recipe.evidence import Evidence

@registry.algorithms.register("measured")
class Measured(Trick):
    name = "measured"
    evidence = (Evidence(image_size=256, measure="FID", without=10, having=11.5, source="a paper"),)

@registry.algorithms.register("outspoken")
class Outspoken(Trick):
    name = "outspoken"

    def advise(self, stages):
        yield f"it has nothing to do in {len(stages)} stages."
"""


def test_check_says_at_which_size_a_trick_was_worse_while_it_acts(
    tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    """TREAD in PRX Part 2: FID 18.2 → 21.61 at 256 px, better at 1024 px; toys of 16 px are left in peace."""
    (tmp_path / "advised.py").write_text(ADVISED)
    tiny_recipe |= {"code_paths": [str(tmp_path / "advised.py")]}
    registry.import_code(tiny_recipe["code_paths"])
    routed = {"start_block": 0, "end_block": 0}

    def warnings(algorithms: Recipe, *sizes: int) -> list[str]:
        stages = [{"image_size": size, "global_train_batch_size": 8} for size in sizes]
        stages[0]["until"] = "4ba"
        given = tiny_recipe | {"algorithms": algorithms | {"progressive_resolution": {"stages": stages}}}
        found, _ = examine(config.load([write_recipe(given)]), 1)
        assert not [result.text for result in found if result.mark == "✗"]
        return [result.text for result in found if result.mark == "!"]

    (said,) = warnings({"tread": routed}, 256, 512)
    assert said.startswith("algorithms.tread: at 256 px it may do harm") and "18.2 without it and 21.61 with it" in said
    assert "prx-part2" in said and "algorithms.tread.start" in said
    assert not warnings({"tread": routed | {"start": "4ba"}}, 256, 512) and not warnings({"tread": routed}, 8, 16)
    assert [text.partition(":")[0] for text in warnings({"measured": {}, "outspoken": {}}, 256, 512)] == [
        "algorithms.measured",
        "algorithms.measured",
        "algorithms.outspoken",
    ]


class Thin(Trick):
    name = "thin"
    saves_memory = True


def test_a_trick_that_saves_memory_is_tried_off_too_where_its_window_opens_or_closes() -> None:
    state: Any = SimpleNamespace(algorithms=[Thin("2ba", "5ba")], timestamp=Timestamp())
    assert is_sometimes_dense(state, ScheduleWindow()) and is_sometimes_dense(state, ScheduleWindow("4ba"))
    assert not is_sometimes_dense(state, ScheduleWindow("2ba", "5ba")) and not is_sometimes_dense(state, ScheduleWindow("5ba"))


def test_stages_follow_one_another_and_the_last_goes_on_to_the_end() -> None:
    stages = [
        {"until": "4ba", "image_size": 8, "global_train_batch_size": 48, "device_train_microbatch_size": 12},
        {"until": "7ba", "image_size": 16, "global_train_batch_size": 24},
    ]
    sizes = {"image_size": 32, "global_train_batch_size": 6}
    first, last = planned_stages(sizes | {"algorithms": {"progressive_resolution": {"stages": stages}}}, num_ranks=2)
    assert (first.image_size, first.device_batch_size, first.microbatch_size) == (8, 24, 12)
    assert (last.image_size, last.device_batch_size, last.microbatch_size) == (16, 12, 12)
    assert str(first.window.end) == str(last.window.start) == "4ba" and last.window.end is None
    (whole,) = planned_stages(sizes | {"algorithms": {}}, num_ranks=2)
    assert (whole.path, whole.image_size, whole.microbatch_size, whole.window.end) == ("", 32, 3, None)


def test_the_guide_s_trick_scales_the_loss_inside_of_its_window(tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "ScaledLoss" in block)
    (tmp_path / "scaled_loss.py").write_text(code)
    tiny_recipe |= {"code_paths": [str(tmp_path / "scaled_loss.py")], "max_duration": "2ba", "save_interval": "2ba"}
    tiny_recipe["algorithms"] |= {"scaled_loss": {"factor": 0.25, "end": "1ba"}, "progressive_resolution": False}
    recipe = config.load([write_recipe(tiny_recipe)])
    run(recipe)
    rows = read_metrics(Path(recipe.run_folder) / "metrics.jsonl")
    assert [row["loss/train/total"] / row["loss/train/flow"] for row in rows] == pytest.approx([0.25, 1.0])


def test_blocks_that_the_backbone_has_not_are_found_before_anything_is_attached(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["algorithms"] = {"tread": {"start_block": 0, "end_block": 7}, "repa": {"teacher": TEACHER, "block": 2}}
    found, _ = examine(config.load([write_recipe(tiny_recipe)]), 1)
    assert [result.text for result in found if result.mark == "✗"] == [
        "algorithms.tread: blocks 0 to 7 cannot be routed; model.backbone has 2 blocks, counted from 0 to 1.",
        "algorithms.repa.block: 2 is no block of model.backbone, which has 2, counted from 0 to 1.",
    ]
