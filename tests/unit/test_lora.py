"""LoRA: what is trained, what is written, and that peft and diffusers read it as it was trained."""

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import POOLED_WIDTH, TINY, inputs
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from diffusers import PRXPixelPipeline, PRXTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from peft import PeftModel
from texts import t5
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from prx_composer.algorithms.lora import LoRA
from prx_composer.algorithms.resolution import ResolutionAware
from prx_composer.algorithms.token_routing import SPRINT
from prx_composer.cli import app
from prx_composer.commands.export.pipeline import write_adapters, write_pipeline, written_aside
from prx_composer.common.errors import UserError
from prx_composer.models import TextToImage
from prx_composer.models.autoencoder import DiffusersAutoencoder
from prx_composer.models.counting import flops_of_backbone
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.layers import BLOCK_LAYERS, add_adapters, merge_adapters
from prx_composer.optim import AdamW
from prx_composer.optim.muon import Muon
from prx_composer.recipe import config
from prx_composer.runs.folder import read_metrics
from prx_composer.runs.model_parts import keep_frozen, with_kept
from prx_composer.runs.opening import Trained, load_trained
from prx_composer.runs.pretrained_models import write_fragment
from prx_composer.training.meta_model import MetaModel
from prx_composer.training.run import build_trainer, run

Recipe = dict[str, Any]
Write = Callable[..., str]
Build = Callable[..., TextToImage]


KL = dict(_class_name="AutoencoderKL", block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], norm_num_groups=4)
KL |= dict(up_block_types=["UpDecoderBlock2D"], latent_channels=4)


class AdaptedTransformer(PRXTransformer2DModel, PeftAdapterMixin):
    """diffusers' model with diffusers' own reader of adapters, which its PRX lacks."""


def attach(model: TextToImage, optimizer: torch.optim.Optimizer, *algorithms: Any) -> None:
    state = State(
        rank_zero_seed=0, run_name="test", model=model, device=DeviceCPU(), optimizers=optimizer, algorithms=list(algorithms)
    )
    for algorithm in algorithms:
        algorithm.apply(Event.INIT, state, Logger(state))


def shaken(model: TextToImage) -> TextToImage:
    """B is zero at first: adapters that do nothing would prove nothing."""
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def predict(backbone: Any, model: TextToImage) -> torch.Tensor:
    text = model.encode_prompts(["a red circle", "a blue square, left"], torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    noised, timestep = torch.randn(2, 3, 16, 24, generator=generator), torch.rand(2, generator=generator)
    with torch.no_grad():
        out = backbone(noised, timestep, text.embedding, attention_mask=text.mask)
    return out if isinstance(out, torch.Tensor) else out.sample


def test_a_run_trains_adapters_only_and_begins_where_its_model_ended(tiny_model: Build) -> None:
    model = tiny_model(trainable_text=False)
    before, weights = predict(model.backbone, model), copy.deepcopy(model.backbone.state_dict())
    optimizer = AdamW(model, lr=1e-2)
    attach(model, optimizer, LoRA(rank=4))
    assert torch.equal(predict(model.backbone, model), before), "B is zero"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * len(BLOCK_LAYERS) and all(".lora_" in name for name in trained)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert stepped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for _ in range(2):
        predict_loss = model.backbone(torch.ones(1, 3, 8, 8), torch.tensor([0.5]), torch.ones(1, 3, 24))
        predict_loss.square().mean().backward()
        optimizer.step()
    assert not torch.allclose(predict(model.backbone, model), before)
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in model.backbone.state_dict().items()}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in weights.items())


def test_muon_gives_adapters_to_its_adamw(tiny_model: Build) -> None:
    model = tiny_model(trainable_text=False)
    optimizer = Muon(model, lr=1e-2)
    attach(model, optimizer, LoRA(rank=2))
    model.backbone(torch.ones(1, 3, 8, 8), torch.tensor([0.5]), torch.ones(1, 3, 24)).square().mean().backward()
    optimizer.step()
    moved = [parameter for name, parameter in model.backbone.named_parameters() if "lora_B" in name and parameter.any()]
    assert len(moved) == 2 * len(BLOCK_LAYERS)
    assert all("exp_avg" in state for state in optimizer.state.values())


@pytest.mark.parametrize("targets", [BLOCK_LAYERS, ("attention.to_out.0", "modulation.lin", "txt_in")])
def test_merged_weights_draw_what_the_adapters_drew_and_are_named_as_before(tiny_model: Build, targets: Any) -> None:
    model = tiny_model(trainable_text=False)
    names = list(model.backbone.state_dict())
    before = predict(model.backbone, model)
    add_adapters(model.backbone, 4, 8.0, targets)
    adapted = predict(shaken(model).backbone, model)
    merge_adapters(model.backbone)
    assert list(model.backbone.state_dict()) == names
    torch.testing.assert_close(predict(model.backbone, model), adapted, atol=1e-5, rtol=0)
    assert (adapted - before).abs().max() > 1e-3


