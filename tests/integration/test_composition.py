"""Every pair of algorithms, the whole stack, and what may not be combined."""

import copy
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from stacks import TEACHER, stack_of_24h

from prx_composer import registry
from prx_composer.callbacks.checkpointing import RandomStep
from prx_composer.common.errors import UserError
from prx_composer.models import TextToImage
from prx_composer.recipe import config
from prx_composer.recipe.arguments import build
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.run import run

Write = Callable[..., str]
Recipe = dict[str, Any]
Build = Callable[..., TextToImage]
Batch = dict[str, torch.Tensor]
REPOSITORY = Path(__file__).parents[2]

ALGORITHMS: dict[str, dict[str, Any]] = {
    "contrastive_flow_matching": {},
    "deferred_masking": {"mixer_blocks": 1, "rate": 0.5},
    "ema": {"half_life": "2ba"},
    "float8": {"emulate": True},
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 0.1},
    "internal_guidance": {},
    "irepa": {"teacher": TEACHER, "block": 1},
    "low_precision_norm": {},
    "lpips": {"net": "squeeze", "random_weights": True, "scale": 1.25},
    "muon": {},  # an optimizer, but it must go with all of them
    "perceptual_dino": {"teacher": TEACHER, "image_size": 16},
    "progressive_resolution": {
        "stages": [
            {"until": "1ba", "image_size": 16, "global_train_batch_size": 4, "device_train_microbatch_size": 2},
            {"image_size": 24, "global_train_batch_size": 2, "device_train_microbatch_size": 2},
        ]
    },
    "readouts": {},
    "repa": {"teacher": TEACHER, "block": 1, "projector_hidden": 16, "adapter": {"depth": 1, "mask_rate": 0.2}},
    "resolution_aware": {},
    "sprint": {"start_block": 1, "rate": 0.5},
    "timestep_phases": {"phases": [{"until": "1ba", "logit_mean": 0.8, "logit_std": 0.8}, {"logit_mean": -0.2}]},
    "tread": {"start_block": 1, "rate": 0.5, "self_guidance": True},
}
if importlib.util.find_spec("torchao") is None:  # the extra float8, which CI has
    del ALGORITHMS["float8"]
ROUTERS = ("deferred_masking", "sprint", "tread")
FORBIDDEN = {frozenset(pair) for pair in itertools.combinations(ROUTERS, 2)}
FORBIDDEN |= {frozenset(("deferred_masking", name)) for name in ("lpips", "perceptual_dino")}
FORBIDDEN |= {frozenset(("internal_guidance", "tread"))}  # which guides itself here
LOSSES = {"contrastive_flow_matching", "internal_guidance", "irepa", "lpips", "perceptual_dino", "readouts", "repa"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


class Batches:
    """Two batches a pass, of the present stage's size."""

    def __init__(self, batch: Batch):
        self.batch, self.image_size, self.size = batch, 16, 4

    def set_stage(self, image_size: int, global_batch_size: int) -> None:
        self.image_size, self.size = image_size, global_batch_size

    def end_pass(self) -> None:
        pass

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Batch]:
        for shift in range(2):
            batch = {name: value.roll(shift, 0)[: self.size] for name, value in self.batch.items()}
            yield batch | {"image": batch["image"].repeat(1, 1, 2, 1)[..., : self.image_size, : self.image_size]}


