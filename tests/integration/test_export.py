"""What `prx export` writes is opened by diffusers alone and draws what this package draws; diffusers is the oracle."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import prx
from conftest import QWEN3_VL_TEXT, T5GEMMA_HALF, TINY_BACKBONE, train_once
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXPixelPipeline
from PIL import Image

from prx_composer.commands.export.pipeline import push, write_pipeline, written_aside
from prx_composer.common.errors import UserError
from prx_composer.models import DDPM, EDM, FlowMatching, HuggingFaceTextEncoder, PRXBackbone, TextToImage
from prx_composer.models.autoencoder import DiffusersAutoencoder
from prx_composer.recipe import config
from prx_composer.runs.opening import Trained, load_trained
from prx_composer.training.run import run

Recipe = dict[str, Any]
Write = Callable[..., str]
Build = Callable[..., TextToImage]
PROMPT = "a red circle on the left of a white background"
VAE = dict(
    _class_name="AutoencoderKL", latent_channels=4, block_out_channels=[8, 8], norm_num_groups=4, scaling_factor=0.7,
    down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
)  # fmt: skip


def exported(model: TextToImage, folder: Path, **facts: Any) -> Path:
    trained = Trained(model.eval(), Path("nowhere"), "raw", 16)
    with written_aside(folder) as partial:
        write_pipeline(replace(trained, **facts), partial)
    return folder


def draw(pipeline: Any, prompt: str, height: int, width: int, seed: int, output_type: str, **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    arguments = dict(height=height, width=width, generator=generator, output_type=output_type, use_resolution_binning=False)
    return pipeline(prompt, **arguments, **options).images


class Exact(FlowMatchEulerDiscreteScheduler):
    """As an export's card has it."""

    def step(self, velocity: torch.Tensor, timestep: torch.Tensor, *arguments: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        t = timestep / self.config["num_train_timesteps"]
        return super().step(velocity * t.clamp(min=0.05) / t, timestep, *arguments, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bottleneck", [None, 6])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_pixel_pipeline_draws_our_image_from_our_seed(
    tiny_model: Build, tmp_path: Path, guidance_scale: float, bottleneck: int | None
) -> None:
    """By our own steps with the scheduler of the card, by its own with `clamp_sampling`; of the 6, one is below 0.05."""
    flow = FlowMatching(noise_scale=2.0, timestep_shift=3.0)
    model = tiny_model(flow=flow, bottleneck_size=bottleneck, resolution_embeds=bottleneck is not None)
    pipeline = PRXPixelPipeline.from_pretrained(exported(model, tmp_path / "out"))
    options: Any = dict(num_inference_steps=6, guidance_scale=guidance_scale)
    theirs = draw(pipeline, PROMPT, 24, 16, 7, "pt", **options)
    pipeline.scheduler = Exact.from_config(pipeline.scheduler.config)
    exact = draw(pipeline, PROMPT, 24, 16, 7, "pt", **options)
    ours = model.sample([PROMPT], 24, 16, [7], 6, guidance_scale)
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=0)
    model.flow = replace(flow, clamp_sampling=True)
    clamped = model.sample([PROMPT], 24, 16, [7], 6, guidance_scale)
    torch.testing.assert_close(clamped, theirs, atol=1e-4, rtol=0)
    assert (theirs - exact).abs().max() > 1e-3