def test_the_adapters_cost_what_is_counted(tiny_model: Build) -> None:
    model = tiny_model(trainable_text=False, hidden_size=128, depth=6)
    add_adapters(model.backbone, 8, 8.0, BLOCK_LAYERS)
    image, text = torch.randn(1, 3, 32, 32), torch.randn(1, 14, 24)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.backbone(image, torch.tensor([0.5]), text).square().mean().backward()
    assert flops_of_backbone(model.backbone, 32, 32, 14) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.fixture
def folder(tiny_model: Build, tmp_path: Path) -> Path:
    """A diffusers folder to begin with."""
    with written_aside(tmp_path / "base") as partial:
        write_pipeline(Trained(tiny_model(seed=5).eval(), Path("nowhere"), "raw", 16), partial)
    return tmp_path / "base"


@pytest.fixture
def recipe(tiny_recipe: Recipe, folder: Path) -> Recipe:
    """LoRA beneath EMA and two stages."""
    encoder = {
        "name": "huggingface",
        "pretrained": f"{folder}/text_encoder",
        "tokenizer": f"{folder}/tokenizer",
        "max_tokens": 14,
    }
    tiny_recipe["model"] |= {"init_from": str(folder), "text_encoder": encoder}
    tiny_recipe["algorithms"] = {"lora": {"rank": 4, "alpha": 8}} | tiny_recipe["algorithms"]
    tiny_recipe["optimizer"]["lr"] = 0.02
    return tiny_recipe


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe["run_folder"].replace("${run_name}", recipe["run_name"]))


def exported(source: Path, output: Path, *options: str) -> Path:
    result = CliRunner().invoke(app, ["export", str(source), "--output", str(output), *options])
    assert result.exit_code == 0, result.output
    return output


