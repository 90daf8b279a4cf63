"""What each check of the preflight finds, and that it finds nothing where nothing is wrong."""

import json
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from stacks import TEACHER

from prx_composer.common.errors import UserError
from prx_composer.data.format import Bucket, BucketWriter, RawSample
from prx_composer.data.sources import ShapesSource
from prx_composer.recipe import config
from prx_composer.recipe.config import Recipe
from prx_composer.training.components import Components
from prx_composer.training.preflight import Result, check_callbacks, examine, require
from prx_composer.training.preflight.data_fit import check_data
from prx_composer.training.preflight.pretrained import check_weights
from prx_composer.training.preflight.step import extremes
from prx_composer.training.preflight.surroundings import (
    check_gpus,
    check_loggers,
    check_storage,
    check_surroundings,
    checkpoints_to_keep,
)
from prx_composer.training.trial import check_config

Load = Callable[..., tuple[Recipe, Components]]


@pytest.fixture
def load(tiny_recipe: dict[str, Any], write_recipe: Callable[..., str]) -> Load:
    """The tiny recipe with changes, and what was built of it."""

    def loaded(*changes: str, **keys: Any) -> tuple[Recipe, Components]:
        recipe = config.load([write_recipe(tiny_recipe | keys), *changes])
        return recipe, examine(recipe, 1)[1]

    return loaded


def marked(results: Any, mark: str = "✗") -> list[str]:
    return [result.text for result in results if result.mark == mark]


# ---------------------------------------------------------------------------------------------------------- recipe


def test_all_mistakes_of_a_recipe_are_found_at_once(load: Load) -> None:
    recipe, _ = load(
        "optimizer.lrr=1",
        "optimizer.betas=3",
        "algorithms.emma={}",
        "algorithms.gradient_clipping.clipping_threshold=-1",
        "image_size=18",
        "global_train_batch_size=50",
        "callbacks.images={prompts: []}",
        "parallelism_config={fsdp: {sharding: full}}",
        "precision=bf16",
    )
    found = marked(check_config(recipe))
    for beginning in (
        "optimizer.lrr: no such argument",
        "optimizer.betas: expected a list",
        "algorithms.emma: there is no 'emma'",
        "algorithms.gradient_clipping: clipping_threshold must be positive",
        "image_size: 18 is not divisible by model.backbone.patch_size 4",
        "device_train_microbatch_size: 24 does not divide the device batch 50",
        "callbacks.images: prompts must name at least one",
        "parallelism_config.fsdp.sharding: no such argument",
        "precision: 'bf16' is none of",
    ):
        assert len([text for text in found if text.startswith(beginning)]) == 1, (beginning, found)
    assert len(found) == 9, found


def test_all_wrong_keys_of_a_file_are_named_in_one_error(load: Load) -> None:
    with pytest.raises(UserError) as error:
        load("sead=3", "image_size=large", "optimzer={}")
    for path in ("sead", "image_size", "optimzer"):
        assert f"✗ {path}: " in str(error.value)


def test_one_mistake_alone_is_said_without_a_list() -> None:
    with pytest.raises(UserError, match=r"^a: wrong\.$"):
        require([Result("✓", "fine"), Result("✗", "a: wrong.")])


def test_sizes_of_latents_count_the_autoencoders_downsampling(load: Load) -> None:
    autoencoder = "model.autoencoder={name: diffusers, config: {block_out_channels: [4, 4, 8], latent_channels: 3}}"
    recipe, parts = load(autoencoder, "algorithms.progressive_resolution=false")
    assert parts.multiple == 16 and not marked(check_config(recipe))
    found = marked(check_config(load(autoencoder, "algorithms.progressive_resolution=false", "image_size=24")[0]))
    assert found == ["image_size: 24 is not divisible by model.backbone.patch_size 4 × autoencoder downsampling 4; try 32."]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(16, 16)], {(16, 16)}),
        ([(16, 16), (16, 16)], {(16, 16)}),
        ([(8, 36), (12, 20), (16, 16), (24, 12), (20, 16), (32, 8)], {(20, 16), (12, 20), (8, 36), (32, 8)}),
    ],
)
def test_extremes_are_the_most_and_fewest_pixels_the_widest_and_the_tallest(sizes: list, expected: set) -> None:
    buckets = [Bucket(*size) for size in sizes]
    chosen = [tuple(buckets[index]) for index in extremes(buckets)]
    assert len(chosen) == len(set(chosen)) and set(chosen) == expected
    assert chosen[0] in ((16, 16), (20, 16)), "what takes most memory comes first"


