"""`benchmarks/architectures.py` gives every backbone the size that the recipe's own has, by what it is asked to match."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from prx_composer.common.errors import UserError
from prx_composer.recipe import config

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
spec: Any = importlib.util.spec_from_file_location("architectures_benchmark", REPOSITORY / "benchmarks" / "architectures.py")
architectures: Any = importlib.util.module_from_spec(spec)  # tests have a module of the file's name
sys.modules["architectures_benchmark"] = architectures
spec.loader.exec_module(architectures)

QUICKSTART, DIGITS = (str(REPOSITORY / "yamls" / f"{name}.yaml") for name in ("quickstart", "digits"))
CLASSES = ["auraflow", "dit_air", "flux", "lumina2", "pixart", "sana", "sd3", "stable_cascade", "uvit"]


def planned(recipe: str, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    _, known, refused = architectures.plan_stacks(architectures.Options([recipe], **options))
    return {name: stack["architecture"] for name, stack in known.items()}, refused


def test_backbones_of_one_width_are_those_of_the_recipes() -> None:
    frame, first = architectures.first_of(config.load([QUICKSTART]))
    for name, own in architectures.architectures(CLASSES).items():
        sizes = architectures.fitted(own, frame, first.heads, first.depth)
        different = {key for key in own if sizes[key] != own[key]} - {"sample_size", "axes_lens"}  # that need only be enough
        different -= {"pooled_projection_dim"}  # of the one encoder that all have
        assert not different, (name, different)
        assert sizes.keys() == own.keys()


def test_labels_take_the_place_of_text_where_a_class_has_no_other_and_files_come_with_their_class() -> None:
    _, known, refused = architectures.plan_stacks(architectures.Options([DIGITS], only=["dit"]))
    assert list(known) == ["prx", "dit"] and not refused
    assert any(argument.startswith("model.text_encoder=") and "labels" in argument for argument in known["dit"]["arguments"])
    _, known, refused = architectures.plan_stacks(architectures.Options([QUICKSTART], only=["uvit"]))
    assert any(argument.startswith("code_paths=") and "uvit.py" in argument for argument in known["uvit"]["arguments"])
    assert not refused
    found, [refused] = planned(QUICKSTART, only=["dit"])
    assert list(found) == ["prx"] and "it takes class labels, and the score asks for captions" in refused["reason"]


@pytest.mark.parametrize("match", ["flops", pytest.param("parameters", marks=pytest.mark.long)])
def test_heads_and_depth_are_found_that_match(match: str) -> None:
    """With as many heads no other depth is nearer."""
    frame, first = architectures.first_of(config.load([QUICKSTART]))
    own = architectures.architectures(["pixart"])["pixart"]
    size = architectures.matched(own, frame, first, match)

    def off(one: Any) -> float:
        return abs(math.log(getattr(one, match) / getattr(first, match)))

    assert off(size) < 0.1
    assert size.arguments["num_attention_heads"] == size.heads and size.arguments["num_layers"] == size.depth
    for depth in (size.depth - 1, size.depth + 1):
        arguments = {"name": "diffusers", **architectures.fitted(own, frame, size.heads, depth)}
        assert off(architectures.measured(arguments, frame, size.heads, depth)) > off(size)


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--only sd5: there is no such backbone in yamls/architectures. Did you mean 'sd3'"):
        planned(QUICKSTART, only=["sd5"])
    with pytest.raises(UserError, match="others are compared with prx"):
        planned(str(architectures.ARCHITECTURES / "sd3.yaml"))


def test_the_page_says_what_backbones_cost_and_how_far_off_the_match_is() -> None:
    size = {"heads": 4, "depth": 4, "parameters": 1000, "flops": 2e9, "images": 32, "match": "parameters", "arguments": {}}
    told = {"changes": [], "adds": [], "leaves_out": [], "sets": [], "notes": [], "not_compared": {}}
    stacks = {name: told | {"architecture": size | {"parameters": count}} for name, count in (("prx", 1000), ("sd3", 1040))}
    head = {"what": "x", "date": "", "machine": "", "threads": 1, "load": 0, "versions": {}, "command": "x", "recipe": ["x"]}
    result = head | {"seeds": [1], "target": 0.9, "still_to_train": 2, "chance": {"comparisons": 0}, "stacks": stacks}
    page = architectures.page(result | {"length": "", "refused": [], "comparisons": [], "runs": [], "starts": [head]})
    assert "| `sd3` | 4 × 4 | 1,040 | 2.000 | +4.0% | – | – |" in page and "matched by parameters" in page
