"""Shares of a mixture that change with time: how they are written, what is drawn, and that a resumed run repeats it."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mixture import SQUARE, TALL, WIDE, write

from prx_composer.commands.plan.conditions import read_manifests
from prx_composer.commands.plan.timeline import sources, stretched, timeline
from prx_composer.common.errors import UserError, problems_of
from prx_composer.data.dataset import ImageCaptionDataset
from prx_composer.data.mixture import MixedDataset, Shares, without
from prx_composer.data.sampler import BucketBatchSampler
from prx_composer.recipe import config
from prx_composer.recipe.arguments import data_sets
from prx_composer.recipe.checks import argument_problems
from prx_composer.recipe.times import Phase, phases_of
from prx_composer.training.run import run
from prx_composer.training.trial import check_recipe

Recipe = dict[str, Any]
ENDS = {"red": {"weight": 2, "until": "0.5dur"}, "blue": {"weight": 1}}


# ------------------------------------------------------------------------------------------------------ as written


@pytest.mark.parametrize(
    ("mix", "phases"),
    [
        ({"a": {}, "b": {}}, [Phase({})]),
        ({"a": {"weight": 3}, "b": {"weight": 1}}, [Phase({"a": 3.0, "b": 1.0})]),
        (ENDS, [Phase({"red": 2.0, "blue": 1.0}, "0.5dur"), Phase({"red": 0.0, "blue": 1.0})]),
        (  # one begins, another changes and ends; the same moment written twice is one
            {
                "a": {"weight": [{"until": "10ba", "weight": 0}, {"weight": 5}]},
                "b": {"weight": [{"until": "10ba", "weight": 2}, {"until": "30ba", "weight": 0.5}]},
                "c": {"weight": 1},
            },
            [
                Phase({"a": 0.0, "b": 2.0, "c": 1.0}, "10ba"),
                Phase({"a": 5.0, "b": 0.5, "c": 1.0}, "30ba"),
                Phase({"a": 5.0, "b": 0.0, "c": 1.0}),
            ],
        ),
        (
            {
                "a": {"weight": 1, "until": "100ba or 0.8budget"},
                "b": {"weight": [{"until": "50ba or 0.4budget", "weight": 1}, {"weight": 2}]},
            },
            [
                Phase({"a": 1.0, "b": 1.0}, "50ba or 0.4budget"),
                Phase({"a": 1.0, "b": 2.0}, "100ba or 0.8budget"),
                Phase({"a": 0.0, "b": 2.0}),
            ],
        ),
    ],
)
def test_phases_are_the_times_between_changes(mix: Any, phases: list[Phase]) -> None:
    assert phases_of(mix) == phases
    for phase in phases:
        assert sum(phase.shares(dict.fromkeys(mix, 10)).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({"a": {"until": "0.5dur"}, "b": {}}, ["mix.a.weight is missing"]),
        ({"a": {"weight": 1, "until": "soon"}, "b": {"weight": 1}}, ["mix.a.until: 'soon' is no time"]),
        ({"a": {"weight": 1, "until": "2ep"}, "b": {"weight": 1}}, ["mix.a.until: 2ep cannot be in epochs"]),
        ({"a": {"weight": 1, "until": "0ba"}, "b": {"weight": 1}}, ["mix.a.until: 0ba must be later than the beginning"]),
        (
            {"a": {"weight": 1, "until": "2h"}, "b": {"weight": 1, "until": "0.5dur"}, "c": {"weight": 1}},
            ["give all times in one unit"],
        ),
        ({"a": {"weight": 1, "until": "0.5dur"}}, [r"mix: no data set has a weight from 0.5dur on \(then\)"]),
        (
            {"a": {"weight": [{"until": "5ba", "weight": 0}, {"weight": 1}]}},
            [r"no data set has a weight at the beginning \(until 5ba\)"],
        ),
        ({"a": {"weight": []}, "b": {"weight": 1}}, ["mix.a: a list of weights needs at least one"]),
        (
            {
                "a": {"weight": [{"until": "0.5dur", "weight": 1}, {"until": "0.2dur", "weight": 2}, {"wieght": 1}]},
                "b": {"weight": [{"weight": 1}, {"weight": 2}]},
                "c": {"weight": -1},
                "d": {"weight": 0, "until": "0.2dur"},
            },
            [
                r"mix.a.weight\[1\].until: 0.2dur must be later",
                r"mix.a.weight\[2\].wieght: unknown",
                r"mix.b.weight\[0\].until is missing",
                "mix.c.weight must be a positive number, not -1",
                "mix.d.weight must be a positive number, not 0",
            ],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_once_with_its_path(mix: Any, said: list[str]) -> None:
    import re

    with pytest.raises(UserError) as error:
        data_sets({"path": "data", "mix": mix})
    problems = problems_of(error.value)
    assert len(problems) == len(said), problems
    assert all(any(re.search(pattern, problem) for problem in problems) for pattern in said), problems


def test_times_are_compared_with_the_run(tiny_recipe: Recipe) -> None:
    def said(mix: Any, **changes: Any) -> list[str]:
        values = tiny_recipe | {"train_loader": {"name": "image_caption", "path": "d", "mix": mix} | changes.pop("loader", {})}
        return [
            problem
            for problem in argument_problems(values | changes, imports=False)
            if "until" in problem or "max_dur" in problem
        ]

    assert not said(ENDS)
    assert (
        "train_loader.mix.red.until: 1dur is not before the end"
        in said({"red": {"weight": 1, "until": "1dur"}, "blue": {"weight": 1}})[0]
    )
    late = {"red": {"weight": [{"until": "3ba", "weight": 1}, {"until": "9ba", "weight": 2}]}, "blue": {"weight": 1}}
    (problem,) = said(late)
    assert problem.startswith("train_loader.mix.red.weight[1].until: 9ba is not before the end of the run (max_duration: 8ba)")
    assert "cannot be in epochs" in said(ENDS, max_duration="3ep")[0]
    assert "shuffle" in said(ENDS, loader={"shuffle": False})[0]
    budget = {"red": {"weight": 1, "until": "0.5budget"}, "blue": {"weight": 1}}
    assert "the recipe has none" in said(budget)[0] and not said(budget, time_budget="1h")
    assert "not before the end" in said({"red": {"weight": 1, "until": "2h"}, "blue": {"weight": 1}}, time_budget="1h")[0]


# -------------------------------------------------------------------------------------------------------- as drawn


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, ImageCaptionDataset]:
    return {
        "red": write(tmp_path / "red", "red", {SQUARE: 44, WIDE: 20}),
        "blue": write(tmp_path / "blue", "blue", {SQUARE: 12, TALL: 32}),
        "new": write(tmp_path / "new", "green", {SQUARE: 20}),
    }


PHASES = [
    Phase({"red": 3.0, "blue": 1.0, "new": 0.0}, "7ba"),
    Phase({"red": 1.0, "blue": 1.0, "new": 2.0}, "30ba"),
    Phase({"red": 0.0, "blue": 1.0, "new": 1.0}),
]
LENGTHS = (7, 23, 60)  # batches, none a whole number of epochs


class Sampled:
    """What is drawn of a mixture as its times come: batches, over all ranks, as a trainer asks for them."""

    def __init__(self, mixed: MixedDataset, ranks: int = 1, batch: int = 4, epoch: int = 0):
        self.mixed, self.batch, self.epoch, self.given = mixed, batch, epoch, 0
        self.samplers = [BucketBatchSampler(mixed, 16, batch, 4, True, 0, ranks, rank) for rank in range(ranks)]
        self._begin()

    def _begin(self) -> None:
        start = self.mixed.start_sample
        for sampler in self.samplers:
            sampler.set_epoch(self.epoch)
            self.mixed.start_sample = start
        self.running = []
        for sampler in self.samplers:
            self.mixed.start_sample = start
            self.running.append(list(sampler))
        self.given = start // self.batch

    def draw(self, batches: int) -> list[list[int]]:
        drawn = []
        for _ in range(batches):
            if not self.running[0]:
                self.epoch, self.given = self.epoch + 1, 0
                self._begin()
            drawn.append([request.sample_id for rank in self.running for request in rank.pop(0)])
            self.given += 1
        return drawn

    def change(self, phase: int) -> None:
        self.mixed.end_epoch(self.epoch, self.batch, self.given)
        self.mixed.phase = phase
        self.epoch += 1
        self._begin()


def whole(parts: Any, ranks: int = 1, phases: list[Phase] = PHASES) -> list[list[list[int]]]:
    sampled = Sampled(MixedDataset(parts, phases, 0), ranks)
    drawn = [sampled.draw(LENGTHS[0])]
    for phase, length in enumerate(LENGTHS[1:], 1):
        sampled.change(phase)
        drawn.append(sampled.draw(length))
    return drawn


def part_of(mixed: MixedDataset, sample: int) -> str:
    return list(mixed.parts)[mixed.locate(sample)[0]]


def test_every_phase_has_its_shares(parts: Any) -> None:
    mixed = MixedDataset(parts, PHASES, 0)
    for phase, length, batches in zip(PHASES, LENGTHS, whole(parts), strict=True):
        seen = Counter(part_of(mixed, sample) for batch in batches for sample in batch)
        assert sum(seen.values()) == 4 * length and len(batches) == length
        for name, share in phase.shares({name: len(part) for name, part in parts.items()}).items():
            if share == 0:
                assert seen[name] == 0, "not one after its time, nor before it"
            # Whole epochs are right up to a sample, of the one that is cut short it's a draw without replacement.
            assert abs(seen[name] - 4 * length * share) <= 3 * (4 * min(length, 27) * share * (1 - share)) ** 0.5 + 2, (
                phase,
                seen,
            )


def test_whole_epochs_of_a_phase_are_exact_to_a_sample(parts: Any) -> None:
    mixed = MixedDataset(parts, PHASES, 0)
    sampled = Sampled(mixed)
    sampled.draw(5)
    sampled.change(1)
    steps = mixed.epoch_steps(4)
    assert steps == 128 // 4, "an epoch is of what is drawn from"
    for epochs in range(1, 5):
        seen = Counter(part_of(mixed, sample) for batch in Sampled(mixed, epoch=1).draw(epochs * steps) for sample in batch)
        for name, share in (("red", 0.25), ("blue", 0.25), ("new", 0.5)):
            assert abs(seen[name] - epochs * steps * 4 * share) <= 4, "two rare buckets are a batch ahead"
    mixed.phase = 2
    assert mixed.epoch_steps(4) == 64 // 4 and mixed.least == 64


def test_no_sample_comes_again_before_every_other_has_come_across_changes(parts: Any) -> None:
    """Where a source goes on, what the cut epoch had not drawn comes first."""
    mixed = MixedDataset(
        parts, [Phase({"red": 1.0, "blue": 1.0, "new": 1.0}, "7ba"), Phase({"red": 1.0, "blue": 2.0, "new": 1.0})], 0
    )
    for cut in (0, 1, 9, 17, 32):
        mixed._restart()
        sampled, seen = Sampled(mixed), Counter[int]()
        for batch in sampled.draw(cut):
            seen.update(batch)
        sampled.change(1)
        for _ in range(3):
            for batch in sampled.draw(mixed.epoch_steps(4)):
                seen.update(batch)
            for part in range(3):
                for bucket in range(3):
                    counts = [seen[int(sample)] for sample in mixed.ids_in(part, bucket)]
                    assert not counts or max(counts) - min(counts) <= 1, (cut, part, bucket, counts)


def test_without_removes_as_many_as_were_drawn() -> None:
    ids = np.array([5, 3, 5, 8, 3, 5])
    assert without(ids, np.array([5, 3, 5, 9])).tolist() == [8, 3, 5]
    assert without(ids, np.array([], np.int64)).tolist() == ids.tolist() and without(ids, ids).size == 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 9, rng.integers(0, 30))
        drawn = rng.permutation(ids)[: rng.integers(0, len(ids) + 1)]
        assert Counter(without(ids, drawn).tolist()) == Counter(ids.tolist()) - Counter(drawn.tolist())


def test_a_mixture_without_times_is_drawn_as_it_was(parts: Any) -> None:
    """Also where an image size changes, which ends an epoch too."""
    weights = {"red": 3.0, "blue": 1.0, "new": 1.0}
    plain, one = MixedDataset(parts, weights, 0), MixedDataset(parts, [Phase(weights)], 0)
    one.end_epoch(0, 4, 3)
    shares = Shares(plain.table, list(weights.values()), 4)
    for epoch in range(5):
        for first, second in zip(plain.epoch_ids(epoch, 4), one.epoch_ids(epoch, 4), strict=True):
            assert np.array_equal(first, second)
        drawn = [Counter(plain.locate(int(i))[0] for i in ids) for ids in plain.epoch_ids(epoch, 4)]
        assert [[of[part] for of in drawn] for part in range(3)] == shares.epoch(epoch).draws
    assert plain.state_dict(8) == one.state_dict(8) and "changes" not in plain.state_dict(8)
    before_the_first_change = MixedDataset(parts, [Phase(weights, "7ba"), Phase(weights | {"red": 0.0})], 0)
    assert all(map(np.array_equal, plain.epoch_ids(0, 4), before_the_first_change.epoch_ids(0, 4)))


def test_any_number_of_ranks_and_a_resume_anywhere_draw_the_same(parts: Any) -> None:
    phases = whole(parts)
    assert phases == whole(parts, ranks=2) == whole(parts, ranks=4)
    batches = [batch for phase in phases for batch in phase]
    sampled, done = Sampled(MixedDataset(parts, PHASES, 0)), 0
    for phase, length in enumerate(LENGTHS):
        for _ in range(length):
            state = sampled.mixed.state_dict(sampled.given * 4)
            again = MixedDataset(parts, PHASES, 0)
            again.load_state_dict(json.loads(json.dumps(state)))
            assert again.phase == phase
            if done % 5 == 0 and not again.has_ended(sampled.epoch):
                resumed = Sampled(again, ranks=2, epoch=sampled.epoch)
                left = min(sum(LENGTHS[: phase + 1]) - done, 3, len(sampled.running[0]))
                assert resumed.draw(left) == batches[done : done + left]
            sampled.draw(1)
            done += 1
        if phase < 2:
            sampled.change(phase + 1)


# -------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture
def recipe(tiny_recipe: Recipe, shapes_data: Path) -> Recipe:
    """Two stages, of which the second begins at the fourth batch; shares change at the third and the sixth."""
    weights = [{"until": "3ba", "weight": 1}, {"until": "6ba", "weight": 0}, {"weight": 3}]
    mix = {"old": {"path": str(shapes_data), "weight": weights}, "more": {"path": str(shapes_data), "weight": 2}}
    return tiny_recipe | {"train_loader": {"name": "image_caption", "mix": mix, "num_workers": 2}, "save_interval": "1ba"}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss/train/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_is_resumed_before_at_and_after_a_change_repeats_every_loss(
    recipe: Recipe, write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    file = write_recipe(recipe)
    run(config.load([file]))
    folder = tmp_path / "runs" / "tiny"
    expected = losses(folder)
    assert len(expected) == 8
    shutil.copytree(folder, tmp_path / "kept")
    for last, workers in ((2, 0), (3, 2), (5, 1)):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
        for checkpoint in (folder / "checkpoints").iterdir():
            batch = int(checkpoint.name.rpartition("ba")[2]) if "ba" in checkpoint.name else 0
            if checkpoint.is_symlink() or batch > last:
                shutil.rmtree(checkpoint) if checkpoint.is_dir() and not checkpoint.is_symlink() else checkpoint.unlink()
        run(config.load([file, "autoresume=true", f"train_loader.num_workers={workers}"]))
        assert losses(folder) == expected, last


def test_what_a_check_and_a_plan_say(recipe: Recipe, write_recipe: Callable[..., str]) -> None:
    loaded = config.load([write_recipe(recipe)])
    results = [str(result) for result in check_recipe(loaded, 1, step=False)]
    assert not [line for line in results if line.startswith("✗")]
    shares = "until 3ba: old 33.3%, more 66.7%; until 6ba: more 100.0%; then: old 60.0%, more 40.0%"
    assert any("train_loader.mix" in line and shares in line for line in results), results
    manifests = read_manifests(loaded)
    assert manifests is not None
    said, taken = sources(loaded, timeline(loaded, 1, None), manifests)
    # Batches of 48 up to the fourth, then of 24.
    old, more = 3 * 48 / 3 + 2 * 24 * 0.6, 3 * 48 * 2 / 3 + 48 + 2 * 24 + 2 * 24 * 0.4
    (samples,) = (sum(manifest.buckets.values()) for manifest in manifests.values())
    assert said == shares and [source.images for source in taken] == pytest.approx([old, more])
    assert [source.epochs for source in taken] == pytest.approx([old / samples, more / samples])
    line = timeline(loaded, 1, None)
    changes, moved = stretched(loaded, line.spans, [8, 8])
    assert changes["train_loader.mix.old.weight[0].until"] == "6ba" and changes["train_loader.mix.old.weight[1].until"] == "12ba"
    assert [phase.until for phase in phases_of(moved.train_loader["mix"])] == ["6ba", "12ba", None]


def test_too_few_samples_in_a_phase_and_another_length_are_said(
    recipe: Recipe, write_recipe: Callable[..., str], tmp_path: Path
) -> None:
    few = write(tmp_path / "few", "red", {SQUARE: 30})
    assert len(few) == 30
    recipe["train_loader"]["mix"]["few"] = {
        "path": str(tmp_path / "few"),
        "weight": [{"until": "6ba", "weight": 0}, {"weight": 1}],
    }
    for part in ("old", "more"):
        recipe["train_loader"]["mix"][part] |= {"weight": 1, "until": "6ba"}
    recipe["algorithms"]["progressive_resolution"]["stages"][1]["global_train_batch_size"] = 48
    problems = [str(result) for result in check_recipe(config.load([write_recipe(recipe)]), 1, step=False)]
    assert any("more than the 30 images that there are to train on" in problem for problem in problems), problems
