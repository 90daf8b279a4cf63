"""Files of a recipe and `key=value`s become one: merged from left to right, a file over its `base`."""

import functools
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prx_composer.common.errors import UserError
from prx_composer.common.files import read_text
from prx_composer.registry import UNNAMED

log = logging.getLogger(__name__)

RUN_FOLDER = "runs/${run_name}"
_KINDS = ("name", "model_type")  # what says which arguments the others are: of a component, of a configuration of transformers


def merge_arguments(arguments: list[str], keys: Sequence[str]) -> DictConfig:
    """Return recipe files and `key=value`s merged from left to right, with `${…}` as it stands.

    A file may be a few keys over others, which its `base` names and which are read first. That is so for the first file alone:
    under another lies what was given before it.

    Args:
        keys: of a recipe, by which a `key=value` is told from a file with a `=` in its name.

    Raises:
        UserError: no file; one that isn't there or isn't YAML; a base that isn't there, or leads back; a key that cannot be set.
    """
    merged = OmegaConf.create({"run_folder": RUN_FOLDER})  # a default that refers to another key
    assert isinstance(merged, DictConfig)
    files = [argument for argument in arguments if _is_file(argument, keys)]
    if not files:
        raise UserError("Name at least one recipe, such as: prx train yamls/quickstart.yaml [key=value …]")
    for argument in arguments:
        for layer in _layers(argument, alone=argument == files[0]) if argument in files else ():
            merged = _merge(merged, layer)
        if argument not in files:
            merged = _set(merged, argument)
    return merged


def _layers(file: str, alone: bool, above: tuple[Path, ...] = ()) -> list[DictConfig]:
    """Return a recipe file and, below it, those that its `base` names: one path or several, from where the file lies.

    Args:
        alone: whether nothing lies below it yet; else its base is left out.
        above: files that lead to this one.
    """
    path, own = Path(file).resolve(), _read(file)
    if path in above:
        raise UserError(f"{file}: base leads back to this file.")
    named: Any = own.pop("base", None)
    bases = list(named) if isinstance(named, ListConfig) else [] if named is None else [named]
    if not all(isinstance(base, str) for base in bases):
        raise UserError(f"{file}: base must be the path of a recipe, or a list of them, not {named!r}.")
    if bases and not alone and not above:
        _warn(f"{file}: its base {', '.join(bases)} is not read: what was given before it stands in its place.")
    layers = list[DictConfig]()
    for base in bases if alone else ():
        lower = Path(file).parent / base
        if not lower.is_file():
            raise UserError(f"{file}: base: there is no recipe {lower.resolve()}.")
        layers += _layers(str(lower), not layers, (*above, path))
    if isinstance(code := own._get_node("code_paths"), ListConfig):
        names: Any = OmegaConf.to_container(code, resolve=False)
        own["code_paths"] = [_placed(name, file) for name in names]
    return [*layers, own]


def _placed(name: Any, file: str) -> Any:
    """Return where the Python file lies that a recipe's `code_paths` names: beside the recipe.

    One that is only in the working directory is taken there: recipes of run folders, and older ones, name it so.
    """
    if not isinstance(name, str) or "${" in name or Path(name).expanduser().is_absolute():
        return name
    beside, here = Path(file).parent / name, Path(name)
    if not here.is_file() or (beside.is_file() and beside.samefile(here)):
        return str(beside)
    if beside.is_file():
        _warn(f"{file}: code_paths: {beside} is imported, and not the file {name} of the working directory.")
        return str(beside)
    _warn(f"{file}: code_paths: {name} of the working directory is imported: there is no {beside}.")
    return name


@functools.cache  # a recipe is read more than once
def _warn(message: str) -> None:
    log.warning("%s", message)


def _is_file(argument: str, keys: Sequence[str]) -> bool:
    """Return whether an argument is a recipe, and no `key=value`; a file's name may have a `=` in it.

    Raises:
        UserError: it is both.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        return True
    may_set = key.partition(".")[0].partition("[")[0] in keys
    is_file = os.path.isfile(argument)
    if may_set and is_file:
        raise UserError(
            f"{argument} is a file and could also set {key}. Write ./{argument} for the file, or \"{key}='{value}'\" for the key."
        )
    return is_file or ("/" in key and not may_set)


def _merge(below: Any, above: DictConfig) -> Any:
    """Merge two recipes; a component of another name, or a network of another type, replaces the one below as a whole."""
    below = below.copy()
    _drop_replaced(below, above)
    return OmegaConf.merge(below, above)


def _drop_replaced(below: Any, above: DictConfig) -> None:
    for key in above:
        old, new = (config._get_node(key) for config in (below, above))
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            unnamed = {"name": UNNAMED.get(str(key))}
            if any(new[kind] != (old.get(kind) or unnamed.get(kind) or new[kind]) for kind in _KINDS if kind in new):
                del below[key]
            else:
                _drop_replaced(old, new)


def _set(merged: Any, argument: str) -> Any:
    """Apply `a.b=value` or `a.list[0].b=value`; the value is YAML. Components are replaced as by `_merge`."""
    key, _, text = argument.partition("=")
    if key == "base":
        raise UserError(f"{argument}: base is a line of a recipe's file. Here give the files themselves, the lower one first.")
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
