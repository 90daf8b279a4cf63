"""Commands: `prx` in this process, and any in a process of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import warm
from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.common.errors import UserError

REPOSITORY = Path(__file__).parents[1]


def prx(*arguments: Any, code: int = 0) -> str:
    """Runs a command; a UserError is what `main` would print."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        assert code == 1, result.exception
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def path_of(program: str, real: bool = False) -> str:
    """Return where `python`, `composer`, `prx` or another program of the environment lies, or its warm twin (see warm.py)."""
    twin = Path(warm.folder()) / program
    return str(twin if warm.folder() and twin.exists() and not real else Path(sys.executable).with_name(program))


def start(program: str, *arguments: Any, real: bool = False, **options: Any) -> "subprocess.Popen[str]":
    """Start `python`, `composer` or `prx` in the repository, its output in pipes, and return the process.

    Args:
        real: in a new interpreter, not in a fork of one that has imported everything.
        options: of Popen.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command = [path_of(program, real), *map(str, arguments)]
    return subprocess.Popen(command, **(dict(cwd=REPOSITORY, text=True) | pipes | options))


def run(program: str, *arguments: Any, timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run what `start` starts to its end."""
    process = start(program, *arguments, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
