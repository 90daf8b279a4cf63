"""Over epochs of full batches of one bucket each, every data set has its share and every image is drawn as often as it says."""

import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from test_mixture import SQUARE, TALL, WIDE, write

from prx_composer.data.mixture import MixedDataset, Shares, apportion
from prx_composer.data.sampler import BucketBatchSampler, BucketedDataset, epoch_batches

Table = list[list[int]]


def due(counts: Table, weights: list[float], drawn: int) -> list[list[Fraction]]:
    """What every data set's bucket should have given of so many samples, exactly."""
    total = sum(map(Fraction, weights))
    return [[Fraction(w) / total * Fraction(n, sum(row)) * drawn for n in row] for w, row in zip(weights, counts, strict=True)]


def follow(counts: Table, weights: list[float], batch: int, epochs: int) -> Any:
    """After every epoch: samples so far, and those of every data set's bucket; each plan is checked for being possible."""
    shares, so_far = Shares(counts, weights, batch), [[0] * len(counts[0]) for _ in counts]
    for epoch in range(epochs):
        plan = shares.epoch(epoch)
        assert plan.before == so_far and sum(map(sum, plan.draws)) == shares.steps * batch
        assert all(sum(column) % batch == 0 for column in zip(*plan.draws, strict=True)), "full batches of one bucket"
        for row, (there, draws) in zip(so_far, zip(counts, plan.draws, strict=True), strict=True):
            assert all(draw >= 0 and (count or not draw) for count, draw in zip(there, draws, strict=True))
            row[:] = [before + draw for before, draw in zip(row, draws, strict=True)]
        yield shares.steps * batch * (epoch + 1), [list(row) for row in so_far]


