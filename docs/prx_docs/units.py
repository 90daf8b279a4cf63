"""The unit of a key, by what the docstring of its argument says of it."""

import re

from prx_composer.schedule.moments import Moment

TIME = "[a time](../../docs/reference/index.md#times)"
# The first that is found in the meaning counts; a number of which none is has no unit, such as a weight or a ratio.
_SAID = (
    (r"multiplier", "× `lr`"),
    (r"[Ll]earning rate( per step)?[.;]|^learning rate|^Muon's step", "per step"),
    (r"per step, as a fraction", "of `lr`, per step"),
    (r"Decoupled weight decay", "per step"),
    (r"in tokens|many tokens", "tokens"),
    (r"wider or taller", "longer side / shorter side"),
    (r"^for other aspect ratios", "pixels"),
    (r"\bin pixels|^side of (the|what|a) |^sides (of|are) ", "pixels"),
    (r"seconds", "seconds"),
    (r"^share|^part of|^of a compiled graph: the part|this share|this fraction|share of uniform|share of noise", "share, 0 to 1"),
    (r"^images|^how many, |fewer images|^with different seeds|^real images|fewer images than", "images"),
    (r"^prompts", "prompts"),
    (r"batches|interval for aggregating|so many steps|steps to wait|steps in a row|many losses|normal losses", "batches"),
    (r"counted from 0|routed block", "index of a block"),
    (r"^blocks|of blocks|of its blocks", "blocks"),
    (r"^Euler steps", "steps of drawing"),
    (r"^channels|^width of", "channels"),
    (r"^bytes", "bytes"),
    (r"FLOP/s", "FLOP/s"),
    (r"standard deviations", "standard deviations"),
    (r"^ranks", "GPUs"),
    (r"^processes", "processes"),
    (r"^words", "words"),
)


def unit_of(name: str, kind: str, default: str, meaning: str) -> str:
    """Return the unit of a key's value; "" for one that has none.

    Args:
        name: the last part of its path.
        kind, default, meaning: as the reference has them.
    """
    if "string" in kind and (
        _is_time(default) or re.search(r"[Tt]ime string|`Moment`|^window|\btime\b.*(share ends|between)", meaning)
    ):
        return TIME
    if "string" in kind and re.search(r"\b\d+(ba|h|m)\b", meaning):
        return TIME if "integer" not in kind and "number" not in kind else f"seconds, or {TIME}"
    if not re.search(r"integer|number", kind) or name in ("seed", "name"):
        return ""
    return next((unit for words, unit in _SAID if re.search(words, meaning)), "")


def _is_time(default: str) -> bool:
    try:
        return bool(default) and bool(Moment(default).points)
    except ValueError:
        return False
