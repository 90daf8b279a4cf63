"""The table of bad input in recipes/data/README.md and what becomes of bad input are the same. Cases: tests/bad_*.py."""

import re
from pathlib import Path

import bad_archives
import bad_pictures
import bad_tables
import pytest
from bad_input import outcome, reasons_in, table

from prx_composer.commands.convert.outcome import REASONS

GROUPS = (bad_archives.CASES, bad_pictures.CASES, bad_tables.CASES)
CASES = {row: cases for group in GROUPS for row, cases in group.items()}
TABLE = table()
DECIDED_OVER_ALL = {"duplicate", "near_duplicate"}  # by a pass over the whole input: test_curation.py


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert TABLE.keys() == CASES.keys()
    assert sum(map(len, GROUPS)) == len(CASES), "a row stands in two files"


def test_every_reason_stands_in_the_table() -> None:
    assert set().union(*map(reasons_in, TABLE.values())) == REASONS.keys()


def test_a_row_names_the_reasons_that_its_cases_end_in_and_no_other() -> None:
    for row, cell in TABLE.items():
        found = {reason for case in CASES[row] for reason in case.dropped}
        assert reasons_in(cell) - DECIDED_OVER_ALL == found, row
        assert ("refused" in cell) == any(case.refused for case in CASES[row]), row
        assert not cell.startswith("kept") or any(case.kept for case in CASES[row]), row


@pytest.mark.parametrize(("row", "number"), [(row, i) for row, cases in CASES.items() for i in range(len(cases))])
def test_bad_input_becomes_what_the_table_says(tmp_path: Path, row: str, number: int) -> None:
    case = CASES[row][number]
    kept, dropped, refused = outcome(case, tmp_path / "in")
    assert (kept, dropped) == (case.kept, case.dropped), refused
    assert bool(refused) == bool(case.refused) and re.search(case.refused, refused)
