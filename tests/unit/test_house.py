"""The floor plan: imports go down only, those inside of functions included, and nothing is larger than a reader can hold."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "prx_composer"

# From the ground up. A room is a folder or a loose module of the package; rooms on one floor know nothing of each other.
FLOORS = (
    {"common"},
    {"registry", "schedule"},
    {"recipe"},
    {"models"},
    {"optim"},
    {"data"},
    {"runs"},
    {"algorithms", "metrics"},
    {"loggers"},
    {"callbacks"},
    {"training"},
    {"commands", "integrations"},
    {"cli"},
)
MOST_MODULES = 150  # raise it for a new feature, never for a new corner of an old one
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def name_of(file: Path) -> str:
    """The module's name without the package's: "" for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def imports(name: str) -> set[str]:
    """Every module of the package that this one imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "prx_composer":
            package = node.module.partition(".")[2]
            for alias in node.names:
                below = f"{package}.{alias.name}".strip(".")
                found.add(below if below in MODULES else package)
        elif isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[2] for alias in node.names if alias.name.partition(".")[0] == "prx_composer")
    return found - {name, ""}  # the package itself holds its version alone


IMPORTS = {name: imports(name) for name in MODULES}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in MODULES} - {""} == FLOOR.keys()


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_down_only(floor: int) -> None:
    up = [
        f"{name} → {imported}"
        for name in MODULES
        if FLOOR.get(room(name)) == floor
        for imported in IMPORTS[name]
        if room(imported) != room(name) and FLOOR[room(imported)] >= floor
    ]
    assert not up, up


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {name: set(imported) for name, imported in IMPORTS.items()}
    while free := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in free}
    assert not left, {name: imported & left.keys() for name, imported in left.items()}


def test_no_file_is_over_400_lines_and_there_are_not_more_than_there_were() -> None:
    lines = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert not {name: count for name, count in lines.items() if count > 400}
    assert len(MODULES) <= MOST_MODULES


def test_no_function_is_over_60_lines_or_takes_over_12_parameters() -> None:
    wrong = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60 or (parameters > 12 and node.name != "__init__"):
                    wrong[f"{name}:{node.name}"] = (lines, parameters)
    assert not wrong, wrong


def test_a_file_s_name_occurs_once() -> None:
    names = Counter(name.rpartition(".")[2] for name, file in MODULES.items() if file.name != "__init__.py")
    assert not {name: count for name, count in names.items() if count > 1}


def test_the_core_knows_no_plug_in_by_name() -> None:
    knowing = [
        name
        for name, tree in TREES.items()
        if room(name) not in ("integrations", "cli")
        and any(isinstance(node, ast.Constant) and "llm_foundry" in str(node.value) for node in ast.walk(tree))
    ]
    assert not knowing, knowing
