"""How many graphs are compiled: as the plan says, one for every number of tokens; of frozen networks one or two for all sizes."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_T5
from stacks import TEACHER, stack_of_24h
from torch._dynamo.testing import CompileCounterWithBackend

from prx_composer.algorithms.perceptual import LPIPS, lpips_distance
from prx_composer.commands.plan.conditions import Conditions, find_gpu, read_manifests
from prx_composer.commands.plan.plan import make_plan
from prx_composer.models import PRXBackbone
from prx_composer.models.compiling import graphs_kept_in
from prx_composer.models.encoders import HuggingFaceTextEncoder, TeacherSpec, VisionEncoder
from prx_composer.models.routing import RandomRouter
from prx_composer.recipe import config

Write = Callable[..., str]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts what is compiled from here on, by torch's tracer alone."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def test_the_plan_counts_the_graphs_that_torch_makes_of_all_buckets_stages_and_routes(
    tiny_recipe: dict[str, Any], write_recipe: Write, graphs: CompileCounterWithBackend
) -> None:
    recipe = stack_of_24h(tiny_recipe)
    recipe["model"]["compile"], recipe["algorithms"]["tread"]["end"] = "blocks", "5ba"  # in a part of the second stage
    loaded = config.load([write_recipe(recipe)])
    compiled = make_plan(loaded, Conditions(find_gpu("h200"))).compiling
    manifest = next(iter((read_manifests(loaded) or {}).values()))
    backbone = PRXBackbone(**{key: value for key, value in recipe["model"]["backbone"].items() if key != "name"})
    backbone.compile_graphs(per_block=True)
    router = RandomRouter("tread", 1, 2, 0.5)
    for _ in range(2):  # the second time nothing is new
        for image_size in (16, 24):
            for bucket in manifest.buckets:
                height, width = bucket.at(image_size, manifest.image_size, backbone.patch_size)
                route = router.draw(6, backbone.num_tokens(height, width), torch.Generator())
                text, mask = torch.randn(6, 14, backbone.context_in_dim), torch.ones(6, 14, dtype=torch.bool)
                for drawn in (route, None):
                    backbone(torch.randn(6, 3, height, width), torch.rand(6), text, attention_mask=mask, route=drawn)
    assert graphs.frame_count == compiled.graphs["backbone"] + compiled.graphs["backbone (routed)"] == compiled.count
    assert compiled.seconds == 3 * 7 * compiled.count and compiled.seconds_again < compiled.seconds / 5


@pytest.mark.parametrize("more", [{"model_type": "dinov2"}, {"model_type": "dinov3_vit", "intermediate_size": 24}])
def test_a_teacher_s_layers_share_a_graph_for_all_sizes_and_give_the_same(
    more: dict[str, Any], graphs: CompileCounterWithBackend
) -> None:
    spec = TEACHER["config"] | {"num_hidden_layers": 3, "hidden_size": 24} | more
    torch.manual_seed(0)
    compiled = VisionEncoder(TeacherSpec(config=spec, compile=True))
    plain = VisionEncoder(TeacherSpec(config=spec))
    plain.module.load_state_dict(compiled.module.state_dict())
    for images, height, width in ((2, 16, 16), (2, 12, 20), (3, 24, 8)):
        image = torch.randn(images, 3, height, width)
        torch.testing.assert_close(compiled(image), plain(image))
    assert graphs.frame_count == 1


T5GEMMA = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
T5GEMMA |= dict(head_dim=8, vocab_size=64, sliding_window=8)  # which every other layer has


@pytest.mark.parametrize(
    ("spec", "most"),
    [(TINY_T5 | {"num_layers": 3}, 4), ({"model_type": "t5gemma", "encoder": T5GEMMA, "decoder": T5GEMMA, "vocab_size": 64}, 2)],
    ids=["t5", "t5gemma"],
)
def test_a_text_encoder_s_layers_share_graphs_for_captions_of_all_lengths_and_give_the_same(
    spec: dict[str, Any], most: int, graphs: CompileCounterWithBackend, tokenizer: Any
) -> None:
    """T5's first layer makes the bias of positions, which the others are given; T5Gemma's layers see all or a window."""
    torch.manual_seed(0)
    compiled = HuggingFaceTextEncoder(tokenizer, config=spec, max_tokens=14, compile=True)
    plain = HuggingFaceTextEncoder(tokenizer, config=spec, max_tokens=14)
    plain.network.load_state_dict(compiled.network.state_dict())
    for texts in (["a red circle"], ["a blue square on the left of a white background", ""], ["a cross"] * 3):
        tokens = compiled.tokenize(texts)
        used = tokens["attention_mask"].any(0)  # of other lengths, as groups of captions are
        given = tokens["input_ids"][:, used], tokens["attention_mask"][:, used]
        torch.testing.assert_close(compiled(*given), plain(*given))
    assert 1 <= graphs.frame_count <= most
    with pytest.raises(ValueError, match="compile: true is for a frozen encoder"):
        HuggingFaceTextEncoder(tokenizer, config=spec, max_tokens=14, compile=True, trainable=True)


def test_compiled_lpips_gives_the_same_at_all_sizes(graphs: CompileCounterWithBackend, tiny_model: Callable[..., Any]) -> None:
    trick = LPIPS(net="alex", random_weights=True, scale=1.0, compile=True)
    trick.build(tiny_model(in_channels=3))
    assert trick.network is not None
    for images, height, width in ((2, 40, 56), (3, 64, 48), (2, 48, 48)):
        prediction, target = (torch.rand(images, 3, height, width) for _ in range(2))  # no views of one tensor
        expected = lpips_distance(trick.network.on(target.device), prediction, target)
        torch.testing.assert_close(trick.distance(prediction.requires_grad_(), target), expected)
    assert graphs.frame_count


def test_what_is_compiled_is_kept_in_the_run_folder_unless_the_user_has_said_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.delenv(name, raising=False)
    with graphs_kept_in(tmp_path / "compiled"):
        assert os.environ[name] == str(tmp_path / "compiled")
    assert name not in os.environ
    monkeypatch.setenv(name, "elsewhere")
    with graphs_kept_in(tmp_path / "compiled"):
        assert os.environ[name] == "elsewhere"
    assert os.environ[name] == "elsewhere"


RESTART = """
import sys, torch
from pathlib import Path
from torch._dynamo.utils import counters
from prx_composer.models import PRXBackbone
from prx_composer.models.compiling import graphs_kept_in

torch.manual_seed(0)
backbone = PRXBackbone(in_channels=3, patch_size=4, context_in_dim=8, hidden_size=8, num_heads=1, depth=2, axes_dim=(4, 4))
backbone.compile_graphs(per_block=True)
with graphs_kept_in(Path(sys.argv[1])):
    backbone(torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 4, 8)).square().mean().backward()
counted = counters["aot_autograd"]
print(counted["autograd_cache_miss"], counted["autograd_cache_hit"])
"""


@pytest.mark.long
def test_a_second_process_compiles_nothing_again(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    counts = []
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", RESTART, str(tmp_path / "compiled")]
        counts.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split())
    assert counts == [["1", "0"], ["0", "1"]] and list((tmp_path / "compiled").iterdir())
