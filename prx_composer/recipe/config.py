"""A recipe: its keys, checked, its defaults written out.

A recipe that a user hands to train.py is the user's program, and `registry.import_code` runs what its `code_paths` name. The
recipe inside of a run folder is data, maybe a stranger's: opening it imports nothing (`without_code`).
"""

import dataclasses
import inspect
import json
import logging
import shlex
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prx_composer import registry
from prx_composer.common.errors import Problems, UserError, nearest, raise_all
from prx_composer.recipe.annotations import dataclass_in, hints_of
from prx_composer.recipe.arguments import Spec, check_type, entries
from prx_composer.recipe.checks import argument_problems, first_look
from prx_composer.recipe.merging import RUN_FOLDER, merge_arguments
from prx_composer.registry import BY_KEY, BY_NAME, NESTED, UNNAMED, Registry, with_size
from prx_composer.schedule.moments import Point, parse_duration


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The keys of a recipe, llm-foundry's names where it has one; and its times as what they are, once they have been checked.

    Args:
        run_name: the run's name, of which its folder is called, and with which trackers show it.
        model: what is trained: a model by name, with its parts.
        optimizer: how weights follow gradients, by name.
        train_loader: the data that are trained on, by the loader's name.
        global_train_batch_size: images per step, over all GPUs.
        image_size: side in pixels of the square whose area training images have; buckets of other aspect ratios have nearly that.
        max_duration: length of the run: `1000ba` batches, `3ep` passes through the data, or `500000sp` samples.
        time_budget: time of training, over all restarts, within which the run ends with everything written: `24h`, `1h30m`.
        scheduler: the learning rate over time, by name.
        device_train_microbatch_size: images per forward pass of one GPU, which memory decides; by default its whole share of the
            batch.
        seed: of every random draw: order, noise, timesteps, initial weights. 0 to 2³² − 1.
        algorithms: tricks, by name. `false` instead of arguments leaves one out that a file below it set.
        callbacks: what watches the run, by name; `false` as above.
        loggers: where numbers are written beside `metrics.jsonl`, by name; `false` as above.
        eval_loader: data kept out of training, on which the validation loss is measured; without it there is none.
        eval_interval: a time between two evaluations, in batches, epochs, samples or parts of the run; one comes at the end.
        eval_subset_num_batches: measure as many samples as so many batches hold, evenly spaced; −1: all of them.
        global_eval_batch_size: images per step of an evaluation, over all GPUs; by default as in training.
        precision: of the computing; weights and optimizer state are fp32 in any case. `amp_bf16` for GPUs, `fp32` for CPUs.
        parallelism_config: left out, every GPU has all weights (DDP); `{fsdp: {}}` shards them over all GPUs (FSDP2),
            `{fsdp: {shard_degree: 8}}` within groups of eight.
        run_folder: where everything of the run is written.
        save_interval: a time between two checkpoints; also of the clock, such as `30m`.
        save_num_checkpoints_to_keep: the newest that stay, at least 1; −1: all.
        save_folder: an address such as `s3://bucket/run`, to which the newest whole checkpoint is copied, and what else a fresh
            machine needs to go on.
        autoresume: go on from the run's newest whole checkpoint, if it has one. Without it a run that exists is an error.
        dist_timeout: seconds after which ranks that wait for one another give up.
        progress_bar: show one on the terminal.
        preflight: check weights, data, disk, loggers and a step of every stage before training, as `prx check` does.
        code_paths: Python files of yours that are imported first, for what they register. A recipe names them from where it lies
            itself, as its `base`; a command line, from the working directory.
        variables: values of your own, which other keys use as `${variables.name}`.
        resume: `allow: [optimizer.lr, …]` names keys that may differ from those of the run that goes on.
    """

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
    run_folder: str = RUN_FOLDER
    save_interval: str = "0.25dur"
    save_num_checkpoints_to_keep: int = 2
    save_folder: str | None = None
    autoresume: bool = False
    dist_timeout: float = 600.0
    progress_bar: bool = True
    preflight: bool = True
    code_paths: list[str] = field(default_factory=list)
    variables: Spec = field(default_factory=dict)
    resume: Spec = field(default_factory=dict)

    @property
    def eval_batch_size(self) -> int:
        """Images of one step of an evaluation, over all ranks."""
        return self.global_eval_batch_size or self.global_train_batch_size

    @property
    def length(self) -> Point:
        return Point.parse(self.max_duration)

    @property
    def budget(self) -> float | None:
        """Seconds of training that the run may take."""
        return None if self.time_budget is None else parse_duration(self.time_budget)

    @property
    def save_every(self) -> Point:
        return Point.parse_interval(self.save_interval)

    @property
    def evaluate_every(self) -> Point:
        return Point.parse(self.eval_interval)


def load(arguments: list[str], num_ranks: int = 1) -> Recipe:
    """Read `[A.yaml, B.yaml, …, key=value, …]`, merged from left to right.

    A.yaml may be a few keys over another recipe, `base: other.yaml`, which is read first. B.yaml's base is A.yaml.

    Args:
        num_ranks: over which batches must divide; asked only if the recipe is wrong anyway.

    Raises:
        UserError: a file that isn't there or isn't YAML, an unknown or missing key, a value of the wrong type; together with
            whatever else is wrong with the keys that are right.
    """
    merged, defaults = merge_arguments(arguments, [f.name for f in dataclasses.fields(Recipe)]), _defaults()
    hints = typing.get_type_hints(Recipe)
    problems = Problems()
    values = {key: default for key, default in defaults.items() if key not in merged}
    keys = [str(key) for key in merged]
    problems.found += [f"{key}: no such key in a recipe.{nearest(key, list(hints))}" for key in keys if key not in hints]
    for key in (key for key in keys if key in hints):
        with problems.noted():
            value = _resolved(merged, key)
            check_type(value, hints[key], key, _EXAMPLES.get(key, defaults.get(key)))
            values[key] = with_size(value) if key == "model" else value
            for name in value if key in BY_NAME else ():
                with problems.noted():
                    list(entries({name: value[name]}, key))
    missing = [key for key in hints if key not in merged and key not in defaults]
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


def _resolved(merged: DictConfig, key: str) -> Any:
    """Return a key's value with what it refers to by `${…}`."""
    try:
        value: Any = merged[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or key}: {str(error).splitlines()[0]}") from error