def train(names: tuple[str, ...], tiny_model: Build, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Two steps in microbatches of two; returns the final weights and every logged loss term."""
    model = tiny_model(depth=3)
    optimizer = build(registry.optimizers, "muon" if "muon" in names else "adamw", {"lr": 1e-2}, "optimizer", model=model)
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        algorithms=[build(registry.algorithms, name, ALGORITHMS[name], f"algorithms.{name}") for name in names if name != "muon"],
        callbacks=[RandomStep()],
        loggers=logger,
        train_dataloader=DataSpec(Batches(batch), get_num_samples_in_batch=lambda b: len(b["image"])),
        device_train_microbatch_size=2,
        max_duration="2ba",
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    trainer.close()
    terms = {name: [float(value) for _, value in points] for name, points in logger.data.items() if name.startswith("loss/")}
    return {name: value.clone() for name, value in model.state_dict().items()}, terms


@pytest.fixture
def square_batch(tiny_batch: Batch) -> Batch:
    return tiny_batch | {"image": tiny_batch["image"][..., :16].repeat(1, 1, 1, 2)}


@pytest.mark.parametrize("first", ALGORITHMS)
def test_every_pair_trains_in_either_order_with_the_same_result_or_is_refused_by_name(
    first: str, tiny_model: Build, square_batch: Batch
) -> None:
    alone, _ = train((first,), tiny_model, square_batch)
    for second in [name for name in ALGORITHMS if name > first]:
        if {first, second} in FORBIDDEN:
            for names in ((first, second), (second, first)):
                with pytest.raises(UserError, match=rf"algorithms.{names[0]}|algorithms.{names[1]}") as refusal:
                    train(names, tiny_model, square_batch)
                assert first in str(refusal.value) and second in str(refusal.value)
            continue
        weights, terms = train((first, second), tiny_model, square_batch)
        assert all(torch.isfinite(value).all() for value in weights.values()), (first, second)
        assert {f"loss/train/{name}" for name in LOSSES & {first, second}} <= terms.keys()
        if second not in ("ema", "low_precision_norm"):  # these don't touch the weights in fp32
            assert weights.keys() != alone.keys() or any(not torch.equal(weights[n], alone[n]) for n in alone), (first, second)
        swapped, swapped_terms = train((second, first), tiny_model, square_batch)
        assert swapped_terms == terms and swapped.keys() == weights.keys()
        assert all(torch.equal(swapped[name], value) for name, value in weights.items()), (first, second)


def stack(recipe: Recipe, router: str) -> Recipe:
    """Every algorithm that goes with this router, with windows that open and close in a run of eight batches."""
    recipe = copy.deepcopy(recipe)
    names = [name for name in ALGORITHMS if name != "muon" and (name not in ROUTERS or name == router)]
    names = [name for name in names if frozenset((name, router)) not in FORBIDDEN]
    recipe["algorithms"] = {name: copy.deepcopy(ALGORITHMS[name]) for name in names} | {
        name: recipe["algorithms"][name] for name in ("gradient_clipping", "ema", "progressive_resolution")
    }
    for name in (router, "irepa", "contrastive_flow_matching", "resolution_aware"):
        recipe["algorithms"][name] |= {"start": "1ba", "end": "7ba"}
    recipe["algorithms"]["repa"]["end"] = "5ba"
    recipe["optimizer"] = {"name": "muon", "lr": 1e-3}
    recipe["model"]["backbone"]["depth"] = 3
    for stage in recipe["algorithms"]["progressive_resolution"]["stages"]:
        stage["image_size"] = {8: 16, 16: 24}[stage["image_size"]]
    return recipe | {"image_size": 24}


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    return read_metrics(Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"])) / "metrics.jsonl")


def terms_of(recipe: Recipe) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name.startswith("loss/")} for row in rows_of(recipe)]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.timeout(600)
def test_a_resumed_run_with_every_algorithm_repeats_every_loss_term_bit_for_bit(
    router: str, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    whole = stack(tiny_recipe, router)
    run(config.load([write_recipe(whole)]))
    parts = copy.deepcopy(whole) | {"run_name": "parts", "autoresume": True}
    path = write_recipe(parts, "parts.yaml")
    for stop in ("2ba", "6ba"):  # while everything is on, and when the teacher of repa has gone
        run(config.load([path, f"callbacks.stop_after.time={stop}"]))
    run(config.load([path]))
    assert terms_of(parts) == terms_of(whole) and len(terms_of(whole)) == 8
    assert {f"loss/train/{name}" for name in LOSSES & whole["algorithms"].keys()} <= terms_of(whole)[3].keys()
    assert terms_of(whole)[4]["loss/train/repa"] != 0 == terms_of(whole)[5]["loss/train/repa"]
    states = [
        torch.load(Path(r["run_folder"].replace("${run_name}", r["run_name"])) / "checkpoints/ba8/rank0.pt", weights_only=False)
        for r in (whole, parts)
    ]
    models = [state["state"]["model"] for state in states]
    assert all(torch.equal(models[1][name], value) for name, value in models[0].items())
    assert not any("teacher" in name or "lpips" in name or "source" in name for name in models[0])


def check_24h(recipe: Recipe) -> None:
    terms = terms_of(recipe)
    names = {"flow", "repa", "lpips", "perceptual_dino", "total"}
    assert len(terms) == 6 and all(names == {name.removeprefix("loss/train/") for name in row} for row in terms)
    for row in terms:
        parts = sum(value for name, value in row.items() if name != "loss/train/total")
        assert row["loss/train/total"] == pytest.approx(parts, rel=1e-5)
    assert terms[3]["loss/train/repa"] != 0 == terms[4]["loss/train/repa"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("blocks", {"parallelism_config": {"fsdp": {}}}, marks=pytest.mark.long),  # as the recipe is run
        pytest.param(True, {}, marks=pytest.mark.long),
    ],
)
def test_the_24h_stack_trains_compiled_as_it_does_eagerly(
    kind: Any, changes: Recipe, tiny_recipe: Recipe, write_recipe: Write
) -> None:
    eager = stack_of_24h(tiny_recipe) | {"run_name": "eager"}
    compiled = copy.deepcopy(eager) | {"run_name": "compiled"} | changes
    compiled["model"]["compile"] = kind
    for recipe in (eager, compiled):
        assert main([write_recipe(recipe, f"{recipe['run_name']}.yaml")]) == 0
        check_24h(recipe)
    totals = [[row["loss/train/total"] for row in terms_of(recipe)] for recipe in (eager, compiled)]
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)


def test_fsdp2s_hooks_fit_into_no_graph(tiny_recipe: Recipe, write_recipe: Write) -> None:
    tiny_recipe["model"]["compile"] = True
    assert main([write_recipe(tiny_recipe | {"parallelism_config": {"fsdp": {}}})]) == 1


def test_the_24h_recipe_passes_the_check_and_a_mistake_in_it_does_not() -> None:
    from typer.testing import CliRunner

    from prx_composer.cli import app

    recipe = str(REPOSITORY / "yamls" / "24h.yaml")
    result = CliRunner().invoke(app, ["check", "--config-only", "--ranks", "32", recipe])
    assert result.exit_code == 0 and "1,177.2M parameters" in result.output and "512, 1024" in result.output
    for wrong, message in (
        ("algorithms.tread.rate=1.5", "algorithms.tread: rate must lie between 0 and 1"),
        ("algorithms.tred={}", "Did you mean 'tread'?"),
        ("algorithms.repa.teacher.pretraind=x", "algorithms.repa.teacher.pretraind: no such argument"),
        ("model.backbone.patch_size=48", "image_size: 512 is not divisible by model.backbone.patch_size 48"),
        ("algorithms.progressive_resolution.stages[1].global_train_batch_size=500", "stages[1].global_train_batch_size: 500"),
    ):
        result = CliRunner().invoke(app, ["check", "--config-only", "--ranks", "32", recipe, wrong])
        assert result.exit_code == 1, wrong
        assert any(line.startswith("✗") and message in line for line in result.output.splitlines()), (wrong, result.output)


def test_ablations_merge_over_the_quickstart() -> None:
    from prx_composer.training.trial import check_config

    files = sorted((REPOSITORY / "yamls" / "ablations").glob("*.yaml"))
    assert len(files) >= 14
    for file in files:
        if file.stem == "float8" and "float8" not in ALGORITHMS:
            continue
        results = check_config(config.load([str(REPOSITORY / "yamls" / "quickstart.yaml"), str(file)]))
        assert not [str(result) for result in results if result.mark == "✗"], file.name