def test_the_shares_of_the_case_are_right_and_its_rare_images_are_seen() -> None:
    """48 squares, one wide and three tall images with 6 new squares; they were never seen, and 0.833 came out 0.787 or 0.738."""
    counts = [[48, 1, 3], [6, 0, 0]]
    for weight in (5.0, 19.0):
        for batch in (1, 4, 8, 16, 32):
            drawn, given = list(follow(counts, [1.0, weight], batch, 60))[-1]
            quota = drawn / 60 / (1 + weight)  # of the first set in an epoch; a batch of its rare buckets may be more than that
            assert abs(sum(given[1]) - drawn * weight / (1 + weight)) < max(1, batch - quota + 1), (weight, batch)
            assert all(number > 0 for number in given[0]), "every bucket is drawn from"
            for row, exact in zip(given, due(counts, [1.0, weight], drawn), strict=True):
                assert all(abs(number - share) <= 2 * batch for number, share in zip(row, exact, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_keeps_its_shares_over_epochs(seed: int) -> None:
    rng = random.Random(seed)
    parts, buckets, batch = rng.randint(1, 4), rng.randint(1, 6), rng.choice([1, 3, 8, 16])
    counts = [[rng.choice([0, 1, 5, rng.randint(0, 200)]) for _ in range(buckets)] for _ in range(parts)]
    for row in counts:
        row[0] = rng.randint(20, 200) + batch * buckets * 4  # a bucket that all share
    counts = [list(row) for row in zip(*(column for column in zip(*counts, strict=True) if any(column)), strict=True)]
    weights = [rng.choice([1.0, 2.5, 0.833, rng.uniform(0.2, 5)]) for _ in range(parts)]
    early, late = 0, 0
    for epoch, (drawn, given) in enumerate(follow(counts, weights, batch, 50), 1):
        exact = due(counts, weights, drawn)
        if epoch == 1:
            assert all(sum(column) for column in zip(*given, strict=True)), "every bucket has its turn at once"
        if epoch > 4:  # what came early is made up for
            for row, share in zip(given, exact, strict=True):
                assert abs(sum(row) - sum(share)) <= 1, (counts, weights, batch, epoch)
        furthest = max(abs(n - s) for row, shares in zip(given, exact, strict=True) for n, s in zip(row, shares, strict=True))
        early, late = (max(early, furthest), late) if epoch <= 25 else (early, max(late, furthest))
    assert late <= max(early, batch) + 1 <= 3 * batch + 1, "what is owed doesn't grow with the epochs"


@pytest.mark.parametrize("seed", range(20))
def test_data_sets_that_share_no_bucket_are_a_batch_off_at_most_two(seed: int) -> None:
    rng = random.Random(seed)
    parts, batch = rng.randint(2, 4), rng.choice([2, 8, 32])
    counts = [[rng.randint(1, 99) if part == bucket else 0 for bucket in range(parts)] for part in range(parts)]
    weights = [rng.uniform(0.1, 9) for _ in range(parts)]
    for drawn, given in follow(counts, weights, batch, 60):
        for row, share in zip(given, due(counts, weights, drawn), strict=True):
            assert abs(sum(row) - sum(share)) <= 2 * batch


def test_a_plan_is_a_function_of_the_epoch_alone() -> None:
    counts, weights = [[30, 7, 2], [5, 0, 11]], [0.7, 0.3]
    ahead, plans = Shares(counts, weights, 8), [Shares(counts, weights, 8).epoch(epoch) for epoch in range(12)]
    assert [ahead.epoch(epoch) for epoch in (11, 3, 3, 4, 9)] == [plans[epoch] for epoch in (11, 3, 3, 4, 9)]


def test_every_image_is_drawn_as_often_as_its_share_says(tmp_path: Any) -> None:
    counts = {"red": {SQUARE: 20, WIDE: 1, TALL: 3}, "blue": {SQUARE: 6}}
    parts = {name: write(tmp_path / name, name, of) for name, of in counts.items()}
    mixed, epochs, batch = MixedDataset(parts, {"red": 1.0, "blue": 5.0}, seed=0), 40, 4
    seen = Counter[int]()
    for epoch in range(epochs):
        shares = []
        for ranks in (1, 2):
            samplers = [BucketBatchSampler(mixed, 16, batch, 4, True, 0, ranks, rank) for rank in range(ranks)]
            for sampler in samplers:
                sampler.set_epoch(epoch)
            steps = [[[request for share in step for request in share] for step in zip(*samplers, strict=True)]]
            shares.append(steps[0])
            assert len(steps[0]) == len(samplers[0])
        assert shares[0] == shares[1], "any number of ranks draws the same"
        for step in shares[0]:
            assert len({(request.height, request.width) for request in step}) == 1
            seen.update(request.sample_id for request in step)
    drawn = sum(seen.values())
    reds, blues = [seen[index] for index in range(24)], [seen[index] for index in range(24, 30)]
    assert abs(sum(blues) - drawn * 5 / 6) <= 1 and max(blues) - min(blues) <= 1
    for index, number in enumerate(reds):
        assert abs(number - drawn / 6 / 24) <= 1 + 2 * batch / parts["red"].counts[parts["red"].bucket_of(index)], reds


def test_a_resumed_epoch_of_a_mixture_goes_on_where_it_was(tmp_path: Any) -> None:
    parts = {"red": write(tmp_path / "red", "red", {SQUARE: 20, WIDE: 1}), "blue": write(tmp_path / "blue", "blue", {SQUARE: 6})}

    def epoch_from(begun: int) -> list[Any]:
        mixed = MixedDataset(parts, {"red": 1.0, "blue": 5.0}, seed=0)
        mixed.load_state_dict(MixedDataset(parts, {"red": 1.0, "blue": 5.0}, seed=0).state_dict(begun))
        sampler = BucketBatchSampler(mixed, 16, 4, 4, True, 0, 1, 0)
        sampler.set_epoch(7)
        return list(sampler)

    assert epoch_from(12) == epoch_from(0)[3:] and len(epoch_from(12)) == 3


def test_a_single_data_set_is_drawn_as_it_was(tmp_path: Any) -> None:
    dataset: BucketedDataset = write(tmp_path / "red", "red", {SQUARE: 37, WIDE: 3})
    sampler = BucketBatchSampler(dataset, 16, 8, 4, True, 5, 1, 0)
    sampler.set_epoch(2)
    rng = np.random.default_rng([5, 2])
    by_bucket = []
    for first, count, batches in ((0, 3, 1), (3, 37, 4)):  # as before mixtures were planned: buckets sorted, each shuffled
        members = first + np.arange(count)
        rng.shuffle(members)
        by_bucket.append(np.resize(members, (batches, 8)))
    stacked = np.concatenate(by_bucket)
    rng.shuffle(stacked)
    assert [[request.sample_id for request in batch] for batch in sampler] == stacked.tolist()
    assert np.array_equal(stacked, epoch_batches(dataset.ids(), 8, shuffle=True, seed=5, epoch=2))


@pytest.mark.parametrize("seed", range(30))
def test_apportioned_numbers_are_whole_sum_up_and_are_near(seed: int) -> None:
    rng = random.Random(seed)
    unit, total = rng.randint(1, 9), rng.randint(0, 40)
    needs = [rng.randint(-20, 100) for _ in range(rng.randint(1, 6))]
    given = apportion(needs, unit, total)
    assert sum(given) == total and min(given) >= 0
    if sum(needs) == total * unit and min(needs) >= 0:
        assert all(abs(unit * number - need) < unit for number, need in zip(given, needs, strict=True))
