"""What `prx export` writes of a class of diffusers is opened by diffusers alone and draws what this package draws."""

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from architectures import POOLED_WIDTH, TINY, of_pixels
from texts import INSTRUCTION, LONGEST, PROMPTS, SYSTEM, flux, gemma, lumina2, sana, sd3, t5

from prx_composer.commands.export.card import Card, write_card
from prx_composer.commands.export.pipeline import write_own_class
from prx_composer.commands.generate import DrawingSettings
from prx_composer.common.errors import UserError
from prx_composer.models import FlowMatching, TextToImage
from prx_composer.models.autoencoder import DiffusersAutoencoder, Pixels
from prx_composer.models.caption_format import format_of
from prx_composer.models.class_labels import ClassLabels, train_label_tokenizer
from prx_composer.models.diffusers_backbone import DiffusersBackbone
from prx_composer.models.diffusion import DDPM
from prx_composer.models.encoders import load_tokenizer
from prx_composer.models.flow import initial_noise
from prx_composer.models.several_encoders import SeveralTextEncoders
from prx_composer.recipe.arguments import text_encoders
from prx_composer.runs.model_parts import ModelParts
from prx_composer.runs.opening import Trained, load_trained
from prx_composer.runs.pretrained_models import check_init_from, initialise, write_fragment

SEEDS, STEPS, SCALE, SHIFT = [3, 4], 4, 3.0, 3.0
# fmt: off
KL = dict(_class_name="AutoencoderKL", block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2,
          up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1)
DC = dict(_class_name="AutoencoderDC", latent_channels=4, attention_head_dim=4, encoder_block_out_channels=[8, 8],
          decoder_block_out_channels=[8, 8], encoder_layers_per_block=[1, 1], decoder_layers_per_block=[1, 1],
          encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=[[], []],
          decoder_qkv_multiscales=[[], []], scaling_factor=0.3)
# fmt: on


# How each pipeline reads prompts, what it must be told then, and how a class is sized to that.
READ = {"SD3": sd3, "Flux": flux, "Sana": sana, "Lumina2": lumina2, "AuraFlow": t5}
TOLD: dict[str, dict[str, Any]] = {
    "SD3": {},
    "Flux": {},
    "Sana": dict(complex_human_instruction=INSTRUCTION, use_resolution_binning=False),
    "Lumina2": dict(system_prompt=SYSTEM, cfg_normalization=False),
    "AuraFlow": {},
}


def model_of(name: str, encoder: Any) -> TextToImage:
    torch.manual_seed(0)
    pooled = {POOLED_WIDTH[name]: encoder.pooled_size} if encoder.pooled_size else {}
    made: Any = DiffusersBackbone(**{"class": name}, **(TINY[name] | pooled))
    kind = DC if name.startswith("Sana") else KL | ({"shift_factor": None} if name.startswith("AuraFlow") else {})
    flow = DDPM("eps", "squaredcos_cap_v2") if name.startswith("StableCascade") else FlowMatching("v", timestep_shift=SHIFT)
    model = TextToImage(made, encoder, flow, DiffusersAutoencoder(config=kind))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def written(model: TextToImage, folder: Path) -> str:
    folder.mkdir()
    return write_own_class(Trained(model, Path("run"), "ema", 32), folder)


@pytest.mark.parametrize("name", sorted(TINY.keys() - {"DiTTransformer2DModel"}))  # which takes no text
def test_the_transformer_is_the_class_s_own_folder(name: str, tmp_path: Path) -> None:
    model: Any = model_of(name, t5(pooled="mean") if POOLED_WIDTH[name] else t5())
    written(model, tmp_path / "out")
    part = "prior" if name.startswith("StableCascade") else "transformer"
    opened = getattr(diffusers, name).from_pretrained(tmp_path / "out", subfolder=part)
    assert opened.state_dict().keys() == model.backbone.model.state_dict().keys()
    assert all(torch.equal(value, opened.state_dict()[key]) for key, value in model.backbone.model.state_dict().items())
    said = {k: v for k, v in opened.config.items() if k[0] != "_"}
    assert json.dumps(said, sort_keys=True) == json.dumps(model.backbone.config, sort_keys=True)  # lists or tuples


