"""A recipe: YAML files and `key=value`s merged and checked, every error naming its YAML path.

Nothing here builds a model or touches data. `check` binds every component's arguments against its signature, so that what
a constructor would reject is said before anything is built; `build` then calls the constructors.
"""

import dataclasses
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from composer.core import Time, TimeUnit
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prx_composer import registry
from prx_composer.data.data_sets import data_sets
from prx_composer.errors import Problems, UserError, at_path
from prx_composer.registry import NESTED, Registry, nearest
from prx_composer.schedule import Moment, Point, names_budget, parse_duration
from prx_composer.signatures import constructor

__all__ = ["RESUMABLE_CHANGES", "Recipe", "build", "build_all", "check", "check_arguments", "import_code", "load", "split"]

Spec = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The keys of a recipe, llm-foundry's names where it has one."""

    run_name: str
    model: Spec
    optimizer: Spec
    train_loader: Spec
    global_train_batch_size: int
    image_size: int
    max_duration: str
    time_budget: str | None = None
    scheduler: Spec = field(default_factory=lambda: {"name": "constant"})
    device_train_microbatch_size: int | None = None
    seed: int = 17
    algorithms: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)
    eval_loader: Spec | None = None
    eval_interval: str = "0.25dur"
    eval_subset_num_batches: int = -1
    global_eval_batch_size: int | None = None
    precision: str = "fp32"
    parallelism_config: Spec | None = None
    run_folder: str = "runs/${run_name}"
    save_interval: str = "0.25dur"
    save_num_checkpoints_to_keep: int = 2
    autoresume: bool = False
    dist_timeout: float = 600.0
    progress_bar: bool = True
    preflight: bool = True
    code_paths: list[str] = field(default_factory=list)
    variables: Spec = field(default_factory=dict)


# What may differ between a run and its continuation without making it another run. Not the microbatch: it decides the draws.
RESUMABLE_CHANGES = frozenset(
    {"max_duration", "autoresume", "callbacks", "loggers", "save_interval", "save_num_checkpoints_to_keep", "dist_timeout"}
    | {"eval_interval", "eval_subset_num_batches", "progress_bar", "preflight", "code_paths", "variables", "time_budget"}
)


def load(arguments: list[str]) -> Recipe:
    """`[A.yaml, B.yaml, …, key=value, …]`, merged left to right.

    Raises:
        UserError: a file that isn't there or isn't YAML, an unknown or missing key, a value of the wrong type.
    """
    merged = OmegaConf.create({"run_folder": Recipe.run_folder})  # a default that refers to another key
    assert isinstance(merged, DictConfig)
    if not any("=" not in argument for argument in arguments):
        raise UserError("Name at least one recipe, such as: composer train.py yamls/quickstart.yaml [key=value …]")
    for argument in arguments:
        merged = _set(merged, argument) if "=" in argument else _merge(merged, _read(argument))
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    problems = Problems()
    for key in merged:
        if key not in fields:
            problems.found.append(f"{key}: no such key in a recipe.{nearest(str(key), list(fields))}")
    missing = [name for name, f in fields.items() if name not in merged and not _has_default(f)]
    if missing:
        problems.found.append(
            f"The recipe lacks {', '.join(missing)}. A file that names a few keys, such as those in yamls/ablations/, is "
            "given after a whole recipe, over which it is merged."
        )
        problems.raise_any()
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        problems.found.append(f"{error.full_key or 'recipe'}: {str(error).splitlines()[0]}")
        values = {}
    assert isinstance(values, dict)
    hints = typing.get_type_hints(Recipe)
    for key, value in values.items():
        with problems.noted():
            if key in fields:
                _check_type(value, hints[str(key)], str(key))
    problems.raise_any()
    return Recipe(**{str(key): value for key, value in values.items()})


def _has_default(f: "dataclasses.Field[Any]") -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _merge(below: Any, above: DictConfig) -> Any:
    """Merges two recipes; a component of another name replaces the one below instead of inheriting its arguments."""
    below = below.copy()
    _drop_replaced(below, above)
    return OmegaConf.merge(below, above)


