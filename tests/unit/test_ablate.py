"""Stacks, turns and tables of `benchmarks/ablate.py`. Nothing timed is asserted."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import pytest
from torch import nn

from prx_composer.common.errors import UserError
from prx_composer.recipe import config

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
ablate: Any = importlib.import_module("ablate")
turns: Any = importlib.import_module("turns")
numbers: Any = importlib.import_module("ablate_numbers")
reporting: Any = importlib.import_module("ablate_report")
folders: Any = importlib.import_module("ablate_folder")

QUICKSTART = str(REPOSITORY / "yamls" / "quickstart.yaml")


# --------------------------------------------------------------------------------------------------------- stacks


def ablation(name: str) -> str:
    return str(REPOSITORY / "yamls" / "ablations" / f"{name}.yaml")


@pytest.mark.parametrize(
    ("text", "name", "changes"),
    [
        ("base", "base", []),
        ("+muon", "base+muon", [ablation("muon")]),
        ("-ema", "base-ema", ["algorithms.ema=false"]),
        ("base-ema", "base-ema", ["algorithms.ema=false"]),
        ("+muon+tread-ema", "base+muon+tread-ema", [ablation("muon"), ablation("tread"), "algorithms.ema=false"]),
        ("-ema+low_precision_norm", "base-ema+low_precision_norm", ["algorithms.ema=false", ablation("low_precision_norm")]),
    ],
)
def test_a_stack_is_files_and_what_is_left_out_in_order(
    text: str, name: str, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stack = ablate.parse_stack(text)
    assert (stack.name, list(stack.changes)) == (name, changes)


def test_a_stack_can_name_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-stacks").mkdir()
    (tmp_path / "my-stacks" / "own-one.yaml").write_text("seed: 1\n")
    stack = ablate.parse_stack("+ema+my-stacks/own-one.yaml-ema")
    assert stack.name == "base+ema+own-one-ema"
    assert stack.files == [ablation("ema"), "my-stacks/own-one.yaml"]
    assert stack.left_out == ["ema"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("+muno", "there is no muno.yaml in yamls/ablations. Did you mean 'muon'"),
        ("+muno", "repa, resolution_aware"),
        ("+nowhere/own.yaml", "no file nowhere/own.yaml"),
        ("muon", "'muon' is not understood"),
        ("+muon+", "'+' is not understood"),
    ],
)
def test_an_unknown_stack_is_refused_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        ablate.parse_stack(text)
    assert message in str(error.value)


def test_what_is_not_in_a_recipe_cannot_be_left_out() -> None:
    with pytest.raises(UserError, match="no algorithm emma to leave out. Did you mean 'ema'"):
        ablate.check_stack([QUICKSTART], ablate.parse_stack("-emma"), [])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "yamls" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ablation_is_a_valid_change_of_the_quickstart(path: Path) -> None:
    recipe = ablate.check_stack([QUICKSTART], ablate.parse_stack(f"+{path.stem}"), [])
    assert path.read_text().startswith("# ")
    assert recipe != config.load([QUICKSTART])


def test_options_and_overrides_are_told_apart() -> None:
    options = ablate.parse_arguments(
        ["a.yaml", "--stack", "base", "--stack", "-ema", "--seed", "1", "--seed", "2", "max_duration=6ba"]
    )
    assert options.recipe == ["a.yaml", "max_duration=6ba"]
    assert options.stack == ["base", "-ema"]
    assert (options.seed, options.turn) == ([1, 2], 25)


def planned(*arguments: str) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    return ablate.plan_stacks(ablate.parse_arguments(list(arguments)))


def test_existing_results_are_kept_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "runs" / "ablate-quickstart" / "base" / "metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert ablate.main([QUICKSTART, "--stack", "base"]) == 1
    assert "runs/ablate-quickstart is there already, and nothing that could go on; give --overwrite" in capsys.readouterr().err
    assert kept.exists()
    recipe, stacks, _ = planned(QUICKSTART, "--stack", "base", "--stack", "-ema", "seed=5")
    [group] = folders.Folder(Path("runs/ablate-quickstart"), True, {"recipe": "x"}).add([recipe.seed], stacks, 6)
    base, without = group.runs()
    assert not kept.exists()
    assert (base.seed, base.folder) == (5, Path("runs/ablate-quickstart/seed5-0/base"))
    assert without.arguments[:2] == [QUICKSTART, "algorithms.ema=false"]
    assert without.arguments[-1] == "seed=5"  # the last word is the command line's
    assert "callbacks.shapes_score.interval=0.05dur" in without.arguments


def test_three_seeds_are_the_default() -> None:
    assert ablate.default_seeds(17) == [17, 1, 2] and ablate.default_seeds(2) == [2, 1, 3]


def test_icons_are_scored_in_training_too_and_have_a_target_of_their_own() -> None:
    recipe = config.load([str(REPOSITORY / "yamls" / "icons.yaml")])
    assert "callbacks.icons_score.interval=0.05dur" in ablate.defaults(recipe)
    assert (
        config.load([str(REPOSITORY / "yamls" / "icons.yaml"), *ablate.defaults(recipe)]).callbacks["icons_score"]["wordings"]
        == []
    )
    assert any(score in recipe.callbacks for score in ablate.TARGETS)


@pytest.mark.parametrize("recipe", ["quickstart", "icons"])
def test_all_are_the_files_of_the_folder_and_what_the_recipe_has_and_the_rest_is_refused_by_name(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "check_lines", lambda *_, **__: iter(()))  # each takes a third of a second
    path = REPOSITORY / "yamls" / f"{recipe}.yaml"
    base, stacks, refused = planned(str(path), "--all")
    assert next(iter(stacks)) == "base"
    reasons = {entry["stack"]: entry["reason"] for entry in refused}
    files = {f"base+{file.stem}" for file in (REPOSITORY / "yamls" / "ablations").glob("*.yaml")}
    assert stacks.keys() | reasons.keys() == {"base", *files, *(f"base-{name}" for name in base.algorithms)}
    assert "has algorithms.ema already" in reasons["base+ema"] and "base-ema" in stacks
    assert "has optimizer already" in reasons["base+muon"] and stacks["base+adamw"]["leaves_out"] == ["muon"]
    assert "base+normuon" in stacks, "a setting that the recipe hasn't is something new"
    assert any("muon.normuon to True" in note for note in stacks["base+normuon"]["notes"])
    assert stacks["base+tread"]["adds"] == ["tread"] and stacks["base-ema"]["leaves_out"] == ["ema"]
    assert not stacks["base+tread"]["sets"] and not stacks["base+tread"]["notes"] and not stacks["base-ema"]["sets"]
    assert "random weights" in stacks["base+repa"]["notes"][0] and "random weights" in stacks["base+lpips"]["notes"][0]
    assert "noise_scale" in stacks["base+noise_scale"]["not_compared"]["metrics/eval/validation_loss"]
    assert not stacks["base+v_prediction"]["not_compared"]


def test_what_all_cannot_add_is_left_out_and_what_is_named_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `prx check --config-only` says is said before anything is trained."""
    recipe = tmp_path / "odd.yaml"
    recipe.write_text("model:\n  backbone: {patch_size: 5}\n")
    with pytest.raises(UserError, match="--stack base.odd: .*patch_size 5"):
        planned(QUICKSTART, "--stack", "base", "--stack", f"+{recipe}")
    monkeypatch.setattr(ablate, "ABLATIONS", tmp_path)
    _, stacks, refused = planned(QUICKSTART, "--all")
    assert [entry["stack"] for entry in refused] == ["base+odd"] and "patch_size 5" in refused[0]["reason"]
    assert list(stacks) == ["base", "base-gradient_clipping", "base-ema"]


