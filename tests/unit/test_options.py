"""A verb's options are the fields of its dataclass, and reading them costs nothing."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from prx_composer import cli
from prx_composer.commands import Parsed, command, parse_size
from prx_composer.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    recipe: Annotated[list[str], typer.Argument(help="What is read.")]
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many.")] = 3
    code: Annotated[list[str], typer.Option(metavar="FILE", help="What is executed.")] = field(default_factory=list)
    output: Annotated[str, typer.Option(help="What is written.")]
    quick: Annotated[bool, typer.Option("--quick", help="Whether it hurries.")] = False


def invoke(*arguments: str) -> tuple[list[Options], str]:
    given: list[Options] = []

    def verb(options: Options) -> None:
        """Do it."""
        given.append(options)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command("do")(command(verb))
    return given, CliRunner().invoke(app, list(arguments)).output


def test_a_verb_is_called_with_its_dataclass_as_it_was_given_or_with_the_defaults() -> None:
    ((options,), _) = invoke("a.yaml", "b=1", "--output", "x")
    assert options == Options(recipe=["a.yaml", "b=1"], output="x")
    ((options,), _) = invoke("a.yaml", "--output", "x", "-n", "4", "--code", "f.py", "--code", "g.py", "--quick")
    assert options == Options(recipe=["a.yaml"], output="x", count=4, code=["f.py", "g.py"], quick=True)


def test_lists_that_are_left_out_are_not_shared() -> None:
    first, second = (invoke("a.yaml", "--output", "x")[0][0] for _ in range(2))
    first.code.append("f.py")
    assert second.code == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("a.yaml",), "Missing option '--output'"), (("a.yaml", "--output", "x", "-n", "0"), "greater than or equal to 1")],
)
def test_what_is_wrong_never_reaches_the_verb(arguments: tuple[str, ...], expected: str) -> None:
    given, output = invoke(*arguments)
    assert not given and expected in output


def test_the_help_is_the_verbs_docstring_and_the_fields_words() -> None:
    _, output = invoke("--help")
    assert all(words in output for words in ("Do it.", "-n, --count", "How many.", "[default: 3; x>=1]", "--code FILE"))


@dataclass(frozen=True, kw_only=True)
class Reading:
    sizes: Annotated[
        dict[str, int], Parsed(list[str], lambda given: {text: len(text) for text in given}, []), typer.Option(help="?")
    ]
    made: int = 5  # no option


def test_a_verb_takes_the_options_of_several_dataclasses_parsed_and_no_field_that_is_none() -> None:
    given: list[Any] = []

    def verb(options: Options, reading: Reading) -> None:
        given.extend((options, reading))

    app = typer.Typer(add_completion=False)
    app.command("do")(command(verb))
    assert CliRunner().invoke(app, ["a.yaml", "--output", "x", "--sizes", "ab", "--sizes", "c"]).exit_code == 0
    assert given == [Options(recipe=["a.yaml"], output="x"), Reading(sizes={"ab": 2, "c": 1})]
    assert CliRunner().invoke(app, ["a.yaml", "--output", "x"]).exit_code == 0 and given[3] == Reading(sizes={})
    assert "made" not in CliRunner().invoke(app, ["--help"]).output


VERBS = [(name,) for name in cli.VERBS] + [(group, name) for group, (_, verbs) in cli.GROUPS.items() for name in verbs]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_has_a_word_on_every_option(verb: tuple[str, ...]) -> None:
    found: Any = typer.main.get_command(cli.app)
    for name in verb:
        found = found.commands[name]
    said = " ".join(CliRunner().invoke(cli.app, [*verb, "--help"]).output.split())
    for parameter in found.params:
        assert parameter.help and " ".join(parameter.help.split())[:40] in said, parameter.name


def test_the_command_line_is_read_without_torch() -> None:
    code = (
        "import sys, prx_composer.cli\n"
        "prx_composer.cli.env.environment(), prx_composer.cli.recipes.list_recipes(type('', (), {'invoked_subcommand': None}))\n"
        "heavy = {'torch', 'composer', 'transformers', 'diffusers', 'streaming', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("text", "expected"), [("512x768", (512, 768)), ("512×768", (512, 768)), ("32", (32, 32))])
def test_a_size_is_height_by_width_or_one_number(text: str, expected: tuple[int, int]) -> None:
    assert parse_size(text) == expected
    for wrong in ("", "5x", "5x6x7", "big"):
        with pytest.raises(UserError, match="--size"):
            parse_size(wrong)
