"""`prx recipes`: the recipes that come with this package, and how they get into your folder."""

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import yaml
from typer import Argument, Option, echo

from prx_composer.commands import writing
from prx_composer.common import installation
from prx_composer.common.errors import UserError, nearest

HELP = "List the recipes that come with this package, or copy them into your folder."


@dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """Options of `prx recipes copy`."""

    names: Annotated[list[str], Argument(metavar="NAME", help="As `prx recipes` lists them; ablations: all of that folder.")]
    output: Annotated[str, Option(metavar="DIR", help="Folder in which yamls/ is made.")] = "."


def list_recipes(context: typer.Context) -> None:
    """List the recipes, one a line: whole ones, then those of a few keys that are given after a whole one."""
    if context.invoked_subcommand is not None:
        return
    named = _named()
    longest = max(map(len, named))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for name, file in sorted(named.items(), key=lambda item: ("/" in item[0], item[0])):
        line = f"{name:{longest}}  {_about(file)}"
        echo(line if len(line) <= width else f"{line[: width - 2]} …")
    echo("\nprx recipes copy quickstart && prx train yamls/quickstart.yaml")


def copy_recipes(options: CopyOptions) -> None:
    """Copy recipes, and what they are based on, to yamls/ of this folder, where the documentation's commands find them."""
    named, folder = _named(), installation.recipes()
    for asked in options.names:
        files = [file for name, file in named.items() if name == asked or name.startswith(f"{asked}/")]
        if not files:
            raise UserError(f"{asked}: there is no such recipe.{nearest(asked, list(named))}")
        for file in dict.fromkeys(part for one in files for part in _whole(one)):
            target = Path(options.output).expanduser() / "yamls" / file.relative_to(folder)
            content = file.read_bytes()
            if target.is_file() and target.read_bytes() != content:
                raise UserError(f"{target} is there already, and another: move it away, or name another folder by --output.")
            with writing(f"--output: {target}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            echo(target)


def _named() -> dict[str, Path]:
    folder = installation.recipes()
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def _about(file: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    comment = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
    words = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.split(r"(?<=\.)\s(?=[A-Z`])|:\s(?=uv |composer )", words)[0]


def _whole(file: Path) -> list[Path]:
    """Return a recipe and, after it, its own code and the recipes that its `base` leads to, with theirs."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    base = content.get("base") or []
    lower = [file.parent / name for name in ([base] if isinstance(base, str) else base)]
    code = [file.parent / name for name in content.get("code_paths") or []]
    return [file, *code, *(part for one in lower for part in _whole(one))]
