"""Stacks and numbers of `benchmarks/ablate.py --cost`. Nothing timed is asserted: the times here are made up."""

import importlib
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prx_composer.common.errors import UserError
from prx_composer.recipe import config

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
ablate: Any = importlib.import_module("ablate")
cost: Any = importlib.import_module("ablate_cost")
turns: Any = importlib.import_module("turns")

MINI = str(REPOSITORY / "yamls" / "24h_mini.yaml")
QUICKSTART = str(REPOSITORY / "yamls" / "quickstart.yaml")
STAGES = str(REPOSITORY / "yamls" / "ablations" / "progressive_resolution.yaml")


# --------------------------------------------------------------------------------------------------------- stacks


def test_stacks_are_each_one_alone_and_the_whole_without_each() -> None:
    assert cost.stacks_of(["a", "b", "c"]) == {
        "bare": frozenset(),
        "whole": frozenset("abc"),
        "bare+a": frozenset("a"),
        "bare+b": frozenset("b"),
        "bare+c": frozenset("c"),
        "whole-a": frozenset("bc"),
        "whole-b": frozenset("ac"),
        "whole-c": frozenset("ab"),
    }


@pytest.mark.parametrize(("algorithms", "names"), [("a", ["bare", "whole"]), ("ab", ["bare", "whole", "bare+a", "bare+b"])])
def test_no_stack_is_trained_twice_under_two_names(algorithms: str, names: list[str]) -> None:
    assert list(cost.stacks_of(list(algorithms))) == names


@pytest.mark.parametrize("together", [3, 4, 6, 18, 99])
def test_every_group_has_bare_and_whole_and_every_other_stack_is_in_one(together: int) -> None:
    names = list(cost.stacks_of(list("abcdefgh")))
    groups = cost.in_groups(names, together)
    assert all(group[:2] == ["bare", "whole"] and len(group) <= together for group in groups)
    assert list(chain.from_iterable(group[2:] for group in groups)) == names[2:]
    assert cost.in_groups(["bare", "whole"], together) == [["bare", "whole"]]


def planned(arguments: list[str]) -> list[Any]:
    return cost.plan(cost.parse_arguments(arguments))


def algorithms_of(run: Any) -> dict[str, Any]:
    """The algorithms that train.py builds from a run's arguments."""
    recipe = config.load(run.arguments)
    config.check(recipe)
    return {name: arguments for name, arguments in recipe.algorithms.items() if arguments is not False}


def test_every_run_of_the_24h_recipe_is_its_stage_with_just_the_algorithms_of_its_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (first, first_runs), (second, second_runs) = planned([MINI, "--cost", "--steps", "7", "--turn", "3"])
    shared = ["skip_nonfinite", "gradient_clipping", "low_precision_norm", "ema", "tread", "lpips", "perceptual_dino"]
    assert first.algorithms == [*shared[:5], "repa", *shared[5:]] and first.closed == []
    assert second.algorithms == shared and second.closed == ["repa"]  # it ends with the first stage
    for stage, groups, shape in ((first, first_runs, (32, 16, 16)), (second, second_runs, (40, 16, 16))):
        stacks = cost.stacks_of(stage.algorithms)
        seen = {run.stack.name: run for run in chain.from_iterable(groups)}
        assert seen.keys() == stacks.keys()
        for name in ("bare", "whole", "bare+tread", "whole-ema"):
            assert algorithms_of(seen[name]).keys() == stacks[name]
        recipe = config.load(seen["whole"].arguments)
        assert (recipe.image_size, recipe.global_train_batch_size, recipe.device_train_microbatch_size) == shape
        assert recipe.max_duration == "12ba"  # one turn to warm up, three that count
        assert (recipe.eval_loader, recipe.callbacks, recipe.preflight) == (None, {}, False)
    whole = first_runs[0][1]
    assert (algorithms_of(whole)["repa"]["start"], algorithms_of(whole)["repa"]["end"]) == ("0ba", None)


def test_a_kept_algorithm_is_in_all_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [(stage, [[bare, whole]])] = planned([QUICKSTART, STAGES, "--cost", "--keep", "gradient_clipping", "--stage", "1"])
    assert (stage.algorithms, stage.kept) == (["ema"], ["gradient_clipping"])
    assert list(algorithms_of(bare)) == ["gradient_clipping"]
    assert list(algorithms_of(whole)) == ["gradient_clipping", "ema"]


LATE = """
from composer.core import Algorithm
from prx_composer import registry

@registry.algorithms.register("late_{number}")
class Late(Algorithm):
    def __init__(self, strength: float = 1.0, start: str = "{start}"):
        pass
"""


