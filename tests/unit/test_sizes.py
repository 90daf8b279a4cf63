"""Named sizes of the backbone: one table, which the documents hold as counted, and which a run doesn't need any more."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prx_composer.common.errors import UserError
from prx_composer.integrations.llm_foundry import Model
from prx_composer.models import PRXBackbone
from prx_composer.models.counting import flops_of_backbone
from prx_composer.recipe import config
from prx_composer.registry import SIZES
from prx_composer.runs.folder import as_saved, recipe_changes
from prx_composer.training.components import Components

RECIPE = "yamls/one_gpu_24gb.yaml"
PAGE = Path(__file__).parents[2] / "recipes" / "README.md"
NUMBERS = {name: [f"model.backbone.{key}={number}" for key, number in numbers.items()] for name, numbers in SIZES.items()}


def sized(name: str, **changes: int) -> PRXBackbone:
    """A model without storage, in pixels, patch 16."""
    with torch.device("meta"):
        return PRXBackbone(in_channels=3, patch_size=16, bottleneck_size=256, **(SIZES[name] | changes))


def flops(name: str, side: int, backward: bool) -> int:
    """Those of an image beside 256 tokens of T5Gemma. Blocks are alike: two models tell what each costs, in less time."""
    one, two = (flops_of_backbone(sized(name, depth=depth), side, side, 256, backward) for depth in (1, 2))
    return one + (SIZES[name]["depth"] - 1) * (two - one)


def row(name: str) -> str:
    """What the table says of a size."""
    numbers = [SIZES[name][key] for key in ("hidden_size", "depth", "num_heads")]
    parameters = sum(parameter.numel() for parameter in sized(name).parameters())
    counts = [flops(name, side, backward) for side in (256, 512) for backward in (False, True)]
    cells = [f"`{name}`", *map(str, numbers), f"{parameters / 1e6:,.0f}M", *(f"{count / 1e9:,.0f}" for count in counts)]
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_documents_is_what_is_counted() -> None:
    table = re.search(r"\| `model.backbone.size` .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE.read_text())
    assert table is not None and table[1].splitlines() == [row(name) for name in SIZES]


def test_a_forward_pass_is_a_third_of_training_but_for_the_gradients_that_nobody_needs() -> None:
    forward, training = (flops_of_backbone(sized("S"), 256, 256, 256, backward) for backward in (False, True))
    assert (forward, training) == (flops("S", 256, False), flops("S", 256, True))
    assert 2.9 < training / forward < 3


@pytest.mark.parametrize("name", SIZES)
def test_a_run_with_a_size_is_the_run_with_its_numbers(name: str) -> None:
    """Check, plan, training, export and what opens a run read the recipe: it is the same, and keeps no name of a size."""
    by_name, by_numbers = (
        config.load([RECIPE, *changes])
        for changes in ([f"model.backbone.size={name}"], ["model.backbone.size=null", *NUMBERS[name]])
    )
    assert as_saved(by_name) == as_saved(by_numbers) and "size" not in as_saved(by_name)["model"]["backbone"]
    assert recipe_changes(as_saved(by_numbers), as_saved(by_name), ranks=1) == []
    backbone = Components(by_name, meta=True).backbone
    assert {key: backbone.config[key] for key in SIZES[name]} == SIZES[name]


def test_a_file_and_a_key_may_say_the_size_and_the_other_keys_stay(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("variables: {size: S}\nmodel: {backbone: {size: '${variables.size}', patch_size: 32}}\n")
    written = yaml.safe_load(Path(RECIPE).read_text())["model"]["backbone"]
    del written["size"]
    for changes in ([str(tmp_path / "small.yaml")], ["model.backbone.size=S", "model.backbone.patch_size=32"]):
        assert config.load([RECIPE, *changes]).model["backbone"] == written | SIZES["S"] | {"patch_size": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.backbone.size=XXL"],
            r"^model.backbone.size: there is no size 'XXL'. Did you mean 'XL'\? Allowed: 1.2B, B, L, S, XL.$",
        ),
        (["model.backbone.size=1.2"], "there is no size 1.2. Did you mean '1.2B'"),
        (["model.backbone.size=[B]"], r"there is no size \['B'\]"),
        (["model.backbone.depth=14"], "model.backbone.size: B stands for .* but there is model.backbone.depth=14"),
    ],
)
def test_what_is_no_size_or_not_that_size_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load([RECIPE, *changes])


def test_what_a_refusal_says_to_write_is_right_both_ways() -> None:
    changes = ["model.backbone.depth=14", "model.backbone.num_heads=24"]
    with pytest.raises(UserError) as refused:
        config.load([RECIPE, *changes])
    numbers, size = re.findall(r"(?:no size, |alone, )([^;]+?)[;.]?(?: or the|$)", str(refused.value))
    assert (
        config.load([RECIPE, *numbers.split()]).model["backbone"].items()
        >= {"hidden_size": 768, "depth": 14, "num_heads": 24}.items()
    )
    assert config.load([RECIPE, *changes, *size.split()]).model["backbone"].items() >= SIZES["B"].items()


def test_another_backbones_size_is_its_own(tiny_recipe: dict[str, Any], write_recipe: Any) -> None:
    tiny_recipe["model"]["backbone"] = {"name": "mine", "size": 7}
    with pytest.raises(UserError, match="there is no 'mine' among the backbones"):
        config.check(config.load([write_recipe(tiny_recipe)]))


def test_llm_foundrys_model_takes_a_size(tokenizer: Any) -> None:
    text = dict(
        name="huggingface", config=dict(model_type="t5", d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2), max_tokens=14
    )
    given = dict(name="prx", size="S", in_channels=3, patch_size=16, context_in_dim=24)
    model = Model(tokenizer, seed=1, backbone=given, text_encoder=text)
    assert model.backbone.config.items() >= SIZES["S"].items()
