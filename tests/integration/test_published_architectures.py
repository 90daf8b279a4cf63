"""Recipes of published size are checked and planned, and have as many parameters as their systems say."""

import math
from pathlib import Path

import pytest

from prx_composer.commands.plan.conditions import Conditions, find_gpu
from prx_composer.commands.plan.plan import make_plan
from prx_composer.recipe import config
from prx_composer.runs.model_parts import ModelParts
from prx_composer.training.trial import check_config

FOLDER = Path(__file__).parents[2] / "yamls" / "architectures" / "published"
RECIPES = [path for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "eight_gpus"]


def linear(inside: int, outside: int) -> int:
    """Weight and bias."""
    return (inside + 1) * outside


def attention(d: int) -> int:
    return 4 * linear(d, d)


def mlp(d: int) -> int:
    return linear(d, 4 * d) + linear(4 * d, d)


def two_layers(inside: int, d: int) -> int:
    return linear(inside, d) + linear(d, d)


def mmdit(d: int, layers: int, text: int, pooled: int, patch: int) -> int:
    """SD3, figure 2b: two streams with weights of their own; the last block ends with the image's alone."""
    stream = linear(d, 6 * d) + attention(d) + mlp(d)
    last = stream + linear(d, 2 * d) + 3 * linear(d, d)
    around = linear(patch, d) + two_layers(256, d) + two_layers(pooled, d) + linear(text, d) + linear(d, 2 * d) + linear(d, patch)
    return 2 * stream * (layers - 1) + last + around


def flux(d: int, double: int, single: int, text: int, pooled: int, patch: int, head: int = 128) -> int:
    """As SD3's blocks, with norms of q and k, then those whose attention and MLP lie side by side."""
    two_streams = 2 * (linear(d, 6 * d) + attention(d) + mlp(d) + 2 * head)
    one_stream = linear(d, 3 * d) + 3 * linear(d, d) + linear(d, 4 * d) + linear(5 * d, d) + 2 * head
    around = linear(patch, d) + two_layers(256, d) + two_layers(pooled, d) + linear(text, d) + linear(d, 2 * d) + linear(d, patch)
    return double * two_streams + single * one_stream + around


def cross_attention_dit(d: int, layers: int, text: int, patch_in: int, patch_out: int) -> int:
    """PixArt-α, figure 4: one modulation for all blocks, of which each has a table of its own."""
    block = 2 * attention(d) + mlp(d) + 6 * d
    around = linear(patch_in, d) + two_layers(text, d) + two_layers(256, d) + linear(d, 6 * d) + 2 * d + linear(d, patch_out)
    return layers * block + around


def dit(d: int, layers: int, classes: int, patch_in: int, patch_out: int) -> int:
    """DiT, with adaLN-Zero; diffusers' class embeds time and label in every block, where the paper does so once."""
    block = linear(d, 6 * d) + attention(d) + mlp(d) + two_layers(256, d) + (classes + 1) * d
    return layers * block + linear(patch_in, d) + linear(d, 2 * d) + linear(d, patch_out)


def sana(d: int, layers: int, text: int, channels: int, ratio: float = 2.5) -> int:
    """Sana, figure 5: linear attention without biases of q, k and v, and Mix-FFN: 1×1, depthwise 3×3, gated, 1×1."""
    inside = int(ratio * d)
    ffn = linear(d, 2 * inside) + 2 * inside * 10 + inside * d
    block = attention(d) - 3 * d + attention(d) + ffn + 6 * d
    around = linear(channels, d) + two_layers(text, d) + d + two_layers(256, d) + linear(d, 6 * d) + 2 * d + linear(d, channels)
    return layers * block + around