def test_peft_and_diffusers_read_what_was_trained(recipe: Recipe, folder: Path, write_recipe: Write, tmp_path: Path) -> None:
    run(config.load([write_recipe(recipe)]))
    trained = load_trained(str(folder_of(recipe)), merge=False).model
    wanted = predict(trained.backbone, trained)
    untrained = PRXTransformer2DModel.from_pretrained(folder / "transformer").eval()
    assert (predict(untrained, trained) - wanted).abs().max() > 0.05
    lora = exported(folder_of(recipe), tmp_path / "lora", "--format", "lora", "--license", "apache-2.0")
    by_peft = PeftModel.from_pretrained(copy.deepcopy(untrained), str(lora)).merge_and_unload()
    torch.testing.assert_close(predict(by_peft, trained), wanted, atol=1e-4, rtol=0)
    by_diffusers: Any = AdaptedTransformer.from_pretrained(folder / "transformer").eval()
    by_diffusers.load_lora_adapter(lora, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(predict(by_diffusers, trained), wanted, atol=1e-4, rtol=0)
    merged = exported(folder_of(recipe), tmp_path / "merged", "--no-samples")
    pipeline = PRXPixelPipeline.from_pretrained(merged)
    torch.testing.assert_close(predict(pipeline.transformer, trained), wanted, atol=1e-4, rtol=0)
    card = (lora / "README.md").read_text()
    assert "license: apache-2.0" in card and str(folder.parent) not in card and "PeftModel" in card
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace("THIS_FOLDER", str(lora))
        .replace("PATH_OR_HUB_ID_OF_base", str(folder))
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    torch.testing.assert_close(predict(scope["pipe"].transformer, trained), wanted, atol=1e-4, rtol=0)


def test_a_resumed_run_repeats_the_uninterrupted_one_without_the_model_it_began_with(
    recipe: Recipe, folder: Path, write_recipe: Write
) -> None:
    run(config.load([write_recipe(recipe)]))
    parts = copy.deepcopy(recipe) | {"run_name": "parts", "autoresume": True}
    path = write_recipe(parts, "parts.yaml")
    run(config.load([path, "callbacks.stop_after.time=5ba"]))
    for file in (folder / "transformer").iterdir():
        file.unlink()
    run(config.load([path]))
    losses = [[row["loss/train/total"] for row in read_metrics(folder_of(r) / "metrics.jsonl")] for r in (recipe, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    ours, theirs = (load_trained(str(folder_of(r))).model.state_dict() for r in (recipe, parts))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_a_run_goes_on_and_is_opened_without_the_folder_that_was_imported(
    tiny_recipe: Recipe, folder: Path, write_recipe: Write, tmp_path: Path
) -> None:
    """All of the folder: the backbone is in the checkpoints, text encoder and tokenizer lie with the run."""
    write_fragment(str(folder), tmp_path / "base.yaml")
    tiny_recipe["algorithms"] = {"lora": {"rank": 4, "alpha": 8}}
    tiny_recipe["optimizer"]["lr"] = 0.02
    tiny_recipe |= {"autoresume": True}
    del tiny_recipe["model"]["text_encoder"]
    whole, parts = tiny_recipe | {"run_name": "whole"}, tiny_recipe | {"run_name": "parts"}
    run(config.load([write_recipe(whole), str(tmp_path / "base.yaml")]))
    arguments = [write_recipe(parts, "parts.yaml"), str(tmp_path / "base.yaml")]
    run(config.load([*arguments, "callbacks.stop_after.time=5ba"]))
    expected = load_trained(str(folder_of(whole))).model.sample(["a red circle"], 16, 16, [1], 2)
    (kept,) = (folder_of(whole) / "frozen" / "text_encoder").glob("*.safetensors")
    assert kept.samefile(next((folder / "text_encoder").glob("*.safetensors"))), "a link, which costs no room"
    shutil.rmtree(folder)
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 0, result.output
    run(config.load(arguments))
    losses = [[row["loss/train/total"] for row in read_metrics(folder_of(r) / "metrics.jsonl")] for r in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert torch.equal(load_trained(str(folder_of(parts))).model.sample(["a red circle"], 16, 16, [1], 2), expected)
    opened = load_trained(str(exported(folder_of(whole), tmp_path / "merged", "--no-samples"))).model
    torch.testing.assert_close(opened.sample(["a red circle"], 16, 16, [1], 2), expected, atol=1e-4, rtol=0)


def test_an_autoencoder_in_a_folder_is_kept_with_the_run_and_one_of_the_hub_is_not(tmp_path: Path) -> None:
    source, run_folder = tmp_path / "source", tmp_path / "run"
    (source / "vae").mkdir(parents=True)
    for name in ("config.json", "a.safetensors", "a.bin", "README.md", "model.onnx"):
        (source / "vae" / name).write_text(name)
    here = {"name": "diffusers", "pretrained": str(source), "subfolder": "vae", "dtype": "bfloat16"}
    model = {"autoencoder": here, "text_encoder": {"name": "huggingface", "pretrained": "google/t5-small"}}
    keep_frozen(model, run_folder)
    keep_frozen(model, run_folder)
    assert [file.name for file in sorted((run_folder / "frozen").rglob("*.*"))] == ["a.safetensors", "config.json"]
    shutil.rmtree(source)
    keep_frozen(model, run_folder)
    kept = here | {"pretrained": str(run_folder / "frozen" / "autoencoder"), "subfolder": None}
    assert with_kept(model, run_folder) == model | {"autoencoder": kept}
    assert with_kept(model, tmp_path / "other") == model


def test_a_plan_counts_what_a_run_trains(recipe: Recipe, write_recipe: Write) -> None:
    loaded = config.load([write_recipe(recipe)])
    planned, model = MetaModel(loaded), build_trainer(loaded).state.model
    real = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in planned.trained.items()} == real and not planned.uncounted.told
    backbone: Any = model.backbone
    assert flops_of_backbone(planned.model.backbone, 16, 16, 14) == flops_of_backbone(backbone, 16, 16, 14)


def test_what_cannot_be_adapted_is_said_by_its_path(
    recipe: Recipe, write_recipe: Write, tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        ({"targets": ["qkv"]}, "algorithms.lora: targets: 'qkv' ends no linear layer's name; the blocks have attention.img_qkv"),
        ({"targets": []}, "targets is empty"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": -1.0}, "alpha must be positive"),
    ):
        with pytest.raises(UserError, match=said):
            build_trainer(config.load([write_recipe(recipe | {"algorithms": {"lora": arguments}})]))
    model = tiny_model()
    with pytest.raises(UserError, match=r"model.text_encoder.trainable is true; set it to false"):
        attach(model, AdamW(model), LoRA())
    model = tiny_model(trainable_text=False, depth=4)
    with pytest.raises(UserError, match=r"given it fusion.*write lora first"):
        attach(model, AdamW(model), SPRINT(start_block=1, end_block=2), LoRA())
    model = tiny_model(trainable_text=False)
    with pytest.raises(UserError, match=r"given it resolution_embedder.*write lora first"):
        attach(model, AdamW(model), ResolutionAware(), LoRA())
    model = tiny_model(trainable_text=False, resolution_embeds=True)  # the model's own is frozen as its other weights are
    attach(model, AdamW(model), LoRA())
    model = tiny_model(trainable_text=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"LoRA needs peft: uv sync --inexact --extra lora"):
        attach(model, AdamW(model), LoRA())


def test_adapters_are_exported_from_runs_that_have_them_and_no_run_begins_with_them(
    recipe: Recipe, folder: Path, write_recipe: Write, tmp_path: Path
) -> None:
    run(config.load([write_recipe(recipe), "max_duration=4ba"]))
    result = CliRunner().invoke(app, ["export", str(folder), "--output", str(tmp_path / "x"), "--format", "lora"])
    assert isinstance(result.exception, UserError) and "is not of a run with algorithms.lora" in str(result.exception)
    assert not (tmp_path / "x").exists()
    second = copy.deepcopy(recipe) | {"run_name": "second"}
    second["model"]["init_from"] = str(folder_of(recipe))
    with pytest.raises(UserError, match=r"have LoRA adapters beside them. Merge them with `prx export RUN"):
        build_trainer(config.load([write_recipe(second)]))
    second["model"]["init_from"] = str(exported(folder_of(recipe), tmp_path / "merged", "--no-samples"))
    build_trainer(config.load([write_recipe(second)]))


def of_diffusers(name: str) -> TextToImage:
    torch.manual_seed(0)
    encoder: Any = t5(pooled="mean") if POOLED_WIDTH[name] else t5()
    sizes = TINY[name] | ({POOLED_WIDTH[name]: encoder.pooled_size} if POOLED_WIDTH[name] else {})
    made: Any = DiffusersBackbone(**{"class": name}, **sizes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return TextToImage(made, encoder, autoencoder=DiffusersAutoencoder(config=KL)).eval()


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "StableCascadeUNet"])
def test_adapters_of_a_class_of_diffusers_are_read_by_peft_and_diffusers(name: str, tmp_path: Path) -> None:
    model = of_diffusers(name)
    backbone: Any = model.backbone
    base = copy.deepcopy(backbone)
    attach(model, AdamW(model), LoRA(rank=2))
    shaken(model)
    adapted = [path for path, module in backbone.named_modules() if hasattr(module, "lora_A")]
    blocks = tuple(f"{path}." for path, module in backbone.named_modules() if backbone.is_block(module))
    assert adapted and all(path.startswith(blocks) for path in adapted)  # FLUX has a layer elsewhere that ends as theirs do
    write_adapters(Trained(model, Path("run"), "raw", 32, recipe={"model": {"init_from": "base"}}), tmp_path, "title", None)
    part, x = backbone.signature.part, inputs(base)
    x["pooled"] = torch.randn(3, base.pooled_dim)
    with torch.no_grad():
        wanted, before = backbone(**x), base(**x)
        assert (wanted - before).abs().max() > 1e-2
        by_peft, by_diffusers = copy.deepcopy(base), copy.deepcopy(base)
        by_peft.model = PeftModel.from_pretrained(by_peft.model, str(tmp_path)).merge_and_unload()
        torch.testing.assert_close(by_peft(**x), wanted, atol=1e-4, rtol=1e-4)
        if hasattr(base.model, "load_lora_adapter"):
            by_diffusers.model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=part)
            torch.testing.assert_close(by_diffusers(**x), wanted, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "README.md").read_text()
    assert f"diffusers' {name}" in card and "PRX" not in card
    base.model.save_pretrained(tmp_path / "base" / part)
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace("PATH_OR_HUB_ID_OF_base", str(tmp_path / "base")).replace("THIS_FOLDER", str(tmp_path)), scope := {})
    by_card = copy.deepcopy(base)
    by_card.model = scope[part]
    with torch.no_grad():
        torch.testing.assert_close(by_card(**x), wanted, atol=1e-4, rtol=1e-4)


def test_adapters_that_are_not_all_that_was_trained_are_not_exported_alone(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(trainable_text=False)
    attach(model, AdamW(model), LoRA(rank=2), ResolutionAware())
    with pytest.raises(UserError, match="--format lora: run trained resolution_embedder of the backbone beside its adapters"):
        write_adapters(Trained(model, Path("run"), "raw", 16), tmp_path, "title", None)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_adapted_blocks_are_compiled_as_one_graph(recipe: Recipe, write_recipe: Write) -> None:
    recipe["algorithms"] = {"lora": {"rank": 4}}
    run(config.load([write_recipe(recipe), "max_duration=3ba"]))
    compiled = copy.deepcopy(recipe) | {"run_name": "compiled"}
    run(config.load([write_recipe(compiled), "max_duration=3ba", "model.compile=blocks"]))
    losses = [[row["loss/train/total"] for row in read_metrics(folder_of(r) / "metrics.jsonl")] for r in (recipe, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
