"""What a component takes, read from its source: nothing is imported, so that a misspelt argument is answered in a second.

A registry names a class as "module:attribute". Its file is found as Python would find it, parsed, and followed through imports
and base classes of this package and of Composer. What comes out is an *outline*: a class or function of the same name, bases,
parameters and annotations, without a body. `inspect.signature` and `typing.get_type_hints` answer for it as for the real one.
"""

import abc
import ast
import builtins
import collections.abc
import dataclasses
import functools
import inspect
import pathlib
import sys
import typing
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FOLLOWED = frozenset({"prx_composer", "composer"})
_CHEAP = {m.__name__: m for m in (abc, builtins, collections.abc, dataclasses, pathlib, typing)}  # imported anyway
_HARMLESS = frozenset({"final", "register", "runtime_checkable"})  # decorators that leave a class as it is
UNREAD: Any = type("Unread", (), {"__repr__": lambda _: "…"})()
"""Stands for a default that is no literal."""


class CannotTell(Exception):
    """The source says it in a way that is not understood here; importing it tells."""


@functools.cache
def outline(module: str, attribute: str) -> Any:
    """Return the class or function of that name in a module, without its body.

    Raises:
        CannotTell: it can't be read without importing it.
    """
    found = _source(module).value(attribute)
    if not inspect.isclass(found) and not inspect.isfunction(found):
        raise CannotTell(f"{module}:{attribute} is neither a class nor a function")
    return found


def constants(module: str, name: str) -> dict[str, Any]:
    """Return the names that a class, such as an enumeration, sets to literals in its body.

    Raises:
        CannotTell: there is no such class in the source.
    """
    node = _source(module).statement(name)
    if not isinstance(node, ast.ClassDef):
        raise CannotTell(f"{module}:{name} is no class")
    pairs = [(s.targets[0], s.value) for s in node.body if isinstance(s, ast.Assign) and len(s.targets) == 1]
    return {target.id: value.value for target, value in pairs if isinstance(target, ast.Name) and isinstance(value, ast.Constant)}


