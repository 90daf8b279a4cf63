"""Every key of a recipe, by the code that checks recipes: what it means, its type and default, and whether it may change."""

import dataclasses
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prx_composer import registry
from prx_composer.common.outlines import UNREAD, constructor, outline
from prx_composer.recipe.annotations import dataclass_in, hints_of, type_in_words
from prx_composer.recipe.arguments import (
    OF_DATA_SET,
    OF_SHARE,
    given_beside,
    given_by_recipe,
    is_filled,
    provided_by,
)
from prx_composer.recipe.checks import OF_KEY, OF_OURS, precisions, sharding_keys
from prx_composer.recipe.config import Recipe
from prx_composer.recipe.resume import Rule, rule_of
from prx_composer.registry import BY_KEY, BY_NAME, NESTED, SIZES, UNNAMED, Registry

from .docstrings import arguments, summary
from .units import unit_of

_WRITTEN = {"mix": "data sets", "captions": "caption columns"}  # mappings with names of the user's, of which keys are known
_REQUIRED = "*required*"
_SAID_HERE = {  # of Composer's, whose docstrings have no such thing, or are no literals
    "optimizer_monitor": {
        "log_optimizer_metrics": "log what the optimizer reports of its moments, too.",
        "batch_log_interval": "batches between two entries.",
    },
    "file": {
        "filename": "of the log, below the directory of the start; `{run_name}`, `{rank}` and the like are filled in.",
        "remote_file_name": "where it is uploaded to, if anywhere.",
        "capture_stdout": "write what is printed into it.",
        "capture_stderr": "write errors into it.",
        "buffer_size": "bytes that are kept before they are written; 1: line by line.",
        "log_traces": "write traces of algorithms into it.",
        "flush_interval": "batches between two writes to the disk.",
        "overwrite": "replace a file of that name.",
    },
}


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Args:
        path: with dots; `*` stands for a name of the user's, `[]` for an item of a list, and `**` at the end for anything.
        type, default, meaning: in words.
    """

    path: str
    type: str
    default: str
    meaning: str

    @property
    def unit(self) -> str:
        return unit_of(self.path.rpartition(".")[2], self.type, self.default, self.meaning)

    @property
    def rule(self) -> Rule:
        return rule_of(self.path.replace("[]", "").replace("*", "x"))


@dataclass(frozen=True)
class Section:
    """A component, and its keys.

    Args:
        title: the component's name in a recipe.
        path: of what has these keys.
        about: what the component is.
        kind: of the registry, "" for the keys at the top.
    """

    title: str
    path: str
    about: str
    kind: str = ""
    keys: list[Key] = field(default_factory=list)


def sections() -> Iterator[Section]:
    """Yield every component of this package, with its keys, after the keys at the top of a recipe."""
    yield _top()
    yield _sharding()
    for key, components in BY_KEY.items():
        if key != "eval_loader":  # its keys are those of train_loader
            provided, also = OF_KEY[key]
            for name in components.builtin:
                yield _component(components, name, key, provided, also)
    for key, components in NESTED.items():
        path = f"train_loader.{key}" if key == "source" else f"model.{key}"
        for name in components.builtin:
            also = given_beside(key, name)
            yield _component(components, name, path, also, also)
    for kind, components in BY_NAME.items():
        for name in components.builtin:
            yield _component(components, name, f"{kind}.{name}", OF_OURS, {}, named=False)


def every_key() -> list[Key]:
    """Return the keys of all sections; those of train_loader as of eval_loader, too."""
    found = [key for section in sections() for key in section.keys]
    copied = (
        dataclasses.replace(key, path=key.path.replace("train_", "eval_", 1))
        for key in found
        if key.path.startswith("train_loader.")
    )
    return [*found, *copied]


def _top() -> Section:
    meanings, hints = arguments(Recipe), typing.get_type_hints(Recipe)
    found = Section("The keys at the top", "", "")
    for f in dataclasses.fields(Recipe):
        default: Any = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        said = _REQUIRED if default is dataclasses.MISSING else _yaml(default)
        found.keys.append(Key(f.name, type_in_words(hints[f.name]), said, meanings[f.name] + _allowed(f.name)))
    below = ("variables.**", "a mapping", "", "names and values of yours."), (
        "resume.allow", "a list", "[]", "keys that may change in this one start; a key allows all below it."
    )  # fmt: skip
    found.keys.extend(Key(*one) for one in below)
    return found


def _allowed(key: str) -> str:
    """Return which names a key takes."""
    names = list(BY_KEY[key].builtin) if key in BY_KEY else precisions() if key == "precision" else []
    return f" One of {', '.join(f'`{name}`' for name in names)}." if len(names) > 1 else ""


def _sharding() -> Section:
    path, config = "parallelism_config.fsdp", outline("prx_composer.training.trainer", "HybridConfig")
    parameters, hints, meanings = (function(config) for function in (given_by_recipe, hints_of, arguments))
    found = Section("Sharding", path, summary(config), "parallelism")
    found.keys.append(Key(path, "a mapping", "", "how weights are sharded; `{}` for the defaults below."))
    for name in sharding_keys():
        default = "FULL" if name == "mixed_precision" else parameters[name].default  # this package's, not Composer's
        found.keys.append(Key(f"{path}.{name}", type_in_words(hints.get(name)), _yaml(default), meanings[name]))
    return found


def _component(
    components: Registry, name: str, path: str, provided: Collection[str], also: Mapping[str, str], named: bool = True
) -> Section:
    target = components.described(name, path, imports=False)
    found = Section(name, path, summary(target), components.kind)
    if named:
        needed = "" if UNNAMED.get(path.rpartition(".")[2]) == name else _REQUIRED
        found.keys.append(Key(f"{path}.name", "a string", needed, f"`{name}`"))
    filled = components.kind not in ("sources", "backbones", "text_encoders", "autoencoders", "models")
    meanings = arguments(target) | _SAID_HERE.get(name, {})
    found.keys.extend(_keys(constructor(target), path, meanings, provided, filled))
    for extra, meaning in also.items():
        kind = "a mapping" if extra in NESTED else "a string or a mapping" if extra == "tokenizer" else "a string or null"
        found.keys.append(Key(f"{path}.{extra}", kind, "none", meaning))
        if extra == "tokenizer":
            found.keys.append(Key(f"{path}.tokenizer.train", "true or false", "", "train one on the captions of `train_loader`."))
            found.keys.append(Key(f"{path}.tokenizer.by", "`word` or `caption`", "word", "what one of its tokens is."))
            found.keys.append(Key(f"{path}.tokenizer.vocab_size", "an integer", "4096", "words that it has at most."))
    if components is registry.text_encoders and name == "several":
        found.keys.append(Key(f"{path}.encoders.**", "", "", "by its name, the keys of a text encoder."))
    if components is registry.backbones and name == "diffusers":
        found.keys.append(Key(f"{path}.class", "a string", _REQUIRED, "name of a class of diffusers that has a signature."))
        found.keys.append(Key(f"{path}.**", "", "", "arguments of that class."))
    if components is registry.backbones and name == "prx":
        sizes = f"name of a size, {', '.join(f'`{size}`' for size in SIZES)}, instead of hidden_size, depth and num_heads."
        found.keys.insert(1, Key(f"{path}.size", "a string", "none", sizes))
    return found


def _keys(
    function: Callable[..., Any], path: str, meanings: dict[str, str], provided: Collection[str] = (), filled: bool = False
) -> Iterator[Key]:
    hints = hints_of(function)
    for name, parameter in given_by_recipe(function, provided).items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint, key = hints.get(name, Any), f"{path}.{name}"
        fills = filled and name in provided_by({}) and is_filled(parameter)
        default = "the recipe's" if fills else _REQUIRED if parameter.default is parameter.empty else _yaml(parameter.default)
        kind = "a component" if name in NESTED else _type(hint)
        yield Key(key, kind, default, meanings.get(name, ""))
        for value, mark in (({}, ""), ([], "[]")):
            if (of := dataclass_in(hint, value)) is not None:
                yield from _keys(of, key + mark, arguments(of))
        if name in _WRITTEN:
            yield from _of_named(name, key)
        elif name in ("config", "init_kwargs"):
            yield Key(f"{key}.**", "", "", "whatever the library takes there.")


def _of_named(name: str, key: str) -> Iterator[Key]:
    """Yield the keys of a mapping whose names are the user's."""
    if name == "captions":
        wording = outline("prx_composer.models.prompts", "Wording")
        yield Key(f"{key}.*", "a number or a mapping", "", "name of a caption column → its weight, or the keys below.")
        yield from _keys(constructor(wording), f"{key}.*", arguments(wording))
        return
    yield Key(f"{key}.*", "a mapping", "", "name of a data set → what it has of its own, of these:")
    for part in OF_DATA_SET:
        yield Key(f"{key}.*.{part}", "", "as above", f"`train_loader.{part}` of this data set.")
    yield Key(f"{key}.*.source.**", "", "", "arguments of that source.")
    for part, meaning in OF_SHARE.items():
        kind = "a number or a list" if part == "weight" else "a string"
        yield Key(f"{key}.*.{part}", kind, "none", meaning)


def _type(hint: Any) -> str:
    """Return a type in words; of a type that isn't checked, what it is made of."""
    found = " or ".join(dict.fromkeys(type_in_words(hint).split(" or ")))
    if found or hint is Any:
        return found
    return " or ".join(filter(None, map(type_in_words, typing.get_args(hint)))) or "a mapping or a list"


def _yaml(value: Any) -> str:
    """Return a default as a recipe would give it."""
    if value is None:
        return "none"
    if value is UNREAD:
        return "the library's"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value)