def _defaults() -> dict[str, Any]:
    """Return the defaults of the keys that have one."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(Recipe)
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    }


def check(recipe: Recipe) -> None:
    """Check names, arguments and times that need no data; the arguments that the program supplies count as given.

    Raises:
        UserError: naming every path that is wrong.
    """
    raise_all(argument_problems(vars(recipe)))


NEEDS_CODE = "needs_code"
"""Key of a checkpoint's index: the YAML paths of components that decide what the model draws and came from such files."""

log = logging.getLogger(__name__)


def needs_code(recipe: dict[str, Any]) -> list[str]:
    """Return what `NEEDS_CODE` says of a recipe, in the process that trains it."""
    found = []
    for path, components, name in _deciding(recipe):
        if components.is_packaged(name):
            continue
        if components is not registry.algorithms or getattr(components.get(name, path), "shapes_sampling", False):
            found.append(path)
    return found


def without_code(recipe: Recipe, index: dict[str, Any], where: Path) -> Recipe:
    """Return the recipe of a run that is opened, without algorithms that opening doesn't need and cannot name.

    Args:
        index: of the checkpoint.
        where: it lies, for messages.

    Raises:
        UserError: the model needs code that the user has not given.
    """
    recorded, saved = index.get(NEEDS_CODE), {"model": recipe.model, "algorithms": recipe.algorithms}
    lacking, passed_over = list[str](), list[str]()
    for path, components, name in _deciding(saved):
        replaced = bool(recorded) and path in recorded and components.is_packaged(name)  # the code had a class of that name
        if not replaced and _is_known(components, name, path):
            continue
        if components is registry.algorithms and isinstance(recorded, list) and path not in recorded:
            passed_over.append(name)  # a loss or the like: of training alone
        else:
            lacking.append(path)
    files = [str(file) for file in recipe.code_paths]
    if lacking and files:
        raise UserError(
            f"{where}: {', '.join(lacking)} came from Python code of the run's author: {', '.join(files)} (its code_paths). "
            "Opening a run executes nothing that the run names. Read that code, and if you trust it, give your copy: "
            f"{' '.join(f'--code {shlex.quote(file)}' for file in files)}"
        )
    if recorded is None and files and not any(components.is_added(name) for _, components, name in _deciding(saved)):
        log.warning(
            "%s: its recipe names Python code (%s), which is not executed. An older version wrote this checkpoint and didn't say "
            "whether the model needs it; if it does, give --code FILE.",
            where,
            ", ".join(files),
        )
    if passed_over:
        log.info("%s: algorithms.%s, of the author's own code, is of training alone.", where, ", ".join(passed_over))
    return dataclasses.replace(
        recipe, algorithms={key: value for key, value in recipe.algorithms.items() if key not in passed_over}
    )