def test_a_changed_length_is_said() -> None:
    options = ablate.parse_arguments([QUICKSTART, "--all", "max_duration=1000ba"])
    whole = config.load([QUICKSTART]).max_duration
    assert ablate.length_of(options, config.load(options.recipe)) == f"1000ba, where the recipe has {whole}"
    options = ablate.parse_arguments([QUICKSTART, "--all"])
    assert ablate.length_of(options, config.load(options.recipe)) == whole


# ---------------------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize("players", [1, 2, 3, 4])
def test_everybody_plays_every_round_and_follows_everybody(players: int) -> None:
    orders = [turns.turn_order(players, round) for round in range(2 * players)]
    assert all(sorted(order) == list(range(players)) for order in orders)
    followed = {(before, after) for order in orders for before, after in pairwise(order)}
    if players <= 3:
        assert len(followed) == players * (players - 1)
    assert {order[0] for order in orders} == set(range(players))


def dummy_training(folder: Path, name: str, link: int, steps: int, dies_at: int | None) -> None:
    """What the Trainer does, as far as `Turns` sees it; fails if anybody else computes at the same time."""
    callback = turns.Turns(str(folder / f"{name}.jsonl"), link, steps=2)
    state: Any = SimpleNamespace(model=nn.Linear(3, 2), timestamp=SimpleNamespace(batch=0))
    logger: Any = None
    callback.fit_start(state, logger)
    for step in range(steps):
        if step == dies_at:
            os._exit(7)
        callback.before_dataloader(state, logger)
        computing = os.open(folder / "computing", os.O_CREAT | os.O_EXCL)
        callback.after_dataloader(state, logger)
        time.sleep(0.01)
        with (folder / "order").open("a") as order:
            order.write(name)
        state.timestamp.batch = step + 1
        callback.batch_end(state, logger)
        os.close(computing)
        (folder / "computing").unlink()
    callback.close(state, logger)


