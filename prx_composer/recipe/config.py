"""A recipe: YAML files and `key=value`s merged and checked, every error naming its YAML path.

Nothing here builds a model or touches data. `check` binds every component's arguments against its signature, so that what
a constructor would reject is said before anything is built; `build` then calls the constructors.
"""

import dataclasses
import importlib.util
import inspect
import io
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prx_composer.common.errors import Problems, UserError, nearest, raise_all
from prx_composer.common.files import read_text
from prx_composer.common.outlines import constructor
from prx_composer.recipe.arguments import check_entries, check_type, hints_of, is_filled, split
from prx_composer.recipe.checks import argument_problems, first_look, missing_code
from prx_composer.registry import NESTED, Registry

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
    resume: Spec = field(default_factory=dict)  # {allow: [keys that may differ from the run that goes on]}; see resume.py


def load(arguments: list[str], num_ranks: int = 1) -> Recipe:
    """`[A.yaml, B.yaml, …, key=value, …]`, merged left to right.

    Args:
        num_ranks: over which batches must divide; asked only if the recipe is wrong anyway.

    Raises:
        UserError: a file that isn't there or isn't YAML, an unknown or missing key, a value of the wrong type; together with
            whatever else is wrong with the keys that are right.
    """
    merged = _merged(arguments)
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    hints = typing.get_type_hints(Recipe)
    problems = Problems()
    values = {name: _default(f) for name, f in fields.items() if name not in merged and _has_default(f)}
    keys = [str(key) for key in merged]
    problems.found.extend(f"{key}: no such key in a recipe.{nearest(key, list(fields))}" for key in keys if key not in fields)
    for key in (key for key in keys if key in fields):
        with problems.noted():
            value = _resolved(merged, key)
            check_type(value, hints[key], key, _EXAMPLES.get(key, fields[key].default))
            values[key] = value
            if key in ("algorithms", "callbacks", "loggers"):
                check_entries(value, key)
    missing = [name for name, f in fields.items() if name not in merged and not _has_default(f)]
    if missing:
        problems.found.append(
            f"The recipe lacks {', '.join(missing)}. A file that names a few keys, such as those in yamls/ablations/, is "
            "given after a whole recipe, over which it is merged."
        )
    if problems.found:
        if len(missing) <= 1:  # of a few keys alone it cannot be said what they will be merged over
            problems.found.extend(first_look(values, num_ranks))
        problems.raise_any()
    return Recipe(**values)


# Of keys whose defaults aren't.
_EXAMPLES = {"max_duration": "1000ba", "time_budget": "24h"}


def _merged(arguments: list[str]) -> DictConfig:
    merged = OmegaConf.create({"run_folder": Recipe.run_folder})  # a default that refers to another key
    assert isinstance(merged, DictConfig)
    files = [argument for argument in arguments if _is_file(argument)]
    if not files:
        raise UserError("Name at least one recipe, such as: composer train.py yamls/quickstart.yaml [key=value …]")
    for argument in arguments:
        merged = _merge(merged, _read(argument)) if argument in files else _set(merged, argument)
    return merged


def _is_file(argument: str) -> bool:
    """Whether an argument is a recipe, and no `key=value`; a file's name may have a `=` in it.

    Raises:
        UserError: it is both.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        return True
    may_set = key.partition(".")[0].partition("[")[0] in {f.name for f in dataclasses.fields(Recipe)}
    if may_set and Path(argument).is_file():
        raise UserError(
            f"{argument} is a file and could also set {key}. Write ./{argument} for the file, or \"{key}='{value}'\" for the key."
        )
    return Path(argument).is_file() or ("/" in key and not may_set)


def _resolved(merged: DictConfig, key: str) -> Any:
    """A key's value with what it refers to by `${…}`."""
    try:
        value: Any = merged[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or key}: {str(error).splitlines()[0]}") from error


def _has_default(f: "dataclasses.Field[Any]") -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _default(f: "dataclasses.Field[Any]") -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


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
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)  # "${…}" stays as it is
        value = parsed["value"]
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
        config = OmegaConf.load(io.StringIO(read_text(argument)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{argument} is not valid YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{argument} cannot be read: {error.strerror or error}.") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{argument} must be a mapping of keys at its top.")
    return config


def import_code(paths: Sequence[str], option: str | None = None) -> None:
    """Imports a user's Python files, so that what they register is found.

    Only files that the user names belong here: of their own recipe, or by `--code`. Never what a run folder or data name.

    Args:
        option: of the command line, that named them; by default they are the recipe's `code_paths`.

    Raises:
        UserError: a file that isn't there.
    """
    for index, name in enumerate(paths):
        path = Path(name).expanduser()
        if missing := missing_code([name], option or f"code_paths[{index}]"):
            raise UserError(missing[0])
        module_name = f"prx_composer_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)


# ------------------------------------------------------------------------------------------------------ components


def check(recipe: Recipe) -> None:
    """Checks names, arguments, times and sizes that need no data; the arguments that `train` supplies count as given.

    Raises:
        UserError: naming every path that is wrong.
    """
    raise_all(argument_problems(vars(recipe)))


def build(
    components: Registry, name: str, arguments: Spec, path: str, provided: Mapping[str, Any] | None = None, **given: Any
) -> Any:
    """Call a component's constructor with its arguments from the recipe and with what the program has for it.

    Mappings become what the constructor's annotation asks for: dataclasses, or nested components by name.

    Args:
        provided: what there is for any component, such as `provided_by` returns; see `is_filled`.
        given: what components of this kind are called with, if the constructor has such a parameter.

    Raises:
        UserError: what the constructor rejects with a ValueError, and files or weights that cannot be had, at `path`.
    """
    target = components.get(name, path)
    function = constructor(target)
    hints = hints_of(function)
    accepted = inspect.signature(function).parameters
    filled = {key: value for key, value in (provided or {}).items() if key in accepted and is_filled(accepted[key])}
    filled |= {key: value for key, value in given.items() if key in accepted}
    filled |= {key: _construct(value, key, hints.get(key), f"{path}.{key}") for key, value in arguments.items()}
    try:
        return target(**filled)
    except UserError:
        raise
    except Exception as error:
        # A bare Exception is what llm-foundry raises for a value that it doesn't take.
        if isinstance(error, ValueError | OSError | ImportError) or type(error) is Exception:
            raise UserError(f"{path}: {error}") from error
        raise


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
