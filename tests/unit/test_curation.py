"""What a conversion leaves out: duplicates, filters, expressions."""

import math
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
from conversions import convert, encoded, jpeg, picture, rows, sample, write_tar

from prx_composer.commands.convert.outcome import near_duplicates
from prx_composer.commands.convert.settings import check_where, is_wanted
from prx_composer.common.errors import UserError


def test_near_duplicates_are_those_of_a_plain_comparison_of_all_with_all() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 400).astype(np.uint64)
    for _ in range(400):  # relatives of others, at distances from 0 to 9 bits
        flipped = hashes[rng.integers(len(hashes))]
        for bit in rng.choice(64, rng.integers(0, 10), replace=False):
            flipped ^= np.uint64(1) << np.uint64(bit)
        hashes = np.append(hashes, flipped)
    for distance in (0, 1, 4, 7):
        kept: list[int] = []
        expected = []
        for value in hashes.tolist():
            near = any((value ^ other).bit_count() <= distance for other in kept)
            expected.append(near)
            if not near:
                kept.append(value)
        assert near_duplicates(hashes, distance).tolist() == expected


def curated(tmp_path: Path, members: list[tuple[str, bytes]], **changes: Any) -> tuple[list[str], dict[str, int]]:
    """Captions that are left and reasons that are not, with the input in one tar and in two."""
    outcomes = []
    starts = [index for index, (name, _) in enumerate(members) if name.endswith(".jpg")]
    middle = starts[len(starts) // 2]
    for name, parts in (("one", [members]), ("two", [members[:middle], members[middle:]])):
        for number, part in enumerate(parts):
            write_tar(tmp_path / name / f"{number}.tar", part)
        statistics = convert("webdataset", tmp_path / name, tmp_path / f"{name}-out", **changes)
        outcomes.append((sorted(row["caption"] for row in rows(tmp_path / f"{name}-out")), statistics["dropped"]))
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def test_the_first_of_exact_duplicates_stays_wherever_they_are(tmp_path: Path) -> None:
    images = [jpeg(100, 100, seed) for seed in (0, 1, 0, 2, 1, 0)]
    members = [part for i, image in enumerate(images) for part in sample(f"{i}", image, f"{i}")]
    assert curated(tmp_path, members, duplicates="exact") == (["0", "1", "3"], {"duplicate": 3})


def test_a_resized_and_recompressed_copy_is_a_near_duplicate(tmp_path: Path) -> None:
    first, other = picture(200, 300, 1), picture(200, 300, 2)
    copy = first.resize((120, 80))
    assert imagehash.phash(first) - imagehash.phash(copy) <= 4 < imagehash.phash(first) - imagehash.phash(other)
    images = [encoded(first, quality=95), encoded(other), encoded(copy, quality=60), encoded(first, "PNG")]
    members = [part for i, image in enumerate(images) for part in sample(f"{i}", image, f"{i}")]
    assert curated(tmp_path, members, duplicates="perceptual") == (["0", "1"], {"near_duplicate": 2})


def test_a_duplicate_is_never_left_out_for_one_that_is_left_out_itself(tmp_path: Path) -> None:
    image = jpeg(100, 100)
    members = [*sample("0", image, " "), *sample("1", image, "short"), *sample("2", image, "long enough")]
    found = curated(tmp_path, members, duplicates="exact", caption_chars=(8, None))
    assert found == (["long enough"], {"no_caption": 1, "caption_length": 1})


def test_filters_leave_out_what_they_say_and_count_it(tmp_path: Path) -> None:
    members = [
        *sample("0", jpeg(100, 100, 0), "good", score=5),
        *sample("1", jpeg(40, 100, 1), "thin", score=5),
        *sample("2", jpeg(60, 300, 2), "wide", score=5),
        *sample("3", jpeg(100, 100, 3), "a caption of many words", score=5),
        *sample("4", jpeg(100, 100, 4), "ugly", score=1),
        *sample("5", jpeg(100, 100, 5), "odd", score="five"),
    ]
    found = curated(tmp_path, members, min_side=50, max_aspect=3.0, caption_chars=(1, 10), where="score > 2")
    reasons = ["min_side", "max_aspect", "caption_length", "where", "where_failed"]
    assert found == (["good"], dict.fromkeys(reasons, 1))


@pytest.mark.parametrize(
    "where",
    [
        "__import__('os').system('true')",
        "score.__class__",
        "(lambda: 1)()",
        "[x for x in score]",
        "open('/etc/passwd')",
        "score >",
        "9**9**9 +",
    ],
)
def test_an_expression_that_is_more_than_one_is_refused(where: str) -> None:
    with pytest.raises(UserError, match="--where"):
        check_where(where)


def test_an_expression_cannot_take_forever_or_all_memory() -> None:
    for where in ("9 ** 9 ** 9 > 0", "'a' * 10 ** 12 == ''", "len(txt * 10 ** 9) > 1"):
        assert is_wanted(where, {"txt": "text"}) is None


def test_expressions_over_metadata_and_sizes() -> None:
    columns = {"score": 5.5, "txt": b"A Cat", "width": 100, "nan": math.nan}
    assert is_wanted("score > 5 and width >= 100 and 'cat' in lower(txt)", columns) is True
    assert is_wanted("missing > 5", columns) is None and is_wanted("nan > 5", columns) is False
