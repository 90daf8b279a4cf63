"""Differences between stacks over seeds: intervals and verdicts of an ablation, and the lines that cards get from them."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from prx_composer.common.errors import UserError

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
numbers: Any = importlib.import_module("ablate_numbers")
folders: Any = importlib.import_module("ablate_folder")
reporting: Any = importlib.import_module("ablate_report")
cards: Any = importlib.import_module("card_lines")


def run(stack: str, seed: int, accuracy: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    return {
        "stack": stack,
        "seed": seed,
        "group": f"seed{seed}-0",
        "failed": None,
        "steps": 100,
        "accuracy": accuracy,
        "accuracy_key": "heldout_accuracy",
        "validation_loss": 0.03,
        "validation_key": "metrics/eval/mse",
        "ratio": {"median": 1.0},
        "seconds_to_target": 100.0,
    } | changes


def comparison(runs: list[dict[str, Any]], column: str = "accuracy", **known: Any) -> dict[str, Any]:
    found = numbers.compare(runs, {"base": {}, "base+x": known})
    return next(one for one in found if one["column"] == column)


def pairs(base: list[float], own: list[float], key: str = "accuracy") -> list[dict[str, Any]]:
    runs = [run("base", seed, **{key: value}) for seed, value in enumerate(base)]
    return runs + [run("base+x", seed, **{key: value}) for seed, value in enumerate(own)]


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize("column", ["accuracy", "seconds_to_target"])
def test_an_interval_is_that_of_scipy_s_paired_test(seeds: int, column: str) -> None:
    draw = np.random.default_rng(seeds)
    base, own = draw.uniform(0.5, 1.0, seeds), draw.uniform(0.5, 1.0, seeds)
    found = comparison(pairs(base.tolist(), own.tolist(), column), column)
    scale = np.log if column == "seconds_to_target" else np.asarray  # of times, factors
    oracle: Any = stats.ttest_rel(scale(own), scale(base))
    ends = oracle.confidence_interval(0.95)
    assert (found["low"], found["high"], found["p"]) == pytest.approx((ends.low, ends.high, oracle.pvalue), rel=1e-9)
    assert found["mean"] == pytest.approx(float(np.mean(scale(own) - scale(base))))
    assert (found["verdict"] == "no difference seen") == (ends.low <= 0 <= ends.high) == (oracle.pvalue >= 0.05)


def test_intervals_hold_the_truth_nineteen_times_of_twenty() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        found = numbers.interval(draw.normal(0.3, 1.0, 3).tolist())
        held += found["low"] <= 0.3 <= found["high"]
    assert held / 1000 == pytest.approx(0.95, abs=0.02)


def test_holm_s_correction_is_the_one_of_his_procedure() -> None:
    """Sorted, the k-th of n is multiplied by n − k + 1, and none is less than one before it; the example is a textbook's."""
    assert numbers.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert numbers.holm([0.9, 0.8]) == [1.0, 1.0] and numbers.holm([]) == []


def test_by_chance_one_comparison_in_twenty_differs_and_none_of_all_together() -> None:
    draw = np.random.default_rng(1)
    stacks = {"base": {}} | {f"base+{index}": {} for index in range(200)}
    runs = [run(stack, seed, float(draw.normal())) for stack in stacks for seed in range(3)]
    found = [one for one in numbers.compare(runs, stacks) if one["column"] == "accuracy"]
    told = numbers.chance(found)
    assert told["comparisons"] == 200 and told["by_chance"] == pytest.approx(10.0)
    assert 3 <= told["different"] <= 25 and told["of_all_together"] == 0