def play(folder: Path, dying: dict[str, int], names: str = "abc", steps: int = 6) -> tuple[dict[str, int], list[int]]:
    """Exit codes by name, and how many were still there after each round."""
    context = multiprocessing.get_context("fork")
    processes: dict[str, Any] = {}

    def start(name: str) -> Any:
        ours, theirs = socket.socketpair()
        arguments = (folder, name, theirs.fileno(), steps, dying.get(name))
        process = context.Process(target=dummy_training, args=arguments, daemon=True)
        process.start()
        theirs.close()
        processes[name] = process
        return turns.Player(name, ours, lambda: process.exitcode is not None)

    left = [len(playing) for _, playing in turns.take_turns([partial(start, name) for name in names])]
    return {name: process.exitcode for name, process in processes.items()}, left


def test_trainings_in_turns_never_overlap_and_all_finish(tmp_path: Path) -> None:
    codes, left = play(tmp_path, dying={})
    assert codes == {"a": 0, "b": 0, "c": 0}
    assert (tmp_path / "order").read_text() == "aabbcc" + "ccbbaa" + "bbccaa"
    assert left == [3, 3, 0]
    header, *rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert header["trained_parameters"] == 8
    assert [(row["batch"], row["turn"]) for row in rows] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert all(row["memory_mb"] > 0 for row in rows)


@pytest.mark.parametrize("step", [0, 2, 3], ids=["before its first turn", "between turns", "in its turn"])
def test_a_training_that_dies_gives_its_turns_away(step: int, tmp_path: Path) -> None:
    codes, _ = play(tmp_path, dying={"a": step})
    assert codes == {"a": 7, "b": 0, "c": 0}
    order = (tmp_path / "order").read_text()
    assert [order.count(name) for name in "abc"] == [step, 6, 6]


