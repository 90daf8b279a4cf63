"""Several data sets as one, each with the share of samples that its weight says."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.format import Bucket
from prx_composer.data.sampler import BucketedDataset, SampleRequest


class MixedDataset(BucketedDataset):
    """Data sets drawn from with given shares, as one data set for the sampler.

    An epoch has as many full batches as all data sets together would fill; a data set of weight w has w / Σw of their samples,
    see `Shares`. In every bucket it goes through its own samples in passes, each in an order of its own, and an epoch goes on
    where the one before it ended: no sample is seen n + 1 times before every other of its bucket has been seen n times.

    Args:
        parts: name → data set; all of one base size.
        weights: name → weight; None: every sample is seen equally often.
        seed: of the orders.

    Raises:
        UserError: data sets of different base sizes.
    """

    def __init__(self, parts: dict[str, ImageCaptionDataset], weights: dict[str, float] | None, seed: int):
        self.parts, self._seed = parts, seed
        sizes = {name: part.image_size for name, part in parts.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise UserError(f"mix: the data sets have different base sizes ({told} px); convert them with one --base-size.")
        buckets = sorted({bucket for part in parts.values() for bucket in part.buckets})
        counts = [dict(zip(part.buckets, part.stored[0], strict=True)) for part in parts.values()]
        skipped = [dict(zip(part.buckets, part.skipped[0], strict=True)) for part in parts.values()]
        super().__init__(
            next(iter(sizes.values())),
            buckets,
            [[there.get(bucket, 0) for bucket in buckets] for there in counts],
            [[places.get(bucket, np.empty(0, np.int64)) for bucket in buckets] for places in skipped],
        )
        self._weights = weights or {name: float(len(part)) for name, part in parts.items()}
        self._shares: dict[int, Shares] = {}  # by batch size
        self.images = all(part.images for part in parts.values())
        self.text_columns = {f"{name}/{key}": c for name, part in parts.items() for key, c in part.text_columns.items()}
        self.latent_columns = {f"{name}/{key}": c for name, part in parts.items() for key, c in part.latent_columns.items()}

    def _in_part(self, request: SampleRequest) -> tuple[ImageCaptionDataset, SampleRequest, int]:
        """Return the data set of a sample, the request to it, and the id of its first sample."""
        part = self.locate(request.sample_id)[0]
        first = self._start(part, 0)
        return list(self.parts.values())[part], request._replace(sample_id=request.sample_id - first), first

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        part, asked, first = self._in_part(request)
        sample = part[asked]
        return sample | {"sample_id": sample["sample_id"] + first}

    def look_at(self, request: SampleRequest) -> dict[str, Any]:
        part, asked, _ = self._in_part(request)
        return part.look_at(asked)

    @property
    def undecodable(self) -> int:
        return sum(part.undecodable for part in self.parts.values())

    def check_sizes(self, image_size: int, sizes: list[Bucket]) -> None:
        size_of = dict(zip(self.buckets, sizes, strict=True))
        for name, part in self.parts.items():
            try:
                part.check_sizes(image_size, [size_of[bucket] for bucket in part.buckets])
            except ValueError as error:
                raise ValueError(f"mix.{name}: {error}") from None

    def identity(self) -> dict[str, Any]:
        total = sum(self._weights.values())
        return {"mix": {name: {**part.identity(), "share": self._weights[name] / total} for name, part in self.parts.items()}}

    def epoch_ids(self, epoch: int, batch_size: int) -> list[NDArray[np.int64]]:
        plan = self._plans(batch_size).epoch(epoch)
        parts = range(len(self.parts))
        return [
            np.concatenate([self._stretch(part, bucket, plan.before[part][bucket], plan.draws[part][bucket]) for part in parts])
            for bucket in range(len(self.buckets))
        ]

    def epoch_steps(self, batch_size: int) -> int:
        return self._plans(batch_size).steps

    def _plans(self, batch_size: int) -> "Shares":
        if batch_size not in self._shares:
            self._shares[batch_size] = Shares(self.table, list(self._weights.values()), batch_size)
        return self._shares[batch_size]

    def _stretch(self, part: int, bucket: int, begin: int, draws: int) -> NDArray[np.int64]:
        """Return so many of the endless shuffled passes through what a data set has in a bucket, from `begin` on."""
        if draws == 0:
            return np.empty(0, np.int64)
        ids = self.ids_in(part, bucket)
        numbers = range(begin // len(ids), -(-(begin + draws) // len(ids)))
        passes = [np.random.default_rng([self._seed, part, bucket, number]).permutation(len(ids)) for number in numbers]
        return ids[np.concatenate(passes)[begin % len(ids) : begin % len(ids) + draws]]


# How many samples every data set gives to every bucket in an epoch, with what is owed carried on. Whole numbers throughout, so
# that every machine comes to the same plan.


class EpochPlan(NamedTuple):
    """By data set, then by bucket: how many samples were drawn in the epochs before this one, and how many this one draws."""

    before: list[list[int]]
    draws: list[list[int]]


class Shares:
    """Plan epochs of full batches, each of one bucket, that follow given shares.

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
        """Return the plan of an epoch, a function of its number: those before it are gone through once."""
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
        """Return how many batches every bucket has in this epoch."""
        needs, unit = [sum(column) for column in zip(*owed, strict=True)], self._scale * self.batch_size
        held = [bucket for bucket in range(len(needs)) if any(row[bucket] for row in self._rates)]  # others are left out whole
        unseen = [bucket for bucket in held if not any(row[bucket] for row in self._drawn)]
        first = sorted(unseen, key=lambda bucket: -needs[bucket])[: self.steps]
        rest = apportion([need - unit * (bucket in first) for bucket, need in enumerate(needs)], unit, self.steps - len(first))
        return [number + (bucket in first) for bucket, number in enumerate(rest)]

    def _column(self, bucket: int, batches: int, owed: list[list[int]]) -> list[int]:
        """Return what every data set gives to a bucket: what it owes, and of what the bucket gets too early its part."""
        rates, needs = [row[bucket] for row in self._rates], [row[bucket] for row in owed]
        early = batches * self.batch_size * self._scale - sum(needs)
        targets = [need * sum(rates) + early * rate for need, rate in zip(needs, rates, strict=True)]
        holders = [index for index, rate in enumerate(rates) if rate]
        given = apportion([targets[index] for index in holders], self._scale * sum(rates), batches * self.batch_size)
        by_holder = dict(zip(holders, given, strict=True))
        return [by_holder.get(index, 0) for index in range(len(rates))]

    def _balance(self, draws: list[list[int]], owed: list[list[int]]) -> None:
        """Let data sets give for each other within buckets, until each gives its share.

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
    """Return a path from one that gives too much, by way of others, to one that gives too little; None if there is none."""
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
    """Return whole numbers that sum to `total`, nearest to needs / unit and none negative; what is over comes off all alike."""
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