# --------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("column", "base", "own", "verdict", "words"),
    [
        ("accuracy", [0.90, 0.91, 0.92], [0.95, 0.97, 0.96], "better", "better by 0.050 (0.025 to 0.075)"),
        ("accuracy", [0.95, 0.97, 0.96], [0.90, 0.91, 0.92], "worse", "worse by 0.050 (0.025 to 0.075)"),
        ("accuracy", [0.90, 0.95, 0.92], [0.95, 0.90, 0.93], "no difference seen", "no difference seen (−0.122 to +0.128)"),
        ("validation_loss", [0.03, 0.031, 0.032], [0.02, 0.0215, 0.022], "better", "better by 0.0098 (0.0091 to 0.0106)"),
        ("validation_loss", [0.02, 0.0215, 0.022], [0.03, 0.031, 0.032], "worse", "worse by 0.0098 (0.0091 to 0.0106)"),
        ("seconds_to_target", [100.0, 100.0, 100.0], [50.0, 52.0, 48.0], "better", "better by 50% (45% to 55%)"),
        ("seconds_to_target", [50.0, 52.0, 48.0], [100.0, 100.0, 100.0], "worse", "worse by 100% (81% to 121%)"),
        ("seconds_to_target", [100.0, 100.0, 100.0], [99.0, 104.0, 98.0], "no difference seen", None),
        ("accuracy", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "no difference seen", "no difference seen (+0.000 to +0.000)"),
        ("accuracy", [0.9], [0.95], "one seed", "+0.050, not judged: one seed has no interval"),
        (
            "accuracy",
            [0.90, 0.92],
            [0.92, 0.94],  # alike but for rounding
            "not judged",
            "+0.020, not judged: the same difference in every seed has no interval",
        ),
    ],
)  # fmt: skip
def test_verdicts_are_words(column: str, base: list[float], own: list[float], verdict: str, words: str | None) -> None:
    found = comparison(pairs(base, own, column), column)
    assert found["verdict"] == verdict
    assert words is None or found["words"] == words


def test_the_time_of_a_step_is_a_factor_of_the_base_s() -> None:
    runs = [run("base", seed) for seed in range(3)]
    runs += [run("base+x", seed, ratio={"median": ratio}) for seed, ratio in enumerate((0.80, 0.83, 0.81))]
    found = comparison(runs, "step")
    assert found["verdict"] == "better" and found["words"].startswith("better by 19% (")
    assert math.exp(found["mean"]) == pytest.approx((0.80 * 0.83 * 0.81) ** (1 / 3))


def test_a_run_that_died_leaves_no_pair_and_is_said() -> None:
    runs = pairs([0.90, 0.91, 0.92, 0.92], [0.95, 0.97, 0.96, 0.9])
    runs[7] |= {"failed": "ValueError: no"}
    runs[0] |= {"failed": "killed by SIGKILL"}
    found = comparison(runs)
    assert [pair["seed"] for pair in found["pairs"]] == [1, 2]
    assert found["dropped"] == [
        {"seed": 0, "why": "base failed after step 100: killed by SIGKILL"},
        {"seed": 3, "why": "base+x failed after step 100: ValueError: no"},
    ]
    assert found["words"].endswith(", in 2 of 4 seeds")
    assert comparison(runs[:1] + runs[4:5])["verdict"] == "no pair"
    assert (
        comparison([run("base", 0), run("base+x", 0, group="seed0-1")])["dropped"][0]["why"]
        == "base has not been trained beside it"
    )


def test_times_to_a_target_that_some_never_reach_are_counted_and_not_compared() -> None:
    runs = pairs([100.0, 100.0, 100.0], [50.0, 52.0, 48.0], "seconds_to_target")
    runs[4] |= {"seconds_to_target": None}
    found = comparison(runs, "seconds_to_target")
    assert (found["verdict"], found["p"]) == ("not compared", None)
    assert found["words"] == "not compared: seeds that reached it: 2 of 3 with base+x and 3 of 3 with base"
    assert comparison(runs)["verdict"] == "no difference seen"


def test_a_loss_of_another_velocity_is_not_compared() -> None:
    runs = pairs([0.03, 0.03], [0.02, 0.021], "validation_loss")
    reason = {"metrics/eval/mse": "another model.flow.noise_scale"}
    assert comparison(runs, "validation_loss", not_compared=reason)["words"] == "not compared: another model.flow.noise_scale"
    assert comparison(runs, not_compared=reason)["verdict"] == "no difference seen"
    runs[2] |= {"validation_key": "metrics/eval/validation_loss"}
    assert "has metrics/eval/validation_loss, base metrics/eval/mse" in comparison(runs, "validation_loss")["dropped"][0]["why"]