@functools.cache
def _source(module: str) -> "_Source":
    return _Source(module)


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module that is not imported."""

    name: str

    def value(self, attribute: str) -> Any:
        if self.name in _CHEAP:
            if hasattr(_CHEAP[self.name], attribute):
                return getattr(_CHEAP[self.name], attribute)
        elif self.name.partition(".")[0] in FOLLOWED:
            source = _source(self.name)
            if attribute in source.bound:
                return source.value(attribute)
            if source.is_package and _spec(f"{self.name}.{attribute}") is not None:
                return _Module(f"{self.name}.{attribute}")
        raise CannotTell(f"{self.name}.{attribute} is not followed")


class _Source:
    """A parsed file."""

    def __init__(self, module: str):
        spec = _spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise CannotTell(f"{module} has no source")
        self.module = module
        self.is_package = spec.submodule_search_locations is not None
        self.bound: dict[str, list[ast.stmt]] = {}
        self._values: dict[str, Any] = {}
        self._under_way: set[str] = set()
        try:
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError) as error:
            raise CannotTell(f"{spec.origin} cannot be parsed") from error
        for statement in _statements(tree.body):
            for name in _names(statement):
                self.bound.setdefault(name, []).append(statement)

    def statement(self, name: str) -> ast.stmt:
        statements = self.bound.get(name, [])
        if len(statements) != 1:  # set twice, as by `try: import … except ImportError: …`
            raise CannotTell(f"{name} is set {len(statements)} times in {self.module}")
        return statements[0]

    def value(self, name: str) -> Any:
        """Of a name at the top of the file."""
        if name in self._under_way:
            raise CannotTell(f"{name} in {self.module} refers to itself")
        if name not in self._values:
            self._under_way.add(name)
            try:
                self._values[name] = self._value(name)
            finally:
                self._under_way.remove(name)
        return self._values[name]

    def _value(self, name: str) -> Any:
        if name not in self.bound and hasattr(builtins, name):
            return getattr(builtins, name)
        statement = self.statement(name)
        if isinstance(statement, ast.ClassDef):
            return self._class(statement)
        if isinstance(statement, ast.FunctionDef):
            return self._function(statement)
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if _bound_by_import(a) == name)
            return _Module(alias.name if alias.asname else name)
        if isinstance(statement, ast.ImportFrom):
            original = next(a.name for a in statement.names if (a.asname or a.name) == name)
            return _Module(self._absolute(statement)).value(original)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            return self._annotation(statement.value)  # an alias of a type
        raise CannotTell(f"{name} in {self.module}")

    def _absolute(self, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = self.module.split(".")
        parts = parts[: len(parts) - statement.level + self.is_package]
        return ".".join([*parts, *([statement.module] if statement.module else [])])

    # --------------------------------------------------------------------------------------------------- annotations

    def _hint(self, node: ast.expr | None) -> Any:
        """An annotation; `Any`, which is not checked, where it can't be told."""
        try:
            return Any if node is None else self._annotation(node)
        except CannotTell:
            return Any

    def _annotation(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return self._annotation(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node.value
        if isinstance(node, ast.Name):
            return self.value(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._annotation(node.value)
            if isinstance(owner, _Module):
                return owner.value(node.attr)
        try:
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
                return typing.Union[self._annotation(node.left), self._annotation(node.right)]  # noqa: UP007
            if isinstance(node, ast.Subscript):
                base = self._annotation(node.value)
                items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                if base is typing.Literal:
                    return base[tuple(ast.literal_eval(item) for item in items)]
                arguments = tuple(self._annotation(item) for item in items)
                return base[arguments[0] if len(arguments) == 1 else arguments]
            if isinstance(node, ast.List):
                return [self._annotation(item) for item in node.elts]
        except (TypeError, ValueError) as error:
            raise CannotTell(ast.unparse(node)) from error
        raise CannotTell(ast.unparse(node))

    # --------------------------------------------------------------------------------------------- classes, functions

    def _function(self, node: ast.FunctionDef) -> Callable[..., Any]:
        if node.decorator_list and any(_decorator(d) not in _HARMLESS for d in node.decorator_list):
            raise CannotTell(f"{node.name} in {self.module} is decorated")
        given = node.args
        plain = [*given.posonlyargs, *given.args]
        defaults = [inspect.Parameter.empty] * (len(plain) - len(given.defaults)) + [_literal(d) for d in given.defaults]
        kinds = [inspect.Parameter.POSITIONAL_ONLY] * len(given.posonlyargs)
        kinds += [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(given.args)
        found = list(zip(plain, kinds, defaults, strict=True))
        if given.vararg:
            found.append((given.vararg, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.empty))
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
            value = inspect.Parameter.empty if default is None else _literal(default)
            found.append((argument, inspect.Parameter.KEYWORD_ONLY, value))
        if given.kwarg:
            found.append((given.kwarg, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.empty))
        stub = _stub()
        stub.__name__, stub.__module__ = node.name, self.module
        stub.__annotations__ = {a.arg: self._hint(a.annotation) for a, _, _ in found if a.annotation is not None}
        stub.__signature__ = inspect.Signature([inspect.Parameter(a.arg, kind, default=d) for a, kind, d in found])
        return stub

    def _class(self, node: ast.ClassDef) -> type:
        names = [_decorator(decorator) for decorator in node.decorator_list]
        if any(name not in _HARMLESS | {"dataclass"} for name in names):
            raise CannotTell(f"{node.name} in {self.module} is decorated")
        bases = tuple(base for expression in node.bases if (base := self._base(expression)) is not None)
        body: dict[str, Any] = {"__module__": self.module, "__qualname__": node.name}
        for statement in node.body:
            for name in _names(statement):
                if name == "__init__" and isinstance(statement, ast.FunctionDef):
                    body[name] = self._function(statement)
                elif name in ("__init__", "__new__"):
                    raise CannotTell(f"{node.name}.{name} in {self.module}")
        try:
            if "dataclass" in names and "__init__" not in body:
                keywords = any("kw_only" in ast.unparse(decorator) for decorator in node.decorator_list)
                fields = list(self._fields(node))
                return dataclasses.make_dataclass(node.name, fields, bases=bases, namespace=body, kw_only=keywords)
            return type(node.name, bases, body)
        except TypeError as error:
            raise CannotTell(f"{node.name} in {self.module}") from error

    def _base(self, node: ast.expr) -> type | None:
        """The outline of a base class; None for one that has no constructor to inherit."""
        try:
            found = self._annotation(node.value if isinstance(node, ast.Subscript) else node)
        except CannotTell:
            return Foreign
        if inspect.isclass(found) and found.__module__.partition(".")[0] in FOLLOWED:
            return found
        return None if found in (object, abc.ABC, typing.Protocol, typing.Generic) else Foreign

    def _fields(self, node: ast.ClassDef) -> Iterator[tuple[str, Any, Any]]:
        for statement in node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if "ClassVar" in ast.unparse(statement.annotation):
                continue
            value, options = statement.value, {}
            has_default = value is not None
            if isinstance(value, ast.Call) and _decorator(value) == "field":
                given = {keyword.arg: keyword.value for keyword in value.keywords}
                options = {key: ast.literal_eval(given[key]) for key in ("init", "kw_only") if key in given}
                has_default, value = bool(given.keys() & {"default", "default_factory"}), given.get("default")
            default = _literal(value) if value is not None else UNREAD
            if has_default:
                options["default"] = default if isinstance(default, int | float | str | bool | None) else UNREAD
            yield statement.target.id, self._hint(statement.annotation), dataclasses.field(**options)


def _stub() -> Any:
    def stub(*_: Any, **__: Any) -> None:
        raise CannotTell("an outline has no body")

    return stub


class Foreign:
    """Stands for a base class that is not followed; `constructor` goes no further than it."""


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those at the top of a file, also below `if` and `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            for part in (statement.body, statement.orelse, *(h.body for h in getattr(statement, "handlers", []))):
                yield from _statements(part)


def _names(statement: ast.stmt) -> list[str]:
    """What a statement binds."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Import):
        return [_bound_by_import(alias) for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _bound_by_import(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _decorator(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNREAD


@functools.cache
def _spec(module: str) -> ModuleSpec | None:
    """Where a module is, as `importlib.util.find_spec` says it, which imports the packages around it first."""
    spec, name, path = None, "", None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = next((s for finder in sys.meta_path if (s := finder.find_spec(name, path)) is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    return spec


# ----------------------------------------------------------------------------------------------------- constructors

_CALLBACK = ("composer.core.callback", "Callback")  # by name, since its outline has the same


def constructor(target: Any) -> Callable[..., Any]:
    """The function whose signature says which arguments a class or function takes.

    A constructor of `*args, **kwargs` alone that stands around another one, or that hands everything on to the class it
    inherits from, is looked through. Composer's Callback takes any arguments and drops them: it counts as one without.

    Raises:
        CannotTell: an outline whose constructor is that of a class which wasn't read.
    """
    if not inspect.isclass(target):
        return target
    open_ended = None
    for cls in target.__mro__:
        if cls is object or (cls.__module__, cls.__qualname__) == _CALLBACK:
            break
        if cls is Foreign:
            raise CannotTell(f"the constructor of {target.__qualname__} is another package's")
        init = vars(cls).get("__init__")
        if init is None:
            continue
        init = _wrapped(init)
        if not _takes_anything(init):
            return init
        open_ended = open_ended or init
    return open_ended or _nothing


def _nothing(self: Any) -> None: ...


def _takes_anything(init: Any) -> bool:
    try:
        parameters = list(inspect.signature(init).parameters.values())[1:]
    except ValueError:  # of a class written in C
        return False
    return [parameter.kind for parameter in parameters] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _wrapped(init: Any) -> Any:
    """A class decorator may put a constructor around a class's own without naming it in `__wrapped__`: llm-foundry's does."""
    while inspect.isfunction(init) and _takes_anything(init):
        inner = [value for value in inspect.getclosurevars(init).nonlocals.values() if inspect.isfunction(value)]
        if len(inner) != 1:
            break
        init = inner[0]
    return init