def microdit(d: int, layers: int, mixer: int, mixer_layers: int, text: int, patch: int, experts: int = 8) -> int:
    """MicroDiT, appendix A: no biases but in embedders and modulations; every second block but the last has experts."""

    def wide(width: float) -> int:
        return 256 * math.ceil(int(width) / 256)

    def block(d: int, index: int, inner: int, hidden: int, has_experts: bool) -> int:
        mlp = experts * (2 * d * wide(hidden) + d) if has_experts else 3 * d * wide(int(2 * hidden / 3))
        return 3 * d + linear(1024, 6 * d) + 4 * d * inner + 4 * d * d + mlp

    def projected(inside: int) -> int:
        return two_layers(inside, d) + d

    total = sum(block(mixer, i, mixer, 4 * mixer, i % 2 == 1) for i in range(mixer_layers))
    for i in range(layers):
        share = i / (layers - 1)
        inner = min(d, 128 * math.ceil(int(d * (0.5 + 0.5 * share)) / 128))
        total += block(d, i, inner, int(d * (0.5 + 3.5 * share)), i % 2 == 1 and i < layers - 1)
    around = linear(patch, d) + projected(text) + projected(d) + two_layers(512, d) + linear(d, 2 * d) + d + linear(d, patch)
    caption = 2 * d + 4 * d * d + 3 * d * wide(8 * d / 3)
    between = 2 * (d + d * mixer) + mixer + mixer * d
    return total + around + caption + between


def prx(d: int, layers: int, text: int, patch: int, ratio: float = 3.5, head: int = 64) -> int:
    """PRX: no biases but in embedders and modulations; text gives keys and values alone; a gated MLP."""
    block = 6 * d * d + 3 * int(ratio * d) * d + 3 * head + linear(d, 6 * d)
    return layers * block + linear(patch, d) + linear(text, d) + two_layers(256, d) + linear(d, 2 * d) + linear(d, patch)


def cascade(d: int, down: list[int], up: list[int], text: int, image: int, channels: int, time: int = 64, parts: int = 4) -> int:
    """Stage C of Würstchen: threes of a ConvNeXt block with response norm, a modulation by three embeddings, and attention."""
    convolution = 10 * d + linear(d, 4 * d) + 2 * 4 * d + linear(4 * d, d)
    three = convolution + 3 * linear(time, 2 * d) + attention(d) + linear(d, d)
    skip = 4 * d * d  # beside what the last block on the way up's coarser level gives
    text_and_image = linear(text, parts * d) + linear(text, d) + linear(image, parts * d)
    around = linear(channels, d) + linear(d, channels) + text_and_image + 2 * linear(d, d)  # between the levels
    return three * sum(down + up) + skip + around


# recipe → parameters by the formula, and what was published
COUNTED = {
    "sd3_medium": (mmdit(1536, 24, 4096, 2048, 64), 2.028e9),  # 2B by the paper
    "flux_schnell_size": (flux(3072, 19, 38, 4096, 768, 64), 11.89e9),  # 12B by its card
    "pixart_sigma": (cross_attention_dit(1152, 28, 4096, 16, 32), 0.611e9),  # 0.6B by the paper
    "sana_1600m": (sana(2240, 20, 2304, 32), 1.604e9),  # 1,604M: table 1
    "dit_xl": (dit(1152, 28, 1000, 16, 32), 0.675e9 + 27 * (two_layers(256, 1152) + 1001 * 1152)),  # 675M: table 1
    "microdit": (microdit(1024, 28, 768, 6, 4096, 16), 1.16e9),  # by the paper
    "microdit_512": (microdit(1024, 28, 768, 6, 4096, 16), 1.16e9),
    "wuerstchen": (cascade(2048, [8, 24], [24, 8], 1280, 768, 16), 3.6e9),  # 3.6B by its card
    "prx_baseline": (prx(1792, 16, 2304, 64), None),  # "1.2B"
}


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_of_published_size_are_checked_and_as_large(file: Path) -> None:
    recipe = config.load([str(file)])
    assert not [str(result) for result in check_config(recipe, 8) if result.mark == "✗"]
    by_formula, published = COUNTED[file.stem]
    backbone = ModelParts(recipe.model, 0, meta=True).backbone
    assert sum(parameter.numel() for parameter in backbone.parameters()) == by_formula
    if published is not None:
        assert by_formula == pytest.approx(published, rel=0.01)


PLANNED = [pytest.param(file, marks=[] if file.stem == "sana_1600m" else pytest.mark.long, id=file.stem) for file in RECIPES]


@pytest.mark.slow
@pytest.mark.parametrize("file", PLANNED)
def test_recipes_of_published_size_are_planned_and_fit(file: Path) -> None:
    plan = make_plan(config.load([str(file)]), Conditions(find_gpu("h200"), num_gpus=8, utilisation=0.3))
    assert plan.parameters == COUNTED[file.stem][0] and all(stage.fits for stage in plan.stages)
