"""Times and numbers with which a run would train wrongly or not at all: `prx check` and train.py refuse them alike."""

import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prx_composer.common.errors import UserError
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.training import main
from prx_composer.training.trial import check_config, check_recipe

Recipe = dict[str, Any]
Write = Callable[..., str]


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore")


@pytest.fixture
def plain(tiny_recipe: Recipe) -> Recipe:
    return tiny_recipe | {"algorithms": {}, "image_size": 8, "max_duration": "6ba", "device_train_microbatch_size": None}


def refused(recipe: str, *changes: str) -> list[str]:
    return [result.text for result in check_config(config.load([recipe, *changes])) if result.mark == "✗"]


WARMUPS = [
    ("constant_with_warmup", "96sp", "6ba", "96sp is counted in samples, and max_duration: 6ba in batches", "2ba"),
    ("linear_decay_with_warmup", "2ba", "288sp", "2ba is counted in batches, and max_duration: 288sp in samples", "96sp"),
    ("cosine_with_warmup", "1ep", "288sp", "1ep is counted in epochs, and max_duration: 288sp in samples", "0.05dur"),
    ("constant_with_warmup", "5m", "6ba", "counts batches, samples, epochs or dur, not 5m", "0.05dur"),
    ("constant_with_warmup", "7ba", "6ba", "7ba is longer than the run (max_duration: 6ba)", "0.1dur"),
    ("linear_decay_with_warmup", "1.5dur", "6ba", "1.5dur is longer than the run", "0.1dur"),
    ("warmup_stable_decay", "7ba", "6ba", "7ba is longer than the run", "0.1dur"),
    ("warmup_stable_decay", "300sp", "6ba", "300sp is longer than the run", "0.1dur"),
    ("warmup_stable_decay", "2h", "6ba", "2h is longer than the run (time_budget: 1h)", "0.1dur"),
    ("cosine_with_warmup", "2ep", "1ep", "2ep is longer than the run", "0.1dur"),
]


@pytest.mark.parametrize(("name", "warmup", "duration", "said", "instead"), WARMUPS)
def test_a_warmup_that_the_run_cannot_follow_is_refused(
    name: str, warmup: str, duration: str, said: str, instead: str, plain: Recipe, write_recipe: Write, capsys: Any
) -> None:
    path = write_recipe(plain | {"scheduler": {"name": name, "t_warmup": warmup}, "time_budget": "1h"})
    (problem,) = refused(path, f"max_duration={duration}")
    assert problem.startswith("scheduler.t_warmup: ") and said in problem
    assert main([path, f"max_duration={duration}"]) == 1 and problem in capsys.readouterr().err
    assert f"such as {instead}" in problem or f"give {instead}" in problem
    assert refused(path, f"max_duration={duration}", f"scheduler.t_warmup={instead}") == []
    for other in re.findall(r"'(scheduler=.*?)'", problem):
        assert refused(path, f"max_duration={duration}", *shlex.split(f"'{other}'")) == []


@pytest.mark.parametrize("t_max", ["2h", "0.5budget", "9iter"])
def test_an_end_that_composers_schedulers_do_not_count_is_refused(t_max: str, plain: Recipe, write_recipe: Write) -> None:
    scheduler = {"name": "cosine_with_warmup", "t_warmup": "2ba", "t_max": t_max}
    path = write_recipe(plain | {"scheduler": scheduler, "time_budget": "1h"})
    (problem,) = refused(path)
    assert problem.startswith(f"scheduler.t_max: cosine_with_warmup counts batches, samples, epochs or dur, not {t_max}; give")
    assert refused(path, "scheduler.t_max=1dur") == []
    (other,) = re.findall(r"'(scheduler=.*?)'", problem)
    assert refused(path, other) == []


@pytest.mark.parametrize(
    ("name", "warmup", "duration"),
    [
        ("constant_with_warmup", "6ba", "6ba"),
        ("constant_with_warmup", "0.5dur", "2ep"),
        ("linear_decay_with_warmup", "1ep", "600ba"),
        ("linear_decay_with_warmup", "0ba", "6ba"),
        ("cosine_with_warmup", "20ba", "2ep"),
        ("warmup_stable_decay", "200sp or 3m", "6ba"),
        ("warmup_stable_decay", "30m", "6ba"),
        ("warmup_stable_decay", "0.2budget", "6ba"),
    ],
)
def test_a_warmup_that_it_can_follow_is_not(name: str, warmup: str, duration: str, plain: Recipe, write_recipe: Write) -> None:
    path = write_recipe(plain | {"scheduler": {"name": name, "t_warmup": warmup}, "time_budget": "1h"})
    assert refused(path, f"max_duration={duration}") == []


