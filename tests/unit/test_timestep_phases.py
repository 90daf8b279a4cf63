"""Timesteps that are drawn otherwise in one part of the run than in another."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from commands import prx
from composer.core import Timestamp
from conftest import train_once

from prx_composer.algorithms.timestep_phases import TimestepPhase, TimestepPhases
from prx_composer.callbacks.checkpointing import what_moves
from prx_composer.commands.plan.timeline import stretched, timeline
from prx_composer.common.errors import UserError
from prx_composer.models import FlowMatching, TextToImage
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import build_trainer, run

Build = Callable[..., TextToImage]
Recipe = dict[str, Any]
Write = Callable[..., str]
P_JIT: list[dict[str, Any]] = [{"until": "3ba", "logit_mean": 0.8, "logit_std": 0.8}, {"logit_mean": -0.2, "logit_std": 1.0}]
ALGORITHMS: Recipe = {"timestep_phases": {"phases": P_JIT}}
SIX: Recipe = {"max_duration": "6ba", "save_interval": "1ba", "autoresume": True, "preflight": False}
FLOW = FlowMatching(timestep_shift=3.0, shift_uniform=False)


def at_batch(model: TextToImage, batch: int) -> Any:
    """What a phase asks of a State."""
    return SimpleNamespace(model=model, timestamp=Timestamp(batch=batch))


class Nothing(torch.nn.Module):
    """A backbone that answers with its input: many images cost nothing."""

    router, patch_size = None, 4

    def forward(self, x_t: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        return x_t, {}


def drawn(model: TextToImage, draws: int = 20_000) -> np.ndarray:
    """Timesteps of one training step of that many images."""
    model.caption_dropout, network = 0.0, model.backbone
    model.backbone = Nothing()  # pyright: ignore[reportAttributeAccessIssue]
    tokens = {"input_ids": torch.zeros(draws, 1, dtype=torch.int64), "attention_mask": torch.ones(draws, 1, dtype=torch.bool)}
    outputs = model(tokens | {"latent": torch.zeros(draws, 3, 4, 4), "text_embedding": torch.zeros(draws, 1, 24)})
    model.backbone = network
    return outputs.timestep.numpy().astype(np.float64)


def closed_form(mean: float, std: float, uniform: float) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution of FLOW's timesteps: the logit-normal part shifted, the uniform part as it is."""

    def cdf(t: np.ndarray) -> np.ndarray:
        return uniform * t + (1 - uniform) * scipy.stats.norm.cdf(scipy.special.logit(t / (3 - 2 * t)), mean, std)

    return cdf


def test_the_timesteps_are_each_phase_s_before_and_after_the_border(tiny_model: Build) -> None:
    """A histogram of 20 bins and a Kolmogorov–Smirnov test against the closed form; t = 1 is noise."""
    model = tiny_model(flow=FLOW, trainable_text=False)
    trick = TimestepPhases([TimestepPhase("3ba", 0.8, 0.8), TimestepPhase("5ba", -0.2, 1.0, 0.3), TimestepPhase("7ba")])
    trick.attach(model, None)
    expected = [(0.8, 0.8, 0.1)] * 3 + [(-0.2, 1.0, 0.3)] * 2 + [(0.0, 1.0, 0.1)] * 3
    means = []
    for batch, of in enumerate(expected):
        trick.follow_window(at_batch(model, batch))
        t, cdf = drawn(model), closed_form(*of)
        assert scipy.stats.kstest(t, cdf).pvalue > 1e-3, batch
        counts, edges = np.histogram(t, 20, (0, 1))
        share = np.diff(cdf(edges.clip(1e-12, 1 - 1e-12)))
        assert np.abs(counts / t.size - share).max() < 5 * np.sqrt(share.max() / t.size), batch
        others = {(0.8, 0.8, 0.1), (-0.2, 1.0, 0.3), (0.0, 1.0, 0.1)} - {of}
        assert all(scipy.stats.kstest(t, closed_form(*other)).pvalue < 1e-6 for other in others), "it can fail"
        means.append(t.mean())
    assert means[2] > means[5] > means[3], "more noise first"


def test_miniT2I_s_minus_is_our_plus(tiny_model: Build) -> None:
    """Its t = 1 is the image: t of noise is 1 − sigmoid(N(−0.8, 0.8²)) = sigmoid(N(0.8, 0.8²))."""
    theirs = 1 - scipy.special.expit(np.random.default_rng(0).normal(-0.8, 0.8, 20_000))
    ours = replace(FlowMatching(uniform_fraction=0.0), **TimestepPhase(logit_mean=0.8, logit_std=0.8).changes)
    t = ours.sample_timesteps(20_000, torch.Generator().manual_seed(0)).numpy()
    assert scipy.stats.ks_2samp(theirs, t).pvalue > 1e-3
    assert np.median(t) > 0.5


