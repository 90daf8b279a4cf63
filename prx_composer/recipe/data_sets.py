"""Which data sets a recipe's loader names: one by its path, or several under `mix`."""

from collections.abc import Mapping
from typing import Any

from prx_composer.common.errors import UserError

_OF_ONE = ("path", "split", "captions", "remote", "source")  # what the data sets of a mixture may have of their own
_WEIGHT = "weight"


def data_sets(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The data sets that a loader's specification names: where in it → its arguments, those that all share included.

    Below `mix`, a data set lies in a folder of its name in `path` (and `remote`), unless it has one of its own.

    Raises:
        UserError: no path; a mixture that is empty, has an unknown key, or a weight for some of its data sets only.
    """
    mix = spec.get("mix")
    if mix is None and not spec.get("path"):
        raise UserError("path is missing: the folder of the data set.")
    if mix is None:
        return {"": dict(spec)}
    if not isinstance(mix, Mapping) or not mix or not all(isinstance(part, Mapping) for part in mix.values()):
        raise UserError(f"mix must be a mapping such as {{flux: {{path: data/flux, weight: 0.5}}}}, not {mix!r}.")
    for name, part in mix.items():
        if unknown := part.keys() - {*_OF_ONE, _WEIGHT}:
            raise UserError(f"mix.{name}.{min(unknown)}: unknown; a data set has {', '.join(_OF_ONE)} and {_WEIGHT}.")
        if not (part.get("path") or spec.get("path")):
            raise UserError(
                f"mix.{name}.path is missing: the folder of the data set; or set path to the folder that holds them all."
            )
    weights = {name: part[_WEIGHT] for name, part in mix.items() if _WEIGHT in part}
    if weights and len(weights) < len(mix):
        without = next(name for name in mix if name not in weights)
        raise UserError(f"mix.{without}.weight is missing: give one to all data sets, or to none: samples are seen equally then.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"mix.{name}.weight must be a positive number, not {weight!r}.")
    return {f"mix.{name}": _of_mixture(spec, name, part) for name, part in mix.items()}


def _of_mixture(spec: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: value for key, value in spec.items() if key != "mix"}
    below = {key: f"{spec[key]}/{name}" for key in ("path", "remote") if spec.get(key)}
    return shared | below | {key: value for key, value in part.items() if key != _WEIGHT}


def weights_of(mix: Mapping[str, Any]) -> dict[str, float] | None:
    """Data set → weight, or None if none is given."""
    weights = {name: float(part[_WEIGHT]) for name, part in mix.items() if _WEIGHT in part}
    return weights or None
