"""A component of a recipe: its name and arguments, whether its constructor takes them, and the call.

Nothing here imports PyTorch or Composer: a constructor may be read from its source (`common/outlines.py`). Every error names
the YAML path.
"""

import contextlib
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prx_composer.common.errors import Problems, UserError, at_path, nearest
from prx_composer.common.outlines import CannotTell, constructor
from prx_composer.recipe.annotations import dataclass_in, hints_of, instead_of, matches, options_of, type_in_words
from prx_composer.recipe.times import phases_of
from prx_composer.registry import NESTED, UNNAMED, Registry, backbones, constructor_in_diffusers

Spec = dict[str, Any]


def split(spec: Any, path: str, unnamed: str | None = None) -> tuple[str, Spec]:
    """Return the name and the arguments of `{name: …, **arguments}`; `unnamed` is the name of one that has none."""
    if unnamed is not None:
        if not isinstance(spec, dict):
            raise UserError(f"{path}: expected a mapping, not {spec!r}.")
        spec = {"name": unnamed} | spec
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise UserError(f"{path} must be a mapping with a `name`, not {spec!r}.")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def provided_by(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe has for its algorithms, callbacks and loggers, by the name of a constructor's parameter.

    A component that declares a parameter of one of these names is called with it, be it this package's or anybody's.

    Args:
        values: keys of a recipe.
    """
    return {
        "folder": str(values.get("run_folder")),
        "image_size": values.get("image_size"),
        "global_batch_size": values.get("global_train_batch_size"),
        "seed": values.get("seed"),
        "source": (values.get("train_loader") or {}).get("source") or {},
    }


_OFTEN_OWN = frozenset({"image_size", "global_batch_size", "seed"})


def is_filled(parameter: inspect.Parameter) -> bool:
    """Return whether the program fills a parameter that it has a value for, where the recipe gives none.

    A size or a seed with a default is the component's own setting: the size that a teacher sees, the seed of a callback's images.
    """
    return parameter.default is parameter.empty or parameter.name not in _OFTEN_OWN


def entries(components: dict[str, Any], kind: str) -> Iterator[tuple[str, Spec]]:
    """Yield name and arguments of the algorithms, callbacks or loggers of a recipe, in order, but those set to false."""
    for name, arguments in components.items():
        if arguments is False:
            continue
        if not isinstance(arguments, dict | None) and arguments is not True:
            raise UserError(f"{kind}.{name} must be a mapping of arguments, or false to leave it out, not {arguments!r}.")
        yield name, arguments if isinstance(arguments, dict) else {}


OF_DATA_SET = ("path", "split", "captions", "remote", "source", "skip")  # what one data set of a mixture may have of its own
OF_SHARE = {
    "weight": "its share of what is drawn, in relation to the other weights; or a list of `{weight, until}` for a share that "
    "changes. All data sets have one, or none: every sample is drawn equally often then.",
    "until": "a time at which its share ends.",
}

# What a recipe gives of a nested component beside its constructor's arguments: the program makes what they name.
OF_NESTED = {
    "text_encoder": {
        "tokenizer": "hub id or folder of the tokenizer, by default the encoder's own; or `{train: true, vocab_size: 4096}`: "
        "one of words that is trained on the captions when the run begins, of at most so many words."
    }
}


def given_beside(key: str, name: str) -> dict[str, str]:
    """Return what a recipe gives of a nested component beside its constructor's arguments, with what each means."""
    return {} if name == "several" else OF_NESTED.get(key, {})  # each of several text encoders has its own tokenizer


def text_encoders(model: Mapping[str, Any]) -> dict[str, Spec]:
    """Return the text encoders of a recipe's `model` by YAML path: one, or those of `several`; none of a model that is wrong."""
    encoder, path = model.get("text_encoder"), "model.text_encoder"
    if not isinstance(encoder, dict):
        return {}
    if encoder.get("name") != "several":
        return {path: encoder}
    inner = encoder.get("encoders")
    return (
        {f"{path}.encoders.{name}": one for name, one in inner.items() if isinstance(one, dict)}
        if isinstance(inner, dict)
        else {}
    )


def encoder_title(model: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return what a recipe's text encoders are called, and their revisions; None without one."""
    specs = list(text_encoders(model).values())
    titles = [
        str(one.get("pretrained") or f"random {(one.get('config') or {}).get('model_type', one.get('name'))}") for one in specs
    ]
    revisions = [one.get("revision") for one in specs]
    return " + ".join(titles), " + ".join(map(str, revisions)) if any(revisions) else None


def data_sets(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the data sets that a loader names: where in it → its arguments, those that all share included.

    Below `mix`, a data set lies in a folder of its name in `path` (and `remote`), unless it has one of its own.

    Raises:
        UserError: no path; a mixture that is empty, has an unknown key, or weights as `phases_of`; all that is wrong with it.
    """
    mix = spec.get("mix")
    if mix is None and not spec.get("path"):
        raise UserError("path is missing: the folder of the data set.")
    if mix is None:
        return {"": dict(spec)}
    if not isinstance(mix, Mapping) or not mix or not all(isinstance(part, Mapping) for part in mix.values()):
        raise UserError(f"mix must be a mapping such as {{flux: {{path: data/flux, weight: 0.5}}}}, not {mix!r}.")
    problems = Problems()
    for name, part in mix.items():
        if unknown := part.keys() - {*OF_DATA_SET, *OF_SHARE}:
            problems.found.append(
                f"mix.{name}.{min(unknown)}: unknown; a data set has {', '.join(OF_DATA_SET)}, {' and '.join(OF_SHARE)}."
            )
        if not (part.get("path") or spec.get("path")):
            problems.found.append(
                f"mix.{name}.path is missing: the folder of the data set; or set path to the folder that holds them all."
            )
    with problems.noted():
        phases_of(mix)
    problems.raise_any()
    return {f"mix.{name}": _of_mixture(spec, name, part) for name, part in mix.items()}


def _of_mixture(spec: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: value for key, value in spec.items() if key != "mix"}
    below = {key: f"{spec[key]}/{name}" for key in ("path", "remote") if spec.get(key)}
    return shared | below | {key: value for key, value in part.items() if key not in OF_SHARE}


def split_folders(loader: Mapping[str, Any] | None) -> dict[str, Path] | None:
    """Return where the splits of an `image_caption` loader lie, by data set; None of another loader, or of one that is wrong."""
    if not loader or loader.get("name") != "image_caption":
        return None
    try:
        parts = data_sets(loader)
    except UserError:
        return None
    return {where.removeprefix("mix."): Path(part["path"]) / (part.get("split") or "train") for where, part in parts.items()}


def skip_files(loader: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the files of an `image_caption` loader's skip lists, by data set, as `split_folders`."""
    parts = data_sets(loader) if loader and split_folders(loader) is not None else {}
    return {where.removeprefix("mix."): str(part["skip"]) for where, part in parts.items() if part.get("skip")}


# ----------------------------------------------------------------------------------------------------------------------- checked


def check_component(
    components: Registry,
    name: str,
    arguments: Spec,
    path: str,
    *given: Collection[str],
    imports: bool = True,
) -> None:
    """Check a component's name, and its arguments as `check_arguments` does.

    Args:
        given: `provided`, `also` and `defaulted` of that.
        imports: whether components may be imported for it. If not, what cannot be known without passes.
    """
    try:
        if (components, name) == (backbones, "diffusers"):  # whose arguments are those of the class that it names
            function = constructor_in_diffusers(arguments.get("class"), f"{path}.class")
            arguments = {key: value for key, value in arguments.items() if key != "class"}
        else:
            function = components.constructor(name, path, imports)
    except CannotTell:
        return
    check_arguments(function, arguments, path, *given, imports=imports, of=(components, name))


def check_arguments(
    target: Any,
    arguments: Spec,
    path: str,
    provided: Collection[str] = (),
    also: Collection[str] = (),
    defaulted: Collection[str] = (),
    imports: bool = True,
    of: tuple[Registry, str] | None = None,
) -> None:
    """Bind arguments against a signature.

    Args:
        target: a class or function, or its outline.
        provided: what the program passes and a recipe may not.
        also: what a recipe may give though the signature doesn't have it.
        defaulted: what the program passes unless the recipe does.
        imports: whether components that are nested in it may be imported.
        of: where the target is registered, and its name.
    """
    try:
        function = constructor(target)
    except CannotTell:
        return
    parameters = given_by_recipe(function, provided)
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    allowed = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)] + sorted(also)
    hints = hints_of(function)
    problems = Problems()
    for key, value in arguments.items():
        with problems.noted():
            default = parameters[key].default if key in parameters else None
            if key not in allowed and not open_ended:
                own = nearest(str(key), allowed) if allowed else " It takes none."
                raise UserError(f"{path}.{key}: no such argument.{_taken_by_others(of, str(key), imports) or own}")
            if key in NESTED:
                if value is not None or default is not None:
                    _check_nested(key, value, f"{path}.{key}", imports)
            elif of == (NESTED["text_encoder"], "several") and key == "encoders":
                if not isinstance(value, dict) or not value:
                    raise UserError(f"{path}.{key} must be a mapping such as {{clip: {{name: huggingface, …}}}}, not {value!r}.")
                for name, inner in value.items():
                    with problems.noted():
                        _check_nested("text_encoder", inner, f"{path}.{key}.{name}", imports)
                        if inner["name"] == "several":
                            raise UserError(f"{path}.{key}.{name}: several encoders are no part of others; name each here.")
            elif key in hints:
                try:
                    check_type(value, hints[key], f"{path}.{key}", default)
                except UserError as error:
                    if instead := _taken_by_others(of, key, imports, value):
                        raise UserError(f"{error}{instead}") from None
                    raise
    for name, parameter in parameters.items():
        if name not in defaulted and name not in arguments and parameter.default is parameter.empty and name in allowed:
            problems.found.append(f"{path} lacks the argument {name!r}.")
    problems.raise_any()


def _check_nested(key: str, value: Any, path: str, imports: bool) -> None:
    name, arguments = split(value, path, UNNAMED.get(key))
    also = given_beside(key, name)
    check_component(NESTED[key], name, arguments, path, also, also, imports=imports)


def _taken_by_others(of: tuple[Registry, str] | None, key: str, imports: bool, *value: Any) -> str:
    """Return in words which others of a nested component's kind take an argument, or a value of it; "" if none does."""
    if of is None or of[0] not in NESTED.values():
        return ""
    (components, own), takers = of, list[str]()
    for name in sorted(components.builtin.keys() - {own}):
        with contextlib.suppress(CannotTell, UserError, KeyError):
            hint = hints_of(components.constructor(name, name, imports))[key]
            if value:
                check_type(value[0], hint, name)
            takers.append(name)
    others = " and ".join(f"name: {name}" for name in takers)
    if not others or value:
        return f" {others} takes it." if others else ""
    return f" It is of {others}. {components.instead.get(own, f'{own} has none')}."


def given_by_recipe(function: Callable[..., Any], provided: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor that a recipe may give: all but those that the program passes."""
    signature = inspect.signature(function)
    return {name: parameter for name, parameter in signature.parameters.items() if name not in ("self", *provided)}


# ------------------------------------------------------------------------------------------------------------------------ called


def build(
    components: Registry, name: str, arguments: Spec, path: str, recipe: Mapping[str, Any] | None = None, **given: Any
) -> Any:
    """Call a component's constructor with its arguments from the recipe and with what the program has for it.

    Mappings become what the constructor's annotation asks for: dataclasses, or nested components by name.

    Args:
        recipe: keys of the recipe, which have something for any component; see `provided_by` and `is_filled`.
        given: what components of this kind are called with, if the constructor has such a parameter.

    Raises:
        UserError: what the constructor rejects with a ValueError, and files or weights that cannot be had, at `path`.
    """
    target = components.get(name, path)
    function = constructor(target)
    hints = hints_of(function)
    accepted = inspect.signature(function).parameters
    provided = {} if recipe is None else provided_by(recipe)
    filled = {key: value for key, value in provided.items() if key in accepted and is_filled(accepted[key])}
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
        return build(NESTED[key], *split(value, path, UNNAMED.get(key)), path)
    of = dataclass_in(hint, value)
    if of is None:
        return value
    if isinstance(value, dict):
        return _dataclass(of, value, path)
    return [_dataclass(of, element, f"{path}[{index}]") for index, element in enumerate(value)]


def _dataclass(cls: Any, value: Spec, path: str) -> Any:
    with at_path(path):
        return cls(**value)


# ----------------------------------------------------------------------------------------------------------- types


def check_type(value: Any, hint: Any, path: str, example: Any = None) -> None:
    """Compare a YAML value with an annotation, as far as the annotation is one that YAML can express.

    Args:
        example: a value that would be right, such as the default.

    Raises:
        UserError: it is of another type; says what to write.
    """
    options = options_of(hint)
    if value is None and type(None) in options:
        return
    of = dataclass_in(hint, value)
    if of is not None and isinstance(value, dict):
        check_arguments(of, value, path)
        return
    if of is not None and isinstance(value, list):
        _check_each([(f"[{index}]", element, of) for index, element in enumerate(value)], path)
        return
    expected = type_in_words(hint)
    if not expected:
        return
    if not any(matches(value, option) for option in options):
        raise UserError(f"{path}: expected {expected}, not {value!r}.{instead_of(value, options, example, path)}")
    if len(options) > 1 or not isinstance(value, list | dict):
        return
    of_items = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
    if isinstance(value, dict):
        _check_each([(f".{key}", item, of_item) for of_item in of_items[1:] for key, item in value.items()], path)
    else:
        of_items = of_items * len(value) if len(of_items) == 1 else of_items  # of another length: the constructor's to judge
        _check_each([(f"[{i}]", item, of_item) for i, (item, of_item) in enumerate(zip(value, of_items, strict=False))], path)


def _check_each(items: Iterable[tuple[str, Any, Any]], path: str) -> None:
    """Check the types of what is below a path: where, what, and its annotation."""
    problems = Problems()
    for below, item, hint in items:
        with problems.noted():
            check_type(item, hint, path + below)
    problems.raise_any()
