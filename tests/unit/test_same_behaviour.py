"""benchmarks/same_behaviour.py names what differs between two results. Nothing is trained here."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
same: Any = importlib.import_module("same_behaviour")
inside: Any = importlib.import_module("inside_checkout")

RESULT: dict[str, Any] = {
    "rows": [{"batch": b, "seconds": 0.1 * b, "loss/train/total": 1 / b, "stage/index": 0} for b in (1, 2, 3)],
    "tensors": {"state.model.weight": "float32 [2] 01", "state.average.weight": "float32 [2] 02"},
    "pictures": {"ba3.png": "03"},
    "files": {},
}


def changed() -> dict[str, Any]:
    return copy.deepcopy(RESULT)


def test_equal_results_differ_in_nothing_even_if_one_took_longer() -> None:
    slower = changed()
    for row in slower["rows"]:
        row |= {"seconds": 9.0, "time/train": 9.0, "throughput/batches_per_sec": 9.0, "budget/elapsed": 9.0, "train_seconds": 9.0}
    assert same.differences(RESULT, slower) == []


def test_the_first_batch_that_differs_is_named_with_key_and_both_values() -> None:
    other = changed()
    other["rows"][1]["loss/train/total"] = 0.5000000000000001
    other["rows"][2]["loss/train/total"] = 0.3
    assert same.differences(RESULT, other) == [
        "batch 2: loss/train/total was 0.5, is 0.5000000000000001; 2 of 3 batches differ",
    ]


@pytest.mark.parametrize(("key", "before", "after"), [("loss/train/new", "absent", "2.0"), ("stage/index", "0", "absent")])
def test_a_number_that_only_one_side_logs_is_a_difference(key: str, before: str, after: str) -> None:
    other = changed()
    other["rows"][0].pop("stage/index") if after == "absent" else other["rows"][0].update({key: 2.0})
    assert same.differences(RESULT, other) == [f"batch 1: {key} was {before}, is {after}"]


def test_a_batch_that_is_missing_is_a_difference() -> None:
    other = changed()
    del other["rows"][2]
    assert same.differences(RESULT, other)[0].startswith("batch 3: ")


def test_tensors_and_pictures_are_named_and_those_of_one_side_alone_are_said_to_be() -> None:
    other = changed()
    other["tensors"] = {"state.model.weight": "float32 [2] ff", "state.averages.weight": "float32 [2] 02"}
    other["pictures"]["ba3.png"] = "ff"
    assert same.differences(RESULT, other) == [
        "tensors: state.model.weight; state.average.weight only before; state.averages.weight only after; 3 of 2 differ",
        "pictures: ba3.png; 1 of 1 differ",
    ]


def test_a_side_that_does_not_run_is_never_equal() -> None:
    failed = {"error": "no such key"}
    assert same.differences(RESULT, failed) == ["after did not run: no such key"]
    assert len(same.differences(failed, failed)) == 2


def test_a_fingerprint_changes_with_the_last_bit_and_with_the_dtype() -> None:
    import torch

    tensor = torch.ones(3)
    nearly = torch.nextafter(tensor, torch.tensor(2.0))
    marks = [dict(inside._fingerprints({"state": [t]}, ""))["state.0"] for t in (tensor, nearly, tensor.double())]
    assert len(set(marks)) == 3 and marks[0] == dict(inside._fingerprints({"state": [torch.ones(3)]}, ""))["state.0"]


def test_an_algorithm_that_is_new_is_a_case_by_itself_and_every_part_that_is_named_is_there() -> None:
    cases = same.all_cases(REPOSITORY / "yamls", {"tread", "lora", "brand_new"})
    assert cases["brand_new"] == ["yamls/quickstart.yaml parts/small.yaml parts/bare.yaml parts/brand_new.yaml"]
    assert cases["tread"][0].endswith("yamls/ablations/tread.yaml") and cases["lora"][0].endswith("parts/lora.yaml")
    old = same.OLD_RUNS
    lines = [line for runs in (cases, old["made"], old["killed"], old["opened"]) for listed in runs.values() for line in listed]
    named = {word for line in lines for word in line.split() if word.startswith(("parts/", "yamls/"))}
    known = {f"parts/{name}.yaml" for name in (*same.SETTINGS["parts"], "brand_new")}
    assert not [word for word in named if word not in known and not (REPOSITORY / word).is_file()]