@pytest.mark.parametrize(("start", "measured"), [("0.5dur", False), ("0.25dur", True)])
def test_ones_own_algorithm_opens_when_its_signature_says_so(
    start: str,
    measured: bool,
    tiny_recipe: dict[str, Any],
    write_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"late_{int(measured)}"
    Path("late.py").write_text(LATE.format(number=int(measured), start=start))
    tiny_recipe["algorithms"]["progressive_resolution"] = False
    tiny_recipe["algorithms"][name] = {}
    [(stage, groups)] = planned([write_recipe(tiny_recipe | {"code_paths": ["late.py"]}), "--cost"])
    assert (name in stage.algorithms, stage.closed) == (measured, [] if measured else [name])
    if measured:
        assert algorithms_of(groups[0][1])[name] == {"start": "0ba"}  # it has no `end` that could be given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "2"], "--stage 2: the recipe has 2 that train, from 0."),
        (["--keep", "emma"], "--keep emma: the recipe has no such algorithm. Did you mean 'ema'"),
        (["--keep", "ema", "--keep", "gradient_clipping"], "no algorithm whose cost could be measured"),
        (["algorithms.ema=false", "algorithms.gradient_clipping=false"], "no algorithm whose cost could be measured"),
        (["algorithms.emma={}"], "algorithms.emma: there is no 'emma'"),
        (["max_duration=1ep"], "cannot be in epochs"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ablate.main([QUICKSTART, STAGES, "--cost", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_overwritten_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("found.md").touch()
    with pytest.raises(UserError, match="found.md is there already; give --overwrite"):
        planned([QUICKSTART, "--cost", "--output", "found"])
    planned([QUICKSTART, "--cost", "--output", "found", "--overwrite"])
    assert not Path("found.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--together", "2"], "--together must be at least 3"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--stored-text"], "give both"),
        (["--stack", "base"], "unrecognized arguments: --stack"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablate.main([QUICKSTART, "--cost", *arguments])
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- numbers

STACKS = cost.stacks_of(["repa", "tread"])  # bare, whole, bare+repa, bare+tread
TIMES = {"bare": 100.0, "bare+repa": 120.0, "bare+tread": 75.0, "whole": 90.0}
MEMORY = {"bare": 1000.0, "bare+repa": 1300.0, "bare+tread": 900.0, "whole": 1150.0}


def measurement(stack: str, group: int = 0, slowdown: tuple[float, ...] = (9.0, 1.0, 3.0, 2.0), **changes: Any) -> Any:
    """Two steps a turn on a machine that is slower in some rounds; what is said of the first is far off."""
    steps = [
        {"turn": turn, "loader_ms": 5.0, "step_ms": factor * TIMES[stack] * part, "memory_mb": MEMORY[stack] - 1 + turn / 3}
        for turn, factor in enumerate(slowdown)
        for part in ((0.5, 1.5) if turn else (7.0, 7.0))
    ]
    return cost.Measurement(**({"stack": stack, "group": group, "steps": steps, "failed": None} | changes))


def summary(measurements: list[Any]) -> dict[str, Any]:
    return {"number": 1, "sizes": "16 px, batch 4, microbatch 4", "kept": [], "closed": ["lpips"]} | cost.summarise(
        measurements, ["repa", "tread"], STACKS
    )


def test_what_an_algorithm_adds_is_free_of_the_machines_slowdown() -> None:
    found = summary([measurement(name) for name in STACKS])
    bare, whole, *_ = found["stacks"]
    assert (bare["step_ms"]["median"], bare["x_bare"]["median"], bare["loader_ms"]) == (200.0, 1.0, 5.0)
    assert {key: whole["x_bare"][key] for key in ("median", "p25", "p75", "rounds")} == pytest.approx(
        {"median": 0.9, "p25": 0.9, "p75": 0.9, "rounds": 3}
    )
    repa, tread = found["effects"]
    assert [row["algorithm"] for row in found["effects"]] == ["repa", "tread"]
    assert (repa["alone"]["share"]["median"], repa["alone"]["ms"]["median"]) == pytest.approx((0.2, 40.0))
    assert (tread["alone"]["share"]["median"], tread["alone"]["ms"]["median"]) == pytest.approx((-0.25, -50.0))
    # In the whole, of 90: without REPA there is TREAD alone, 75; without TREAD there is REPA alone, 120.
    assert repa["in_the_whole"]["share"]["p25"] == pytest.approx(15 / 90, abs=1e-4)
    assert tread["in_the_whole"]["ms"]["median"] == pytest.approx(-60.0)
    assert [repa[side]["memory_mb"] for side in ("alone", "in_the_whole")] == [300.0, 250.0]
    assert (found["together"]["share"]["median"], found["together"]["memory_mb"]) == (pytest.approx(-0.1), 150.0)


def test_groups_are_compared_within_themselves_and_bare_and_whole_over_all() -> None:
    slow = (1.0, 50.0, 70.0)
    measured = [measurement(name) for name in ("bare", "whole", "bare+repa")]
    measured += [measurement(name, 1, slow) for name in ("bare", "whole", "bare+tread")]
    found = summary(measured)
    repa, tread = found["effects"]
    assert (repa["alone"]["share"]["rounds"], tread["alone"]["share"]["rounds"]) == (3, 2)
    assert (repa["alone"]["share"]["median"], tread["alone"]["share"]["median"]) == pytest.approx((0.2, -0.25))
    assert found["together"]["share"] == pytest.approx({"median": -0.1, "p25": -0.1, "p75": -0.1, "rounds": 5})


def test_what_happens_once_in_a_turn_has_its_share() -> None:
    bare = [{"turn": turn, "loader_ms": 0.0, "step_ms": 10.0, "memory_mb": 1.0} for turn in range(3) for _ in range(10)]
    now_and_then = [row | {"step_ms": 110.0 if number % 10 == 9 else 10.0} for number, row in enumerate(bare)]
    stacks = cost.stacks_of(["ema"])
    measured = [cost.Measurement("bare", 0, bare), cost.Measurement("whole", 0, now_and_then)]
    [ema] = cost.summarise(measured, ["ema"], stacks)["effects"]
    assert ema["alone"]["ms"]["median"] == 10.0 and ema["alone"]["share"]["median"] == 1.0
    assert ema["in_the_whole"]["ms"]["median"] == 10.0 and ema["in_the_whole"]["share"]["median"] == 0.5


REFUSAL = "error: algorithms.repa needs a|b in the stack."


def test_a_refused_stack_is_a_line_and_the_others_have_their_numbers(tmp_path: Path) -> None:
    found = summary([measurement(name) for name in STACKS if name != "bare+repa"] + [measurement("bare+repa", failed=REFUSAL)])
    repa, tread = found["effects"]
    assert (repa["alone"]["ms"], repa["in_the_whole"]["ms"]["median"]) == (None, pytest.approx(30.0))
    assert (tread["alone"]["ms"]["median"], tread["in_the_whole"]["ms"]) == (pytest.approx(-50.0), None)
    assert repa["alone"]["failed"] == [f"bare+repa: {REFUSAL}"]
    text = cost.tables(found)
    assert "| `bare+repa` | refused: algorithms.repa needs a\\|b in the stack. |" in text
    assert "left out: lpips" in text
    first, second = text.split("\n\n")[1:]
    for table in (first, second):
        assert len({line.replace("\\|", "").count("|") for line in table.strip().splitlines()}) == 1
    cost.plot([found, found], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_without_the_bare_recipe_the_whole_is_still_measured(tmp_path: Path) -> None:
    nothing = cost.Measurement("bare", 0, [], "RuntimeError: out of patience")
    found = summary([nothing, *(measurement(name) for name in STACKS if name != "bare")])
    assert [row["alone"]["ms"] for row in found["effects"]] == [None, None]
    assert found["effects"][1]["in_the_whole"]["ms"]["median"] == pytest.approx(-60.0)
    assert "| `bare` | failed: RuntimeError: out of patience |" in cost.tables(found)
    assert not found["stacks"][0]["refused"]
    cost.plot([found], tmp_path / "bars.png")


def test_table_says_what_is_added_with_its_sign() -> None:
    lines = cost.tables(summary([measurement(name) for name in STACKS])).splitlines()
    assert "| `repa` | +40.0 | +20.0 (+20.0 to +20.0) | +300 | +30.0 | +16.7 (+16.7 to +16.7) | +250 |" in lines
    assert "| **together** | -20.0 | -10.0 (-10.0 to -10.0) | +150 |  |  |  |" in lines
    assert "| sum of the lines | -10.0 | | | -30.0 | | |" in lines


def test_a_refusal_is_quoted_in_full_and_a_crash_by_its_last_line(tmp_path: Path) -> None:
    run = turns.Run(turns.Stack("bare", ()), 17, tmp_path / "bare", [], [])
    run.process = SimpleNamespace(returncode=1)
    run.log.write_text("a warning\n\nerror: two things are wrong:\n  one\n  another\n\n")
    assert run.failure() == "error: two things are wrong: one another"
    run.log.write_text("Traceback\n  x\n[rank0]: RuntimeError: out of patience\n")
    assert run.failure() == "RuntimeError: out of patience"