@pytest.mark.parametrize("name", READ)
def test_a_pipeline_reads_prompts_and_draws_our_image_from_our_noise(name: str, tmp_path: Path) -> None:
    model: Any = model_of(f"{name}Transformer2DModel", READ[name]())
    assert "from_pretrained(DIR) draws the same" in written(model, tmp_path / "out")
    pipeline = getattr(diffusers, model.backbone.signature.pipeline).from_pretrained(tmp_path / "out")
    read = LONGEST + 2 if name in ("SD3", "Flux", "AuraFlow") else LONGEST
    guided = dict(true_cfg_scale=SCALE, guidance_scale=1.0) if name == "Flux" else dict(guidance_scale=SCALE)
    check(model, pipeline, prompt=PROMPTS, negative_prompt=["", ""], max_sequence_length=read, **guided, **TOLD[name])
    assert abs(drawn_by_card(model, tmp_path / "out") - model.generate(PROMPTS[:1], 32, 32, [0], STEPS, SCALE)[0]).max() <= 1


def drawn_by_card(model: Any, folder: Path) -> Any:
    """Return the image, int (3, H, W), that the code on the model's card draws."""
    settings = DrawingSettings(32, 32, STEPS, guidance_scale=SCALE)
    write_card(Trained(model, Path("run"), "ema", 32), folder, Card("shapes", None, "", "0", settings, PROMPTS, "opened"))
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    if model.backbone.class_name.startswith("Lumina2"):  # whose pipeline takes every autoencoder for one of 8×
        code = re.sub(r"(height|width)=32", rf"\1={32 * 8 // model.autoencoder.downsampling}", code)
    exec(code.replace("PATH_OR_HUB_ID", str(folder)), scope := dict[str, Any]())
    return torch.from_numpy(np.array(scope["image"])).permute(2, 0, 1).int()


@pytest.mark.parametrize("name", ["SD3", "Lumina2"])
def test_a_pipeline_that_reads_otherwise_is_given_embeddings_and_draws_our_image(name: str, tmp_path: Path) -> None:
    model: Any = model_of(f"{name}Transformer2DModel", t5(pooled="mean") if name == "SD3" else t5())
    assert "it takes embeddings" in written(model, tmp_path / "out")
    cls = getattr(diffusers, model.backbone.signature.pipeline)
    text = {part: None for part in cls._get_signature_keys(cls)[0] if part.startswith(("text_encoder", "tokenizer"))}
    pipeline = cls.from_pretrained(tmp_path / "out", **text)
    found, options = [model.encode_prompts(prompts, torch.device("cpu")) for prompts in (PROMPTS, ["", ""])], dict[str, Any]()
    for kind, one in zip(("", "negative_"), found, strict=True):
        options[f"{kind}prompt_embeds"] = one.embedding * one.mask[..., None]
        more = {"prompt_attention_mask": one.mask} if name == "Lumina2" else {"pooled_prompt_embeds": one.pooled}
        options |= {f"{kind}{key}": value for key, value in more.items()}
    check(model, pipeline, guidance_scale=SCALE, **options, **({"cfg_normalization": False} if name == "Lumina2" else {}))


