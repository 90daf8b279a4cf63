"""What is wrong with a recipe is said at once, all of it, before torch is imported; what is right is let through."""

import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prx_composer import registry
from prx_composer.common.errors import UserError, problems_of
from prx_composer.common.outlines import CannotTell, constructor, outline
from prx_composer.recipe import config
from prx_composer.recipe.arguments import check_arguments
from prx_composer.recipe.checks import first_look
from prx_composer.recipe.config import Recipe
from prx_composer.schedule.moments import Point
from prx_composer.training import check_lines, read_recipe
from prx_composer.training.run import build_trainer
from prx_composer.training.trial import check_config

Write = Callable[..., str]
COMPONENTS = [
    (kind, name) for kind in vars(registry).values() if isinstance(kind, registry.Registry) for name in sorted(kind.builtin)
]


def found(arguments: list[str], num_ranks: int = 1) -> list[str]:
    try:
        read_recipe(arguments, num_ranks)
    except UserError as error:
        return problems_of(error)
    return []


# -------------------------------------------------------------------------------------------------------- outlines


def spelt(hint: Any) -> set[str]:
    """An annotation, `A | B` and `Union[A, B]` alike."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return {str(option) for option in (typing.get_args(hint) if union else (hint,))}


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids=[f"{kind.kind}-{name}" for kind, name in COMPONENTS])
def test_a_constructor_read_from_its_source_is_the_one_that_is_imported(kind: registry.Registry, name: str) -> None:
    read, real = (constructor(kind.described(name, name, imports)) for imports in (False, True))
    parameters = [
        [(p.name, p.kind, p.default is p.empty) for p in inspect.signature(function).parameters.values()]
        for function in (read, real)
    ]
    assert parameters[0] == parameters[1]
    mine, theirs = typing.get_type_hints(read), typing.get_type_hints(real)
    for parameter, hint in mine.items():
        assert hint is Any or spelt(hint) == spelt(theirs[parameter]), parameter
    yaml_types = {parameter for parameter, hint in theirs.items() if spelt(hint) <= {str(t) for t in (int, float, str, bool)}}
    assert all(mine.get(parameter) is not Any for parameter in yaml_types), "what can be checked is"


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids=[f"{kind.kind}-{name}" for kind, name in COMPONENTS])
def test_every_argument_of_every_component_may_be_misspelt(kind: registry.Registry, name: str) -> None:
    target = kind.described(name, name, imports=False)
    taken = inspect.signature(constructor(target)).parameters
    if any(p.kind == p.VAR_KEYWORD for p in taken.values()):
        pytest.skip("it takes any argument")
    for parameter in taken.keys() - {"self"}:
        with pytest.raises(UserError) as error:
            check_arguments(target, {f"{parameter}_": 1}, "here", imports=False)
        assert f"here.{parameter}_: no such argument. Did you mean" in str(error.value)


def test_what_cannot_be_read_is_left_to_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "prx_composer_strange"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "odd.py").write_text(
        "import functools\nfrom somewhere import Base\n"
        "try:\n    from a import Twice\nexcept ImportError:\n    class Twice: ...\n"
        "class Inherits(Base): ...\n"
        "class New:\n    def __new__(cls, anything): ...\n"
        "@functools.cache\ndef decorated(x): ...\n"
        "class Later:\n    def __init__(self, other: 'Later', plain: int = 3): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Twice", "New", "decorated", "Absent"):
        with pytest.raises(CannotTell):
            outline("prx_composer_strange.odd", name)
    with pytest.raises(CannotTell):
        constructor(outline("prx_composer_strange.odd", "Inherits"))
    with pytest.raises(CannotTell):
        outline("prx_composer_strange.absent", "Any")
    later = typing.get_type_hints(constructor(outline("prx_composer_strange.odd", "Later")))
    assert later["plain"] is int and later["other"] is Any
    assert "prx_composer_strange" not in sys.modules


def test_neither_torch_nor_composer_is_imported_to_find_a_mistake(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    path = write_recipe(tiny_recipe)
    program = (
        "import sys\n"
        "from prx_composer.training import check_lines, main\n"
        f"assert main([{path!r}, 'sead=3', 'algorithms.emma={{}}', 'image_size=18', 'optimizer.lrr=1']) == 1\n"
        f"assert list(check_lines([{path!r}, 'optimizer.lr=fast'], 1, True, True))[0].startswith('✗ optimizer.lr: expected')\n"
        "heavy = {'torch', 'composer', 'transformers', 'diffusers', 'numpy', 'streaming'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in ("sead", "algorithms.emma", "image_size", "optimizer.lrr"):
        assert f"✗ {path}: " in done.stderr or f"✗ {path} " in done.stderr
    script = (Path(__file__).parents[2] / "train.py").read_text()
    assert "from prx_composer.training import main" in script


# ------------------------------------------------------------------------------------------------- broken recipes

STAGES = "algorithms.progressive_resolution.stages"
BROKEN: dict[str, tuple[list[str], list[str]]] = {
    "one of each": (
        ["sead=3", "image_size=large", "algorithms.emma={}", "global_train_batch_size=50"],
        [
            *["sead: no such key", "image_size: expected an integer", "algorithms.emma: there is no 'emma'"],
            "device_train_microbatch_size: 24 does not divide the device batch 50",
        ],
    ),
    "a type and a batch": (
        ["progress_bar=maybe", "device_train_microbatch_size=7"],
        ["progress_bar: expected true or false", "device_train_microbatch_size: 7 does not divide"],
    ),
    "a key and a batch of a stage": (
        ["modle={}", f"{STAGES}[1].global_train_batch_size=25"],
        ["modle: no such key", f"{STAGES}[1].device_train_microbatch_size: 12 does not divide the device batch 25"],
    ),
    "two entries": (
        ["algorithms.ema=3", "algorithms.tread=4", "callbacks.images={}"],
        ["algorithms.ema must be a mapping", "algorithms.tread must be a mapping", "callbacks.images lacks the argument"],
    ),
    "a missing key": (["max_duration=null", "optimizer.lrr=1"], ["max_duration: expected a string", "optimizer.lrr: no such"]),
    "two loaders": (
        ["train_loader.shufle=true", "eval_loader={name: image_caption, pth: x}"],
        ["train_loader.shufle: no such", "eval_loader.pth: no such", "eval_loader.path is missing"],
    ),
    "both of a mixture": (
        ["train_loader.mix={a: {source: {name: shape}}, b: {source: {name: shapes, heldot: 3}}}"],
        ["train_loader.mix.a.source: there is no 'shape'", "train_loader.mix.b.source.heldot: no such argument"],
    ),
    "two stages": (
        [f"{STAGES}=[{{image_size: big, global_train_batch_size: 4}}, {{image_sise: 8, global_train_batch_size: 4}}]"],
        [f"{STAGES}[0].image_size: expected an integer", f"{STAGES}[1].image_sise: no such argument", f"{STAGES}[1] lacks"],
    ),
    "seed": (["seed=-1"], ["seed: -1 lies outside of 0 … 4294967295"]),
    "large seed": (["seed=4294967296", "image_size=18"], ["seed: 4294967296 lies outside", "image_size: 18 is not divisible"]),
    "no backbone": (["model.backbone=null"], ["model.backbone must be a mapping with a `name`"]),
    "an encoder that is none": (["model.text_encoder=t5"], ["model.text_encoder must be a mapping with a `name`"]),
    "elements": (
        ["optimizer.betas=[high, 0.9]", "callbacks.images={prompts: [1, a red circle]}"],
        ["optimizer.betas[0]: expected a number, not 'high'", "callbacks.images.prompts[0]: expected a string, not 1"],
    ),
    "interpolations": (
        ["run_name=${nothing}", "train_loader.path=${nowhere}", "seed=-2"],
        ["run_name: Interpolation", "run_folder: Interpolation", "train_loader.path: Interpolation", "seed: -2"],
    ),
    "sharding": (
        ["parallelism_config={fsdp: {sharding: full, shard_degree: 3}, tp: {}}"],
        ["parallelism_config.tp: only fsdp", "fsdp.sharding: no such argument", "fsdp.shard_degree: 3 must divide the 1 ranks"],
    ),
    "gathers": (
        ["parallelism_config={fsdp: {mixed_precision: HALF, reshard_after_forward: 3}}"],
        [
            "parallelism_config.fsdp.mixed_precision: 'HALF' is none of FULL, WEIGHTS, DEFAULT, PURE.",
            "parallelism_config.fsdp.reshard_after_forward: 3 must be true, false.",
        ],
    ),
    "a number for a time": (["max_duration=20"], ["max_duration: expected a string, not 20. A time has a unit: write 20ba"]),
    "a part for a time": (["save_interval=0.5"], ["save_interval: expected a string, not 0.5. A time has a unit: write 0.5dur"]),
    "hours without a unit": (
        ["time_budget=24"],
        ["time_budget: expected a string or null, not 24. A time has a unit: write 24h"],
    ),
    "a number for a component's time": (
        ["algorithms.ema.update_interval=10"],
        ["algorithms.ema.update_interval: expected a string, not 10. A time has a unit: write 10ba"],
    ),
    "a number for a name": (["run_name=2024"], ["run_name: expected a string, not 2024.", "\"run_name='2024'\""]),
    "a length in hours": (["max_duration=12h"], ["max_duration: 12h must be a number of batches", "give it as time_budget"]),
    "no length": (["time_budget=3 fortnights"], ["time_budget: '3 fortnights' is no duration such as 24h"]),
    "bf16": (["precision=bf16"], ["precision: 'bf16' is none of fp32, ", "Write precision=amp_bf16."]),
    "amp_bfloat16": (["precision=amp_bfloat16"], ["Write precision=amp_bf16."]),
    "FP16": (["precision=FP16"], ["Write precision=amp_fp16."]),
    "AMP_BF16": (["precision=AMP_BF16"], ["Write precision=amp_bf16."]),
    "fp8": (["precision=fp8"], ["precision=amp_bf16 and algorithms.float8={}"]),
    "double": (["precision=double"], ["precision: 'double' is none of fp32, amp_fp16, amp_bf16, amp_fp8."]),
    "nothing of a budget": (
        ["time_budget=0h", "scheduler={name: warmup_stable_decay, t_warmup: 20}"],
        ["time_budget: a budget must be more than nothing", "scheduler.t_warmup: expected a string, not 20. A time has a unit"],
    ),
    "absent code": (
        ["code_paths=[mine.py, yours.py]", "sead=1", "algorithms.mine={}", "optimizer.lrr=1"],
        [
            "code_paths[0]: there is no Python file mine.py",
            "code_paths[1]: there is no",
            "sead: no such key",
            "optimizer.lrr: no",
        ],
    ),
    "epochs of stages": (["max_duration=3ep"], [f"max_duration: 3ep cannot be in epochs with {STAGES}"]),
    "a warm-up of another kind": (
        ["scheduler={name: constant_with_warmup, t_warmup: 100sp}", "optimizer.lrr=1"],
        ["scheduler.t_warmup: 100sp is counted in samples", "optimizer.lrr: no such"],
    ),
    "a warm-up longer than the run": (
        ["scheduler={name: warmup_stable_decay, t_warmup: 9ba}", "algorithms.emma={}"],
        ["scheduler.t_warmup: 9ba is longer than the run", "algorithms.emma: there is no"],
    ),
    "no checkpoint": (["save_num_checkpoints_to_keep=0", "sead=1"], ["save_num_checkpoints_to_keep: 0 would", "sead: no such"]),
    "a negative length": (["max_duration=-5ba", "seed=-1"], ["max_duration: -5ba must be positive", "seed: -1 lies"]),
    "a wrong budget hides nothing": (["time_budget=[1]", "algorithms.ema.start=0.5budget"], ["time_budget: expected a string"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_all_that_is_wrong_with_a_recipe_is_said_at_once(name: str, tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    arguments, phrases = BROKEN[name]
    problems = found([write_recipe(tiny_recipe), *arguments])
    for phrase in phrases:
        assert any(phrase in problem for problem in problems), (phrase, problems)
    assert len(problems) <= len(phrases), problems
    assert len(set(problems)) == len(problems)


@pytest.mark.parametrize("name", BROKEN)
def test_the_whole_check_says_it_too(name: str, tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    """With classes that are imported, where the recipe can be read at all."""
    arguments, _ = BROKEN[name]
    try:
        recipe = config.load([write_recipe(tiny_recipe), *arguments])
    except UserError:
        return
    said = [result.text for result in check_config(recipe) if result.mark == "✗"]
    assert set(first_look(vars(recipe), 1)) <= set(said)


def test_batches_divide_over_the_ranks_that_are_there(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    (first, *_) = found([write_recipe(tiny_recipe)], num_ranks=5)
    assert first.startswith("global_train_batch_size: 48 does not divide over 5 ranks; try 45")


def test_every_shipped_recipe_passes(tmp_path: Path) -> None:
    quickstart = "yamls/quickstart.yaml"
    for path in sorted(Path("yamls").glob("*.yaml")):
        if path.stem != "foundry":
            assert not found([str(path)], num_ranks={"24h": 32, "24h_next": 32, "eight_gpus": 8}.get(path.stem, 1)), path
    for path in sorted(Path("yamls/architectures").glob("*.yaml")):
        assert not found([str(path)]), path
    for path in sorted(Path("yamls/ablations").glob("*.yaml")):
        assert not found([quickstart, str(path)]), path


def test_with_ones_own_code_components_are_left_until_it_is_imported(
    tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("")
    arguments = [write_recipe(tiny_recipe), f"code_paths=[{tmp_path}/mine.py]", "algorithms.mine={}"]
    assert not found(arguments)
    assert found([*arguments, "seed=-1", "sead=1"]) == found(["yamls/quickstart.yaml", "seed=-1", "sead=1"])


@pytest.mark.parametrize("broken", ["a file that isn't there", "a file that fails"])
def test_code_that_cannot_be_imported_hides_no_other_mistake(
    broken: str, tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path
) -> None:
    if broken == "a file that fails":
        (tmp_path / "broken.py").write_text("raise RuntimeError('unfinished')")
    good = "from prx_composer import registry\n@registry.callbacks.register('good')\ndef good(every: int = 1): ...\n"
    (tmp_path / "good.py").write_text(good)
    kinds = (*registry.BY_KEY, *(f"model.{kind}" for kind in ("backbone", "text_encoder", "autoencoder")), "train_loader.source")
    for kind in (*kinds, "algorithms", "callbacks", "loggers"):
        named = f"{kind}={{name: unseen, a: 1}}" if kind in kinds else f"{kind}.unseen={{a: 1}}"
        other = "precision=double" if kind.startswith("train_loader") else "train_loader.pth=data"
        files = f"code_paths=[{tmp_path}/broken.py, {tmp_path}/good.py]"
        path = write_recipe(tiny_recipe)
        said = list(check_lines([path, files, named, other, "callbacks.good.evry=2"], 1, False, True))
        assert len(set(said)) == len(said)
        paths = {line.partition(": ")[0] for line in said if line[0] == "✗"}
        assert paths == {"✗ code_paths[0]", "✗ callbacks.good.evry", f"✗ {other.partition('=')[0]}"}, kind
        where = named.partition("=")[0]
        assert any(line.startswith(f"– {where}: not checked here, because the code that") for line in said), kind


@pytest.mark.parametrize(
    ("wrong", "remedies"),
    [
        ("max_duration=20", ["max_duration=20ba", "max_duration=20ep", "max_duration=20sp"]),
        ("max_duration=0.5", ["max_duration=1000ba", "max_duration=1000ep", "max_duration=1000sp"]),
        ("save_interval=0.5", ["save_interval=0.5dur"]),
        ("eval_interval=1.5", ["eval_interval=1000ba", "eval_interval=1000ep", "eval_interval=1000sp", "eval_interval=0.5dur"]),
        ("time_budget=0", ["time_budget=24h"]),
        ("time_budget=24", ["time_budget=24h", "time_budget=3d", "time_budget=90m", "time_budget=1h30m"]),
        ("run_name=2024", ["run_name='2024'"]),
        ("algorithms.ema.half_life=5", ["algorithms.ema.half_life=5ba"]),
        ("precision=bf16", ["precision=amp_bf16"]),
        ("algorithms.ema.update_interval=10", ["algorithms.ema.update_interval=10ba"]),
    ],
)
def test_what_a_message_says_to_write_is_right(
    wrong: str, remedies: list[str], tiny_recipe: dict[str, Any], write_recipe: Write
) -> None:
    del tiny_recipe["algorithms"]["progressive_resolution"]
    path = write_recipe(tiny_recipe)
    (said,) = found([path, wrong])
    key, _, value = wrong.partition("=")
    assert "on the command line" not in said or f"\"{key}='{value}'\" on the command line" in said
    for remedy in remedies:
        assert remedy.partition("=")[2] in said
        assert not found([path, remedy]), remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="it needs a machine without a GPU")
@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16"])
def test_a_precision_of_gpus_is_refused_on_a_cpu_beside_what_else_is_wrong(
    precision: str, tiny_recipe: dict[str, Any], write_recipe: Write
) -> None:
    arguments = [write_recipe(tiny_recipe), f"precision={precision}", "algorithms.gradient_clipping.clipping_threshold=-1"]
    with pytest.raises(UserError) as error:
        build_trainer(read_recipe(arguments, 1))
    clipping, refusal = problems_of(error.value)
    assert clipping.startswith("algorithms.gradient_clipping: ")
    assert refusal == f"precision: {precision} needs a GPU, and there is none here; use precision=fp32."
    (line,) = [line for line in check_lines(arguments, 1, False, False) if line[2:].startswith("GPUs")]
    assert line.startswith(f"– GPUs and precision: {precision}: not checked here") and "precision=fp32" in line


def test_a_check_says_what_it_has_not_looked_at(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    """With a wrong type it listed what it had found, as if that were all."""
    for step, config_only in ((True, False), (False, True)):
        *_, last = check_lines([write_recipe(tiny_recipe), "optimizer.lr=fast", "seed=2.5"], 1, config_only, step)
        assert last.startswith("– what only the components can tell: not checked here")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optimizer.lr=.inf", "optimizer.lr=1e-3"),
        ("model.text_encoder.max_tokens=0", "model.text_encoder.max_tokens=1"),
        ("train_loader.max_undecodable=5", "train_loader.max_undecodable=1"),
        ("dist_timeout=.nan", "dist_timeout=0.5"),
        ("save_folder=checkpoints", "save_folder=s3://bucket/runs/one"),
        ("code_paths=[pyproject.toml]", "code_paths=[train.py]"),
    ],
)
def test_a_number_that_means_nothing_is_refused(
    wrong: str, right: str, tiny_recipe: dict[str, Any], write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with them trained, failed at its second batch, or read no caption at all."""
    monkeypatch.chdir(Path(__file__).parents[2])
    path = write_recipe(tiny_recipe)
    (said,) = found([path, wrong])
    assert said.startswith((f"{wrong.partition('=')[0]}: ", "code_paths[0]: there is no Python file pyproject.toml (*.py)"))
    assert found([path, right]) == []


