"""The table of benchmarks/README.md against the benchmarks and their results; the command line that a signature makes."""

import ast
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from prx_composer.common.errors import UserError

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))
common: Any = importlib.import_module("common")

ROW = re.compile(
    r"^\| (?P<question>[^|]+\?) \| `benchmarks/(?P<script>\w+\.py) (?P<arguments>[^`]*)` \| (?P<result>[^|]+) \|$", re.M
)
TABLE = (BENCHMARKS / "README.md").read_text()
ROWS = [found.groupdict() for found in ROW.finditer(TABLE)]


def questions(script: Path) -> list[str] | None:
    """Return the names by which a script is asked, those of the functions that it gives to `main`; [] if it has one question."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    asked = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "main"]
    names = [[argument.id.replace("_", "-") for argument in call.args if isinstance(argument, ast.Name)][1:] for call in asked]
    return max(names, key=len, default=None)


FOUND = {path.name: questions(path) for path in BENCHMARKS.glob("*.py")}
SCRIPTS = {script: names for script, names in FOUND.items() if names is not None}


def test_every_line_of_the_table_is_a_question_with_a_command_and_a_result() -> None:
    lines = TABLE.split("| question |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["question"])
def test_a_question_of_the_table_names_a_command_and_a_result_that_are_there(row: dict[str, str]) -> None:
    names = SCRIPTS[row["script"]]
    assert len(names) < 2 or row["arguments"].split()[0] in names
    link = re.search(r"\((results/[^)]+)\)", row["result"])
    assert "none yet" in row["result"] if link is None else (BENCHMARKS / link[1]).is_file()


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in SCRIPTS.items() for name in names or [""]])
def test_every_question_that_can_be_asked_is_in_the_table(script: str, name: str) -> None:
    rows = [row for row in ROWS if row["script"] == script]
    assert rows and (len(SCRIPTS[script]) < 2 or name in {row["arguments"].split()[0] for row in rows})


def test_results_are_named_by_date_machine_and_question_and_say_so_too() -> None:
    for path in (BENCHMARKS / "results").iterdir():
        named = re.fullmatch(r"(\d{4}-\d\d-\d\d)_([a-z0-9]+)_[\w-]+\.(json|md|png)", path.name)
        assert named, path.name
        if named[3] == "json":
            result = json.loads(path.read_text())
            assert result["date"] == named[1] and named[2] in result["machine"].lower(), path.name


def test_every_link_to_a_result_leads_to_one() -> None:
    pages = [
        page for place in ("*", "benchmarks/*", "prx_composer/**/*", "recipes/**/*") for page in REPOSITORY.glob(f"{place}.md")
    ]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]*results/[^)#]*)\)", page.read_text())]
    links = [(page, link) for page, link in links if "://" not in link]
    assert len(links) > 30
    assert not [(str(page), link) for page, link in links if not (page.parent / link).exists()]


# --------------------------------------------------------------------------------------------------- command line


def asked(
    recipe: Annotated[list[str], "files"],
    *,
    rounds: int = 3,
    stage: Sequence[int] = (),
    seeds: Sequence[int] = (1, 2),
    engine: Literal["local", "ray"] = "local",
    compile: bool = True,
    quick: bool = False,
    name: str | None = None,
) -> dict[str, Any]:
    """Whether options are what the signature says.

    More about it.
    """
    if name == "wrong":
        raise UserError("--name wrong: take another.")
    given = dict(recipe=recipe, rounds=rounds, stage=stage, seeds=seeds, engine=engine, compile=compile, quick=quick, name=name)
    return {"given": given, "ratios": {"a": {"median": 1.5}}, "failed": name == "failing"}


def other(*, base: str) -> dict[str, Any]:
    """Another question."""
    return {"base": base}


def answer(*arguments: str) -> int:
    return common.main("About both.", asked, other, argv=["benchmarks/questions.py", *arguments])


def test_a_question_s_signature_is_its_command_line(tmp_path: Path) -> None:
    options = ["--stage", "0", "--stage", "1", "--seeds", "7", "8", "--engine", "ray", "--no-compile", "--quick", "b.yaml", "x=1"]
    options = [*options[:4], "--rounds", "5", *options[4:11], "--output", str(tmp_path / "made" / "found.json"), *options[11:]]
    assert answer("asked", "a.yaml", *options) == 0
    found = json.loads((tmp_path / "made" / "found.json").read_text())
    expected = dict(rounds=5, stage=[0, 1], seeds=[7, 8], engine="ray", compile=False, quick=True, name=None)
    assert found["given"] == {"recipe": ["a.yaml", "b.yaml", "x=1"], **expected}
    assert found["what"] == "Whether options are what the signature says."
    assert found["command"].startswith("python benchmarks/questions.py asked a.yaml") and found["date"] and found["versions"]


def test_the_first_question_is_asked_by_default_and_medians_can_be_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("a.yaml", "--json") == 0
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == {"a": 1.5}
    assert '"stage": [],' in said and '"seeds": [1, 2],' in said


def test_failures_end_a_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("a.yaml", "--name", "failing") == 1
    assert answer("a.yaml", "--name", "wrong") == 1
    assert capsys.readouterr().err == "error: --name wrong: take another.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["asked"], "required: recipe"),
        (["other"], "required: --base"),
        (["other", "--base", "x", "--rounds", "2"], "unrecognized arguments: --rounds"),
        (["a.yaml", "--engine", "spark"], "choose from"),
        (["a.yaml", "--rounds", "many"], "invalid int value"),
    ],
)
def test_what_a_signature_does_not_take_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        answer(*arguments)
    assert message in capsys.readouterr().err


def test_help_says_which_questions_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer("--help") == 0
    said = capsys.readouterr().out
    assert "About both." in said and "  asked: Whether options" in said and "  other: Another question." in said