def _drop_replaced(below: Any, above: DictConfig) -> None:
    for key in above:
        old, new = (config._get_node(key) for config in (below, above))
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            if "name" in old and "name" in new and old.get("name") != new.get("name"):
                del below[key]
            else:
                _drop_replaced(old, new)


def _set(merged: Any, argument: str) -> Any:
    """Applies `a.b=value` or `a.list[0].b=value`; the value is YAML. Components are replaced as by `_merge`."""
    key, _, text = argument.partition("=")
    parent, _, last = key.rpartition(".")
    try:
        value = OmegaConf.from_dotlist([f"value={text}"]).value
        below = OmegaConf.select(merged, parent) if parent else merged
        if isinstance(below, DictConfig) and last in below:
            _drop_replaced(below, OmegaConf.create({last: value}))
        OmegaConf.update(merged, key, value, merge=True, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{argument}: this cannot be set; give key=value with a key of the recipe. ({error})") from error
    return merged


def _read(argument: str) -> DictConfig:
    if not Path(argument).is_file():
        raise UserError(f"There is no recipe {argument}; give a YAML file, or key=value to change one key.")
    try:
        config = OmegaConf.load(argument)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{argument} is not valid YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{argument} must be a mapping of keys at its top.")
    return config


def import_code(paths: list[str]) -> None:
    """Imports a user's Python files, so that what they register is found.

    Raises:
        UserError: a file that isn't there.
    """
    for index, name in enumerate(paths):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"code_paths[{index}]: there is no Python file {name}.")
        module_name = f"prx_composer_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)


# ------------------------------------------------------------------------------------------------------ components


# What the program passes to a component, beside the recipe's arguments.
_LOADER_PROVIDED = frozenset({"tokenizer", "max_tokens", "image_size", "global_batch_size", "multiple", "seed"})
_PROVIDED = {
    name: frozenset({"folder", "source"})
    for name in ("metrics_file", "images", "shapes_score", "loss_spikes", "watchdog", "skip_nonfinite")
}
_DEFAULTED = frozenset({"image_size"})  # taken from the recipe unless it is given
_NONE: frozenset[str] = frozenset()


def check(recipe: Recipe) -> None:
    """Checks names and arguments of every component; the arguments that `train` supplies count as given.

    Raises:
        UserError: naming every path that is wrong.
    """
    problems = Problems()
    for components, spec, path, provided in (
        (registry.models, recipe.model, "model", frozenset({"seed"})),
        (registry.optimizers, recipe.optimizer, "optimizer", frozenset({"model", "params"})),
        (registry.schedulers, recipe.scheduler, "scheduler", _NONE),
    ):
        with problems.noted():
            _check_spec(components, spec, path, provided, also=frozenset({"init_from"}) if path == "model" else _NONE)
    if not isinstance(recipe.model.get("init_from"), str | None):
        problems.found.append(f"model.init_from: expected a string or null, not {recipe.model['init_from']!r}.")
    with problems.noted(), at_path("save_interval"):
        Point.parse_interval(recipe.save_interval)
    times = {key: getattr(recipe, key) for key in ("max_duration", "eval_interval")}
    times |= {f"scheduler.{key}": value for key, value in recipe.scheduler.items() if key.startswith("t_")}
    for path, time in times.items():
        with problems.noted():
            _check_moment(time, path) if path.startswith("scheduler.") else _check_time(time, path)
    with problems.noted():
        _check_time_budget(recipe)
    with problems.noted():
        _check_kept(recipe.save_num_checkpoints_to_keep)
    for key in ("train_loader", "eval_loader"):
        if spec := getattr(recipe, key):
            with problems.noted():
                _check_spec(registry.loaders, spec, key, _LOADER_PROVIDED, also=frozenset({"source"}))
                if spec["name"] == "image_caption":
                    with at_path(key):
                        found = data_sets(spec)
                    for where, part in found.items():
                        if where and part.get("source"):
                            _check_spec(registry.sources, part["source"], f"{key}.{where}.source")
    for kind in ("algorithms", "callbacks", "loggers"):
        for name, arguments in entries(getattr(recipe, kind), kind):
            path = f"{kind}.{name}"
            with problems.noted():
                target = getattr(registry, kind).get(name, path)
                check_arguments(target, arguments, path, _PROVIDED.get(name, _NONE), defaulted=_DEFAULTED)
    problems.raise_any()