def test_the_pipeline_of_stable_cascade_draws_our_latents_from_our_noise(tmp_path: Path) -> None:
    model: Any = model_of("StableCascadeUNet", t5(pooled="mean"))
    with torch.no_grad():  # The class tells waves of 10⁴ times the time, which show its last bit in fp32: not those.
        for block in model.backbone.blocks[1::3]:
            block.mapper.weight.unflatten(1, (2, 32))[:, :, :24] = 0
    assert "draws the same of embeddings, and reads prompts otherwise" in written(model, tmp_path / "out")
    pipeline: Any = diffusers.StableCascadePriorPipeline.from_pretrained(tmp_path / "out")
    found, options = [model.encode_prompts(prompts, torch.device("cpu")) for prompts in (PROMPTS, ["", ""])], dict[str, Any]()
    for kind, one in zip(("", "negative_"), found, strict=True):
        options[f"{kind}prompt_embeds"] = one.embedding * one.mask[..., None]
        options[f"{kind}prompt_embeds_pooled"] = one.pooled[:, None]
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(SEEDS, (4, 16, 16), torch.device("cpu"))
    drawing = dict(height=32, width=32, num_inference_steps=STEPS, guidance_scale=SCALE, latents=noise, **options)
    ours = model.sample(PROMPTS, 32, 32, SEEDS, STEPS, SCALE)
    assert ours.std() > 0.1
    torch.testing.assert_close(pipeline(**drawing).image_embeddings, ours, rtol=1e-3, atol=1e-3)  # begins at 164 times a rounding


FLOW = {"prediction": "v", "timestep_shift": SHIFT}
DDPM_FLOW = {"name": "ddpm", "prediction": "eps", "beta_schedule": "squaredcos_cap_v2"}


def said(encoder: Any) -> dict[str, Any]:
    """Return what a recipe says of a text encoder."""
    if isinstance(encoder, ClassLabels):
        return {"name": "labels", "tokenizer": {"train": True, "by": "caption"}}
    if isinstance(encoder, SeveralTextEncoders):
        tokens = [list(row) if len(row) > 1 else row[0] for row in encoder.rows]
        return {"name": "several", "tokens": tokens, "encoders": {name: said(one) for name, one in encoder.encoders.items()}}
    form = format_of(encoder.tokenizer)
    how = dict(clean=form.cleaning, instruction=form.instruction, keep_instruction=not form.skipped)
    return dict(name="huggingface", layer=encoder.layer, pooled=encoder.pooled, attend_padding=form.attend_padding, **how)


def exported(model: Any, folder: Path) -> str:
    """Write a model as `prx export` does of a run, whose recipe lies beside it; return the folder."""
    folder.mkdir()
    flow = DDPM_FLOW if isinstance(model.flow, DDPM) else FLOW
    spec: dict[str, Any] = {"name": "text_to_image", "flow": flow, "text_encoder": said(model.text_encoder)}
    spec["autoencoder"] = {"name": "pixels" if isinstance(model.autoencoder, Pixels) else "diffusers"}
    write_own_class(Trained(model, Path("run"), "ema", 32, recipe={"image_size": 32, "model": spec}), folder)
    return str(folder)


