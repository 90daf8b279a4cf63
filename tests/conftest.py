"""Shared: a tiny model with real classes and random weights, and a tiny recipe on procedural data."""

import gc
import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores, and most of what they do is to start processes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # others would start processes, for Triton's kernels alone
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import pytest
import setuptools  # noqa: F401 (before a test imports the distutils that it replaces: inductor would fail when it imports it)
import warm
import yaml

if TYPE_CHECKING:  # fixtures import what they use: xdist's controller reads this file too, and runs no test
    import torch

    from prx_composer.models import FlowMatching, TextToImage

TINY_BACKBONE = dict(in_channels=3, patch_size=4, context_in_dim=24, hidden_size=32, num_heads=2, depth=2, mlp_ratio=2.0)
TINY_T5 = dict(model_type="t5", d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
T5GEMMA_HALF = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    vocab_size=64, sliding_window=16, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
)  # fmt: skip
QWEN3_VL_TEXT = dict(
    model_type="qwen3_vl_text", hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=12, rope_scaling={"rope_type": "default", "mrope_section": [2, 2, 2]},
)  # fmt: skip
SOURCE = {"name": "shapes", "image_size": 16, "images_per_scene": 1, "heldout": 30}


logging.getLogger("prx_composer").setLevel(logging.INFO)  # as `main` has it: no test hangs on another having called that


def runs_tests(config: pytest.Config) -> bool:
    """Whether this process does, and is no controller of others."""
    return hasattr(config, "workerinput") or not config.getoption("numprocesses", 0)


def pytest_configure(config: pytest.Config) -> None:
    if runs_tests(config):
        config.pluginmanager.import_plugin("hostile")  # a fixture; what it imports, most tests need


def pytest_sessionstart(session: pytest.Session) -> None:
    """While this process has one thread and has computed nothing, what it has imported is kept for the commands of tests."""
    if runs_tests(session.config):
        warm.open_folder()


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    warm.close_folder()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from prx_composer.data.sources import all_scenes
    from prx_composer.models.encoders import train_tokenizer

    return train_tokenizer(scene.caption for scene in all_scenes())


@pytest.fixture
def tiny_model(tokenizer: Any) -> "Callable[..., TextToImage]":
    """Builds a model whose zero-initialised layers are randomised, so that every part of it matters."""
    import torch

    from prx_composer.models import HuggingFaceTextEncoder, PRXBackbone, TextToImage

    def build(seed: int = 0, flow: "FlowMatching | None" = None, trainable_text: bool = True, **backbone: Any) -> TextToImage:
        torch.manual_seed(seed)
        encoder = HuggingFaceTextEncoder(tokenizer, config=TINY_T5, max_tokens=14, trainable=trainable_text)
        model = TextToImage(PRXBackbone(**(TINY_BACKBONE | backbone)), encoder, flow, seed=seed)
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
        return model

    return build


@pytest.fixture
def tiny_batch(tokenizer: Any) -> "dict[str, torch.Tensor]":
    import torch

    from prx_composer.data.sources import all_scenes
    from prx_composer.models.prompts import tokenize

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 16, 24), generator=generator, dtype=torch.uint8)
    captions = [scene.caption for scene in all_scenes()[::70]]
    return {"image": image, **tokenize(tokenizer, captions, 14), "sample_id": torch.arange(4)}


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prx_composer.data.sources import ShapesSource, prepare

    path = tmp_path_factory.mktemp("data") / "shapes"
    arguments = {key: value for key, value in SOURCE.items() if key != "name"}
    prepare(path, ShapesSource(**arguments), SOURCE)  # pyright: ignore[reportArgumentType]
    return path


def tiny_recipe_in(folder: Path, data: Path) -> dict[str, Any]:
    """Return a recipe as YAML would give it: two stages, EMA, clipping; seconds on a CPU."""
    return {
        "run_name": "tiny",
        "run_folder": str(folder / "runs" / "${run_name}"),
        "model": {
            "name": "text_to_image",
            "backbone": {"name": "prx", **TINY_BACKBONE},
            "text_encoder": {
                "name": "huggingface",
                "config": dict(TINY_T5),
                "tokenizer": {"train": True},
                "max_tokens": 14,
                "trainable": True,
            },
        },
        "train_loader": {"name": "image_caption", "path": str(data), "source": dict(SOURCE)},
        "image_size": 16,
        "global_train_batch_size": 48,
        "device_train_microbatch_size": 24,
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "max_duration": "8ba",
        "algorithms": {
            "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
            "ema": {"half_life": "4ba", "update_interval": "2ba"},
            "progressive_resolution": {
                "stages": [
                    {"until": "4ba", "image_size": 8, "global_train_batch_size": 48, "device_train_microbatch_size": 24},
                    {"image_size": 16, "global_train_batch_size": 24, "device_train_microbatch_size": 12},
                ]
            },
        },
        "progress_bar": False,
        "save_interval": "2ba",
        "save_num_checkpoints_to_keep": -1,
    }


@pytest.fixture
def tiny_recipe(tmp_path: Path, shapes_data: Path) -> dict[str, Any]:
    return tiny_recipe_in(tmp_path, shapes_data)


def train_once(factory: pytest.TempPathFactory, data: Path, **changes: Any) -> Path:
    """Train the tiny recipe for all tests of a module, which take copies if they write to it; return the run's folder."""
    from prx_composer.recipe import config
    from prx_composer.training.run import run

    folder = factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe_in(folder, data) | changes))
    recipe = config.load([str(folder / "recipe.yaml")])
    run(recipe)
    return Path(recipe.run_folder)


@pytest.fixture
def encoder_folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A text encoder with random but seeded weights, and its tokenizer, as a folder that a recipe can name."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {key: value for key, value in TINY_T5.items() if key != "model_type"}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def write(recipe: dict[str, Any], name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is traced, split into forward and backward, and run by torch: no half minutes of C++."""
    import functools

    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server with an empty bucket `data`."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()  # servers of a process share their state
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    client.create_bucket(Bucket="data")
    yield client
    server.stop()