def _check_time(time: Any, path: str) -> None:
    try:
        parsed = Time.from_timestring(str(time))
        unit, value = parsed.unit, parsed.value
    except (ValueError, TypeError) as error:  # TypeError: 1.5ba
        raise UserError(f"{path}: {time!r} is no time such as 1000ba, 3ep, 64000sp or 0.5dur.") from error
    if path == "max_duration" and unit not in (TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SAMPLE):
        raise UserError(f"{path}: {time} must be a number of batches, epochs or samples, such as 1000ba.")
    if unit == TimeUnit.TOKEN:
        raise UserError(f"{path}: {time}: images have no tokens to count; use ba, ep, sp or dur.")
    if value <= 0:
        raise UserError(f"{path}: {time} must be positive, such as {'1000ba or 3ep' if path == 'max_duration' else '0.25dur'}.")


def _check_kept(number: int) -> None:
    """Raises UserError for a number of checkpoints with which none would be left."""
    if number < 1 and number != -1:
        raise UserError(
            f"save_num_checkpoints_to_keep: {number} would leave none to go on from; give at least 1, or -1 to keep all."
        )


def _check_moment(time: Any, path: str) -> None:
    try:
        Moment(time)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _check_time_budget(recipe: Recipe) -> None:
    """The budget is a time, and without one nothing is a part of it."""
    if recipe.time_budget is not None:
        try:
            if parse_duration(recipe.time_budget) <= 0:
                raise ValueError("a budget must be more than nothing.")
        except ValueError as error:
            raise UserError(f"time_budget: {error}") from error
        return
    for key in ("scheduler", "algorithms", "callbacks"):
        for path, text in _strings(getattr(recipe, key), key):
            if names_budget(text):
                raise UserError(
                    f"{path}: {text} is a part of the time budget, and the recipe has none; set time_budget=24h, say."
                )


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every string in a value of a recipe, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}[{index}]")


def entries(components: dict[str, Any], kind: str) -> Iterator[tuple[str, Spec]]:
    """Name and arguments of the algorithms, callbacks or loggers of a recipe, in order, but those set to false."""
    for name, arguments in components.items():
        if arguments is False:
            continue
        if not isinstance(arguments, dict | None) and arguments is not True:
            raise UserError(f"{kind}.{name} must be a mapping of arguments, or false to leave it out, not {arguments!r}.")
        yield name, arguments if isinstance(arguments, dict) else {}


def split(spec: Any, path: str) -> tuple[str, Spec]:
    """`{name: …, **arguments}` → name, arguments."""
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise UserError(f"{path} must be a mapping with a `name`, not {spec!r}.")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def _check_spec(
    components: Registry, spec: Any, path: str, provided: frozenset[str] = _NONE, also: frozenset[str] = _NONE
) -> None:
    name, arguments = split(spec, path)
    check_arguments(components.get(name, path), arguments, path, provided, also)


