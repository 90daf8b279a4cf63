"""Several data sets as one, each with the share of samples that its weight says, which may change with time."""

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prx_composer.common.errors import UserError
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.format import Bucket
from prx_composer.data.sampler import BucketedDataset, SampleRequest, epoch_batches
from prx_composer.recipe.times import Phase


def shares_in_words(phases: Sequence[Phase], samples: Mapping[str, int]) -> str:
    """Return "until 0.5dur: flux 66.7%, photos 33.3%; then: photos 100.0%".

    Args:
        samples: by data set.
    """
    said = list[str]()
    for phase in phases:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in phase.shares(samples).items() if share)
        said.append(f"{phase}: {shares}" if len(phases) > 1 else shares)
    return "; ".join(said)


class MixedDataset(BucketedDataset):
    """Data sets drawn from with given shares, as one data set for the sampler.

    An epoch has as many full batches as all data sets together would fill; a data set of weight w has w / Σw of their samples,
    see `Shares`. In every bucket it goes through its own samples in passes, each in an order of its own, and an epoch goes on
    where the one before it ended: no sample is seen n + 1 times before every other of its bucket has been seen n times.

    Weights may change with time: `phase` says which of the phases it is. An epoch ends with its phase, and what it has not drawn
    by then comes first in the next ones (so it does where an image size changes, but only in a mixture that has phases).

    Args:
        parts: name → data set; all of one base size.
        weights: name → weight, or the phases of a mixture that changes; None: every sample is seen equally often.
        seed: of the orders.

    Attributes:
        phases: at least one. phase: the present one, by number.

    Raises:
        UserError: data sets of different base sizes.
    """

    def __init__(self, parts: dict[str, ImageCaptionDataset], weights: Mapping[str, float] | Sequence[Phase] | None, seed: int):
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
        self.phases = [*weights] if isinstance(weights, Sequence) else [Phase(weights or {})]
        self._weights = [[(phase.weights or self._samples)[name] for name in parts] for phase in self.phases]
        self._shares: dict[tuple[int, int], Shares] = {}  # by batch size and phase
        self._restart()
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

    @property
    def _samples(self) -> dict[str, int]:
        return {name: len(part) for name, part in self.parts.items()}

    @property
    def shares(self) -> dict[str, float]:
        """The present share of every data set."""
        return self.phases[self.phase].shares(self._samples)

    @property
    def least(self) -> int:
        return min(phase.drawn_from(self._samples) for phase in self.phases)

    def identity(self) -> dict[str, Any]:
        shares = [phase.shares(self._samples) for phase in self.phases]
        of = {name: [share[name] for share in shares] if shares[1:] else shares[0][name] for name in self.parts}
        return {"mix": {name: {**part.identity(), "share": of[name]} for name, part in self.parts.items()}}

    def state_dict(self, num_samples: int, from_beginning: bool = True) -> dict[str, Any]:
        state = super().state_dict(num_samples, from_beginning)
        # One string: a sharded checkpoint is read by the keys that there are before it is read.
        return state | ({_CHANGES: json.dumps([self.phase, self._ended])} if self.phases[1:] else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state.items() if key != _CHANGES})
        self._restart()
        if _CHANGES in state and not self.begins_anew:
            phase, ended = json.loads(state[_CHANGES])
            for epoch, batch_size, steps, self.phase in ended:
                self.end_epoch(epoch, batch_size, steps)
            self.phase = phase

    # ------------------------------------------------------------------------------------------------- epochs

    def _restart(self) -> None:
        self.phase, self._first = 0, 0  # the epoch from which on shares are counted
        self._ended: list[tuple[int, int, int, int]] = []  # epoch, batch size, steps and phase of each that was ended early
        empty = _Rest(np.empty(0, np.int64), 0)
        self._rest = [[empty] * len(self.buckets) for _ in self.parts]

    def epoch_ids(self, epoch: int, batch_size: int) -> list[NDArray[np.int64]]:
        plan, parts = self._plans(batch_size).epoch(epoch - self._first), range(len(self.parts))
        return [
            np.concatenate([self._stretch(part, bucket, plan.before[part][bucket], plan.draws[part][bucket]) for part in parts])
            for bucket in range(len(self.buckets))
        ]

    def epoch_steps(self, batch_size: int) -> int:
        return self._plans(batch_size).steps

    def end_epoch(self, epoch: int, batch_size: int, steps: int) -> None:
        """Count shares anew from the next epoch on, and keep for it what this one has not drawn."""
        if not self.phases[1:] or self.has_ended(epoch):
            return
        plan = self._plans(batch_size).epoch(epoch - self._first)
        ids = self.epoch_ids(epoch, batch_size)
        drawn = epoch_batches(ids, batch_size, shuffle=True, seed=self._seed, epoch=epoch)[:steps].flatten()
        for part, rests in enumerate(self._rest):
            for bucket, rest in enumerate(rests):
                begin, draws = plan.before[part][bucket], plan.draws[part][bucket]
                over = without(self._stretch(part, bucket, begin, draws), drawn)
                passed = max(begin + draws - len(rest.first), 0)
                rests[bucket] = _Rest(np.concatenate([over, rest.first[begin + draws :]]), rest.begin + passed)
        self._ended.append((epoch, batch_size, steps, self.phase))
        self._first = epoch + 1

    def has_ended(self, epoch: int) -> bool:
        """Return whether an epoch was ended before its last batch, or with it."""
        return bool(self._ended) and self._ended[-1][0] == epoch

    def _plans(self, batch_size: int) -> "Shares":
        key = batch_size, self.phase
        if key not in self._shares:
            self._shares[key] = Shares(self.table, self._weights[self.phase], batch_size)
        return self._shares[key]

    def _stretch(self, part: int, bucket: int, begin: int, draws: int) -> NDArray[np.int64]:
        """Return so many of what a data set has left in a bucket and of the endless shuffled passes after it, from `begin` on."""
        if draws == 0:
            return np.empty(0, np.int64)
        rest = self._rest[part][bucket]
        over = rest.first[begin : begin + draws]
        begin, draws = rest.begin + max(begin - len(rest.first), 0), draws - len(over)
        if draws == 0:
            return over
        ids = self.ids_in(part, bucket)
        numbers = range(begin // len(ids), -(-(begin + draws) // len(ids)))
        passes = [np.random.default_rng([self._seed, part, bucket, number]).permutation(len(ids)) for number in numbers]
        return np.concatenate([over, ids[np.concatenate(passes)[begin % len(ids) : begin % len(ids) + draws]]])


_CHANGES = "changes"  # in a checkpoint: the phase, and the epochs that were ended early


class _Rest(NamedTuple):
    """What a data set's bucket still has for the epochs to come.

    Args:
        first: ids that earlier epochs were to draw and have not.
        begin: how far the endless passes, which come after them, have been gone through.
    """

    first: NDArray[np.int64]
    begin: int


def without(ids: NDArray[np.int64], drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ids, in order, without those that were drawn: of one that occurs n times and was drawn m times, the last n − m."""
    order, drawn = np.argsort(ids, kind="stable"), np.sort(drawn)
    ranked = ids[order]
    occurrence = np.arange(len(ids)) - np.searchsorted(ranked, ranked)
    times = np.searchsorted(drawn, ranked, side="right") - np.searchsorted(drawn, ranked)
    return ids[np.sort(order[occurrence >= times])]


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
        weights: of the data sets; one of 0 is not drawn from, nor counted for the length of an epoch.
        batch_size: over all ranks.
    """

    def __init__(self, counts: Sequence[Sequence[int]], weights: Sequence[float], batch_size: int):
        self.batch_size = batch_size
        self.steps = max(sum(sum(row) for row, weight in zip(counts, weights, strict=True) if weight) // batch_size, 1)
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
