"""How a mixture's epochs are composed: how many samples every data set gives to every bucket, with what is owed carried on.

Whole numbers throughout, so that every machine comes to the same plan.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple


class EpochPlan(NamedTuple):
    """By data set, then by bucket: how many samples were drawn in the epochs before this one, and how many this one draws."""

    before: list[list[int]]
    draws: list[list[int]]


class Shares:
    """Plans epochs of full batches, each of one bucket, that follow given shares.

    After every epoch a data set has had its share of all samples up to one, and a bucket its part of the batches up to about
    one: what a bucket gets too early or too late, its data sets give less or more of in the buckets that they share with others.
    Where none is shared, or where an epoch has fewer batches than buckets or less of a data set than a batch, shares are exact up
    to a batch or two, which later epochs make up for. A bucket's first batch comes in the first epoch, or as soon as there is
    room: it is then ahead, and waits.

    Args:
        counts: samples, by data set and bucket; no data set is empty.
        weights: of the data sets; positive.
        batch_size: over all ranks.
    """

    def __init__(self, counts: Sequence[Sequence[int]], weights: Sequence[float], batch_size: int):
        self.batch_size = batch_size
        self.steps = max(sum(map(sum, counts)) // batch_size, 1)
        exact = [Fraction(weight) for weight in weights]
        rates = [
            [weight / sum(exact) * Fraction(count, sum(row)) for count in row] for weight, row in zip(exact, counts, strict=True)
        ]
        self._scale = math.lcm(*(rate.denominator for row in rates for rate in row))
        self._rates = [[int(rate * self._scale) for rate in row] for row in rates]  # of what is drawn, times the scale
        self._restart()

    @property
    def due(self) -> list[Fraction]:
        """Batches that every bucket should have in an epoch."""
        return [Fraction(sum(column) * self.steps, self._scale) for column in zip(*self._rates, strict=True)]

    def epoch(self, number: int) -> EpochPlan:
        """The plan of an epoch, a function of its number: those before it are gone through once."""
        if number < self._planned - 1:
            self._restart()
        while self._planned <= number:
            self._plan()
        return self._last

    def _restart(self) -> None:
        self._planned = 0
        self._drawn = [[0] * len(row) for row in self._rates]
        self._last = EpochPlan(self._drawn, self._drawn)

    def _plan(self) -> None:
        self._planned += 1
        owed = [
            [rate * self._planned * self.steps * self.batch_size - self._scale * drawn for rate, drawn in zip(*rows, strict=True)]
            for rows in zip(self._rates, self._drawn, strict=True)
        ]
        columns = [self._column(bucket, batches, owed) for bucket, batches in enumerate(self._batches(owed))]
        draws = [list(row) for row in zip(*columns, strict=True)]
        self._balance(draws, owed)
        self._last = EpochPlan(self._drawn, draws)
        self._drawn = [[sum(pair) for pair in zip(*rows, strict=True)] for rows in zip(self._drawn, draws, strict=True)]

    def _batches(self, owed: list[list[int]]) -> list[int]:
        """How many every bucket has in this epoch."""
        needs, unit = [sum(column) for column in zip(*owed, strict=True)], self._scale * self.batch_size
        unseen = [bucket for bucket in range(len(needs)) if not any(row[bucket] for row in self._drawn)]
        first = sorted(unseen, key=lambda bucket: -needs[bucket])[: self.steps]
        rest = apportion([need - unit * (bucket in first) for bucket, need in enumerate(needs)], unit, self.steps - len(first))
        return [number + (bucket in first) for bucket, number in enumerate(rest)]

    def _column(self, bucket: int, batches: int, owed: list[list[int]]) -> list[int]:
        """What every data set gives to a bucket: what it owes, and of what the bucket gets too early its part."""
        rates, needs = [row[bucket] for row in self._rates], [row[bucket] for row in owed]
        early = batches * self.batch_size * self._scale - sum(needs)
        targets = [need * sum(rates) + early * rate for need, rate in zip(needs, rates, strict=True)]
        holders = [index for index, rate in enumerate(rates) if rate]
        given = apportion([targets[index] for index in holders], self._scale * sum(rates), batches * self.batch_size)
        by_holder = dict(zip(holders, given, strict=True))
        return [by_holder.get(index, 0) for index in range(len(rates))]

    def _balance(self, draws: list[list[int]], owed: list[list[int]]) -> None:
        """Lets data sets give for each other within buckets, until each gives its share.

        What is drawn of no data set's bucket goes further from what it owes by that than a batch and what buckets got too early:
        where every epoch is of few buckets, the right share of each would be a wrong one over all.
        """
        quotas = apportion([sum(row) for row in owed], self._scale, self.steps * self.batch_size)
        late = [sum(column) for column in zip(*owed, strict=True)]
        got = [self._scale * sum(column) for column in zip(*draws, strict=True)]
        bound = self._scale * self.batch_size + sum(abs(one - other) for one, other in zip(late, got, strict=True))

        def room(giver: int, taker: int) -> list[int]:
            rooms = []
            for bucket in range(len(late)):
                ahead = [self._scale * draws[index][bucket] - owed[index][bucket] for index in (giver, taker)]
                limits = (draws[giver][bucket], (ahead[0] + bound) // self._scale, (bound - ahead[1]) // self._scale)
                rooms.append(max(min(limits), 0) if self._rates[taker][bucket] else 0)
            return rooms

        while True:
            surplus = [sum(row) - quota for row, quota in zip(draws, quotas, strict=True)]
            if (path := _path(surplus, lambda giver, taker: any(room(giver, taker)))) is None:
                return
            pairs = list(pairwise(path))
            moved = min(surplus[path[0]], -surplus[path[-1]], *(sum(room(*pair)) for pair in pairs))
            for giver, taker in pairs:
                for bucket, number in enumerate(apportion(room(giver, taker), 1, moved)):
                    draws[giver][bucket] -= number
                    draws[taker][bucket] += number


def _path(surplus: list[int], can_give: Callable[[int, int], bool]) -> list[int] | None:
    """From one that gives too much, by way of others, to one that gives too little; None if there is no such way."""
    paths = {index: [index] for index, over in enumerate(surplus) if over > 0}
    queue = deque(paths)
    while queue:
        giver = queue.popleft()
        if surplus[giver] < 0:
            return paths[giver]
        for taker in range(len(surplus)):
            if taker not in paths and can_give(giver, taker):
                paths[taker] = [*paths[giver], taker]
                queue.append(taker)
    return None


def apportion(needs: Sequence[int], unit: int, total: int) -> list[int]:
    """Whole numbers that sum to `total`, nearest to needs / unit and none negative; what is over comes off all alike."""
    active = sorted(range(len(needs)), key=lambda index: needs[index])
    over = sum(needs) - total * unit
    while len(active) > 1 and needs[active[0]] * len(active) < over:
        over -= needs[active.pop(0)]
    size = unit * len(active)
    exact = {index: needs[index] * len(active) - over for index in active}
    given = {index: value // size for index, value in exact.items()}
    left = total - sum(given.values())
    for index in sorted(active, key=lambda index: (given[index] * size - exact[index], index))[:left]:
        given[index] += 1
    return [given.get(index, 0) for index in range(len(needs))]