def check_arguments(
    target: Any,
    arguments: Spec,
    path: str,
    provided: frozenset[str] = _NONE,
    also: frozenset[str] = _NONE,
    defaulted: frozenset[str] = _NONE,
) -> None:
    """Binds arguments against a signature.

    Args:
        provided: what the program passes and a recipe may not.
        also: what a recipe may give though the signature doesn't have it.
        defaulted: what the program passes unless the recipe does.
    """
    function = constructor(target)
    parameters = {
        name: parameter for name, parameter in inspect.signature(function).parameters.items() if name not in ("self", *provided)
    }
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    allowed = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)] + sorted(also)
    hints = _hints(function)
    problems = Problems()
    for key, value in arguments.items():
        with problems.noted():
            if key not in allowed and not open_ended:
                instead = nearest(str(key), allowed) if allowed else " It takes none."
                raise UserError(f"{path}.{key}: no such argument.{instead}")
            if key in NESTED and isinstance(value, dict):
                tokenizer = frozenset({"tokenizer"}) if key == "text_encoder" else _NONE
                _check_spec(NESTED[key], value, f"{path}.{key}", provided=tokenizer, also=tokenizer)
            elif key in hints:
                _check_type(value, hints[key], f"{path}.{key}")
    for name, parameter in parameters.items():
        if name not in defaulted and name not in arguments and parameter.default is parameter.empty and name in allowed:
            problems.found.append(f"{path} lacks the argument {name!r}.")
    problems.raise_any()


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations of a foreign class that only resolve where it was written
        return {}


def _check_type(value: Any, hint: Any, path: str) -> None:
    """Compares a YAML value with an annotation, as far as the annotation is one that YAML can express."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    if value is None and type(None) in options:
        return
    for option in options:
        item = next(iter(typing.get_args(option)), None)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            check_arguments(option, value, path)
            return
        if dataclasses.is_dataclass(item) and isinstance(value, list):
            for index, element in enumerate(value):
                _check_type(element, item, f"{path}[{index}]")
            return
    expected = [_describe(option) for option in options]
    if all(expected) and not any(_matches(value, option) for option in options):
        raise UserError(f"{path}: expected {' or '.join(expected)}, not {value!r}.")


_PLAIN = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
_CONTAINERS = {dict: "a mapping", list: "a list", tuple: "a list", Sequence: "a list"}


def _describe(hint: Any) -> str:
    """What a YAML value of that type is called; empty for types that YAML doesn't have, which are then not checked."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return _PLAIN.get(hint) or _CONTAINERS.get(typing.get_origin(hint) or hint, "")


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple)
    return isinstance(value, origin)


def build(components: Registry, name: str, arguments: Spec, path: str, **provided: Any) -> Any:
    """Calls a component's constructor with its arguments from the recipe and those of `provided` that it takes.

    Mappings become what the constructor's annotation asks for: dataclasses, or nested components by name.

    Raises:
        UserError: what the constructor rejects with a ValueError, and files or weights that cannot be had, at `path`.
    """
    target = components.get(name, path)
    function = constructor(target)
    hints = _hints(function)
    given = {key: _construct(value, key, hints.get(key), f"{path}.{key}") for key, value in arguments.items()}
    accepted = inspect.signature(function).parameters
    given |= {key: value for key, value in provided.items() if key in accepted and key not in given}
    try:
        return target(**given)
    except UserError:
        raise
    except Exception as error:
        # A bare Exception is what llm-foundry raises for a value that it doesn't take.
        if isinstance(error, ValueError | OSError | ImportError) or type(error) is Exception:
            raise UserError(f"{path}: {error}") from error
        raise


def build_all(components: Registry, kind: str, recipe_entries: Spec, **provided: Any) -> list[Any]:
    """The algorithms, callbacks or loggers of a recipe, in order."""
    return [build(components, name, arguments, f"{kind}.{name}", **provided) for name, arguments in entries(recipe_entries, kind)]


def _construct(value: Any, key: str, hint: Any, path: str) -> Any:
    if key in NESTED and isinstance(value, dict):
        return build(NESTED[key], *split(value, path), path)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _dataclass(option, value, path)
        item = next(iter(typing.get_args(option)), None)
        if dataclasses.is_dataclass(item) and isinstance(value, list):
            return [_dataclass(item, element, f"{path}[{index}]") for index, element in enumerate(value)]
    return value


def _dataclass(cls: Any, value: Spec, path: str) -> Any:
    try:
        return cls(**value)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
