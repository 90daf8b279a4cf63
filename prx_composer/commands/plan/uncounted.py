"""What a plan cannot count is refused, with the ways on, unless it is to be left out."""

from collections.abc import Collection
from dataclasses import dataclass, field

from prx_composer.common.errors import UserError, nearest

OPTION = "--leave-out"


@dataclass
class Uncounted:
    """Networks that are not counted.

    Args:
        leave_out: their names, as `--leave-out` takes them. None: nothing is refused; what cannot be counted is named.
        told: in words, what is not counted.
    """

    leave_out: Collection[str] | None = None
    told: list[str] = field(default_factory=list)

    def check(self, allowed: list[str]) -> None:
        """Raises UserError for a name that is not among the recipe's."""
        for name in self.leave_out or ():
            if name not in allowed:
                raise UserError(f"{OPTION}: the recipe has no {name!r} to leave out.{nearest(name, allowed)}")

    def leaves(self, name: str, path: str) -> bool:
        """Whether that network is to be left out; if so, it is told."""
        if name not in (self.leave_out or ()):
            return False
        self.told.append(f"{path}: left out, as {OPTION} {name} says: hours and memory are those of a run without it")
        return True

    def refuse(self, name: str, path: str, why: str, ways: str = "") -> None:
        """Tells what cannot be counted; raises UserError if that stops the plan.

        Args:
            why: a clause without a full stop. ways: sentences that say what else could be done.
        """
        if self.leave_out is None:
            self.told.append(f"{path}: {why}; it is not counted")
            return
        raise UserError(f"{path} cannot be counted: {why}. {ways}{' ' if ways else ''}To plan without it: {OPTION} {name}")


def how_to_know(name: str, also: str = "") -> tuple[str, str]:
    """Why a network by hub id is not known, and how it would be."""
    why = f"{name} is no folder with a config.json, is not in the hub's cache on this machine{also}"
    return why, (
        f"Give its folder (config.json is enough); or run `hf download {name} config.json` where there is a network; or give its "
        "configuration as `config:` in place of `pretrained:`."
    )
