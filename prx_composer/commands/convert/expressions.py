"""`--where`: an expression over a sample's metadata, evaluated by simpleeval, which has no way to attributes, calls or files."""

import ast
import functools
from collections.abc import Mapping
from typing import Any

from simpleeval import InvalidExpression, SimpleEval

from prx_composer.commands.convert.settings import Settings
from prx_composer.common.errors import UserError, nearest

MEASURED = ("width", "height", "aspect", "caption_length")  # of the original image and the longest caption
FUNCTIONS = {"len": len, "min": min, "max": max, "abs": abs, "round": round, "lower": lambda text: str(text).lower()}


@functools.lru_cache
def _parse(where: str) -> ast.AST:
    return SimpleEval.parse(where)


def _names(where: str) -> list[str]:
    return [n.id for n in ast.walk(_parse(where)) if isinstance(n, ast.Name) and n.id not in FUNCTIONS | {"True": 0, "False": 0}]


def input_columns(settings: Settings) -> set[str]:
    """The columns of the input that the settings use, the image aside."""
    names = {*settings.captions.values(), *(column for column, _ in settings.metadata.values())}
    return names | ({*_names(settings.where)} - {*MEASURED} if settings.where else set())


def check_where(where: str) -> None:
    """Raises UserError if the expression is none, or more than one."""
    try:
        _names(where)
    except (InvalidExpression, SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"--where {where!r}: {error}") from error
    for node in ast.walk(_parse(where)):
        if isinstance(node, ast.Attribute | ast.Lambda | ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            raise UserError(f"--where {where!r}: names, numbers, text, comparisons, arithmetic and {', '.join(FUNCTIONS)} only.")
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            called = ast.unparse(node.func)
            raise UserError(f"--where: there is no function {called!r}.{nearest(called, list(FUNCTIONS))}")


def is_wanted(where: str, columns: Mapping[str, Any]) -> bool | None:
    """Whether a sample fulfils the expression; None if it cannot be evaluated on it."""
    values = {name: columns.get(name) for name in _names(where)}
    values = {name: v.decode(errors="replace") if isinstance(v, bytes) else v for name, v in values.items()}
    evaluator = SimpleEval(functions=FUNCTIONS, names=values | {"True": True, "False": False, "None": None})
    try:
        return bool(evaluator.eval(where, previously_parsed=_parse(where)))
    except Exception:  # whatever the operands are: a sample must not stop the job
        return None