def labelled() -> TextToImage:
    encoder: Any = ClassLabels(train_label_tokenizer(PROMPTS))
    made: Any = DiffusersBackbone(
        **{"class": "DiTTransformer2DModel"}, **of_pixels("DiTTransformer2DModel") | {"sample_size": 16}
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return TextToImage(made, encoder, FlowMatching("v", timestep_shift=SHIFT)).eval()


def drawn(model: Any, side: int) -> torch.Tensor:
    return model.generate(PROMPTS, side, side, SEEDS, STEPS, SCALE)


@pytest.mark.parametrize("name", sorted(TINY))
def test_what_was_exported_is_opened_imported_and_trained_on_from(name: str, tmp_path: Path) -> None:
    reads = READ.get(name.removesuffix("Transformer2DModel"), partial(t5, pooled="mean") if POOLED_WIDTH[name] else t5)
    model, side = (labelled(), 16) if name.startswith("DiT") else (model_of(name, reads()), 32)
    folder = exported(model, tmp_path / "out")
    opened = load_trained(folder)
    assert opened.image_size == 32
    expected = drawn(model, side)
    assert torch.equal(drawn(opened.model, side), expected)
    write_card(opened, tmp_path / "out", Card("shapes", "mit", "", "0", DrawingSettings(side, side), PROMPTS, "so it is opened"))
    assert f"diffusers' class {name}" in (tmp_path / "out" / "README.md").read_text()
    write_fragment(folder, tmp_path / "on.yaml")
    spec = yaml.safe_load((tmp_path / "on.yaml").read_text())["model"]
    flow = "ddpm" if isinstance(model.flow, DDPM) else "flow_matching"
    assert (
        spec["flow"] == {"name": flow, **asdict(model.flow)} and spec["backbone"]["class"] == name and spec["init_from"] == folder
    )
    encoders = [one for one in text_encoders(spec).values() if one["name"] == "huggingface"]
    assert all(one["config"] is None for one in encoders), "that of a recipe below would stand beside `pretrained`"
    again = ModelParts({"name": "text_to_image", **spec}, 0, tmp_path).model.eval()
    assert not torch.equal(drawn(again, side), expected), "of its first, random weights"
    check_init_from(folder, again.backbone)
    initialise(again, folder)
    assert torch.equal(drawn(again, side), expected)


def test_an_export_of_a_recipe_that_leaves_the_flow_to_its_default_is_opened_and_imported(tmp_path: Path) -> None:
    encoder: Any = t5()
    made = DiffusersBackbone(**{"class": "PixArtTransformer2DModel"}, **of_pixels("PixArtTransformer2DModel"))
    spec = {"name": "text_to_image", "text_encoder": said(encoder)}
    (tmp_path / "out").mkdir()
    recipe = {"image_size": 32, "model": spec}
    write_own_class(Trained(TextToImage(made, encoder).eval(), Path("run"), "raw", 32, recipe=recipe), tmp_path / "out")
    assert load_trained(str(tmp_path / "out")).model.flow == FlowMatching()
    write_fragment(str(tmp_path / "out"), tmp_path / "on.yaml")
    assert yaml.safe_load((tmp_path / "on.yaml").read_text())["model"]["flow"] == {
        "name": "flow_matching",
        **asdict(FlowMatching()),
    }


def test_an_export_of_an_earlier_stage_opens_at_that_stage_s_size(tmp_path: Path) -> None:
    model = model_of("PixArtTransformer2DModel", t5())
    stages = [{"until": "4ba", "image_size": 16}, {"until": "8ba", "image_size": 32}, {"image_size": 64}]
    spec = {"name": "text_to_image", "flow": FLOW, "text_encoder": said(model.text_encoder), "autoencoder": {"name": "diffusers"}}
    for size in (16, 32, 64):
        recipe = {"image_size": 64, "model": spec, "algorithms": {"progressive_resolution": {"stages": list(stages)}}}
        folder = tmp_path / str(size)
        folder.mkdir()
        write_own_class(Trained(model, Path("run"), "ema", size, recipe=recipe), folder)
        assert load_trained(str(folder)).image_size == size
        beside = yaml.safe_load((folder / "recipe.yaml").read_text())["algorithms"]["progressive_resolution"]["stages"]
        assert beside == stages[: 1 + [16, 32, 64].index(size)]
        assert ("left out" in (folder / "recipe.yaml").read_text()) == (size < 64)


@pytest.mark.parametrize("name", ["AuraFlow", "Sana"])
def test_a_plain_pipeline_of_diffusers_is_taken_too(name: str, tmp_path: Path) -> None:
    model: Any = model_of(f"{name}Transformer2DModel", t5() if name == "AuraFlow" else gemma(clean="lower"))
    written(model, tmp_path / "out")
    getattr(diffusers, f"{name}Pipeline").from_pretrained(tmp_path / "out").save_pretrained(
        tmp_path / "theirs"
    )  # with nothing of ours
    assert torch.equal(drawn(load_trained(str(tmp_path / "theirs")).model, 32), drawn(model, 32))


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folder = exported(model_of("SD3Transformer2DModel", t5(pooled="mean")), tmp_path / "out")
    other: Any = model_of("PixArtTransformer2DModel", t5())
    for refuses in (initialise, lambda model, source: check_init_from(source, model.backbone)):
        with pytest.raises(
            UserError, match=r"init_from: .*class_name is SD3Transformer2DModel there and PixArtTransformer2DModel"
        ):
            refuses(other, folder)
    sizes = TINY["SD3Transformer2DModel"] | {"num_attention_heads": 4, "attention_head_dim": 8, "qk_norm": None}
    with pytest.raises(UserError, match="attention_head_dim is 16 there and 8 here; num_attention_heads is 2 there and 4 here"):
        check_init_from(
            folder, DiffusersBackbone(**{"class": "SD3Transformer2DModel"}, **sizes)
        )  # whose shapes would be the same
    file = tmp_path / "out" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for change, said in (
        ({"_class_name": "KandinskyTransformer2DModel"}, "has no signature"),
        ({"num_layer": 3}, "num_layer"),
        ({"pooled_projection_dim": 8}, "text_embedder"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=said) as refused:
            write_fragment(folder, tmp_path / "on.yaml")
        assert folder in str(refused.value)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="is a StableDiffusionPipeline without a transformer"):
        load_trained(str(tmp_path / "unet"))


def test_prompts_that_a_pipeline_reads_in_another_way_are_not_guessed(tmp_path: Path) -> None:
    written(model_of("SD3Transformer2DModel", sd3()), tmp_path / "out")  # no recipe, as of a stranger's
    with pytest.raises(UserError, match="StableDiffusion3Pipeline reads prompts otherwise than by one text encoder's last layer"):
        write_fragment(str(tmp_path / "out"), tmp_path / "on.yaml")


def test_labels_are_exported_with_the_words_that_they_stand_for(tmp_path: Path) -> None:
    encoder: Any = ClassLabels(train_label_tokenizer(PROMPTS))
    sizes = TINY["DiTTransformer2DModel"] | {"in_channels": 3, "out_channels": 6}
    made: Any = DiffusersBackbone(**{"class": "DiTTransformer2DModel"}, **sizes)
    assert "labels are the tokens" in written(TextToImage(made, encoder), tmp_path / "out")
    with pytest.raises(ValueError, match="out_channels is 5; .* set out_channels: 3 or 6"):  # whose rest would be no variances
        TextToImage(DiffusersBackbone(**{"class": "DiTTransformer2DModel"}, **(sizes | {"out_channels": 5})), encoder)
    read = ClassLabels(load_tokenizer(str(tmp_path / "out" / "tokenizer")))
    assert torch.equal(read(**read.tokenize(PROMPTS)), encoder(**encoder.tokenize(PROMPTS)))


def check(model: Any, pipeline: Any, **options: Any) -> None:
    """Compare latents from the same noise, to 10⁻⁴, and images."""
    side = 32 // model.autoencoder.downsampling
    noise = initial_noise(SEEDS, (4, side, side), torch.device("cpu"))
    if isinstance(pipeline, diffusers.FluxPipeline):
        noise = pipeline._pack_latents(noise, 2, 4, side, side)
    if isinstance(pipeline, diffusers.FluxPipeline | diffusers.Lumina2Pipeline):  # which take steps of another grid by themselves
        options["sigmas"] = torch.linspace(1, pipeline.scheduler.sigma_min, STEPS).tolist()
    pipeline.set_progress_bar_config(disable=True)
    drawing = dict(height=32, width=32, num_inference_steps=STEPS, output_type="latent", latents=noise, **options)
    latents = pipeline(**drawing).images
    if isinstance(pipeline, diffusers.FluxPipeline):
        latents = pipeline._unpack_latents(latents, 32, 32, pipeline.vae_scale_factor)
    ours = model.sample(PROMPTS, 32, 32, SEEDS, STEPS, SCALE)
    assert ours.std() > 0.1
    torch.testing.assert_close(latents, ours, rtol=1e-4, atol=1e-4)
    images = pipeline(**(drawing | {"output_type": "np"})).images
    drawn = model.generate(PROMPTS, 32, 32, SEEDS, STEPS, SCALE).permute(0, 2, 3, 1).numpy()
    assert abs((images * 255).round() - drawn).max() <= 1
