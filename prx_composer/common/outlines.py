"""What a component takes, read from its source: nothing is imported, so that a misspelt argument is answered in a second.

A registry names a class as "module:attribute". Its file is found as Python would find it, parsed, and followed through imports
and base classes of this package and of Composer. What comes out is an *outline*: a class or function of the same name, bases,
parameters, annotations and docstring, and no body. `inspect.signature` and `typing.get_type_hints` answer for it as for the
real one.
"""

import abc
import ast
import builtins
import dataclasses
import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FOLLOWED = frozenset({"prx_composer", "composer"})
_HARMLESS = frozenset({"final", "register", "register_to_config", "runtime_checkable"})  # decorators that leave a class as it is
# What a type is written with. Nothing of it can call anything.
_OF_TYPES = (ast.Constant, ast.Name, ast.Load, ast.Attribute, ast.Subscript, ast.Tuple, ast.List)
_OF_TYPES += (ast.BinOp, ast.BitOr, ast.UnaryOp, ast.USub)
_UNDER_WAY = object()
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
    assigned = [statement for statement in node.body if isinstance(statement, ast.Assign)]
    return {name: s.value.value for s in assigned if isinstance(s.value, ast.Constant) for name in _names(s)}


class _Module:
    """A module that is not imported, whose attributes are outlines; those of Python's own modules are what they are."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        package = self._name.partition(".")[0]
        if package in sys.stdlib_module_names and hasattr(importlib.import_module(self._name), attribute):
            return getattr(importlib.import_module(self._name), attribute)
        if package in FOLLOWED:
            source = _source(self._name)
            if attribute in source.bound:
                return source.value(attribute)
            if source.is_package and _spec(f"{self._name}.{attribute}") is not None:
                return _Module(f"{self._name}.{attribute}")
        raise CannotTell(f"{self._name}.{attribute} is not followed")


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
        """Return what a name at the top of the file stands for."""
        if name not in self._values:
            self._values[name] = _UNDER_WAY
            try:
                self._values[name] = self._value(name)
            finally:
                if self._values[name] is _UNDER_WAY:
                    del self._values[name]
        elif self._values[name] is _UNDER_WAY:
            raise CannotTell(f"{name} in {self.module} refers to itself")
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
            return _Module(next((alias.name for alias in statement.names if alias.asname == name), name))
        if isinstance(statement, ast.ImportFrom):
            original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
            package = self.module.split(".")
            package = package[: len(package) - statement.level + self.is_package] if statement.level else []
            return getattr(_Module(".".join([*package, *([statement.module] if statement.module else [])])), original)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            return self._type(statement.value)
        raise CannotTell(f"{name} in {self.module}")

    def _type(self, node: ast.expr) -> Any:
        """Return the type that an annotation, or an alias, says."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if strange := [part for part in ast.walk(node) if not isinstance(part, _OF_TYPES)]:
            raise CannotTell(f"{ast.unparse(node)} has a {type(strange[0]).__name__}")
        names = {part.id: self.value(part.id) for part in ast.walk(node) if isinstance(part, ast.Name)}
        try:
            return eval(compile(ast.Expression(node), self.module, "eval"), {"__builtins__": {}}, names)
        except (TypeError, ValueError, AttributeError) as error:
            raise CannotTell(ast.unparse(node)) from error

    def _hint(self, node: ast.expr) -> Any:
        """Return an annotation; `Any`, which is not checked, where it can't be told."""
        try:
            return self._type(node)
        except CannotTell:
            return Any

    def _function(self, node: ast.FunctionDef) -> Callable[..., Any]:
        if any(_called(decorator) not in _HARMLESS for decorator in node.decorator_list):
            raise CannotTell(f"{node.name} in {self.module} is decorated")
        values: dict[str, Any] = {"__name__": self.module}

        def named(value: Any) -> ast.expr:
            values[f"_{len(values)}"] = value
            return ast.Name(f"_{len(values) - 1}", ast.Load())

        given = node.args
        for argument in [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]:
            if argument is not None and argument.annotation is not None:
                argument.annotation = named(self._hint(argument.annotation))
        given.defaults = [named(_literal(default)) for default in given.defaults]
        given.kw_defaults = [default and named(_literal(default)) for default in given.kw_defaults]
        said = ast.get_docstring(node)
        node.body, node.decorator_list, node.returns = [ast.Pass()], [], None
        exec(compile(ast.fix_missing_locations(ast.Module([node], [])), self.module, "exec"), values)
        values[node.name].__doc__ = said
        return values[node.name]

    def _class(self, node: ast.ClassDef) -> type:
        decorators = {_called(decorator): ast.unparse(decorator) for decorator in node.decorator_list}
        if decorators.keys() - _HARMLESS - {"dataclass"}:
            raise CannotTell(f"{node.name} in {self.module} is decorated")
        bases = tuple(dict.fromkeys(base for expression in node.bases if (base := self._base(expression)) is not None))
        body: dict[str, Any] = {"__module__": self.module, "__qualname__": node.name, "__annotations__": {}}
        body["__doc__"] = ast.get_docstring(node)  # which a reference is made of
        for statement in node.body:
            name = next(iter(_names(statement)), None)
            if name == "__init__" and isinstance(statement, ast.FunctionDef):
                body[name] = self._function(statement)
            elif name in ("__init__", "__new__"):
                raise CannotTell(f"{node.name}.{name} in {self.module}")
            elif name and isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
                body["__annotations__"][name] = self._hint(statement.annotation)
                if statement.value is not None:
                    body[name] = _field(statement.value)
        try:
            made = type(node.name, bases, body)
            return (
                dataclasses.dataclass(kw_only="kw_only" in decorators["dataclass"])(made) if "dataclass" in decorators else made
            )
        except (TypeError, ValueError) as error:
            raise CannotTell(f"{node.name} in {self.module}") from error

    def _base(self, node: ast.expr) -> type | None:
        """Return the outline of a base class; None for one that has no constructor to inherit."""
        try:
            found = self._type(node.value if isinstance(node, ast.Subscript) else node)
        except CannotTell:
            return Foreign
        if inspect.isclass(found) and found.__module__.partition(".")[0] in FOLLOWED:
            return found
        return None if found in (object, abc.ABC, typing.Protocol, typing.Generic) else Foreign