# ----------------------------------------------------------------------------------------------------------- folder


def known(recipe: str = "r") -> dict[str, Any]:
    return {"changes": [], "arguments": ["a.yaml"], "code_paths": [], "recipe": recipe}


def test_groups_hold_the_base_and_what_is_new_and_starts_add_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    question = {"recipe": ["a.yaml"], "turn": 25}
    folder = folders.Folder(Path("found"), False, question)
    stacks = {name: known() for name in ("base", "a", "b", "c")}
    folder.add([17, 1], stacks, together=3)
    said = [(group.seed, group.folder.name, list(group.stacks)) for group in folder.groups()]
    assert said == [
        (17, "seed17-0", ["base", "a", "b"]),
        (17, "seed17-1", ["base", "c"]),
        (1, "seed1-0", ["base", "a", "b"]),
        (1, "seed1-1", ["base", "c"]),
    ]
    folder.add([17, 1], stacks, together=3)
    assert len(folder.groups()) == 4
    folder.add([2], {"base": known(), "d": known()}, together=6)
    added = [(group.seed, list(group.stacks)) for group in folder.groups()[4:]]
    assert added == [(17, ["base", "d"]), (1, ["base", "d"]), (2, ["base", "a", "b", "c", "d"])]
    with pytest.raises(UserError, match="--stack a: its recipe is another"):
        folder.add([17], {"base": known(), "a": known("other")}, together=6)
    folders.os.close(folder.lock)
    with pytest.raises(UserError, match="compares with another turn: 25, where 5 is asked for now"):
        folders.Folder(Path("found"), False, question | {"turn": 5})


def test_a_folder_is_one_start_s_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "WAIT_SECONDS", 0.1)
    folder = folders.Folder(Path("found"), False, {})
    with pytest.raises(UserError, match="in use by another"):
        folders.Folder(Path("found"), True, {})
    folders.os.close(folder.lock)
    folders.Folder(Path("found"), True, {})


@pytest.mark.parametrize(
    ("end", "left", "again"),
    [
        (None, True, True),
        ({"code": 0}, False, False),
        ({"code": 1}, False, True),
        ({"code": -9}, True, True),
        ({"code": 143}, True, True),
    ],
)
def test_what_was_killed_goes_on_and_what_failed_only_if_asked(
    end: dict[str, Any] | None, left: bool, again: bool, tmp_path: Path
) -> None:
    [one] = folders.Group(1, tmp_path, {"base": known()}).runs()
    if end is not None:
        one.end_file.write_text(json.dumps(end | {"failed": "x"}))
    assert [bool(folders.to_train([one], way)) for way in (False, True)] == [left, again]


# ----------------------------------------------------------------------------------------------------------- report