# --------------------------------------------------------------------------------------------------------- weights


def cache_repository(cache: Path, name: str, *files: str) -> Path:
    """As huggingface_hub lays it out."""
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_weights_are_looked_for_in_folders_and_in_the_cache(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache_repository(tmp_path / "hub", "org/whole", "config.json", "model.safetensors", "tokenizer.json")
    shards = cache_repository(tmp_path / "hub", "org/sharded", "config.json", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")

    _, parts = load(
        "model.text_encoder={name: huggingface, pretrained: org/whole}",
        "algorithms.repa={teacher: org/sharded, block: 1}",
        f"algorithms.irepa={{teacher: {tmp_path}/half, block: 1}}",
        "algorithms.perceptual_dino={teacher: org/absent}",
        f"algorithms.lpips.weights={tmp_path}/vgg.pth",
    )
    results = list(check_weights(parts))
    assert marked(results, "✓") == ["model.text_encoder: org/whole is in the local cache"]
    found = {text.split(":")[0]: text for text in marked(results)}
    assert "lacks its 1 of 2 shards of the weights, and HF_HUB_OFFLINE is set" in found["algorithms.repa.teacher"]
    assert found["algorithms.irepa.teacher"].endswith("cannot be loaded: the folder has no weights (*.safetensors).")
    assert "org/absent cannot be loaded: it is not in the local cache" in found["algorithms.perceptual_dino.teacher"]
    assert "hf download org/absent" in found["algorithms.perceptual_dino.teacher"]
    assert found["algorithms.lpips.weights"].endswith("there is no file " + f"{tmp_path}/vgg.pth.")
    (shards / "model-2.safetensors").write_text("")
    assert "algorithms.repa.teacher: org/sharded is in the local cache" in marked(check_weights(parts), "✓")


def test_random_weights_and_a_runs_own_tokenizer_need_nothing(load: Load) -> None:
    recipe, parts = load("model.text_encoder.tokenizer=org/absent", algorithms={"repa": {"teacher": TEACHER, "block": 1}})
    assert marked(check_weights(parts))[0].startswith("model.text_encoder.tokenizer: org/absent cannot be loaded")
    (Path(recipe.run_folder) / "tokenizer").mkdir(parents=True)
    assert list(check_weights(parts)) == []


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub's HTTP interface does for an open, a gated and an unknown repository."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision/")[0]
        if name == "org/gated/auth-check":
            return self._answer(403, {"X-Error-Code": "GatedRepo"})
        if name not in ("org/open", "org/gated"):
            return self._answer(404, {"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": "config.json", "size": 10}, {"rfilename": "model.safetensors", "size": 2_500_000_000}]
        content = {"id": name, "gated": "auto" if name == "org/gated" else False, "private": False, "siblings": files}
        return self._answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def reset_sessions() -> None:
    """huggingface_hub before and since 1.0."""
    (getattr(_http, "reset_sessions", None) or _http.close_session)()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    reset_sessions()
    yield address
    server.shutdown()
    server.server_close()
    reset_sessions()


def test_the_hub_is_asked_for_what_is_not_here_and_nothing_is_downloaded(load: Load, hub: str, tmp_path: Path) -> None:
    _, parts = load(
        "algorithms.repa={teacher: org/open, block: 1}",
        "algorithms.irepa={teacher: org/gated, block: 1}",
        "algorithms.perceptual_dino={teacher: org/absent}",
    )
    results = list(check_weights(parts))
    assert marked(results, "✓") == ["algorithms.repa.teacher: org/open is downloaded on first use (2.5 GB)"]
    gated, absent = marked(results)
    assert gated.startswith("algorithms.irepa.teacher") and f"Accept its licence on {hub}/org/gated" in gated
    assert "hf auth login" in gated
    assert absent.startswith("algorithms.perceptual_dino.teacher") and "has none of that name" in absent
    assert not list(tmp_path.glob("hub/**/*.safetensors"))


def test_a_hub_that_does_not_answer_is_named_with_the_way_round(load: Load, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    _, parts = load("algorithms.repa={teacher: org/open, block: 1}")
    (found,) = marked(check_weights(parts))
    assert "http://127.0.0.1:9 does not answer" in found and "hf download org/open" in found


# ------------------------------------------------------------------------------------------------------------ data


@pytest.fixture
def data(shapes_data: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(shapes_data, tmp_path / "data"))


def test_whole_data_pass(load: Load, data: Path) -> None:
    loader = {"name": "image_caption", "path": str(data)}
    results = list(check_data(load(train_loader=loader, eval_loader=loader | {"split": "heldout"})[1]))
    assert {result.mark for result in results} == {"✓"}
    assert "240 samples in 1 bucket; 1 shard file, all there and whole by size; captions: caption" in results[0].text


def test_missing_and_truncated_shards_and_columns_are_found_without_reading_them(load: Load, data: Path) -> None:
    shards = data / "train" / "16x16" / "shard.00000.mds"
    size = shards.stat().st_size
    os.truncate(shards, size - 1)
    (data / "heldout" / "16x16" / "shard.00000.mds").unlink()
    loader = {"name": "image_caption", "path": str(data)}
    train, heldout = marked(check_data(load(train_loader=loader, eval_loader=loader | {"split": "heldout"})[1]))
    assert "1 of 1 shard file" in train and f"16x16/shard.00000.mds ({size - 1:,} of {size:,} bytes)" in train
    assert heldout.startswith("eval_loader: ") and "16x16/shard.00000.mds (missing)" in heldout


def test_a_manifest_that_disagrees_with_the_shards_is_refused(load: Load, data: Path) -> None:
    manifest = data / "train" / "manifest.json"
    content = json.loads(manifest.read_text()) | {"buckets": {"16x16": 241, "8x32": 7}}
    manifest.write_text(json.dumps(content | {"captions": ["caption", "title"]}))
    found = marked(check_data(load(train_loader={"name": "image_caption", "path": str(data), "captions": {"title": 1.0}})[1]))
    assert len(found) == 3 and "lists 240 samples, but" in found[0] and "have no column title" in found[1]
    assert "8x32/index.json cannot be read" in found[2]


def test_a_column_that_the_data_do_not_have_is_named(load: Load, data: Path) -> None:
    for key, column in (("captions", {"prompt": 1.0}), ("features", ["dino"])):
        loader = {"name": "image_caption", "path": str(data), key: column}
        assert f"train_loader: {key}: no" in marked(check_data(load(train_loader=loader)[1]))[0]


def scenes(path: Path, counts: dict[tuple[int, int], int], broken: frozenset[int] = frozenset()) -> Path:
    samples = [sample for _, sample in ShapesSource(16, images_per_scene=1).samples()]
    with BucketWriter(path / "train", 16, ("caption", "short_caption")) as writer:
        for (height, width), count in counts.items():
            for index in range(count):
                sample = samples[index]
                encoded = sample.image[:40] if index in broken else sample.image
                writer.write(Bucket(height, width), RawSample(encoded, width, height, sample.captions, f"scene-{index}"))
    return path


def test_buckets_that_patches_do_not_divide_are_found_in_every_stage(load: Load, tmp_path: Path) -> None:
    path = scenes(tmp_path / "data", {(16, 16): 90, (10, 26): 90})
    (found,) = marked(check_data(load(train_loader={"name": "image_caption", "path": str(path)})[1]))
    assert found.startswith("train_loader: 1 bucket cannot be cut into patches of 4: 10x26.")


def test_images_that_cannot_be_decoded_are_an_error_only_if_none_can(load: Load, tmp_path: Path) -> None:
    some = scenes(tmp_path / "some", {(16, 16): 90}, frozenset({0, 1}))
    results = list(check_data(load(train_loader={"name": "image_caption", "path": str(some)})[1]))
    assert not marked(results) and "scene-0" in marked(results, "!")[0]
    none = scenes(tmp_path / "none", {(16, 16): 90}, frozenset(range(90)))
    (found,) = marked(check_data(load(train_loader={"name": "image_caption", "path": str(none)})[1]))
    assert "none of the first 10 images of bucket 16x16" in found


def test_data_that_a_source_makes_later_are_not_made_by_the_check(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "later"
    source = {"name": "shapes", "image_size": 16, "aspects": [[1, 1], [2, 3]], "multiple": 2}
    loader = {"name": "image_caption", "path": str(path), "source": source}
    results = list(check_data(load(train_loader=loader, eval_loader={"name": "image_caption", "path": str(path)})[1]))
    assert not path.exists()
    assert [text.split(":")[0] for text in marked(results, "–")] == ["train_loader", "eval_loader"]
    (found,) = marked(results)
    assert "cannot be cut into patches of 4" in found, "the source says which buckets there will be"


def test_a_remote_manifest_is_fetched_and_checked(load: Load, data: Path, tmp_path: Path) -> None:
    loader = {"name": "image_caption", "path": str(tmp_path / "cache"), "remote": str(data)}
    results = list(check_data(load(train_loader=loader)[1]))
    assert "240 samples in 1 bucket" in marked(results, "✓")[0] and not (tmp_path / "cache").exists()
    (found,) = marked(check_data(load(train_loader=loader | {"remote": f"{tmp_path}/nowhere"})[1]))
    assert found.startswith("train_loader.remote: ") and "nowhere/train/manifest.json cannot be fetched" in found


# --------------------------------------------------------------------------------------------------------- machine

Usage = namedtuple("Usage", "total used free")


def test_room_for_one_checkpoint_more_than_is_kept_is_asked_for(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from prx_composer.training.meta_model import MetaModel, training_state

    recipe, _ = load("save_num_checkpoints_to_keep=3")
    size = training_state(MetaModel(recipe)).checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * size, 6 * size, 4 * size))
    assert not marked(check_storage(Components(recipe, meta=True)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * size, 6 * size, 4 * size - 1))
    (found,) = marked(check_storage(Components(recipe, meta=True)))
    assert found.startswith("run_folder: ") and "Set save_num_checkpoints_to_keep to 2 or less, or run_folder" in found
    written = Path(recipe.run_folder) / "checkpoints" / "ba2"
    written.mkdir(parents=True)
    (written / "rank0.pt").write_bytes(bytes(size))
    (Path(recipe.run_folder) / "config.yaml").write_text("{}")
    assert not [text for text in marked(check_storage(Components(recipe, meta=True))) if "GB" in text], (
        "what is there already needs no more room"
    )


def test_a_machine_without_memory_for_the_copy_that_a_checkpoint_is_written_from_is_named(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prx_composer.training.meta_model import MetaModel, staged_bytes

    recipe, _ = load()
    needed = staged_bytes(MetaModel(recipe), recipe, 1, 1)
    for free, mark in ((needed, "✓"), (needed - 1, "!")):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: namedtuple("Memory", "available")(free))
        (found,) = [text for text in marked(check_storage(Components(recipe, meta=True)), mark) if text.startswith("host memory")]
        assert "GB needed for the copy of the state that checkpoints are written from" in found


@pytest.mark.parametrize(
    ("keep", "interval", "duration", "expected"),
    [(2, "2ba", "8ba", 3), (0, "2ba", "8ba", 2), (-1, "3ba", "8ba", 3), (-1, "0.25dur", "3ep", 4), (-1, "1ep", "8ba", None)],
)
def test_how_many_checkpoints_lie_on_the_disk(load: Load, keep: int, interval: str, duration: str, expected: int | None) -> None:
    recipe, _ = load(f"save_num_checkpoints_to_keep={keep}", f"save_interval={interval}", f"max_duration={duration}")
    assert checkpoints_to_keep(recipe) == expected


def test_a_run_folder_that_cannot_be_made_or_is_in_use_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = marked(check_storage(load(run_folder=f"{tmp_path}/file/run")[1]))
    assert f"run_folder: {tmp_path}/file/run cannot be written: {tmp_path}/file is a file" in found
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("precious")
    assert "is already in use" in marked(check_storage(load(run_folder=f"{tmp_path}/used")[1]))[0]
    free = tmp_path / "free"
    free.mkdir()
    assert not marked(check_storage(load(run_folder=str(free))[1])) and not list(free.iterdir()), "it leaves nothing"


def test_loggers_must_be_logged_in_and_writable(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "file").write_text("")
    loggers = {"wandb": {}, "tensorboard": {"log_dir": str(tmp_path / "file" / "tb")}}
    wandb, tensorboard = marked(check_loggers(load(loggers=loggers)[1]))
    assert "there is no API key" in wandb and tensorboard.startswith("loggers.tensorboard.log_dir: ")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password key\n")
    assert "http://127.0.0.1:9 does not answer" in marked(check_loggers(load(loggers={"wandb": {}})[1]))[0]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not marked(check_loggers(load(loggers={"wandb": {}})[1]))


def test_an_mlflow_store_that_cannot_be_used_is_found(load: Load, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    store = tmp_path / "mlruns"
    _, parts = load(loggers={"mlflow": {"tracking_uri": str(store)}})
    assert not marked(check_loggers(parts)) and not store.exists(), "it is made when the run starts"
    store.write_text("not a folder")
    (problem,) = marked(check_loggers(parts))
    assert f"loggers.mlflow.tracking_uri: the store {store} cannot be used" in problem


def test_a_machine_without_a_gpu_is_said_to_be_one(load: Load) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe, _ = load()
    assert [result.mark for result in check_gpus(recipe, [], 1, 1)] == ["✓"]
    assert [result.mark for result in check_gpus(load("precision=amp_bf16")[0], [], 0, 8)] == ["–"]


def test_gpus_that_would_stand_idle_are_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    recipe, _ = load()
    free = {"is_available": True, "device_count": 8, "mem_get_info": (80, 80), "memory_reserved": 0, "get_device_name": "H100"}
    for name, value in free.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    found = {ranks: [result.text for result in check_gpus(recipe, [], ranks, 8) if result.mark == "!"] for ranks in (0, 1, 8)}
    assert found == {0: [], 1: ["GPUs: 1 of 8 visible ones train; `composer -n 8 …` trains on all of them"], 8: []}


def test_guidance_that_is_never_learnt_is_known_before_training(load: Load) -> None:
    """It was said with the first picture."""

    def warnings(*changes: str) -> list[str]:
        _, parts = load("callbacks.images={prompts: [a], interval: 1dur}", *changes)
        return marked(check_callbacks(parts), "!")

    (said,) = warnings("model.caption_dropout=0")
    assert said.startswith("callbacks.images.guidance_scale: 3.5 leads away")
    assert warnings("model.caption_dropout=0", "callbacks.images.guidance_scale=1") == []  # either remedy
    assert warnings("model.caption_dropout=0.1") == []


def test_gains_that_are_rounded_for_sending_alone_are_named(load: Load) -> None:
    weights, amp = "parallelism_config={fsdp: {mixed_precision: weights}}", "precision=amp_bf16"
    named = "! parallelism_config.fsdp.mixed_precision: WEIGHTS rounds the gains"

    def said(*changes: str) -> list[str]:
        return [str(result) for result in examine(load(*changes)[0], 1)[0]]

    for norms in ("false", "{start: 10ba}", "{end: 0.5dur}"):
        found = said(weights, amp, f"algorithms.low_precision_norm={norms}")
        assert any(line.startswith(named) for line in found), found
    for changes in ((weights, amp, "algorithms.low_precision_norm={}"), (weights,), (amp,)):
        assert not any(named in line for line in said(*changes)), changes


@pytest.mark.parametrize("interval", ["0dur", "0ba", "-1ba"])
@pytest.mark.parametrize("name", ["images", "shapes_score"])
def test_pictures_at_every_nothing_are_refused_before_training(name: str, interval: str, load: Load) -> None:
    """A division by zero ended the run at its first batch."""
    prompts = {"prompts": ["a"]} if name == "images" else {}
    _, parts = load(callbacks={name: prompts | {"interval": interval}})
    (said,) = marked(check_callbacks(parts))
    assert said.startswith(f"callbacks.{name}: ") and interval in said


def test_an_evaluation_of_what_is_trained_on_is_said(load: Load) -> None:
    def said(**changes: Any) -> list[str]:
        recipe, _ = load()
        loader = {"name": "image_caption", "path": recipe.train_loader["path"]} | changes
        results = check_surroundings(load(eval_loader=loader)[1])
        return [result.text for result in results if "what is trained on" in result.text]

    (told,) = said()
    assert said(path=f"{load()[0].train_loader['path']}/") == [told], "the same folder, written otherwise"
    assert told.startswith("eval_loader: measures what is trained on: ") and "split train. Set eval_loader.split" in told
    assert not said(split="heldout") and not said(path="elsewhere")
