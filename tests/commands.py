"""`prx` in this process."""

from typing import Any

from typer.testing import CliRunner

from prx_composer.cli import app
from prx_composer.common.errors import UserError


def prx(*arguments: Any, code: int = 0) -> str:
    """Runs a command; a UserError is what `main` would print."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        assert code == 1, result.exception
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output