def result(runs: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    about = {"changes": [], "adds": [], "leaves_out": [], "sets": [], "notes": [], "not_compared": {}}
    stacks = dict.fromkeys((run["stack"] for run in runs), about)
    for name, one in changes.pop("stacks", {}).items():
        stacks[name] = about | one
    found = numbers.compare(runs, stacks)
    start = {"date": "2026-12-01", "machine": "m", "threads": 2, "load": 0.1, "versions": {}, "command": "python …"}
    return (
        start
        | {
            "what": "stacks",
            "recipe": ["yamls/quickstart.yaml", "max_duration=1000ba"],
            "length": "1000ba, where the recipe has 2000ba",
            "starts": [start],
            "seeds": sorted({run["seed"] for run in runs}),
            "target": 0.9,
            "still_to_train": 0,
            "chance": numbers.chance(found),
            "stacks": stacks,
            "refused": [{"stack": "base+ema", "changes": [], "reason": "has it"}],
            "comparisons": found,
            "runs": [
                {"step_ms": {"median": 100.0}, "train_seconds": 1.0, "memory_mb": 5, "loss": 0.1, "trained_parameters": 7} | run
                for run in runs
            ],
        }
        | changes
    )


def test_a_report_says_what_was_left_out_how_many_seeds_and_what_chance_does() -> None:
    runs = pairs([0.90, 0.91, 0.92], [0.95, 0.97, 0.96])
    runs[0] |= {"failed": "ValueError: a|b"}
    told = reporting.report(result(runs, still_to_train=4))
    assert "**Not complete: 4 runs are still to be trained" in told
    assert "`base+ema` was not trained: has it" in told
    assert "`base+x` has no pair with seed 0: base failed after step 100: ValueError: a\\|b" in told
    assert "Of 4 comparisons with an interval, 0.2 would be called better or worse by chance" in told
    assert "One seed has no interval" not in told and "no difference seen (" in told and ", in 2 of 3 seeds" in told
    assert "**One seed has no interval: nothing here is judged.**" in reporting.report(result(pairs([0.9], [0.95])))
    assert "three times as wide" in reporting.report(result(pairs([0.9, 0.91], [0.95, 0.97])))


# ------------------------------------------------------------------------------------------------------------ cards


def write(folder: Path, name: str, **changes: Any) -> None:
    runs = pairs([0.90, 0.91, 0.92], [0.95, 0.97, 0.96])
    (folder / f"{name}.json").write_text(json.dumps(result(runs, **changes)))


def test_a_card_s_line_is_the_newest_result_of_a_stack_that_is_this_algorithm_alone(tmp_path: Path) -> None:
    adds = {"base+x": {"adds": ["tread"], "notes": ["it is tiny"]}}
    write(tmp_path, "2026-11-30_xeon_ablate-a", stacks=adds)
    write(tmp_path, "2026-12-01_xeon_ablate-a", stacks=adds)
    write(tmp_path, "2026-12-02_xeon_ablate-b", stacks={"base+x": {"adds": ["tread", "repa"]}})
    write(tmp_path, "2026-12-02_xeon_ablate-c", stacks={"base+x": {"leaves_out": ["ema"], "sets": ["model"]}})
    write(tmp_path, "2026-12-02_xeon_ablate-d", stacks={"base+x": {"adds": ["adamw"], "leaves_out": ["muon"]}})
    (tmp_path / "2026-11-24_epyc_ablate-old.json").write_text(json.dumps({"runs": []}))
    found = cards.results(tmp_path)
    names = ("tread", "repa", "ema", "muon")
    assert cards.line("tread", found, names) == (
        "**Measured here:** [quickstart](../../benchmarks/results/2026-12-01_xeon_ablate-a.md), 1000ba, where the recipe has "
        "2000ba, 3 seeds, `base+x` (added): accuracy better by 0.050 (0.025 to 0.075); validation loss no difference seen "
        "(+0.0000 to +0.0000); time of a step no difference seen (+0% to +0%). Note: it is tiny."
    )
    assert (
        cards.line("repa", found, names)
        == cards.line("ema", found, names)
        == "**Measured here:** no ablation of several seeds yet."
    )
    assert "`base+x` (left out)" in cards.line("muon", found, names), "AdamW, which takes its place, has no card"


def test_lines_take_the_place_of_the_old_ones_and_nothing_else_changes() -> None:
    text = "# Cards\n\n## ema\n\nIt averages.\n\n**Source.** X.\n\n## Your own\n\nText.\n"
    first = cards.with_lines(text, {"ema": "**Measured here:** a."})
    assert first == text.replace("X.\n", "X.\n\n**Measured here:** a.\n")
    assert cards.with_lines(first, {"ema": "**Measured here:** b."}) == first.replace("a.\n\n## Y", "b.\n\n## Y")


def test_the_cards_say_what_the_results_do() -> None:
    """If it fails: python benchmarks/card_lines.py --write."""
    text = cards.CARDS.read_text()
    found = cards.all_lines(text, cards.results())
    assert len(found) >= 17
    assert cards.with_lines(text, found) == text
