"""Points of time as recipes write them."""

import random

import pytest

from prx_composer.algorithms.resolution import ProgressiveResolution, Stage
from prx_composer.schedule.moments import Moment, ScheduleWindow, duration_string, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[
            ("24h", 86400),
            ("90m", 5400),
            ("1h30m", 5400),
            ("86400s", 86400),
            ("86400sec", 86400),
            ("1.5h", 5400),
            ("1h0m5s", 3605),
        ],
        *[("3d", 259200), ("1d12h", 129600), ("2 hours", 7200), ("90min", 5400), ("1d 6h 30m", 109800), ("24H", 86400)],
    ],
)
def test_durations_may_be_of_any_size_and_are_written_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(duration_string(seconds)) == pytest.approx(seconds, abs=31)


def test_any_duration_is_the_sum_of_its_parts() -> None:
    generator = random.Random(0)
    lengths = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    for _ in range(200):
        parts = [(generator.randint(0, 300) / generator.choice((1, 2, 4)), unit) for unit in lengths if generator.random() < 0.6]
        text = generator.choice(("", " ")).join(f"{number:g}{unit}" for number, unit in parts)
        if parts:
            assert parse_duration(text) == pytest.approx(sum(number * lengths[unit] for number, unit in parts)), text


@pytest.mark.parametrize("text", ["", "24", "1d3d", "3 weeks", "-2h", "h", "30m1h", "1.2.3h", "nanh"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration such as 24h"):
        parse_duration(text)


@pytest.mark.parametrize(
    "text",
    ["1000ba", "1e5ba", "3ep", "64000sp", "0.5dur", ".5dur", "2h", "600sec", "0.83budget", "100000ba or  0.83budget or 2h"],
)
def test_moments_say_what_they_are(text: str) -> None:
    assert str(Moment(text)) == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "'10' is no time such as"),  # Composer takes it for 100 seconds
        ("4 moons", "no time such as 1000ba"),
        ("1.5ba", "whole numbers"),
        ("-5ba", "no time such as"),
        ("83budget", "between 0 and 1"),
        ("1000ba or", "no time such as"),
        ("1000ba and 0.5budget", "no time such as"),
    ],
)
def test_what_is_no_moment_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleWindow("0ba", text)


@pytest.mark.parametrize(
    ("first", "second", "certain"),
    [
        ("5ba", "5ba", True),
        ("5ba", "4ba", False),
        ("1h", "61m", True),
        ("5ba", "0.1budget", False),
        ("0ba", "0.1budget", True),
        ("5ba or 0.5budget", "5ba", True),  # whichever comes first, it is not later than 5ba
        ("5ba", "5ba or 0.5budget", False),  # the budget may come before
        ("5ba or 0.5budget", "6ba or 0.5budget", True),
        ("5ba or 0.5budget", "6ba or 0.4budget", False),
    ],
)
def test_what_is_certain_not_to_come_later(first: str, second: str, certain: bool) -> None:
    assert Moment(first).surely_by(Moment(second)) is certain
    assert ScheduleWindow(end=first).is_disjoint_from(ScheduleWindow(start=second)) is certain


def test_stages_must_be_in_order_in_every_unit() -> None:
    def stages(*ends: str | None) -> list[Stage]:
        return [Stage(image_size=16, global_train_batch_size=8, until=end) for end in ends]

    ProgressiveResolution(stages("100000ba or 0.83budget", "120000ba or 0.9budget", None))
    ProgressiveResolution(stages("100000ba", "0.9budget", None))
    with pytest.raises(ValueError, match=r"stages\[1\].until: 120000ba or 0.8budget must be later"):
        ProgressiveResolution(stages("100000ba or 0.83budget", "120000ba or 0.8budget", None))
    with pytest.raises(ValueError, match="cannot be in epochs"):
        ProgressiveResolution(stages("3ep or 0.8budget", None))
