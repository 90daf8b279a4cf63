"""Recipes: merging, and one clear message, with the YAML path, for everything that is wrong before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.recipe.arguments import build, entries

Write = Callable[..., str]
Recipe = dict[str, Any]


def test_recipes_merge_left_to_right_and_arguments_win(tiny_recipe: Recipe, write_recipe: Write) -> None:
    second = write_recipe({"seed": 5, "model": {"backbone": {"depth": 3}}, "optimizer": {"lr": 0.5}}, "second.yaml")
    recipe = config.load([write_recipe(tiny_recipe), second, "optimizer.lr=1e-4", "algorithms.ema=false", "seed=6"])
    assert recipe.seed == 6 and recipe.optimizer["lr"] == 1e-4 and recipe.model["backbone"]["depth"] == 3
    assert recipe.model["backbone"]["hidden_size"] == 32, "what a later file doesn't name stays"
    assert [name for name, _ in entries(recipe.algorithms, "algorithms")] == [
        "gradient_clipping",
        "progressive_resolution",
    ]
    assert recipe.run_folder.endswith("runs/tiny")


def test_every_shipped_recipe_is_valid() -> None:
    recipes = sorted(path for path in Path("yamls").glob("*.yaml") if path.stem != "foundry")  # a YAML of llm-foundry's
    assert len(recipes) >= 3
    for path in recipes:
        config.check(config.load([str(path)]))


def test_a_value_may_be_longer_than_the_name_of_a_file() -> None:
    prompts = [f"a prompt with the number {number}" for number in range(20)]
    loaded = config.load(["yamls/quickstart.yaml", f"callbacks.images.prompts={json.dumps(prompts)}"])
    assert loaded.callbacks["images"]["prompts"] == prompts


def test_a_file_to_merge_over_a_recipe_says_so_when_given_alone() -> None:
    with pytest.raises(UserError, match=r"lacks run_name, model.* given after a whole recipe"):
        config.load(["yamls/ablations/tread.yaml"])


def test_a_recipe_may_be_a_few_keys_over_its_base(tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path) -> None:
    write_recipe(tiny_recipe, "low.yaml")
    (tmp_path / "deeper").mkdir()
    write_recipe({"base": "../low.yaml", "run_name": "middle", "seed": 3}, "deeper/middle.yaml")
    top = write_recipe({"base": ["deeper/middle.yaml", "other.yaml"], "run_name": "top"}, "top.yaml")
    write_recipe({"base": "low.yaml", "optimizer": {"lr": 0.25}}, "other.yaml")  # under which middle.yaml lies already
    recipe = config.load([top])
    assert (recipe.run_name, recipe.seed, recipe.optimizer["lr"]) == ("top", 3, 0.25)
    assert vars(recipe) == vars(config.load([str(tmp_path / "low.yaml"), "run_name=top", "seed=3", "optimizer.lr=0.25"])), (
        "and all else is as below"
    )


def test_what_is_given_before_a_recipe_stands_in_for_its_base_and_it_is_said(
    tiny_recipe: dict[str, Any], write_recipe: Write, caplog: pytest.LogCaptureFixture
) -> None:
    first = write_recipe(tiny_recipe | {"seed": 3}, "first.yaml")
    write_recipe(tiny_recipe | {"seed": 4}, "base.yaml")
    over = write_recipe({"base": "base.yaml", "run_name": "over"}, "over.yaml")
    assert config.load([over]).seed == 4 and not caplog.messages
    assert config.load([first, over]).seed == 3
    assert [f"{over}: its base base.yaml is not read" in message for message in caplog.messages] == [True]


def test_a_recipe_s_own_code_is_looked_for_beside_it(
    tiny_recipe: dict[str, Any],
    write_recipe: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def code(*arguments: str) -> list[str]:
        return config.load(list(arguments)).code_paths

    for folder in ("lower", "upper", "stands"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "stands")
    (tmp_path / "lower" / "mine.py").touch()
    low = write_recipe(tiny_recipe | {"code_paths": ["mine.py", "/elsewhere/other.py"]}, "lower/low.yaml")
    top = write_recipe({"base": "../lower/low.yaml", "run_name": "top"}, "upper/top.yaml")
    there, other = f"{tmp_path}/lower/mine.py", "/elsewhere/other.py"
    assert code(low) == [there, other] and code("../lower/low.yaml") == ["../lower/mine.py", other]
    (lower, _) = code(top)
    assert Path(lower).samefile(there), "a base's code lies beside the base"
    assert code(low, "code_paths=[mine.py]") == ["mine.py"], "on a command line it is of the working directory"
    assert not caplog.messages
    Path("mine.py").touch()
    assert code(low) == [there, other], "one that is in the working directory too isn't taken unsaid"
    assert [f"{there} is imported, and not the file mine.py of the working directory" in line for line in caplog.messages] == [
        True
    ]
    saved = write_recipe(tiny_recipe | {"code_paths": ["mine.py"]}, "upper/config.yaml")
    assert code(saved) == ["mine.py"], "a run folder names it as it was found from the working directory"
    assert "mine.py of the working directory is imported: there is no" in caplog.messages[-1]


def test_a_base_on_the_command_line_is_refused_with_what_to_write(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    with pytest.raises(UserError, match=r"base is a line of a recipe's file\. Here give the files themselves"):
        config.load([write_recipe(tiny_recipe), "base=other.yaml"])


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("own.yaml", r"own\.yaml: base leads back to this file"),
        ("missing.yaml", r"own\.yaml: base: there is no recipe .*missing\.yaml"),
        (7, r"base must be the path of a recipe, or a list of them, not 7"),
        ({"name": "low"}, r"base must be the path of a recipe"),
    ],
)
def test_a_base_that_cannot_be_is_said(base: Any, message: str, write_recipe: Write) -> None:
    with pytest.raises(UserError, match=message):
        config.load([write_recipe({"base": base}, "own.yaml")])


def test_a_component_of_another_name_does_not_inherit_arguments(tiny_recipe: Recipe, write_recipe: Write) -> None:
    other = write_recipe({"optimizer": {"name": "decoupled_adamw"}, "train_loader": {"source": {"name": "digits"}}}, "other.yaml")
    recipe = config.load([write_recipe(tiny_recipe), other])
    assert recipe.optimizer == {"name": "decoupled_adamw"} and recipe.train_loader["source"] == {"name": "digits"}
    assert recipe.train_loader["path"] == tiny_recipe["train_loader"]["path"], "the mapping around it is merged"
    changes = ["optimizer={name: decoupled_adamw, weight_decay: 0.1}", "train_loader.source={name: digits}", "model={flow: {}}"]
    recipe = config.load([write_recipe(tiny_recipe), *changes])
    assert recipe.optimizer == {"name": "decoupled_adamw", "weight_decay": 0.1}
    assert recipe.train_loader["source"] == {"name": "digits"} and recipe.model["backbone"]["hidden_size"] == 32
    assert config.load([write_recipe(tiny_recipe), "optimizer={name: adamw, eps: 1}"]).optimizer["lr"] == 1e-3, "the same name"


def test_flow_matching_is_the_process_that_has_no_name(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["model"]["flow"] = {"min_timestep": 0.3}
    path = write_recipe(tiny_recipe)
    for name, flow in (("edm", {"name": "edm"}), ("flow_matching", {"min_timestep": 0.3, "name": "flow_matching"})):
        other = write_recipe({"model": {"flow": {"name": name}}}, "other.yaml")
        assert (
            config.load([path, other]).model["flow"] == config.load([path, f"model.flow={{name: {name}}}"]).model["flow"] == flow
        )
        config.check(config.load([path, other]))
    assert config.load([path, "model.flow={name: edm}", "model.flow={p_std: 0.6}"]).model["flow"] == {"name": "edm", "p_std": 0.6}


def test_elements_of_lists_are_set_by_index(tiny_recipe: Recipe, write_recipe: Write) -> None:
    recipe = config.load([write_recipe(tiny_recipe), "algorithms.progressive_resolution.stages[0].until=6ba"])
    stages = recipe.algorithms["progressive_resolution"]["stages"]
    assert stages[0]["until"] == "6ba" and stages[0]["image_size"] == 8
    with pytest.raises(UserError, match="cannot be set"):
        config.load([write_recipe(tiny_recipe), "algorithms.progressive_resolution.stages[7].until=6ba"])


BAD: dict[str, tuple[list[str], str]] = {
    "key": (["modle.caption_dropout=0.1"], r"modle: no such key in a recipe. Did you mean 'model'\?"),
    "component": (["algorithms.emma={}"], r"algorithms.emma: there is no 'emma' among the algorithms. Did you mean 'ema'\?"),
    "backbone": (["model.backbone.name=prxx"], r"model.backbone: there is no 'prxx'.* Did you mean 'prx'"),
    "argument": (["model.backbone.hiden_size=3"], r"model.backbone.hiden_size: no such argument. Did you mean 'hidden_size'"),
    "loader": (["train_loader.shufle=true"], r"train_loader.shufle: no such argument. Did you mean 'shuffle'"),
    "source": (["train_loader.source.heldot=3"], r"train_loader.source.heldot: no such argument. Did you mean 'heldout'"),
    "callback": (["callbacks.images.promts=[a]"], r"callbacks.images.promts: no such argument. Did you mean 'prompts'"),
    "missing": (["callbacks.images={}"], r"callbacks.images lacks the argument 'prompts'"),
    "type": (["model.backbone.depth=four"], r"model.backbone.depth: expected an integer, not 'four'"),
    "top-level type": (["global_train_batch_size=many"], r"global_train_batch_size: expected an integer, not 'many'"),
    "flow": (["model.flow.predicton=x"], r"model.flow.predicton: no such argument. Did you mean 'prediction'"),
    "process": (["model.flow={name: dppm}"], r"model.flow: there is no 'dppm' among the processes. Did you mean 'ddpm'"),
    "key of another process": (
        ["model.flow={name: ddpm, timestep_shift: 3.0}"],
        r"model.flow.timestep_shift: no such argument. It is of name: flow_matching. Its noise is that of its betas, its times",
    ),
    "weight of another process": (
        ["model.flow={name: edm, min_timestep: 0.3}"],
        r"model.flow.min_timestep: no such argument. It is of name: flow_matching. .* its loss is weighted by EDM's own rule",
    ),
    "betas of flow matching": (
        ["model.flow.beta_schedule=linear"],
        r"model.flow.beta_schedule: .* It is of name: ddpm. Its path",
    ),
    "tokens": (["eval_interval=5tok"], r"eval_interval: 5tok: images have no tokens"),
    "literal": (["model.flow.prediction=eps"], r"model.flow.prediction: expected 'x' or 'v', not 'eps'. name: ddpm takes it."),
    "stage": (["algorithms.progressive_resolution.stages=[{until: 3ba}]"], r"stages\[0\] lacks the argument 'image_size'"),
    "stage key": (
        ["algorithms.progressive_resolution.stages=[{image_sise: 8}]"],
        r"algorithms.progressive_resolution.stages\[0\].image_sise: no such argument. Did you mean 'image_size'",
    ),
    "no name": (["optimizer={lr: 1.0}", "optimizer.name=null"], r"optimizer must be a mapping with a `name`"),
    "entry": (["algorithms.ema=3"], r"algorithms.ema must be a mapping of arguments, or false to leave it out, not 3"),
    "interpolation": (["run_name=${nothing}"], r"nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_ends_in_one_message_with_its_path(name: str, tiny_recipe: Recipe, write_recipe: Write) -> None:
    arguments, message = BAD[name]
    with pytest.raises(UserError, match=message):
        config.check(config.load([write_recipe(tiny_recipe), *arguments]))


@pytest.mark.parametrize(("text", "message"), [("a: [1", "not valid YAML"), ("- 1", "mapping"), (None, "There is no recipe")])
def test_files_that_are_no_recipes(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        config.load([str(path)])


def test_a_missing_key_is_named(tiny_recipe: Recipe, write_recipe: Write) -> None:
    del tiny_recipe["optimizer"], tiny_recipe["max_duration"]
    with pytest.raises(UserError, match="lacks optimizer, max_duration|lacks max_duration, optimizer"):
        config.load([write_recipe(tiny_recipe)])
    with pytest.raises(UserError, match="at least one recipe"):
        config.load(["seed=3"])


def test_ones_own_component_is_found_through_code_paths(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "from composer.core import Algorithm\n"
        "from prx_composer import registry\n"
        "@registry.algorithms.register('mine')\n"
        "class Mine(Algorithm):\n"
        "    def __init__(self, strength: float = 1.0): self.strength = strength\n"
        "    def match(self, event, state): return False\n"
        "    def apply(self, event, state, logger): ...\n"
    )
    registry.import_code([str(code)])
    built = [build(registry.algorithms, "mine", {"strength": 2.0}, "algorithms.mine")]
    assert built[0].strength == 2.0
    with pytest.raises(UserError, match=r"code_paths\[0\]"):
        registry.import_code([str(tmp_path / "yours.py")])


def test_every_builtin_name_can_be_imported() -> None:
    for kind in vars(registry).values():
        if isinstance(kind, registry.Registry):
            for name in kind.names():
                assert callable(kind.get(name, name))


def test_recipes_survive_being_saved(tiny_recipe: Recipe, write_recipe: Write) -> None:
    import dataclasses

    recipe = config.load([write_recipe(tiny_recipe)])
    saved = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))
    path = write_recipe({}, "saved.yaml")
    Path(path).write_text(saved)
    assert config.load([path]) == recipe
