"""What was measured, from the files as the benchmarks wrote them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .docstrings import cell, sentence

_ABOUT = ("what", "date", "machine", "load", "threads", "versions", "command", "starts")
_MOST = 24  # numbers, or rows, that are shown of one file; the rest is in it
_COLUMNS = 9


def table(folder: Path) -> str:
    """Return a section for every result, the newest first."""
    files = sorted(folder.glob("*.json"), reverse=True)
    return "\n".join(_section(file) for file in files)


def _section(file: Path) -> str:
    found: dict[str, Any] = json.loads(file.read_text())
    date, machine, question = file.stem.split("_", 2)
    said = [found.get("machine"), f"load {found['load']}" if "load" in found else "", _versions(found.get("versions", {}))]
    lines = [f"## {question}, {date}, {machine} {{ #{file.stem} }}", ""]
    if what := found.get("what"):
        lines += [sentence(what), ""]
    lines += [" · ".join(filter(None, said)), ""]
    if command := found.get("command"):
        lines += ["```text", str(command), "```", ""]
    measured = {key: value for key, value in found.items() if key not in _ABOUT}
    lists = {key: value for key, value in measured.items() if _is_table(value)}
    numbers = list(_numbers({key: value for key, value in measured.items() if key not in lists}))
    if numbers:
        lines += ["| what | value |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in numbers[:_MOST]), ""]
    for key, rows in lists.items():
        lines += [f"**{key}**", "", *_rows(rows), ""]
    more = " has all numbers" if len(numbers) > _MOST or any(len(rows) > _MOST for rows in lists.values()) else ""
    table_file = file.with_suffix(".md")
    beside = f"; [as a table](../benchmarks/results/{table_file.name})" if table_file.exists() else ""
    return "\n".join([*lines, f"[The file](../benchmarks/results/{file.name}){more}{beside}.", ""])


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, dict) for row in value)


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of equal things, such as runs with several seeds; of many columns the first ones."""
    flat = [dict(_numbers({key: value for key, value in row.items() if key not in _ABOUT})) for row in rows[:_MOST]]
    names = list(dict.fromkeys(name for row in flat for name in row))[:_COLUMNS]
    lines = [f"| {' | '.join(map(cell, names))} |", f"|{'---|' * len(names)}"]
    return lines + [f"| {' | '.join(cell(row.get(name, '')) for name in names)} |" for row in flat]


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("torch", "mosaicml", "diffusers"))


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield what is measured, by where it stands; a median with its quartiles as one."""
    name = " · ".join(path)
    if isinstance(value, dict) and "median" in value:
        low, high = value.get("quartiles") or ("", "")
        yield name, f"{value['median']}" + (f" ({low} to {high})" if low != "" else "")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*path, str(key)))
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for index, item in enumerate(value):
            yield from _numbers(item, (*path, f"{index + 1}"))
    elif isinstance(value, list):
        text = ", ".join(map(str, value))
        yield name, text if len(text) < 200 else f"{text[:199]}…"
    elif isinstance(value, float):
        yield name, f"{value:.6g}"
    elif value is not None and not (isinstance(value, str) and len(value) > 300):
        yield name, str(value)
