"""What may change when a run goes on: the table, the comparison, and that a message's advice works when it is followed."""

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from prx_composer import registry
from prx_composer.common.errors import UserError
from prx_composer.common.outlines import constructor
from prx_composer.recipe import config
from prx_composer.recipe.resume import RULES, Change, advice, check_allowed, rule_of, table
from prx_composer.registry import Registry
from prx_composer.runs.folder import (
    as_saved,
    check_same_recipe,
    differences,
    holds_run,
    is_allowed,
    read_changes,
    recipe_changes,
    record_changes,
    save_recipe,
)

Recipe = dict[str, Any]
Write = Callable[..., str]
README = Path(__file__).parents[2] / "prx_composer" / "callbacks" / "README.md"


# ------------------------------------------------------------------------------------------------------- the table


def test_every_key_of_a_recipe_and_every_argument_of_ours_is_in_the_table() -> None:
    import dataclasses

    import composer.optim  # noqa: F401  (what the registries name)

    keys = [field.name for field in dataclasses.fields(config.Recipe)]
    for key, components in {"optimizer": registry.optimizers, "train_loader": registry.loaders, "model": registry.models}.items():
        keys += [f"{key}.{name}" for name in _arguments(components)]
    keys += [f"algorithms.{name}.start" for name in registry.algorithms.builtin]
    assert [key for key in keys if rule_of(key).keys == "**"] == []


def _arguments(components: Registry) -> list[str]:
    import inspect

    found = [inspect.signature(constructor(components.get(name, name))).parameters for name in components.builtin]
    return sorted({name for parameters in found for name in parameters} - {"self"})


def test_the_documents_have_the_table() -> None:
    assert table() in README.read_text(), "print(prx_composer.recipe.resume.table()) is what belongs there"


def test_a_rule_says_why_and_what_follows_in_whole_sentences() -> None:
    for rule in RULES:
        for text in (rule.why, rule.follows):
            assert text[0].isupper() or text[0] == "`", text
            assert text.endswith("."), text


# -------------------------------------------------------------------------------------------------- the comparison


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    tiny_recipe["optimizer"] = {"name": "adamw", "lr": 1e-3}
    tiny_recipe["eval_loader"] = {"name": "image_caption", "path": tiny_recipe["train_loader"]["path"], "split": "heldout"}
    tiny_recipe["algorithms"]["lpips"] = {"weight": 0.1}
    return tiny_recipe | {"autoresume": True}


@pytest.fixture
def started(recipe: Recipe, write_recipe: Write) -> str:
    """The path of a recipe of which a run folder exists."""
    path = write_recipe(recipe)
    loaded = config.load([path])
    Path(loaded.run_folder).mkdir(parents=True)
    save_recipe(loaded, Path(loaded.run_folder))
    return path


def compare(path: str, *changes: str, ranks: int = 1) -> list[Change]:
    """As a start of the recipe does it with its run folder."""
    loaded = config.load([path, *changes])
    config.check(loaded)
    return check_same_recipe(loaded, yaml.safe_load((Path(loaded.run_folder) / "config.yaml").read_text()), "it", ranks)


SAME = {
    "workers": ["train_loader.num_workers=3"],
    "batch of evaluation": ["global_eval_batch_size=5", "eval_loader.num_workers=2"],
    "defaults of an optimizer": ["optimizer.betas=[0.9, 0.95]", "optimizer.weight_decay=0", "optimizer.eps=1e-8"],
    "the default schedule": ["scheduler={name: constant}"],
    "a default of the schedule": ["scheduler={name: constant, alpha: 1.0, t_max: 1dur}"],
    "the default autoencoder": ["model.autoencoder={name: pixels}"],
    "the default flow": ["model.flow={}", "model.flow.prediction=x", "model.flow.timestep_shift=1"],
    "the default process": ["model.flow={name: flow_matching}"],
    "a default of the backbone": ["model.backbone.theta=10000"],
    "a default of the text encoder": ["model.text_encoder.dtype=float32"],
    "defaults of the recipe": ["precision=fp32", "eval_interval=0.25dur", "seed=17"],
    "defaults of the loader": ["train_loader.shuffle=true", "train_loader.split=train"],
    "an algorithm that is off": ["algorithms.tread=false"],
    "a callback's empty arguments": ["callbacks={}"],
    "a window from the beginning": ["algorithms.gradient_clipping.start=0ba"],
    "a stage's default": ["algorithms.progressive_resolution.stages[1].until=null"],
    "what only says how to go on": [
        "dist_timeout=5",
        "progress_bar=true",
        "preflight=false",
        "variables={x: 1}",
        "save_folder=s3://b/r",
    ],
}