def test_a_scheduler_that_does_not_know_the_budget_is_said_with_one_that_does(plain: Recipe, write_recipe: Write) -> None:
    path = write_recipe(plain | {"scheduler": {"name": "cosine_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1}})

    def noted(*changes: str) -> list[str]:
        results = check_config(config.load([path, *changes]))
        assert "✗" not in {result.mark for result in results}
        return [result.text for result in results if result.mark == "!" and result.text.startswith("scheduler")]

    (said,) = noted("time_budget=1h")
    assert "falls until max_duration, and does not know time_budget: 1h" in said
    (instead,) = shlex.split(said[said.index("'scheduler") :].rstrip("."))
    assert noted("time_budget=1h", instead) == noted() == []
    recipe = config.load([path, instead])
    assert recipe.scheduler == {
        "name": "warmup_stable_decay", "t_warmup": "2ba", "decay": 0.667, "shape": "cosine", "alpha_f": 0.1
    }  # fmt: skip
    assert noted("time_budget=1h", "scheduler={name: constant_with_warmup, t_warmup: 2ba}") == []


def test_parts_of_a_run_that_its_budget_may_end_before_are_said(plain: Recipe, write_recipe: Write) -> None:
    path = write_recipe(plain)

    def noted(*changes: str) -> list[str]:
        return [result.text for result in check_config(config.load([path, *changes])) if "ends the run first" in result.text]

    masking = "algorithms.deferred_masking={mixer_blocks: 1, rate: 0.5, end: END}"
    given = ["save_interval=0.25dur", masking.replace("END", "0.9dur")]
    (said,) = noted(*given, "time_budget=1h")
    assert said.startswith(
        "algorithms.deferred_masking.end: 0.9dur; eval_interval: 0.25dur; save_interval: 0.25dur are parts of max_duration"
    )
    assert not noted(*given)  # without a budget
    mended = [
        "save_interval=30m",
        "eval_interval=2ba",
        "algorithms.deferred_masking={mixer_blocks: 1, rate: 0.5, end: 0.9dur or 0.9budget}",
    ]
    assert not noted(*mended, "time_budget=1h")


@pytest.mark.parametrize(
    ("warmup", "decay", "instead"),
    [("0.3dur", 0.9, 0.7), ("3ba", 0.8, 0.5), ("96sp", 1.0, 0.667), ("0.05dur", 1, None), ("2ba", 0.6, None)],
)
def test_a_warmup_that_reaches_into_the_decay_is_said(
    warmup: str, decay: float, instead: float | None, plain: Recipe, write_recipe: Write
) -> None:
    path = write_recipe(plain | {"scheduler": {"name": "warmup_stable_decay", "t_warmup": warmup, "decay": decay}})

    def noted(*changes: str) -> list[str]:
        return [result.text for result in check_config(config.load([path, *changes])) if result.text.startswith("scheduler:")]

    if instead is None:
        assert noted() == []
    else:
        (said,) = noted()
        assert said.endswith(f"never reached. Give a shorter t_warmup, or decay: {instead:g}.")
        assert noted(f"scheduler.decay={instead}") == []


@pytest.mark.parametrize("nothing", ["max_duration=0ba", "max_duration=0sp", "time_budget=0s"])
@pytest.mark.parametrize("warmup", ["2ba", "5m"])
def test_a_run_of_no_length_is_refused_and_not_divided_by(nothing: str, warmup: str, plain: Recipe, write_recipe: Write) -> None:
    path = write_recipe(plain | {"scheduler": {"name": "warmup_stable_decay", "t_warmup": warmup, "decay": 0.9}})
    try:
        said = "\n".join(refused(path, nothing))
    except UserError as error:
        said = str(error)
    assert nothing.partition("=")[0] in said


def test_epochs_are_compared_when_the_data_are_known(plain: Recipe, write_recipe: Write, capsys: Any) -> None:
    """285 images and batches of 48: an epoch is 6 batches, nearly."""
    path = write_recipe(plain | {"scheduler": {"name": "constant_with_warmup", "t_warmup": "2ep"}})
    found = [result.text for result in check_recipe(config.load([path]), step=False) if result.mark == "✗"]
    assert len(found) == 1 and "scheduler.t_warmup: 2ep is longer than the run (max_duration: 6ba)" in found[0]
    assert main([path]) == 1 and found[0] in capsys.readouterr().err
    assert main([path, "max_duration=12ba"]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("max_duration=-5ba", "max_duration: -5ba must be positive, such as 1000ba or 3ep"),
        ("max_duration=0ep", "max_duration: 0ep must be positive"),
        ("eval_interval=-1ba", "eval_interval: -1ba must be positive, such as 0.25dur"),
        (
            "save_num_checkpoints_to_keep=0",
            "save_num_checkpoints_to_keep: 0 would leave none to go on from; give at least 1, or -1",
        ),
        ("save_num_checkpoints_to_keep=-2", "save_num_checkpoints_to_keep: -2 would leave none"),
        ("eval_subset_num_batches=0", "eval_subset_num_batches: 0 would measure nothing; give at least 1, or -1 for all"),
        ("eval_subset_num_batches=-3", "eval_subset_num_batches: -3 would measure nothing"),
    ],
)
def test_numbers_with_which_nothing_is_trained_or_kept_are_refused(
    change: str, said: str, plain: Recipe, write_recipe: Write, capsys: Any
) -> None:
    path = write_recipe(plain)
    (problem,) = refused(path, change)
    assert said in problem and main([path, change]) == 1 and said in capsys.readouterr().err
    assert not Path(plain["run_folder"].replace("${run_name}", "tiny")).exists()


def test_a_number_that_the_optimizer_refuses_is_found_without_a_step(plain: Recipe, write_recipe: Write) -> None:
    found = check_recipe(config.load([write_recipe(plain), "optimizer.weight_decay=-1"]), step=False)
    assert [result.text for result in found if result.mark == "✗"] == ["optimizer: Invalid weight_decay value: -1"]


def test_digits_that_the_model_cannot_draw_are_found_before_it_is_trained(
    plain: Recipe, write_recipe: Write, capsys: Any
) -> None:
    path = write_recipe(plain | {"image_size": 16, "callbacks": {"digits_score": {}}})
    assert main([path, "model.backbone.patch_size=16"]) == 1
    assert "callbacks.digits_score draws at 8 px, and the model in multiples of 16" in capsys.readouterr().err


def pictures(folder: Path, count: int) -> str:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index}.png")
    (folder / "captions.jsonl").write_text(
        "".join(f'{{"file": "{index}.png", "caption": "picture {index}"}}\n' for index in range(count))
    )
    return str(folder)


def test_fewer_images_than_a_batch_are_refused_before_and_after_they_are_converted(
    plain: Recipe, write_recipe: Write, tmp_path: Path, capsys: Any
) -> None:
    """At the first start they are in no data set yet."""
    source = {"name": "folder", "folder": pictures(tmp_path / "pictures", 5), "image_size": 16, "multiple": 8}
    plain["train_loader"] = {"name": "image_caption", "path": str(tmp_path / "five"), "source": source}
    path = write_recipe(plain | {"global_train_batch_size": 8, "max_duration": "2ba"})
    said = "global_train_batch_size: 8 is more than the 5 images that there are to train on; set it to at most 5"
    for made, options in ((False, []), (True, ["preflight=false"]), (True, [])):
        found = [result.text for result in check_recipe(config.load([path]), step=False) if result.mark == "✗"]
        assert [said in text for text in found] == [True], made
        assert main([path, *options]) == 1 and said in capsys.readouterr().err, made
        assert main([path, "global_train_batch_size=5", f"run_name=five{made}{len(options)}"]) == 0, capsys.readouterr().err
    assert len(read_metrics(tmp_path / "runs" / "fiveFalse0" / "metrics.jsonl")) == 2


def test_a_later_stage_with_a_batch_that_large_is_refused_too(plain: Recipe, write_recipe: Write, capsys: Any) -> None:
    stages = [
        {"until": "2ba", "image_size": 8, "global_train_batch_size": 48},
        {"image_size": 16, "global_train_batch_size": 640},
    ]
    path = write_recipe(plain | {"algorithms": {"progressive_resolution": {"stages": stages}}})
    for options in ([], ["preflight=false"]):
        assert main([path, *options]) == 1
        error = capsys.readouterr().err
        assert "stages[1]." in error and "global_train_batch_size: 640 is more than the" in error


ROUTED = {"start_block": 0, "end_block": 1, "rate": 0.5}
SIZES = [
    {"until": "6ba", "image_size": 8, "global_train_batch_size": 48},
    {"image_size": 16, "global_train_batch_size": 48},
]


@pytest.mark.parametrize(
    ("algorithms", "said"),
    [
        ({"tread": ROUTED | {"start": "6ba"}}, "tread: it never begins, since its start (6ba) is not before the end of the run"),
        ({"tread": ROUTED | {"start": "4ba", "end": "0.5dur"}}, None),
        (
            {"tread": ROUTED | {"start": "4ba", "end": "3ba"}},
            "tread: it never begins, since its end (3ba) is not after its start",
        ),
        ({"tread": ROUTED | {"start": "9ba or 0.5dur"}}, None),
        ({"tread": ROUTED | {"start": "2ep"}}, None),
        ({"ema": {"half_life": "2ba", "start": "1dur"}}, "ema: it never begins"),
        (
            {"timestep_phases": {"phases": [{"until": "9ba", "logit_mean": 1.0}, {}]}},
            "timestep_phases.phases[1]: it never begins",
        ),
        ({"progressive_resolution": {"stages": SIZES}}, "progressive_resolution.stages[1]: it never begins"),
    ],
)
def test_what_of_a_schedule_never_comes_is_said(algorithms: Any, said: str | None, plain: Recipe, write_recipe: Write) -> None:
    found = check_config(config.load([write_recipe(plain | {"algorithms": algorithms})]))
    warned = [result.text for result in found if result.mark == "!" and "never begins" in result.text]
    assert len(warned) == (said is not None) and all(text.startswith(f"algorithms.{said}") for text in warned)
    assert not any(result.mark == "✗" for result in found)
