"""The site's reference is made of the code that checks recipes: it lacks no key, and has none that the checker refuses."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prx_composer import registry
from prx_composer.common.errors import UserError, problems_of
from prx_composer.recipe.checks import first_look
from prx_composer.recipe.config import load
from prx_composer.registry import BY_NAME

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "docs"))

from prx_docs import cards, pages, tricks  # noqa: E402
from prx_docs.recipe_keys import Key, Section, every_key, sections  # noqa: E402

KEYS = every_key()
SECTIONS = [section for section in sections() if section.kind not in ("", "parallelism")]
RECIPES = [
    file
    for file in (*REPOSITORY.glob("yamls/**/*.yaml"), *REPOSITORY.glob("recipes/**/*.yaml"))
    if file.name not in ("foundry.yaml", "sky.yaml")  # of llm-foundry's and SkyPilot's programs
]


def pattern(key: Key) -> str:
    text = re.escape(key.path).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+")
    return text.replace(r"\[\]", "")


KNOWN = re.compile("|".join(f"(?:{pattern(key)})" for key in KEYS))


def paths(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}" if path else str(key)
            yield from paths(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from paths(item, path)


def test_every_key_of_every_recipe_is_in_the_reference() -> None:
    lacking = {}
    components = {f"{kind}.{name}" for kind, registry in BY_NAME.items() for name in registry.builtin}
    registered = {"algorithms.brightness", "callbacks.concept_score"}  # by code_paths
    for file in RECIPES:
        named = [path for path in paths(yaml.safe_load(file.read_text()), "") if path != "base"]
        own = [path for path in named if not any(path.startswith(name) for name in registered)]
        if found := [path for path in own if path not in components and not KNOWN.fullmatch(path)]:
            lacking[str(file.relative_to(REPOSITORY))] = found
    assert len(RECIPES) > 30 and not lacking, lacking


def with_section(recipe: dict[str, Any], section: Section, value: Any) -> dict[str, Any]:
    """Return the recipe with that component, and its keys set to a value."""
    top, *below = section.path.split(".")
    names = [key.path.removeprefix(f"{section.path}.") for key in section.keys]
    own = () if top in BY_NAME else ("name", "size", "class")  # which are looked at before a constructor is
    arguments = {name: value for name in names if re.fullmatch(r"\w+", name) and name not in own}
    if "class" in names:
        arguments["class"] = "SD3Transformer2DModel"
    if top in BY_NAME:
        return recipe | {top: {section.title: arguments}}
    component = {"name": section.title, **arguments}
    if not below:
        return recipe | {top: component}
    return recipe | {top: recipe[top] | {below[0]: component}}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"{section.path}:{section.title}")
def test_the_checker_takes_the_keys_of_a_component_and_no_others(section: Section) -> None:
    """What it says to a key that nobody has names those that it allows."""
    recipe = vars(load([str(REPOSITORY / "yamls/quickstart.yaml")]))
    said = "\n".join(first_look(with_section(recipe, section, ...), 1))
    assert "no such argument" not in said, said
    path, own = section.path, set() if section.kind in BY_NAME else {"name", "size"}
    asked = Section(section.title, section.path, "", section.kind, [*section.keys, Key(f"{path}.nobody_has_it", "", "", "")])
    said = "\n".join(first_look(with_section(recipe, asked, ...), 1))
    refused = re.search(rf"{re.escape(path)}\.nobody_has_it: no such argument\.(?:.* Allowed: (.*)\.| It takes none\.)", said)
    assert refused, said
    if f"{path}.**" in {key.path for key in section.keys}:  # of another library's class
        return
    listed = {key.path.removeprefix(f"{path}.") for key in section.keys} - own
    assert {name for name in listed if re.fullmatch(r"\w+", name)} == set((refused[1] or "").split(", ")) - {""}


def test_keys_below_a_component_s_arguments_are_those_that_it_takes() -> None:
    """Of the dataclasses that arguments become: flow, stages, phases, adapters, teachers …"""
    recipe = vars(load([str(REPOSITORY / "yamls/quickstart.yaml")]))
    nested: dict[str, tuple[Section, list[str]]] = {}
    for section in SECTIONS:
        for key in section.keys:
            within = key.path.removeprefix(f"{section.path}.")
            if (found := re.fullmatch(r"(\w+(?:\[\])?)\.(\w+)", within)) and found[1] != "tokenizer":  # which a run makes
                nested.setdefault(f"{section.path}:{section.title}:{found[1]}", (section, []))[1].append(found[2])
    assert {"algorithms.repa:repa:teacher", "algorithms.timestep_phases:timestep_phases:phases[]"} <= nested.keys()
    for where, (section, names) in nested.items():
        argument = where.rpartition(":")[2]
        value: Any = dict.fromkeys([*names, "nobody_has_it"], ...)
        asked = Section(
            section.title, section.path, "", section.kind, [Key(f"{section.path}.{argument.removesuffix('[]')}", "", "", "")]
        )
        said = "\n".join(first_look(with_section(recipe, asked, [value] if argument.endswith("[]") else value), 1))
        refused = re.search(r"nobody_has_it: no such argument\..* Allowed: (.*)\.", said)
        assert refused and set(refused[1].split(", ")) == set(names), (where, said)


def test_keys_of_sharding_are_those_that_the_checker_names() -> None:
    said = "\n".join(first_look({"parallelism_config": {"fsdp": {"nobody_has_it": 1}}}, 1))
    allowed = said.partition("Allowed: ")[2].partition(".")[0].split(", ")
    prefix = "parallelism_config.fsdp."
    assert {key.path.removeprefix(prefix) for key in KEYS if key.path.startswith(prefix)} == set(allowed)


def test_keys_at_the_top_are_those_that_the_checker_names() -> None:
    with pytest.raises(UserError) as raised:
        load([str(REPOSITORY / "yamls/quickstart.yaml"), "nobody_has_it=1"])
    said = next(problem for problem in problems_of(raised.value) if "nobody_has_it" in problem)
    allowed = set(said.partition("Allowed: ")[2].rstrip(".").split(", "))
    assert {key.path for key in KEYS if "." not in key.path} == allowed


def test_every_key_has_a_meaning_and_says_whether_it_may_change() -> None:
    assert not [key.path for key in KEYS if not key.meaning.strip() or not key.rule.why]


def test_units_are_those_that_docstrings_say() -> None:
    """One key of each kind; and whatever a time may be given for says so."""
    units = {key.path: key.unit for key in KEYS}
    assert {path: units[path] for path in UNITS} == UNITS
    times = {path for path, unit in units.items() if "a time" in unit}
    named = {path for path in units if re.search(r"\.(start|end|until|interval|t_max|t_warmup)$|_interval$|duration$", path)}
    others = {path for path, unit in units.items() if unit in ("batches", "seconds")} | {"algorithms.internal_guidance.interval"}
    assert named - times <= others and len(times) > 40  # the last one is of timesteps


UNITS = {
    "image_size": "pixels",
    "callbacks.images.width": "pixels",
    "algorithms.irepa.kernel_size": "tokens",
    "model.text_encoder.max_tokens": "tokens",
    "global_train_batch_size": "images",
    "dist_timeout": "seconds",
    "callbacks.speed_monitor.window_size": "batches",
    "algorithms.tread.rate": "share, 0 to 1",
    "algorithms.tread.end_block": "index of a block",
    "model.backbone.hidden_size": "channels",
    "scheduler.alpha_f": "× `lr`",
    "loggers.file.buffer_size": "bytes",
    "algorithms.repa.weight": "",
    "seed": "",
}


def test_every_option_of_every_command_is_in_the_reference() -> None:
    """Held against what `--help` prints."""
    from commands import prx

    made = pages.commands()
    for heading in re.findall(r"^### `prx ([\w ]+)`", made, re.MULTILINE):
        section = made.partition(f"### `prx {heading}`")[2].partition("\n### ")[0]
        shown = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prx(*heading.split(), "--help"))) - {"--help"}
        listed = set(re.findall(r"--[a-z][\w-]+", section))
        assert shown <= listed and (set(re.findall(r"^\| `[^`]*?(--[a-z][\w-]+)", section, re.MULTILINE)) <= shown), heading


def settings(made: Any) -> str:
    """What a component was made with."""
    return re.sub(r" at 0x\w+", "", repr(vars(made)))


@pytest.mark.parametrize("name", sorted(set(cards.cards()) - {"muon"}))
def test_the_code_on_an_algorithm_s_page_makes_what_the_recipe_s_line_makes(name: str) -> None:
    pytest.importorskip("torchao" if name == "float8" else "torch", reason="the extra float8, which CI has")
    from prx_composer.algorithms.base import Trick
    from prx_composer.callbacks.checkpointing import RandomStep
    from prx_composer.recipe.arguments import build

    card, page = cards.cards()[name], cards.page(name)
    given = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])["algorithms"][name]
    made: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], made)
    (ours,), expected = made["algorithms"], build(registry.algorithms, name, given, f"algorithms.{name}")
    assert type(ours) is type(expected) and settings(ours) == settings(expected) and isinstance(made["callbacks"][0], RandomStep)
    assert isinstance(ours, Trick) and tuple(ours.evidence) == tuple(tricks.evidence_of(name))