@pytest.mark.parametrize("name", SAME)
def test_what_changes_nothing_is_no_change(name: str, started: str) -> None:
    assert compare(started, *SAME[name]) == []


SAID = {
    "longer": ["max_duration=16ba"],
    "a time budget": ["time_budget=1h"],
    "other checkpoints": ["save_interval=1ba", "save_num_checkpoints_to_keep=5"],
    "pictures": ["callbacks.images={prompts: [x]}"],
    "a limit that was reached": ["train_loader.max_undecodable=0.5"],
    "more patience": ["algorithms.skip_nonfinite.limit=100"],
    "another name": ["run_name=other", "run_folder=KEEP"],
    "more evaluation": ["eval_loader=null", "eval_interval=1ba", "eval_subset_num_batches=3"],
}


@pytest.mark.parametrize("name", SAID)
def test_what_may_change_is_a_change_that_needs_no_word(name: str, started: str) -> None:
    folder = config.load([started]).run_folder
    arguments = [argument.replace("KEEP", folder) for argument in SAID[name]]
    changes = compare(started, *arguments)
    assert changes and all(change.rule.may == "logged" for change in changes)


ASKED = {
    "lr": (["optimizer.lr=1e-4"], {"optimizer.lr"}),
    "several": (["optimizer.lr=1e-4", "optimizer.betas=[0.8, 0.9]", "seed=3"], {"optimizer.lr", "optimizer.betas", "seed"}),
    "another schedule": (["scheduler={name: constant_with_warmup, t_warmup: 2ba}"], {"scheduler"}),
    "clipping": (["algorithms.gradient_clipping.clipping_threshold=0.1"], {"algorithms.gradient_clipping.clipping_threshold"}),
    "a term without its own weights": (["algorithms.lpips=false"], {"algorithms.lpips"}),
    "clipping left out": (["algorithms.gradient_clipping=false"], {"algorithms.gradient_clipping"}),
    "another term": (["algorithms.tread={start_block: 0}"], {"algorithms.tread"}),
    "a stage": (
        ["algorithms.progressive_resolution.stages[0].until=6ba"],
        {"algorithms.progressive_resolution.stages[0].until"},
    ),
    "captions": (["train_loader.captions={short_caption: 1.0}"], {"train_loader.captions"}),
    "microbatch": (["device_train_microbatch_size=12"], {"device_train_microbatch_size"}),
    "flow": (["model.flow={timestep_shift: 3}"], {"model.flow.timestep_shift"}),
    "another process": (["model.flow={name: edm}"], {"model.flow"}),
    "caption dropout": (["model.caption_dropout=0.2"], {"model.caption_dropout"}),
    "precision": (["precision=amp_bf16"], {"precision"}),
    "weights that are not read again": (["model.init_from=nowhere"], {"model.init_from"}),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_advice_of_a_refusal_works_when_it_is_followed(name: str, started: str) -> None:
    """The line to type is taken out of the message; a part of it is not enough; the old recipe goes on too."""
    arguments, keys = ASKED[name]
    with pytest.raises(UserError) as refused:
        compare(started, *arguments)
    message = str(refused.value)
    assert keys == set(re.search(r"what differs: (.*)\.$", message, re.MULTILINE)[1].split(", "))  # pyright: ignore
    for key in keys:
        assert rule_of(key).why in message and re.search(rf"^  {re.escape(key)} \(.+ → .+\): ", message, re.MULTILINE)
    typed = shlex.split(_line(message, "To go on with the new values from here: add  "))
    assert {change.key for change in compare(started, *arguments, *typed)} == keys
    if len(keys) > 1:
        with pytest.raises(UserError, match="resume.allow"):
            compare(started, *arguments, "resume.allow=[optimizer.lr]")
    old = shlex.split(_line(message, "To go on with the old recipe: composer train.py "))
    assert compare(*old) == []
    new = shlex.split(_line(message, "To train from the beginning: add  "))
    loaded = config.load([started, *arguments, *new])
    assert loaded.run_name == "NEW" and not Path(loaded.run_folder).exists()


def test_advice_that_is_added_takes_back_nothing_that_was_allowed(started: str) -> None:
    """Of two lists on a command line the last one counts."""
    arguments = ["optimizer.lr=1e-4", "model.caption_dropout=0.2", "resume.allow=[optimizer.lr]"]
    with pytest.raises(UserError, match="what differs: model.caption_dropout") as refused:
        compare(started, *arguments)
    typed = shlex.split(_line(str(refused.value), "To go on with the new values from here: add  "))
    assert len(compare(started, *arguments, *typed)) == 2


def _line(message: str, beginning: str) -> str:
    found = [line.removeprefix(beginning) for line in message.splitlines() if line.startswith(beginning)]
    assert len(found) == 1, message
    return found[0]


NEVER = {
    "depth": (["model.backbone.depth=3"], "model.backbone.depth"),
    "another optimizer": (["optimizer={name: muon, lr: 1e-3}"], "optimizer"),
    "another encoder": (["model.text_encoder.config.d_ff=64"], "model.text_encoder.config.d_ff"),
    "a term with weights": (["algorithms.repa={teacher: {pretrained: x}, block: 1}"], "algorithms.repa"),
    "shards": (["parallelism_config={fsdp: {}}"], "parallelism_config"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_cannot_change_cannot_be_allowed_and_the_old_recipe_goes_on(name: str, started: str) -> None:
    arguments, key = NEVER[name]
    allow = "resume.allow=[model,optimizer,algorithms,parallelism_config]"
    with pytest.raises(UserError, match="cannot change within a run") as refused:
        compare(started, *arguments, allow)
    message = str(refused.value)
    assert f"  {key} (" in message and "To go on with the new values" not in message
    assert compare(*shlex.split(_line(message, "To go on with the old recipe: composer train.py "))) == []


def test_all_differences_are_said_at_once_and_what_can_be_allowed_apart_from_what_cannot(started: str) -> None:
    arguments = ["model.backbone.depth=3", "optimizer.lr=1", "max_duration=16ba", "train_loader.num_workers=2"]
    with pytest.raises(UserError) as refused:
        compare(started, *arguments)
    message = str(refused.value)
    assert "what differs: model.backbone.depth, optimizer.lr." in message and "max_duration" not in message
    line = _line(message, "To go on with the new values from here: keep model.backbone.depth=2, and add  ")
    assert [change.key for change in compare(started, *arguments, "model.backbone.depth=2", *shlex.split(line))] == [
        "optimizer.lr",
        "max_duration",
    ]


def test_a_strangers_component_is_refused_unless_its_argument_is_allowed() -> None:
    before = {"algorithms": {"mine": {"strength": 1}}, "optimizer": {"name": "lion_of_mine", "rate": 1.0}}
    now = {"algorithms": {"mine": {"strength": 2}}, "optimizer": {"name": "lion_of_mine", "rate": 2.0}}
    changes = recipe_changes(before, now, 1)
    assert [change.key for change in changes] == ["algorithms.mine.strength", "optimizer.rate"]
    assert not any(is_allowed(change, []) for change in changes)
    assert all(is_allowed(change, ["optimizer", "algorithms.mine.strength"]) for change in changes)
    assert not is_allowed(changes[1], ["optimizer.ra"]), "a part of a word is no key"


def test_a_recipe_of_an_older_version_without_new_keys_is_the_same(started: str) -> None:
    loaded = config.load([started])
    old = as_saved(loaded)
    for key in ("time_budget", "eval_subset_num_batches", "precision", "preflight", "parallelism_config", "variables"):
        del old[key]
    assert check_same_recipe(loaded, old, "it", 1) == []


def test_the_default_microbatch_may_be_written_out(recipe: Recipe, write_recipe: Write) -> None:
    del recipe["device_train_microbatch_size"]
    before = as_saved(config.load([write_recipe(recipe)]))
    assert recipe_changes(before, before | {"device_train_microbatch_size": 24}, ranks=2) == []
    assert [c.key for c in recipe_changes(before, before | {"device_train_microbatch_size": 48}, ranks=2)]


def test_differences_are_found_wherever_they_are_and_nowhere_else() -> None:
    """Every leaf of a whole recipe, changed or taken out, is found alone and by its own key, whatever the order of the keys."""
    before = yaml.safe_load((Path(__file__).parents[2] / "yamls" / "24h.yaml").read_text())

    def shuffled(value: Any) -> Any:
        return {key: shuffled(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    assert differences(before, shuffled(before)) == []
    leaves = list(_leaves(before, ""))
    assert len(leaves) > 90
    for path, parent, key in leaves:
        if path.endswith("name"):
            continue
        value = parent[key]
        parent[key] = ["another"]
        now = copy.deepcopy(before)
        parent[key] = value
        assert differences(before, now) == [Change(path, value, ["another"])]


def _leaves(value: Any, path: str) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        here = f"{path}[{key}]" if isinstance(value, list) else f"{path}.{key}".lstrip(".")
        if isinstance(item, dict) or (isinstance(item, list) and any(isinstance(i, dict) for i in item)):
            yield from _leaves(item, here)
        else:
            yield here, value, key


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alow": ["x"]}, "resume: expected a mapping such as"),
        ({"allow": "optimizer.lr"}, "resume.allow: expected a list of keys"),
        ({"allow": ["optimzer.lr"]}, "resume.allow: optimzer.lr: no such key in a recipe"),
        ({"allow": ["model.backbone.depth"]}, "resume.allow: model.backbone.depth cannot change within a run. The weights"),
    ],
)
def test_what_is_wrong_with_resume_allow_is_said(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_allowed(given)


def test_what_may_change_for_a_start_is_not_kept_for_the_next(started: str) -> None:
    loaded = config.load([started, "resume.allow=[optimizer.lr]"])
    assert "resume" not in as_saved(loaded)


def test_changes_are_kept_and_need_no_second_word(started: str) -> None:
    loaded = config.load([started])
    folder = Path(loaded.run_folder)
    before = as_saved(loaded)
    changes = compare(started, "optimizer.lr=1e-4", "max_duration=9ba", "resume.allow=[optimizer.lr]")
    record_changes(folder, 4, changes)
    assert [change.key for change in compare(started, "optimizer.lr=1e-4")] == ["optimizer.lr"], "it was allowed before"
    with pytest.raises(UserError, match=r"optimizer.lr \(0.001 → 0.0002\)"):
        compare(started, "optimizer.lr=2e-4")
    record_changes(folder, 6, [Change("optimizer.lr", 1e-4, 1e-3)])
    assert compare(started) == []
    with pytest.raises(UserError, match="optimizer.lr"):
        compare(started, "optimizer.lr=1e-4")
    with (folder / "changes.jsonl").open("a") as file:
        file.write('{"batch": 8, "chan')  # cut short by a kill
    starts = read_changes(folder)
    assert [start["batch"] for start in starts] == [4, 6]
    assert starts[0]["changes"]["optimizer.lr"] == {"before": 1e-3, "now": 1e-4, "may": "asked"}
    assert starts[0]["changes"]["max_duration"] == {"before": "8ba", "now": "9ba", "may": "logged"}
    assert recipe_changes(before, as_saved(loaded), 1) == []


def test_secrets_are_in_no_message_and_no_record(started: str, tmp_path: Path) -> None:
    change = Change("loggers.mine.api_key", "hunter2", "hunter3")
    record_changes(tmp_path, 1, [change])
    assert "hunter" not in str(change) and "hunter" not in (tmp_path / "changes.jsonl").read_text()


def test_new_values_hold_in_every_group_of_an_optimizer_and_in_no_other_setting() -> None:
    """Also those that Muon calls adam_…, and those of a group that joined later; a state that an optimizer keeps there stays."""
    import torch
    from composer.core import Timestamp

    from prx_composer.callbacks.checkpointing import NewValues

    def built(lr: float, adam_lr: float, betas: tuple[float, float]) -> tuple[Any, Any]:
        groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": rate, "seen": 0} for rate in (lr, adam_lr, adam_lr)]
        optimizer = torch.optim.Adam(groups, betas=betas)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)

    (old, old_schedule), (optimizer, schedule) = built(1.0, 2.0, (0.9, 0.95)), built(1.0, 4.0, (0.5, 0.6))
    for group in old.param_groups:
        group["seen"] = 7
    state: Any = SimpleNamespace(optimizers=[optimizer], schedulers=[schedule], timestamp=Timestamp(), previous_timestamp=None)
    state.rank_zero_seed = 1
    values = NewValues([Change("optimizer.adam_lr", 2.0, 4.0), Change("optimizer.adam_betas", [0.9, 0.95], [0.5, 0.6])])
    logger: Any = None
    values.before_load(state, logger)
    optimizer.load_state_dict(old.state_dict())
    schedule.load_state_dict(old_schedule.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0, 1.0], "the checkpoint's"
    values.after_load(state, logger)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 2.0, 2.0] and schedule.base_lrs == [1.0, 4.0, 4.0]
    assert all(group["betas"] == (0.5, 0.6) and group["seen"] == 7 for group in optimizer.param_groups)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 2.0, 2.0]


def test_a_line_to_type_is_safe_in_a_shell() -> None:
    assert advice(["optimizer.lr", "algorithms.progressive_resolution.stages[0].until"]) == (
        "'resume.allow=[optimizer.lr,algorithms.progressive_resolution.stages]'"
    )


# Where a message advises to change a key of a run that has begun: the file, its words, and the key.
ADVISED = [
    ("training/run.py", "Train it on with a longer max_duration=…", "max_duration"),
    ("training/run.py", "Train it on with a longer time_budget=…", "time_budget"),
    ("runs/folder.py", "Go on with that run with autoresume=true", "autoresume"),
    ("callbacks/checkpointing.py", "Make room (save_num_checkpoints_to_keep", "save_num_checkpoints_to_keep"),
    ("algorithms/gradients.py", "algorithms.skip_nonfinite={}", "algorithms.skip_nonfinite"),
    ("algorithms/gradients.py", "against_what_is_not_finite()", "optimizer.lr"),
    ("recipe/resume.py", "a longer warm-up (scheduler.t_warmup=…)", "scheduler.t_warmup"),
    ("recipe/resume.py", "algorithms.gradient_clipping, or", "algorithms.gradient_clipping"),
    ("recipe/resume.py", "algorithms.<term>.end=<batch>ba", "algorithms.lpips.end"),
    ("data/dataset.py", "train_loader.max_undecodable", "train_loader.max_undecodable"),
    ("data/sampler.py", "to begin a new pass over these, add  {advice([DATA])}", "data"),
    ("training/preflight/surroundings.py", "save_num_checkpoints_to_keep to", "save_num_checkpoints_to_keep"),
    ("training/preflight/surroundings.py", "run_folder to a larger disk", "run_folder"),
    ("callbacks/checkpointing.py", "save_num_checkpoints_to_keep=-1", "save_num_checkpoints_to_keep"),
    ("training/preflight/step.py", "device_train_microbatch_size: out of memory", "device_train_microbatch_size"),
]


@pytest.mark.parametrize(("file", "words", "key"), ADVISED)
def test_what_a_message_advises_may_be_done_in_a_run_that_has_begun(file: str, words: str, key: str) -> None:
    """At once; or what the message, or the refusal that follows, says to type allows it."""
    assert words in (README.parents[1] / file).read_text(), "the message was changed: look at this row again"
    change = Change(key, 1, 2)
    typed = shlex.split(advice([key]))[0].removeprefix("resume.allow=")
    assert is_allowed(change, yaml.safe_load(typed))
    asked = ("optimizer.lr", "scheduler.t_warmup", "algorithms.gradient_clipping", "algorithms.lpips.end", "data")
    assert is_allowed(change, []) == (key not in (*asked, "device_train_microbatch_size"))


def test_a_value_that_was_tried_and_not_kept_may_be_taken_back(started: str) -> None:
    """A run goes on from its checkpoint: what a start after it was allowed, and never saved, binds nobody."""
    loaded = config.load([started])
    folder = Path(loaded.run_folder)
    checkpoint = folder / "checkpoints" / "ba4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"files": {}, "recipe": as_saved(loaded)}))
    tried = config.load([started, "optimizer.lr=1e-4", "resume.allow=[optimizer.lr]"])
    assert holds_run(tried, folder)
    record_changes(folder, 4, check_same_recipe(tried, as_saved(loaded), "it", 1))
    save_recipe(tried, folder)
    assert holds_run(config.load([started, "optimizer.lr=1e-4"]), folder) and holds_run(loaded, folder)
    with pytest.raises(UserError, match="optimizer.lr"):
        holds_run(config.load([started, "optimizer.lr=2e-4"]), folder)
    with pytest.raises(UserError, match="ba4 was started with another recipe") as refused:
        holds_run(config.load([started, "optimizer.lr=3e-4"]), folder)
    old = shlex.split(_line(str(refused.value), "To go on with the old values: add  "))
    assert old == ["optimizer.lr=0.001"] and holds_run(config.load([started, "optimizer.lr=3e-4", *old]), folder)
    (checkpoint / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match="optimizer.lr"):
        holds_run(loaded, folder)
