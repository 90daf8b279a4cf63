"""llm-foundry's trainer on our components, and our trainer on llm-foundry's: each repeats what the other one does."""

import copy
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from commands import prx
from conftest import SOURCE
from omegaconf import OmegaConf

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.integrations.foundry_names import INSTALL
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training.run import build_trainer, run

Recipe = dict[str, Any]
Write = Callable[..., str]
FOUNDRY_YAML = Path(__file__).parents[2] / "yamls" / "foundry.yaml"
STAGES = [
    {"until": "2ba", "image_size": 8, "global_train_batch_size": 48, "device_train_microbatch_size": 24},
    {"image_size": 16, "global_train_batch_size": 24, "device_train_microbatch_size": 12},
]


@pytest.fixture
def foundry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """llm-foundry, and its training function not leaving CUDA's settings behind in the environment."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    return pytest.importorskip("llmfoundry", reason=f"llm-foundry isn't installed: {INSTALL}")


@pytest.fixture
def train(foundry: Any, tmp_path: Path, tiny_recipe: Recipe) -> Callable[..., Any]:
    """Trains yamls/foundry.yaml with llm-foundry, at the size of the tiny recipe and with other changes; returns its Trainer."""
    from llmfoundry.command_utils import train_from_yaml

    def train(*overrides: str, without: str | None = None, **keys: Any) -> Any:
        content: Any = OmegaConf.to_container(OmegaConf.load(FOUNDRY_YAML))
        content["variables"]["folder"] = str(tmp_path / "foundry")
        content["model"]["backbone"] |= tiny_recipe["model"]["backbone"]
        tiny = tiny_recipe["model"]["text_encoder"]
        content["model"]["text_encoder"] |= {key: tiny[key] for key in ("config", "trainable")}
        small = {"path": tiny_recipe["train_loader"]["path"], "source": dict(SOURCE), "image_size": 16, "num_workers": 0}
        content["train_loader"] |= small
        content |= {"global_train_batch_size": 48, "device_train_microbatch_size": 24, "device_eval_batch_size": 60}
        content |= {"max_duration": "4ba", "console_log_interval": "100ba"} | keys
        content["callbacks"]["prx_images"]["num_inference_steps"] = 1
        config = OmegaConf.create(content)
        if without:
            parent, _, last = without.rpartition(".")
            del OmegaConf.select(config, parent)[last]
        path = tmp_path / "foundry.yaml"
        OmegaConf.save(config, path)
        trainer = train_from_yaml(str(path), list(overrides))
        trainer.close()
        return trainer

    return train


def losses(folder: Path) -> list[float]:
    return [row["loss/train/total"] for row in read_metrics(folder / "metrics.jsonl")]


def same(first: Any, second: Any) -> bool:
    first, second = (trainer.state.model.state_dict() for trainer in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], value) for name, value in second.items())


def average(trainer: Any) -> dict[str, torch.Tensor]:
    (state,) = [callback for callback in trainer.state.callbacks if type(callback).__name__ == "AverageState"]
    return state.state_dict()["average"]


# ------------------------------------------------------------------------------------------ its trainer runs ours


@pytest.mark.parametrize(
    ("optimizer", "algorithms"),
    [
        ({"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}, {"ema": {"half_life": "2ba", "update_interval": "1ba"}}),
        (
            {"name": "muon", "lr": 1e-3, "weight_decay": 0.1},
            {"ema": {"half_life": "2ba", "update_interval": "1ba"}, "progressive_resolution": {"stages": STAGES}},
        ),
    ],
    ids=["adamw", "muon and stages"],
)
def test_llm_foundrys_trainer_repeats_our_trainers_run_bit_for_bit(
    optimizer: Recipe, algorithms: Recipe, train: Any, tiny_recipe: Recipe, write_recipe: Write, tmp_path: Path
) -> None:
    theirs = train(
        optimizer=optimizer | {"name": f"prx_{optimizer['name']}"},
        algorithms={f"prx_{name}": arguments for name, arguments in algorithms.items()},
        scheduler={"name": "prx_constant"},
    )
    tiny_recipe |= {"optimizer": optimizer, "algorithms": algorithms, "scheduler": {"name": "constant"}, "max_duration": "4ba"}
    shipped: Any = OmegaConf.to_container(OmegaConf.load(FOUNDRY_YAML))
    tiny_recipe["model"] |= {"flow": shipped["model"]["flow"], "caption_dropout": 0.1}
    ours = build_trainer(config.load([write_recipe(tiny_recipe)]))
    ours.fit()
    ours.close()
    folder = Path(tiny_recipe["run_folder"].replace("${run_name}", "tiny"))
    assert losses(tmp_path / "foundry") == losses(folder) and len(losses(folder)) == 4
    assert same(theirs, ours)
    first, second = average(theirs), average(ours)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert (tmp_path / "foundry" / "images" / "ba000004.png").exists()
    assert type(theirs.state.optimizers[0]) is type(ours.state.optimizers[0])


def test_the_loss_of_the_shipped_yaml_goes_down_and_is_evaluated(train: Any, tmp_path: Path) -> None:
    train(max_duration="40ba", eval_interval="40ba")
    curve = losses(tmp_path / "foundry")
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10])
    assert read_metrics(tmp_path / "foundry" / "metrics.jsonl")[-1]["metrics/eval/validation_loss"] > 0


def test_a_run_of_llm_foundrys_trainer_goes_on_bit_for_bit(train: Any, tmp_path: Path) -> None:
    whole = train(max_duration="6ba")
    expected = losses(tmp_path / "foundry")
    (tmp_path / "foundry").rename(tmp_path / "whole")
    saving = {"save_folder": str(tmp_path / "saved"), "save_interval": "2ba", "max_duration": "6ba", "autoresume": True}
    train("callbacks.prx_stop_after.time=4ba", **saving)
    assert losses(tmp_path / "foundry") == expected[:4]
    assert same(train(**saving), whole)
    assert losses(tmp_path / "foundry") == expected


def test_microbatches_weigh_by_their_images_whatever_llm_foundry_counts(train: Any) -> None:
    assert same(train(accumulate_train_batch_on_tokens=True), train(accumulate_train_batch_on_tokens=False))


def test_llm_foundrys_optimizers_train_our_model(train: Any) -> None:
    trainer = train(optimizer={"name": "decoupled_lionw", "lr": 1e-3})
    assert type(trainer.state.optimizers[0]).__module__.startswith("llmfoundry") and int(trainer.state.timestamp.batch) == 4


def test_every_component_that_llm_foundry_lacks_is_published(foundry: Any) -> None:
    from composer import Algorithm, Callback, ComposerModel
    from composer.loggers import LoggerDestination
    from composer.optim import ComposerScheduler

    kinds = {
        "algorithms": Algorithm, "callbacks": Callback, "loggers": LoggerDestination, "optimizers": torch.optim.Optimizer,
        "schedulers": ComposerScheduler,
    }  # fmt: skip
    for kind, base in kinds.items():
        theirs = getattr(foundry.registry, kind).get_all()
        plain = ("composer.", "prx_composer.loggers.")  # Composer's trackers are there; ours belong to a run folder
        composers = {name for name, where in getattr(registry, kind).builtin.items() if where.startswith(plain)}
        missing = [
            name
            for name in getattr(registry, kind).builtin
            if f"prx_{name}" not in theirs and not (name in composers and name in theirs)
        ]
        assert not missing, f"{kind} without an entry point in pyproject.toml"
        for point in entry_points(group=f"llmfoundry_{kind}"):
            if point.name.startswith("prx_"):
                assert issubclass(theirs[point.name], base), point.name
    assert issubclass(foundry.registry.models.get("prx_text_to_image"), ComposerModel)


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        (["algorithms.prx_ema.half_lief=2ba"], None, r"^algorithms.prx_ema.half_lief: no such argument. Did you mean 'half_lif"),
        (["algorithms.prx_ema.half_life=soon"], None, r"^algorithms.prx_ema: .*soon"),
        (["algorithms.prx_ema.start=2h"], None, r"^2h: time is measured by train.py only"),
        ([], "callbacks.prx_images.folder", r"^callbacks.prx_images lacks the argument 'folder'"),
        ([], "callbacks.prx_run", r"^callbacks lacks prx_run"),
        ([], "model.seed", r"^model lacks the argument 'seed'"),
        (["model.backbone.depht=2"], None, r"^model.backbone.depht: no such argument. Did you mean 'depth'"),
        (["model.text_encoder.tokenizer=t5"], None, r"^model.text_encoder.tokenizer: llm-foundry makes it"),
        (["train_loader.num_worker=2"], None, r"^prx_image_caption.num_worker: no such argument. Did you mean 'num_workers'"),
        (["tokenizer.kwargs.vocab=9"], None, r"^tokenizer.kwargs.vocab: no such argument. Did you mean 'vocab_size'"),
        (["train_loader.multiple=2"], None, r"^train_loader.multiple is 2, but the model's is 4"),
        (["eval_loader.max_tokens=9"], None, r"^eval_loader.max_tokens is 9, but the model's is 14"),
        (["train_loader.source.heldout=7"], None, r"^train_loader.source: .* other settings of this source \(heldout\)"),
        (["optimizer.lrr=2"], None, r"^optimizer.lrr: no such argument. Did you mean 'lr'"),
        (["optimizer.param_groups=[{param_str_match: bias}]"], None, r"^optimizer.param_groups: prx_muon makes its own"),
    ],
)  # fmt: skip
def test_a_mistake_in_llm_foundrys_yaml_ends_in_one_message(
    changes: list[str], without: str | None, message: str, train: Any
) -> None:
    with pytest.raises(UserError, match=message):
        train(*changes, without=without)


def test_without_a_tokenizer_it_is_said_how_to_name_one(train: Any) -> None:
    with pytest.raises(UserError, match=r"^tokenizer: name the text encoder's"):
        train(tokenizer={})


def test_our_optimizers_refuse_another_model(foundry: Any) -> None:
    from llmfoundry.utils.builders import build_optimizer

    with pytest.raises(UserError, match=r"^optimizer.name: prx_muon trains prx_text_to_image"):
        build_optimizer(torch.nn.Linear(2, 2), "prx_muon", {"lr": 0.1})


# ------------------------------------------------------------------------------------------- our trainer runs its


LION = {"name": "decoupled_lionw", "lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 5e-4}
INVERSE_ROOT = {"name": "inv_sqrt_with_warmup", "t_warmup": "0ba", "t_scale": "1ba", "t_cooldown": "0ba"}


@pytest.fixture
def lion_recipe(foundry: Any, tiny_recipe: Recipe) -> Recipe:
    return tiny_recipe | {"optimizer": dict(LION), "scheduler": dict(INVERSE_ROOT), "algorithms": {"ema": {"half_life": "4ba"}}}


def test_lion_moves_every_weight_by_the_learning_rate(lion_recipe: Recipe, write_recipe: Write) -> None:
    """Its first step is −lr·sign(gradient), after decay by the share itself, which embeddings and gains are spared."""
    trainer = build_trainer(config.load([write_recipe(lion_recipe), "max_duration=1ba"]))
    model: Any = trainer.state.model
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)  # a layer that begins at zero lets no gradient through
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.fit()
    trainer.close()
    moved = 0
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in embeddings else LION["weight_decay"]
        step = ((parameter - before[name] * (1 - decay)) / LION["lr"]).detach()
        assert torch.allclose(step.abs(), step.abs().round(), atol=1e-3) and step.abs().max() < 1.1, name
        moved += int(step.abs().round().sum())
    assert moved > 0.5 * sum(parameter.numel() for parameter in model.parameters())


def test_the_learning_rate_follows_its_schedule_and_its_callback_freezes(lion_recipe: Recipe, write_recipe: Write) -> None:
    frozen = "backbone.img_in.weight"
    lion_recipe["callbacks"] = {"lr_monitor": {}, "layer_freezing": {"layer_names": [frozen]}}
    trainer = build_trainer(config.load([write_recipe(lion_recipe), "max_duration=4ba"]))
    before = trainer.state.model.get_parameter(frozen).detach().clone()
    trainer.fit()
    trainer.close()
    rows = read_metrics(Path(lion_recipe["run_folder"].replace("${run_name}", "tiny")) / "metrics.jsonl")
    rates = [row["lr-DecoupledLionW/group0"] for row in rows]
    assert rates == pytest.approx([LION["lr"] / (1 + batch) ** 0.5 for batch in range(4)])
    assert torch.equal(trainer.state.model.get_parameter(frozen), before)


def test_a_run_with_lion_goes_on_bit_for_bit(lion_recipe: Recipe, write_recipe: Write) -> None:
    def folder(recipe: Recipe) -> Path:
        return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))

    run(config.load([write_recipe(lion_recipe)]))
    parts = copy.deepcopy(lion_recipe) | {"run_name": "parts", "autoresume": True}
    path = write_recipe(parts, "parts.yaml")
    run(config.load([path, "callbacks.stop_after.time=4ba"]))
    assert len(losses(folder(parts))) == 4
    run(config.load([path]))
    assert losses(folder(parts)) == losses(folder(lion_recipe)) and len(losses(folder(parts))) == 8
    first, second = (
        torch.load(folder(recipe) / "checkpoints" / "ba8" / "rank0.pt", weights_only=False)["state"]["model"]
        for recipe in (lion_recipe, parts)
    )
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_check_and_plan_take_a_recipe_with_llm_foundrys_components(lion_recipe: Recipe, write_recipe: Write) -> None:
    lion_recipe["callbacks"] = {"scheduled_gc": {"batch_interval": 100}}
    path = write_recipe(lion_recipe)
    assert "✗" not in prx("check", "--config-only", path)
    assert "taken to keep" not in prx("plan", path), "what its optimizer keeps is counted, not guessed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["algorithms.emma={}"], r"Did you mean 'ema'\? .*llm-foundry has none either. Allowed: alibi"),
        (["algorithms.prx_ema={}"], r"a YAML of llm-foundry's names it; here it is ema\."),
        (["callbacks.curriculum_learning={}"], r"runs in its trainer only"),
        (["callbacks.nan_monitor.often=1"], r"callbacks.nan_monitor.often: no such argument. It takes none"),
        (["callbacks.scheduled_gc={}"], r"callbacks.scheduled_gc lacks the argument 'batch_interval'"),
        (["optimizer.wd=1"], r"optimizer.wd: no such argument. Allowed: betas, lr, weight_decay"),
        (["optimizer.lr=much"], r"optimizer.lr: expected a number, not 'much'"),
        (["scheduler.t_scael=1ba"], r"scheduler.t_scael: no such argument. Did you mean 't_scale'"),
    ],
)
def test_a_mistake_with_llm_foundrys_components_ends_in_one_message(
    changes: list[str], message: str, lion_recipe: Recipe, write_recipe: Write
) -> None:
    with pytest.raises(UserError, match=message):
        config.check(config.load([write_recipe(lion_recipe), *changes]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimizer.lr=0"], r"^optimizer: Invalid LR: 0"),
        (["scheduler.t_warmup=1ep"], r"t_warmup .* must match max_duration unit"),
        (["scheduler.t_warmup=0.1dur"], r"scheduler: t_warmup cannot be in units of"),
    ],
)
def test_a_value_that_llm_foundry_refuses_is_the_users_to_mend(
    changes: list[str], message: str, lion_recipe: Recipe, write_recipe: Write
) -> None:
    with pytest.raises(UserError, match=message):
        build_trainer(config.load([write_recipe(lion_recipe), *changes]))


WITHOUT = """
import sys
from prx_composer.recipe import config
from prx_composer.common.errors import UserError
from prx_composer.integrations.foundry_names import INSTALL
from prx_composer.training.preflight import examine
_, parts = examine(config.load(["yamls/quickstart.yaml"]), 1)
assert not parts.problems
assert "llmfoundry" not in sys.modules
sys.modules["llmfoundry"] = None  # as if it were not installed
config.check(config.load(["yamls/24h.yaml"]))
for change in ("optimizer={name: decoupled_lionw, lr: 1e-3}", "train_loader.name=image_captoin"):
    try:
        config.check(config.load(["yamls/quickstart.yaml", change]))
    except UserError as error:
        print(error)
"""


def test_without_llm_foundry_nothing_changes_but_the_message_for_an_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text(WITHOUT)
    finished = commands.run("python", tmp_path / "without.py")
    assert finished.returncode == 0, finished.stderr
    lion, loader = finished.stdout.strip().splitlines()
    assert lion == (
        "optimizer: there is no 'decoupled_lionw' among the optimizers. Did you mean 'decoupled_adamw'? Allowed: adamw, "
        "decoupled_adamw, muon. llm-foundry's optimizers can be named too, but it isn't installed. In a clone: "
        "uv sync --inexact --group foundry"
    )
    assert loader.endswith("Did you mean 'image_caption'? Allowed: image_caption."), "llm-foundry's loaders are for text"