def _is_known(components: Registry, name: str, path: str) -> bool:
    try:
        components.get(name, path)
    except UserError:
        return False
    return True


def _deciding(recipe: dict[str, Any]) -> Iterator[tuple[str, Registry, str]]:
    """Yield YAML path, registry and name of every component that may decide what a model draws."""
    yield from _nested(recipe.get("model"), "model", registry.models)
    for name, _ in entries(recipe.get("algorithms") or {}, "algorithms"):
        yield f"algorithms.{name}", registry.algorithms, name


def _nested(spec: Any, path: str, components: Registry) -> Iterator[tuple[str, Registry, str]]:
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        return
    yield path, components, spec["name"]
    for key, value in spec.items():
        if key in NESTED:
            yield from _nested(value, f"{path}.{key}", NESTED[key])


# ---------------------------------------------------------------------------------------------------------- with every default


_NONE_MEANS: dict[str, Any] = {"flow": {}, "autoencoder": {"name": "pixels"}}  # of a model


def resolved(recipe: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Return a recipe, as YAML gives it, with the defaults of its keys and of every component's constructor.

    What cannot be looked up, such as a stranger's component whose file isn't imported, stays as it is.

    Args:
        recipe: perhaps of an older version, which had fewer keys.
        ranks: what a batch is divided by where `device_train_microbatch_size` is left out.
    """
    full = {**recipe, **{key: value for key, value in _defaults().items() if key not in recipe}}
    for key, components in BY_KEY.items():
        if isinstance(full.get(key), dict):
            full[key] = _component(components, full[key])
    for key, components in BY_NAME.items():
        full[key] = {
            name: _component(components, {"name": name} | arguments, named=False)
            for name, arguments in entries(full.get(key) or {}, key)
        }
    batch = full.get("global_train_batch_size")
    if isinstance(batch, int):
        full["device_train_microbatch_size"] = full.get("device_train_microbatch_size") or batch // ranks
        full["global_eval_batch_size"] = full.get("global_eval_batch_size") or batch
    return json.loads(json.dumps(full, default=str))  # as JSON gives it back: keys are strings, and tuples are lists


def _component(components: Registry, spec: dict[str, Any], named: bool = True) -> dict[str, Any]:
    name = spec.get("name")
    arguments = {key: value for key, value in spec.items() if key != "name"}
    try:
        function = components.constructor(str(name), str(name))
    except (UserError, ImportError):
        return spec if named else arguments
    return ({"name": name} if named else {}) | _filled(function, arguments)


def _filled(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of a class written in C
        return dict(arguments)
    hints = hints_of(function)
    found = dict(arguments)
    for name, parameter in parameters.items():
        if name not in found and _is_plain(parameter.default):
            found[name] = parameter.default
        if name in found:
            found[name] = _value(found[name], name, hints.get(name))
    return found


def _value(value: Any, name: str, hint: Any) -> Any:
    value = _NONE_MEANS.get(name) if value is None else value
    if name in NESTED and isinstance(value, dict):
        return _component(NESTED[name], ({"name": UNNAMED[name]} if name in UNNAMED else {}) | value)
    of = dataclass_in(hint, value)
    if of is None:
        return value
    if isinstance(value, dict):
        return _filled(of, value)
    return [_filled(of, element) if isinstance(element, dict) else element for element in value]


def _is_plain(default: Any) -> bool:
    """Return whether a default is a value that a recipe could give."""
    if isinstance(default, list | tuple):
        return all(map(_is_plain, default))
    return default is None or isinstance(default, bool | int | float | str)
