"""Docstrings, taken apart: what a thing is, and what each of its arguments means."""

import ast
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prx_composer.common.outlines import Foreign

_SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields", "Example", "Examples", "Note", "Seams", "Warnings")
_HEAD = re.compile(rf"^(?:({'|'.join(_SECTIONS)})\b[^\n]*:|\.\. .*::.*)$")
_ENTRY = re.compile(r"^(\s+)(\w+(?:, \w+)*)(?: \(.*?\))?: ?(.*)$")
_ELSEWHERE = re.compile(r"^(see|as)( in)? `\w+`")
_DEFAULT = re.compile(r"\s*(Default\s*[:=]|Defaults? to|\(default:?)\s*`[^`]*`\)?\.?(?=\s|$)")  # a column of its own


def class_body(name: str) -> list[ast.stmt]:
    """Return the statements of a class, `module:name`, as they are written."""
    module, _, cls = name.partition(":")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)


def summary(target: Any) -> str:
    """Return what stands before the first section of a docstring."""
    lines = []
    for line in (inspect.cleandoc(target.__doc__ or "")).splitlines():
        if _HEAD.match(line):
            break
        lines.append(line)
    return plain("\n".join(lines))


def arguments(target: Any) -> dict[str, str]:
    """Return the meaning of each argument of a class or function, its bases' where it says nothing of its own, as one line."""
    found: dict[str, str] = {}
    for cls in inspect.getmro(target) if inspect.isclass(target) else (target,):
        if cls in (object, Foreign):
            continue
        for source in (cls, vars(cls).get("__init__")):
            for name, meaning in _entries(getattr(source, "__doc__", None) or "").items():
                if name not in found or _ELSEWHERE.match(found[name]):
                    found[name] = meaning
    return found


def _entries(doc: str) -> dict[str, str]:
    """Return what stands below `Args:`."""
    found: dict[str, str] = {}
    names: list[str] = []
    section, indent = "", 0
    for line in inspect.cleandoc(doc).splitlines():
        if head := _HEAD.match(line):
            section, names, indent = head[1] or "", [], 0
        elif line.strip() and not line[0].isspace():
            section = ""
        elif section == "Args" and line.strip():
            entry = _ENTRY.match(line)
            if entry and (not indent or len(entry[1]) <= indent):
                indent, names = len(entry[1]), entry[2].split(", ")
                found.update(dict.fromkeys(names, entry[3]))
            else:
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return {name: _DEFAULT.sub("", plain(meaning)) for name, meaning in found.items()}


def plain(text: str) -> str:
    """Return Markdown of a docstring, some of which are reStructuredText."""
    text = re.sub(r":\w+:`~?\.?([^`<]*?)(?: <[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"`+([^`\n]+?)`+(?:_\b)?", r"`\1`", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def sentence(text: str) -> str:
    """Return a meaning as it stands in a table: one line, with a capital and a stop."""
    text = " ".join(text.split())
    if text and text[0].isascii() and text[0].islower() and not re.match(r"\w*[_(]", text):
        text = text[0].upper() + text[1:]
    return text if not text or text[-1] in ".:!?" else f"{text}."


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