def test_waiting_is_in_no_step(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    callback = turns.Turns(str(tmp_path / "turns.jsonl"), theirs.detach(), steps=1)
    state: Any = SimpleNamespace(model=nn.Linear(3, 2), timestamp=SimpleNamespace(batch=1))
    clock = iter([100.0, 101.0, 103.0])  # asked for a batch, had it, done with it
    ours.send(turns.GO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "_now", lambda: next(clock))
        callback.fit_start(state, None)
        callback.before_dataloader(state, None)
        callback.after_dataloader(state, None)
        callback.batch_end(state, None)
    ours.close()
    with pytest.raises((RuntimeError, OSError)):  # nobody is there to give another turn
        callback.before_dataloader(state, None)
    callback.close(state, None)
    row = json.loads((tmp_path / "turns.jsonl").read_text().splitlines()[1])
    assert (row["loader_ms"], row["step_ms"]) == (1000, 2000)


# ---------------------------------------------------------------------------------------------------------- table


def steps_of(times: list[float], turn: int = 2) -> list[dict[str, Any]]:
    return [
        {"batch": index + 1, "turn": index // turn, "loader_ms": 100.0, "step_ms": ms, "memory_mb": 50.0 + index}
        for index, ms in enumerate(times)
    ]


METRICS = [
    {"batch": 1, "loss/train/flow": 4.0, "loss/train/total": 9.0, "heldout_accuracy": 0.5},
    {"batch": 2, "loss/train/flow": 3.0, "loss/train/total": 9.0, "metrics/eval/mse": 0.7},
    {"batch": 3, "loss/train/flow": 2.0, "loss/train/total": 9.0, "heldout_accuracy": 0.95},
    {"batch": 4, "loss/train/flow": 1.0, "loss/train/total": 9.0, "heldout_accuracy": 0.92},
]


def test_numbers_are_of_own_training_time() -> None:
    base = steps_of([500.0, 900.0, 1000.0, 1000.0])
    result = numbers.summarise({"trained_parameters": 7}, steps_of([1900.0, 900.0, 1900.0, 900.0]), METRICS, base)
    assert result["train_seconds"] == pytest.approx(6.0)
    assert result["step_ms"]["median"] == 1400
    assert result["ratio"] == {"median": 1.4, "p25": 1.4, "p75": 1.4, "min": 1.4, "max": 1.4, "turns": 1}  # the first is warm-up
    assert result["memory_mb"] == 53
    assert result["loss"] == 1.0
    assert (result["validation_key"], result["validation_loss"]) == ("metrics/eval/mse", 0.7)
    assert result["accuracy"] == 0.92
    assert result["accuracy_curve"] == [(2.0, 1, 0.5), (5.0, 3, 0.95), (6.0, 4, 0.92)]
    assert result["seconds_to_target"] == 5.0
    both = [*METRICS, {"batch": 4, "metrics/eval/validation_loss": 0.6, "metrics/eval/mse": 0.5}]
    result = numbers.summarise({}, steps_of([1.0] * 4), both, base, target=0.96)
    assert (result["validation_key"], result["validation_loss"]) == ("metrics/eval/validation_loss", 0.6)
    assert result["seconds_to_target"] is None


def test_a_number_that_is_not_finite_is_none() -> None:
    rows = [{"batch": 1, "loss/train/flow": float("nan"), "metrics/eval/mse": float("inf"), "heldout_accuracy": 0.0}]
    result = numbers.summarise({}, steps_of([1.0]), rows, steps_of([1.0]))
    assert (result["loss"], result["validation_loss"], result["loss_curve"]) == (None, None, [])


def test_rounds_of_different_starts_are_not_divided_by_one_another() -> None:
    """A run that goes on later has other conditions; and the first round after every start is a warm-up."""

    def of(ms: list[float], starts: list[int]) -> list[dict[str, Any]]:
        return [row | {"start": start} for row, start in zip(steps_of(ms, turn=1), starts, strict=True)]

    base = of([9.0, 1.0, 1.0, 9.0, 1.0, 1.0], [0, 0, 0, 1, 1, 1])
    own = of([1.0, 2.0, 99.0, 1.0, 3.0, 3.0], [0, 0, 1, 1, 1, 1])  # its third step was made again
    assert numbers.ratio_by_turn(own, base) == pytest.approx(dict(median=3, p25=2.5, p75=3, min=2, max=3, turns=3))


def result_of(stack: str, **changes: Any) -> dict[str, Any]:
    found = numbers.summarise({"trained_parameters": 1234567}, steps_of([100.0] * 4), METRICS, steps_of([50.0] * 4))
    return {"stack": stack, "seed": 1, "group": f"seed{changes.get('seed', 1)}-0", "failed": None} | found | changes


def whole(runs: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A result as ablate.py makes it."""
    known = {"changes": [], "adds": [], "leaves_out": [], "sets": [], "notes": [], "not_compared": {}}
    stacks = {run["stack"]: known for run in runs}
    comparisons = numbers.compare(runs, stacks)
    head = {"what": "w", "date": "d", "machine": "m", "threads": 1, "load": 0, "versions": {}, "command": "c", "length": "4ba"}
    start = {"date": "d", "machine": "m", "threads": 1, "versions": {}}
    return head | {
        "recipe": ["quickstart.yaml"],
        "starts": [start],
        "seeds": sorted({run["seed"] for run in runs}),
        "target": 0.9,
        "still_to_train": 0,
        "chance": numbers.chance(comparisons),
        "stacks": stacks,
        "refused": [],
        "comparisons": comparisons,
        "runs": runs,
    } | changes  # fmt: skip


NOTHING = numbers.summarise({}, [], [], [])


def test_table_has_a_line_per_stack_and_says_what_failed() -> None:
    results = [
        result_of("base"),
        result_of("base", seed=2, accuracy=0.98, seconds_to_target=None),
        result_of("base+muon", **NOTHING | {"failed": "ValueError: a|b"}),
        result_of("base-ema"),
    ]
    header, rule, base, muon, ema = reporting.table(whole(results)).splitlines()
    assert header.count("|") == rule.count("|") == base.count("|") == ema.count("|") == muon.replace("\\|", "").count("|")
    cells = [cell.strip() for cell in base.split("|")[1:-1]]
    assert cells[0] == "`base`"
    assert cells[1] == "0.950 (0.920–0.980)"
    assert cells[3] == "100 ms"
    assert cells[4].endswith("never in 1")
    assert "failed with seed 1, after step 0: ValueError: a\\|b" in muon
    header, rule, base, ema = reporting.measured(whole(results)).splitlines()
    assert header.count("|") == rule.count("|") == base.count("|") == ema.count("|")
    assert "1,234,567" in base and "0.950 (0.920–0.980)" in base


def test_curves_are_drawn_for_any_number_of_points_and_stacks(tmp_path: Path) -> None:
    runs = [result_of("base"), result_of("base", seed=2), result_of("base+muon", **NOTHING | {"failed": "x"})]
    runs += [result_of(f"base+{number}") for number in range(12)]
    reporting.plot(whole(runs), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    points = [{"loss_curve": [(1.0, 4.0), (2.0, 2.0)]}, {"loss_curve": [(3.0, 2.0)]}, {"loss_curve": []}]
    assert reporting.middle(points, "loss_curve", lambda point: point[1]) == [(2.0, 3.0, 2.0, 4.0)]


def test_labels_keep_their_order_and_a_distance() -> None:
    places = reporting.apart({"a": 0.5, "b": 0.1, "c": 0.51, "d": 0.5}, gap=0.1)
    heights = [places[name] for name in ("b", "a", "d", "c")]
    assert all(above - below >= 0.0999 for below, above in pairwise(heights))
    assert sum(heights) == pytest.approx(0.5 + 0.1 + 0.51 + 0.5)


# ------------------------------------------------------------------------------------------------------ end to end


FAILING = """
from composer.core import Algorithm, Event
from prx_composer import registry

@registry.algorithms.register("failing")
class Failing(Algorithm):
    def match(self, event, state):
        return event == Event.BATCH_END and state.timestamp.batch == 2

    def apply(self, event, state, logger):
        raise RuntimeError("out of patience")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stacks_are_trained_killed_gone_on_with_and_a_failed_one_is_named(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """All of it at once: a stack that fails, a kill in the middle, a second start with one more seed, a stack that is added."""
    recipe = write_recipe(tiny_recipe | {"callbacks": {"shapes_score": {"images_per_prompt": 1, "num_inference_steps": 2}}})
    (tmp_path / "failing.py").write_text(FAILING)
    own = write_recipe({"code_paths": ["failing.py"], "algorithms": {"failing": {}}}, "own.yaml")
    asked: list[Any] = [REPOSITORY / "benchmarks" / "ablate.py", recipe, "save_interval=2ba", "--turn", 1, "--stack", "base"]
    options = ("--stack", "-ema", "--stack", f"+{own}", "--output", "found", "--seed", 1)
    killed = commands.start("python", *asked, *options, cwd=tmp_path)
    group = tmp_path / "runs" / "ablate-found" / "seed1-0"
    while not list(group.glob("base-ema/checkpoints/*/*")) and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    before = {path.name: path.read_text() for path in group.glob("*.end.json")}
    done = commands.run("python", *asked, *options, "--seed", 2, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((tmp_path / "found.json").read_text())
    assert len(result["starts"]) == 2 and result["still_to_train"] == 0
    base, without, failed, *second = result["runs"]
    assert [run["failed"] for run in result["runs"]] == [None, None, "RuntimeError: out of patience"] * 2
    assert (base["steps"], without["steps"], failed["steps"]) == (8, 8, 1)
    assert base["loss"] == without["loss"]  # equal seeds
    assert [step for _, step, _ in base["accuracy_curve"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [run["seed"] for run in second] == [2, 2, 2] and second[0]["loss"] != base["loss"]
    assert before.items() <= {path.name: path.read_text() for path in group.glob("*.end.json")}.items()
    assert "base-ema.end.json" not in before
    steps = turns.read_metrics(group / "base-ema" / "turns.jsonl")
    assert {row["start"] for row in steps if "start" in row} == {0, 1}, "it was not killed in the middle"
    told = (tmp_path / "found.md").read_text()
    assert "out of patience" in told and "Trained in 2 starts" in told and (tmp_path / "found.png").exists()
    dropped = next(c for c in result["comparisons"] if c["stack"] == "base+own" and c["column"] == "accuracy")
    assert (dropped["verdict"], len(dropped["dropped"])) == ("no pair", 2)

    options = ("--seed", 1, "--output", "whole")
    assert commands.run("python", *asked, "--stack", "-ema", *options, cwd=tmp_path).returncode == 0
    unbroken = json.loads((tmp_path / "whole.json").read_text())["runs"]
    for one, other in zip((base, without), unbroken, strict=True):
        same = ("stack", "seed", "steps", "loss", "accuracy", "trained_parameters")
        assert [one[key] for key in same] == [other[key] for key in same]
        assert [point[1:] for point in one["accuracy_curve"]] == [point[1:] for point in other["accuracy_curve"]]

    again = commands.run("python", *asked, "--stack", "-gradient_clipping", *options, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    added = json.loads((tmp_path / "whole.json").read_text())["runs"]
    assert added[:2] == unbroken, "what had ended was not trained again"
    assert [(run["stack"], run["group"]) for run in added[2:]] == [(n, "seed1-1") for n in ("base", "base-gradient_clipping")]