_source = functools.cache(_Source)


class Foreign:
    """Stands for a base class that is not followed; `constructor` goes no further than it."""


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield those at the top of a file, also below `if` and `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            for part in (statement.body, statement.orelse, *(h.body for h in getattr(statement, "handlers", []))):
                yield from _statements(part)


def _names(statement: ast.stmt) -> list[str]:
    """Return what a statement binds."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _called(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNREAD


def _field(node: ast.expr) -> Any:
    """Return the default of a dataclass' field, or a field with what decides about the constructor's parameter."""
    if not isinstance(node, ast.Call) or _called(node) != "field":
        return _literal(node)
    given = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    options = {key: given[key] for key in ("init", "kw_only", "default") if key in given}
    return dataclasses.field(**options | ({"default": UNREAD} if "default_factory" in given else {}))


@functools.cache
def _spec(module: str) -> ModuleSpec | None:
    """Say where a module is, as `importlib.util.find_spec` does, which imports the packages around it first."""
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
    """Return the function whose signature says which arguments a class or function takes.

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
        if "__init__" not in vars(cls):
            continue
        init = _wrapped(vars(cls)["__init__"])
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
    """Look through a constructor that a class decorator puts around a class's own without naming it in `__wrapped__`."""
    while inspect.isfunction(init) and _takes_anything(init):
        inner = [value for value in inspect.getclosurevars(init).nonlocals.values() if inspect.isfunction(value)]
        if len(inner) != 1:
            break
        init = inner[0]
    return init