def test_evaluation_is_the_same_in_every_phase(tiny_model: Build, tiny_batch: dict[str, torch.Tensor]) -> None:
    model = tiny_model(flow=FLOW, trainable_text=False).eval()
    before = model.eval_forward(tiny_batch)
    trick = TimestepPhases([TimestepPhase("1ba", 5.0, 0.1, 0.0)])
    trick.attach(model, None)
    for batch in (0, 1):
        trick.follow_window(at_batch(model, batch))
        assert torch.equal(model.eval_forward(tiny_batch), before)
        assert (drawn(model, 100).min() > 0.9) == (batch == 0), "after a last phase that ends, model.flow holds"


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases needs at least one"),
        ([{"logit_mean": 0.8}, {}], r"phases\[0\].until is missing"),
        ([{"until": "3ba"}, {"until": "3ba"}, {}], r"phases\[1\].until: 3ba must be later than the phase before it ends"),
        ([{"until": "0ba"}, {}], r"phases\[0\].until: 0ba must be later than the beginning"),
        ([{"until": "soon"}, {}], "'soon' is no time"),
        ([{"logit_std": 0}], r"phases\[0\].logit_std must be positive, not 0"),
        ([{"until": "1ba"}, {"uniform_fraction": 1.5}], r"phases\[1\].uniform_fraction must lie in \[0, 1\], not 1.5"),
        ([{"until": "1ba"}, {"logit_mean": "high"}], r"phases\[1\].logit_mean"),
        ([{"logit_men": 0.8}], r"phases\[0\].logit_men: no such .*logit_mean"),
        ([{"until": "0.5budget"}, {}], r"phases\[0\].until: 0.5budget is a part of the time budget, and the recipe has none"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    phases: list[Any], message: str, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    tiny_recipe["algorithms"]["timestep_phases"] = {"phases": phases}
    said = prx("check", "--config-only", write_recipe(tiny_recipe), code=1)
    assert re.search(rf"algorithms\.timestep_phases.*{message}", said.replace("\n", " ")), said


def test_it_is_there_once_and_needs_a_model_that_draws_timesteps(tiny_model: Build) -> None:
    model, trick = tiny_model(), TimestepPhases([TimestepPhase(logit_mean=0.8)])
    trick.attach(model, None)
    with pytest.raises(UserError, match="there twice"):
        trick.attach(model, None)
    with pytest.raises(UserError, match="needs a model with `training_flow`"):
        trick.attach(torch.nn.Linear(1, 1), None)


def test_the_plan_names_the_phases_and_moves_them_with_the_schedule(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["algorithms"]["timestep_phases"] = {"phases": P_JIT}
    path = write_recipe(tiny_recipe | {"max_duration": "8ba"})
    said = " ".join(prx("plan", path, "--gpu", "h200", "--samples", 100).split())
    assert "timesteps of training: until 3ba: logit_mean 0.8, logit_std 0.8; then logit_mean -0.2, logit_std 1" in said
    recipe = config.load([path])
    changes, new = stretched(recipe, timeline(recipe, 1, 100).spans, [8, 8])
    assert changes["algorithms.timestep_phases.phases[0].until"] == "6ba"
    assert new.algorithms["timestep_phases"]["phases"][0]["until"] == "6ba"
    assert recipe.algorithms["timestep_phases"]["phases"][0]["until"] == "3ba"


@pytest.mark.parametrize("stopped_at", [2, 3, 4])
def test_a_run_that_is_stopped_before_at_or_after_the_border_resumes_bit_for_bit(
    stopped_at: int, tiny_recipe: Recipe, write_recipe: Write, whole: Path
) -> None:
    """Of 6 batches, the border is after the third."""
    path = write_recipe(tiny_recipe | SIX | {"algorithms": ALGORITHMS})
    run(config.load([path, f"callbacks.stop_after.time={stopped_at}ba"]))
    run(config.load([path]))
    assert losses_of(folder_of(tiny_recipe)) == losses_of(whole) and len(losses_of(whole)) == 6
    weights, expected = weights_of(folder_of(tiny_recipe)), weights_of(whole)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_the_border_is_where_it_is_said(tiny_recipe: Recipe, write_recipe: Write, whole: Path) -> None:
    """The losses are those of one distribution up to the border, and not after it."""
    one: Recipe = {"timestep_phases": {"phases": [{"logit_mean": 0.8, "logit_std": 0.8}]}}
    run(config.load([write_recipe(tiny_recipe | SIX | {"algorithms": one})]))
    losses, expected = losses_of(folder_of(tiny_recipe)), losses_of(whole)
    assert losses[:3] == expected[:3] and losses[3] != expected[3]


def test_a_longer_run_says_which_phase_moves(tiny_recipe: Recipe, write_recipe: Write) -> None:
    phases = [P_JIT[0] | {"until": "0.5dur"}, P_JIT[1]]
    path = write_recipe(tiny_recipe | SIX | {"algorithms": {"timestep_phases": {"phases": phases}}})
    run(config.load([path, "callbacks.stop_after.time=4ba"]))
    longer = config.load([path, "max_duration=12ba"])
    trainer = build_trainer(longer)
    found = what_moves(trainer.state, longer, {"max_duration": "6ba", "time_budget": None})
    trainer.close()
    assert any(
        "timestep_phases.phases[0]: at batch 4 its window (0ba to 0.5dur) was over, and is open now" in one for one in found
    )


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def losses_of(folder: Path) -> list[float]:
    return [row["loss/train/total"] for row in read_metrics(folder / "metrics.jsonl") if "loss/train/total" in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/ba6/rank0.pt", weights_only=False)["state"]["model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    """The folder of a run that was never stopped."""
    return train_once(tmp_path_factory, shapes_data, **SIX, algorithms=ALGORITHMS)
