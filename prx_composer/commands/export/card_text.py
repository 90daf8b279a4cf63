"""Text of the cards that leave this machine: nobody's markup, and none of its paths."""

import html
import re
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"(?:/|~|file:|[A-Za-z]:\\)")  # how a path begins that another machine does not have
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)(?:/|$)")  # in the hub's cache


def inline(text: str) -> str:
    """Return a text as one line of Markdown without HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("`", "'")


def fenced(text: str, language: str) -> str:
    """Return a block of code; whatever the text holds, it ends where the block does."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def public_name(path: str) -> tuple[str, bool]:
    """Return what others may know a path by, and whether it is an id of the hub, from whose cache the path is."""
    if cached := _CACHED.search(path):
        return f"{cached[1]}/{cached[2]}", True
    return (re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder") if _is_place(path) else path, False


def without_places(value: Any) -> Any:
    """Return a part of a recipe with nothing but the name of every path that begins at a root or a home; prompts stay."""
    if isinstance(value, dict):
        return {key: item if key == "prompts" else without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    return public_name(value)[0] if isinstance(value, str) and _is_place(value) else value


def public_command(arguments: list[str]) -> list[str]:
    """Return a command line likewise."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        shown.append(f"{option}{equals}{public_name(value)[0] if _is_place(value) else value}")
    return shown


def _is_place(text: str) -> bool:
    return _PLACE.match(text) is not None and "\n" not in text and Path(text.replace("\\", "/")).name != ""
