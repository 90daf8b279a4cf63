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


def test_existing_results_are_kept_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "runs" / "ablate-quickstart" / "base" / "metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert ablate.main([QUICKSTART, "--stack", "base"]) == 1
    assert "runs/ablate-quickstart is there already; give --overwrite" in capsys.readouterr().err
    assert kept.exists()
    [[base, without]] = ablate.plan(
        ablate.parse_arguments([QUICKSTART, "--stack", "base", "--stack", "-ema", "--overwrite", "seed=5"])
    )
    assert not kept.exists()
    assert (base.seed, base.folder) == (5, Path("runs/ablate-quickstart/base"))
    assert without.arguments[:2] == [QUICKSTART, "algorithms.ema=false"]
    assert without.arguments[-1] == "seed=5"  # the last word is the command line's
    assert "callbacks.shapes_score.interval=0.05dur" in without.arguments


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
    {"batch": 2, "loss/train/flow": 3.0, "loss/train/total": 9.0, "metrics/eval/validation_loss": 0.7},
    {"batch": 3, "loss/train/flow": 2.0, "loss/train/total": 9.0, "heldout_accuracy": 0.95},
    {"batch": 4, "loss/train/flow": 1.0, "loss/train/total": 9.0, "heldout_accuracy": 0.92},
]


def test_numbers_are_of_own_training_time() -> None:
    base = steps_of([500.0, 900.0, 1000.0, 1000.0])
    result = ablate.summarise({"trained_parameters": 7}, steps_of([1900.0, 900.0, 1900.0, 900.0]), METRICS, base)
    assert result["train_seconds"] == pytest.approx(6.0)
    assert result["step_ms"]["median"] == 1400
    assert result["ratio"] == {"median": 1.4, "p25": 1.4, "p75": 1.4, "min": 1.4, "max": 1.4, "turns": 1}  # the first is warm-up
    assert result["memory_mb"] == 53
    assert result["loss"] == 1.0
    assert result["validation_loss"] == 0.7
    assert result["accuracy"] == 0.92
    assert result["accuracy_curve"] == [(2.0, 1, 0.5), (5.0, 3, 0.95), (6.0, 4, 0.92)]
    assert result["seconds_to_target"] == 5.0


def result_of(stack: str, **changes: Any) -> dict[str, Any]:
    numbers = ablate.summarise({"trained_parameters": 1234567}, steps_of([100.0] * 4), METRICS, steps_of([50.0] * 4))
    return {"stack": stack, "seed": 1, "merged": [], "failed": None} | numbers | changes


def test_table_has_a_line_per_stack_and_says_what_failed() -> None:
    nothing = ablate.summarise({}, [], [], [])
    results = [
        result_of("base"),
        result_of("base", seed=2, accuracy=0.98, seconds_to_target=None),
        result_of("base+muon", failed="ValueError: a|b", **nothing),
        result_of("base-ema"),
    ]
    header, rule, base, muon, ema = ablate.table(results).splitlines()
    assert header.count("|") == rule.count("|") == base.count("|") == ema.count("|") == muon.replace("\\|", "").count("|")
    cells = [cell.strip() for cell in base.split("|")[1:-1]]
    assert cells[0] == "`base`"
    assert cells[2] == "2.00 (2.00–2.00)"
    assert cells[7] == "0.950 (0.920–0.980)"
    assert cells[8].endswith("never in 1")
    assert cells[9] == "1,234,567"
    assert "failed after step 0: ValueError: a\\|b" in muon


def test_curves_are_drawn_for_any_number_of_points(tmp_path: Path) -> None:
    nothing = ablate.summarise({}, [], [], [])
    ablate.plot([result_of("base"), result_of("base+muon", failed="x", **nothing)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_labels_keep_their_order_and_a_distance() -> None:
    places = ablate.apart({"a": 0.5, "b": 0.1, "c": 0.51, "d": 0.5}, gap=0.1)
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
@pytest.mark.timeout(600)
def test_stacks_are_trained_and_a_failed_one_is_named(
    tiny_recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    recipe = write_recipe(tiny_recipe | {"callbacks": {"shapes_score": {"images_per_prompt": 1, "num_inference_steps": 2}}})
    (tmp_path / "failing.py").write_text(FAILING)
    own = write_recipe({"code_paths": ["failing.py"], "algorithms": {"failing": {}}}, "own.yaml")
    options = ("--stack", "base", "--stack", "-ema", "--stack", f"+{own}", "--turn", 1, "--output", "found", "max_duration=4ba")
    done = commands.run("python", REPOSITORY / "benchmarks" / "ablate.py", recipe, *options, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    base, without, failed = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert (base["failed"], without["failed"], failed["failed"]) == (None, None, "RuntimeError: out of patience")
    assert (base["steps"], without["steps"], failed["steps"]) == (4, 4, 1)
    assert base["loss"] == without["loss"]  # equal seeds
    assert [step for _, step, _ in base["accuracy_curve"]] == [1, 2, 3, 4]
    assert "out of patience" in (tmp_path / "found.md").read_text()
    assert (tmp_path / "found.png").exists()