def test_a_batch_of_an_evaluation_is_named_by_its_own_key(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    path = write_recipe(tiny_recipe | {"eval_loader": tiny_recipe["train_loader"] | {"split": "heldout"}})
    (line,) = found([path, "global_eval_batch_size=-4"])
    assert "global_eval_batch_size: -4 must be at least 1" in line and "train" not in line


# ------------------------------------------------------------------------------------------------- files and keys


def test_a_file_with_an_equals_sign_in_its_name_is_a_recipe(
    tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/lr=1e-3", "seed=5"):
        (tmp_path / folder).mkdir(parents=True)
        write_recipe(tiny_recipe, f"{folder}/config.yaml")
    write_recipe({"seed": 23}, "lr=2.yaml")
    assert config.load(["runs/lr=1e-3/config.yaml", "lr=2.yaml"]).seed == 23
    assert config.load([str(tmp_path / "runs" / "lr=1e-3" / "config.yaml"), "seed=4"]).seed == 4
    with pytest.raises(UserError, match=r"There is no recipe runs/lr=2/config.yaml"):
        config.load(["runs/lr=2/config.yaml"])
    with pytest.raises(UserError, match=r"Write \./seed=5/config.yaml for the file, or \"seed='5/config.yaml'\" for the key"):
        config.load(["runs/lr=1e-3/config.yaml", "seed=5/config.yaml"])
    assert config.load(["./seed=5/config.yaml"]).run_name == "tiny"
    with pytest.raises(UserError, match="seed: expected an integer, not '5/config.yaml'"):
        config.load(["./seed=5/config.yaml", "seed='5/config.yaml'"])
    write_recipe({}, "run_name=a.yaml")
    assert config.load(["./seed=5/config.yaml", "run_name='a.yaml'"]).run_name == "a.yaml"


def test_values_of_the_command_line_may_refer_to_other_keys(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    path = write_recipe(tiny_recipe)
    recipe = config.load([path, "run_folder=x/${run_name}", "run_name=mine", "variables={n: 3}", "seed=${variables.n}"])
    assert (recipe.run_folder, recipe.seed) == ("x/mine", 3)
    loaders = ["train_loader={path: 'data/${run_name}'}", "eval_loader=${train_loader}"]
    recipe = config.load([path, *loaders])
    assert recipe.train_loader["path"] == "data/tiny" and recipe.eval_loader == recipe.train_loader


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed: 5 # für mich\n".encode("latin-1"), "is not UTF-8: byte 0xfc in line 1"),
        ("# ok\nrun_name: größe\n".encode("cp1252"), "is not UTF-8: byte 0xf6 in line 2"),
        ("seed: 5\n".encode("utf-16-le"), "has zero bytes"),
    ],
)
def test_a_recipe_that_is_not_utf_8_is_said_to_be_none(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    (problem,) = found([str(tmp_path / "bad.yaml")])
    assert expected in problem and "bad.yaml" in problem and "iconv" in problem


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_recipe_may_begin_with_a_byte_order_mark(
    encoding: str, tiny_recipe: dict[str, Any], write_recipe: Write, tmp_path: Path
) -> None:
    (tmp_path / "marked.yaml").write_bytes("run_name: größe\n".encode(encoding))
    assert config.load([write_recipe(tiny_recipe), str(tmp_path / "marked.yaml")]).run_name == "größe"


@pytest.mark.parametrize(("text", "expected"), [("24h", "86400sec"), ("1d", "86400sec"), ("1h30m", "5400sec"), ("3ep", "3ep")])
def test_an_interval_in_hours_is_one_that_composer_takes(text: str, expected: str) -> None:
    from composer.core import Time

    assert Point.parse(text).for_composer() == expected and Time.from_timestring(expected).value == int(expected.rstrip("secp"))


def test_seeds_at_both_ends_are_right(tiny_recipe: dict[str, Any], write_recipe: Write) -> None:
    from composer.utils.reproducibility import seed_all

    for seed in (0, 2**32 - 1):
        recipe: Recipe = config.load([write_recipe(tiny_recipe), f"seed={seed}"])
        assert not first_look(vars(recipe), 1)
        seed_all(recipe.seed)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="Seed"):
            seed_all(seed)
