"""How this package is installed: from a clone or a wheel, at which version, and which command adds an extra that is missing."""

import importlib.util
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from prx_composer.common.errors import UserError

NAME = "prx-composer"
PACKAGES = (NAME, "torch", "torchvision", "mosaicml", "mosaicml-streaming", "transformers", "diffusers", "numpy")
"""Whose versions say what a run or a report of a mistake is of."""

_PACKAGE = Path(__file__).parents[1]


def clone() -> Path | None:
    """Return the folder of the clone that this package is run from; None if it was installed by itself."""
    folder = _PACKAGE.parent
    return folder if (folder / "pyproject.toml").is_file() else None


def recipes() -> Path:
    """Return the folder of the recipes: a clone's yamls/, or the copy that a wheel has."""
    folder = clone()
    return _PACKAGE / "yamls" if folder is None else folder / "yamls"


def training() -> list[str]:
    """Return the words of the command that trains on all GPUs of a machine, to which a recipe is added."""
    return ["composer", "train.py"] if clone() is not None else ["composer", "-m", "prx_composer.cli", "train"]


def version_of(package: str) -> str | None:
    """Return a package's version, without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the clone's commit, marked with + if files differ from it; None without a clone or git."""
    folder = clone()
    if folder is None:
        return None
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def extras() -> dict[str, list[Requirement]]:
    """Return what each extra installs, by its name, as the installed package's metadata say."""
    try:
        lines = requires(NAME) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        extra = str(requirement.marker).partition('extra == "')[2].rstrip('"')
        if extra:
            found.setdefault(extra, []).append(requirement)
    return found


def adding(extra: str) -> str:
    """Return the command that installs an extra: in a clone uv's, which keeps what else is installed, and else pip's."""
    if clone() is not None:
        return f"uv sync --inexact --extra {extra}"
    packages = [f"{one.name}{one.specifier}" for one in extras().get(extra, [])]
    pip = ["pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]  # environments of uv have no pip
    return shlex.join([*pip, "install", *(packages or [f"{NAME}[{extra}]"])])  # the latter where nothing is known of it


def require(extra: str, what: str) -> None:
    """Raise UserError, with the command that mends it, if a package of an extra is not installed.

    Args:
        what: needs it, as a message begins.
    """
    if lacking := [one.name for one in extras().get(extra, []) if version_of(one.name) is None]:
        raise UserError(f"{what} needs {' and '.join(lacking)}: {adding(extra)}")