@pytest.mark.parametrize("noise_scale", [1.0, 1.5])
@pytest.mark.parametrize("shift", [None, 0.3])
def test_the_latent_pipeline_draws_our_image_from_our_seed(
    tiny_model: Build, tmp_path: Path, noise_scale: float, shift: float | None
) -> None:
    """Also with a noise scale, for which diffusers has no setting."""
    torch.manual_seed(0)
    backbone = PRXBackbone(**TINY_BACKBONE | {"in_channels": 4, "patch_size": 2})  # pyright: ignore[reportArgumentType]
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    flow = FlowMatching("v", timestep_shift=2.0, noise_scale=noise_scale)
    autoencoder = DiffusersAutoencoder(config=VAE | {"shift_factor": shift})
    model = TextToImage(backbone, tiny_model().text_encoder, flow, autoencoder)
    pipeline = PRXPipeline.from_pretrained(exported(model, tmp_path / "out"))
    options: Any = dict(num_inference_steps=5, guidance_scale=3.0, skip_text_cleaning=True)
    latent = draw(pipeline, PROMPT, 16, 24, 3, "latent", **options)
    ours = model.sample([PROMPT], 16, 24, [3], 5, 3.0)
    torch.testing.assert_close(ours, latent * noise_scale, atol=1e-4, rtol=0)
    image = np.array(draw(pipeline, PROMPT, 16, 24, 3, "pil", **options)[0]).astype(int)
    assert np.abs(image - model.autoencoder.decode(ours)[0].permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("flow", [DDPM("v", "squaredcos_cap_v2"), DDPM("eps", "scaled_linear", 0.00085, 0.012, solver_order=1)])
def test_the_latent_pipeline_draws_what_a_ddpm_does(tiny_model: Build, tmp_path: Path, flow: DDPM) -> None:
    """With its scheduler in the folder; imported again it is the same process."""
    torch.manual_seed(0)
    backbone = PRXBackbone(**TINY_BACKBONE | {"in_channels": 4, "patch_size": 2})  # pyright: ignore[reportArgumentType]
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model = TextToImage(backbone, tiny_model().text_encoder, flow, DiffusersAutoencoder(config=VAE))
    out = exported(model, tmp_path / "out")
    pipeline = PRXPipeline.from_pretrained(out)
    options: Any = dict(num_inference_steps=5, guidance_scale=3.0, skip_text_cleaning=True)
    latent = draw(pipeline, PROMPT, 16, 24, 3, "latent", **options)
    torch.testing.assert_close(model.sample([PROMPT], 16, 24, [3], 5, 3.0), latent, atol=1e-4, rtol=0)
    assert load_trained(str(out)).model.flow == flow
    scheduler = out / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"trailing"', '"leading"'))
    with pytest.raises(UserError, match=r"scheduler: it takes other steps than are taken here, by its timestep_spacing"):
        load_trained(str(out))


def test_what_diffusers_has_no_place_for_is_refused_by_name(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(flow=FlowMatching("v"), text_adapter_depth=1)
    with pytest.raises(UserError, match="text_adapter_depth") as refusal:
        exported(model, tmp_path / "out")
    assert "flow.prediction: v on pixels" in str(refusal.value)
    assert not list(tmp_path.iterdir()), "nothing half-written is left"
    for flow, message in ((DDPM(), "DDPM: .* PRXPixelPipeline takes flow matching's steps"), (EDM(), "EDM: .* PRXPixelPipeline")):
        with pytest.raises(UserError, match=f"model.flow is {message}"):
            exported(tiny_model(flow=flow), tmp_path / "out")
    flow = FlowMatching(min_timestep=0.1, clamp_sampling=True)  # the pipeline's own 0.05 clamps, whatever the loss divides by
    out = exported(
        tiny_model(flow=flow), tmp_path / "out", recipe={"model": {"flow": {"min_timestep": 0.1, "clamp_sampling": True}}}
    )
    assert load_trained(str(out)).model.flow == flow


def test_an_exported_folder_is_opened_again_as_the_same_model(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(flow=FlowMatching(noise_scale=2.0, timestep_shift=3.0))
    opened = load_trained(str(exported(model, tmp_path / "out")))
    assert opened.image_size == 16 and opened.model.flow == model.flow
    assert all(
        torch.equal(tensor, opened.model.backbone.state_dict()[name]) for name, tensor in model.backbone.state_dict().items()
    )
    torch.testing.assert_close(opened.model.sample([PROMPT], 16, 16, [1], 3), model.sample([PROMPT], 16, 16, [1], 3))


def test_a_text_encoder_of_the_hub_can_be_referred_to_instead_of_copied(tiny_model: Build, tmp_path: Path) -> None:
    """The hub is a folder here."""
    trainable = tiny_model()
    hub = tmp_path / "hub"
    trainable.text_encoder.network.save_pretrained(str(hub))  # pyright: ignore[reportCallIssue]
    model = tiny_model(trainable_text=False)
    model.text_encoder._frozen.module.load_state_dict(trainable.text_encoder.network.state_dict())
    recipe = {"model": {"text_encoder": {"name": "huggingface", "pretrained": str(hub)}}}
    trained = Trained(model.eval(), Path("nowhere"), "raw", 16, recipe=recipe)
    with written_aside(tmp_path / "out") as partial:
        write_pipeline(trained, partial, reference=True)
    assert not (tmp_path / "out" / "text_encoder").exists()
    pipeline = PRXPixelPipeline.from_pretrained(tmp_path / "out", text_encoder=trainable.text_encoder.network)
    theirs = draw(pipeline, PROMPT, 16, 16, 7, "pt", num_inference_steps=3, guidance_scale=2.0)
    opened = load_trained(str(tmp_path / "out")).model
    opened.flow = replace(opened.flow, clamp_sampling=True)
    torch.testing.assert_close(opened.sample([PROMPT], 16, 16, [7], 3, 2.0), theirs, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="was trained with the model"):
        write_pipeline(replace(trained, model=trainable), tmp_path, reference=True)


CLIP = dict(model_type="clip_text_model", hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    "text",
    [{"model_type": "t5gemma", "encoder": T5GEMMA_HALF, "decoder": T5GEMMA_HALF}, QWEN3_VL_TEXT, CLIP],
    ids=lambda text: text["model_type"],
)
def test_every_kind_of_frozen_text_encoder_is_opened_by_diffusers_and_by_us_again(
    tiny_model: Build, tokenizer: Any, tmp_path: Path, text: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    encoder = HuggingFaceTextEncoder(tokenizer, config=text, max_tokens=14)
    model = TextToImage(tiny_model().backbone, encoder).eval()
    pipeline = PRXPixelPipeline.from_pretrained(exported(model, tmp_path / "out"))
    pipeline.scheduler = Exact.from_config(pipeline.scheduler.config)
    ours = model.sample([PROMPT], 16, 16, [7], 3, 2.0)
    theirs = draw(pipeline, PROMPT, 16, 16, 7, "pt", num_inference_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(load_trained(str(tmp_path / "out")).model.sample([PROMPT], 16, 16, [7], 3, 2.0), ours)


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    images = {"prompts": [PROMPT], "num_inference_steps": 2, "interval": "1dur"}
    return train_once(tmp_path_factory, shapes_data, callbacks={"images": images})


def test_export_writes_the_average_of_a_run_with_a_card(trained_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prx("export", trained_run, "--output", output, "--license", "cc-by-4.0")
    card = (output / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "diffusers"
    assert yaml.safe_load((output / "recipe.yaml").read_text())["run_name"] == "tiny"
    assert Image.open(output / "samples.png").size[0] > 100 and "name: shapes" in card
    average = torch.load(trained_run / "checkpoints/ba8/rank0.pt", weights_only=False)["state"]["callbacks"]["AverageState"][
        "average"
    ]
    pipeline = PRXPixelPipeline.from_pretrained(output)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, average[f"backbone.{name}"]), name
    assert "not empty" in prx("export", trained_run, "--output", output, code=1)
    prx("export", trained_run, "--output", output, "--overwrite", "--weights", "raw", "--no-samples")
    assert not (output / "samples.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []
    (tmp_path / "file").touch()
    assert "--output: it cannot be written" in prx("export", trained_run, "--output", tmp_path / "file" / "out", code=1)


def test_the_code_on_the_card_runs_without_this_package(trained_run: Path, tmp_path: Path) -> None:
    """In a process of its own, in which this package cannot be imported, and the image is ours.

    Without the scheduler of the card it is what diffusers draws, which can be asked for too.
    """
    output = tmp_path / "out"
    prx("export", trained_run, "--output", output)
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    block = "import sys, warnings\nwarnings.simplefilter('ignore')\nsys.modules['prx_composer'] = None\n"
    code = block + code.replace("PATH_OR_HUB_ID", str(output)) + f"\nimage.save({str(tmp_path / 'exact.png')!r})\n"
    code += "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)\n"
    call = code.split("image = ")[1].partition(".images[0]")[0]
    code += f"image = {call}.images[0]\nimage.save({str(tmp_path / 'theirs.png')!r})\n"
    code += "assert not [name for name in sys.modules if name.startswith('prx_composer.')]\n"
    finished = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    drawn = {}
    for name, option in {"exact": (), "theirs": ("--as-diffusers",)}.items():
        prx("generate", trained_run, "-p", PROMPT, "--output", tmp_path / name, "--no-grid", *option)
        (ours,) = (tmp_path / name).glob("*.png")
        facts = json.loads(Image.open(ours).text["prx"])  # pyright: ignore[reportAttributeAccessIssue]
        assert facts["as_diffusers"] == bool(option)
        drawn[name] = np.array(Image.open(ours)).astype(int)
        assert np.abs(drawn[name] - np.array(Image.open(tmp_path / f"{name}.png"))).max() <= 1
    assert np.abs(drawn["exact"] - drawn["theirs"]).max() > 1


class FakeHub:
    """What HfApi is asked; the hub itself is a service elsewhere."""

    endpoint = "https://hub.example"

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        self.asked.append((repository, private))

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
        if repo_id == "nobody/none":
            raise OSError("403 Forbidden: you are not nobody.")
        self.asked.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_push_uploads_the_whole_folder_and_a_refusal_says_what_to_do(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    folder = exported(tiny_model(), tmp_path / "out")
    assert push(folder, "me/shapes", private=True) == "https://hub.example/me/shapes"
    assert hub.asked == [("me/shapes", True), ("me/shapes", sorted(path.name for path in folder.iterdir()))]
    with pytest.raises(UserError, match="403 Forbidden.*hf auth login.*hf upload nobody/none"):
        push(folder, "nobody/none")


def test_a_kill_while_exporting_leaves_no_folder_of_that_name(
    tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    model = tiny_model()
    monkeypatch.setattr(model.text_encoder.tokenizer, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


QUICKSTART = """
import json, sys, warnings
warnings.simplefilter('ignore')
sys.modules['prx_composer'] = None
import torch
from diffusers import PRXPixelPipeline
folder, output, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pipe = PRXPixelPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
images = [pipe(prompt, height=32, width=32, num_inference_steps=20, guidance_scale=3.0, use_resolution_binning=False,
               output_type='pt', generator=torch.Generator().manual_seed(seed)).images[0] for prompt, seed in asked]
torch.save(torch.stack(images), output)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_exported_quickstart_scores_in_diffusers_what_it_scores_here(tmp_path: Path) -> None:
    """The quickstart cut to 300 batches: every held-out combination, drawn by diffusers in a process without this package."""
    from prx_composer.data.sources import heldout_scenes
    from prx_composer.metrics.scoring import nearest_scenes

    recipe = Path(__file__).parents[2] / "yamls" / "quickstart.yaml"
    changes = [f"run_folder={tmp_path}/run", f"train_loader.path={tmp_path}/shapes", f"eval_loader.path={tmp_path}/shapes"]
    changes += [
        "max_duration=300ba",
        "callbacks.images=false",
        "eval_loader=null",
        "progress_bar=false",
        "callbacks.shapes_score=false",
    ]
    run(config.load([str(recipe), *changes]))
    prx("export", tmp_path / "run", "--output", tmp_path / "out", "--no-samples")
    scenes = heldout_scenes(36)
    asked = [(scene.caption, 1000 + index) for index, scene in enumerate(scenes)]
    command = [sys.executable, "-I", "-c", QUICKSTART, str(tmp_path / "out"), str(tmp_path / "images.pt"), json.dumps(asked)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    theirs = torch.load(tmp_path / "images.pt", weights_only=True)
    model = load_trained(str(tmp_path / "run")).model
    model.flow = replace(model.flow, clamp_sampling=True)
    ours = model.sample([prompt for prompt, _ in asked], 32, 32, [seed for _, seed in asked], 20, 3.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    scores = [
        sum(drawn == scene for drawn, scene in zip(nearest_scenes(model.autoencoder.decode(images)), scenes, strict=True))
        for images in (ours, theirs)
    ]
    assert scores[0] == scores[1] > 0
